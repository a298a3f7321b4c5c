"""Annotations of shards -> how hard the first token after each cut is, by a proxy that is not the policy."""

import numpy as np

from rlpt.types import Prompt
from rlpt_data import annotations
from rlpt_data.shards import ShardFolder

Place = tuple[int, str, int]


def annotated_entropies(
    folder: ShardFolder, split: str, prompts: list[Prompt], proxy: str
) -> dict[Place, float]:
    """Entropy of the first continuation token, nats, by the prompt's key; nothing where the shards have no annotation.

    Raises UserError where several proxies match ``proxy``, or their files are damaged or of other shards.
    """
    root = folder.path / annotations.FOLDER
    if not proxy and not any(root.glob(f"*/{annotations.NAME}")):
        return {}
    found, facts = annotations.find(folder.path, proxy, folder.shard_files())
    annotations.check(found, facts)
    wanted: dict[str, list[Place]] = {}
    for prompt in prompts:
        wanted.setdefault(prompt.trunk.document, []).append(prompt.key)
    entropies: dict[Place, float] = {}
    for name in folder.shard_files():
        if name.startswith(f"{split}/"):
            for row in annotations.read(found / name):
                entropies |= {
                    key: _at(row.entropy, key[2]) for key in wanted.get(row.document_id, ())
                }
    return entropies


def _at(entropy_T: np.ndarray, cut: int) -> float:
    """Of the token that follows the cut: what stands at a position predicts the token there."""
    return float(entropy_T[cut])
