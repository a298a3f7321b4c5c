"""A proxy model over every document of a shard folder: entropy, loss and rank of every token, as sidecars.

The proxy reads the shards' own ids, so it must have their tokenizer. Long documents are scored in overlapping windows:
every token but those of the first window has at least half a window of context. Files that are done stay.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlpt.console import Report, progress
from rlpt.policy.given import model_config
from rlpt_data.annotations import (
    Annotation,
    AnnotationFacts,
    SidecarWriter,
    digest_file,
    proxy_hash,
    write_facts,
)
from rlpt_data.shards import Document, ShardFolder, token_bytes
from rlpt_data.strict import UserError

_WEIGHTS = ("*.safetensors", "config.json")


def annotate(
    shards: Path,
    model: Path,
    *,
    window: int = 512,
    short_window: int = 32,
    batch_tokens: int = 16_384,
) -> dict[str, Any]:
    """Write the sidecars of a shard folder; what was written, and how fast."""
    folder = ShardFolder.open(shards)
    settings = {"window": window, "short_window": short_window}
    name = proxy_hash(_files(model), settings)
    lm = _loaded(model, folder, window)
    target = shards / "annotations" / name
    files = folder.shard_files()
    left = [path for path in files if not (target / path).exists()]
    with _counted(folder, left) as count:
        for path in left:
            _annotate_shard(
                folder, path, target / path, lm, (window, short_window), batch_tokens, count
            )
    sidecars = {path: digest_file(target / path) for path in files}
    facts = AnnotationFacts(
        proxy=name, model=model.name, files=files, sidecars=sidecars, **settings
    )
    write_facts(target, facts)
    return {"proxy": name, "files": len(files), "tokens": count.tokens}


class _Count:
    """Documents and tokens that have been scored, beside a bar."""

    def __init__(self, report: Report) -> None:
        self.tokens = 0
        self._documents = 0
        self._report = report
        self._started = time.monotonic()

    def add(self, document: Document) -> None:
        self._documents += 1
        self.tokens += document.num_tokens
        rate = self.tokens / max(1e-9, time.monotonic() - self._started)
        self._report(self._documents, f"{rate:,.0f} tokens/s")


@contextmanager
def _counted(folder: ShardFolder, left: list[str]) -> Iterator[_Count]:
    rows = {entry.path: entry.rows for entry in folder.manifest.files}
    with progress("annotate", sum(rows[path] for path in left), 0, show=True) as report:
        yield _Count(report)


def _files(model: Path) -> list[Path]:
    paths = [path for pattern in _WEIGHTS for path in sorted(model.glob(pattern))]
    if not paths or not (model / "config.json").is_file():
        raise UserError(f"{model}: no model folder (config.json, safetensors); give one")
    return paths


def _loaded(model: Path, folder: ShardFolder, window: int) -> Any:
    from transformers import AutoModelForCausalLM

    ours, theirs = folder.token_bytes(), token_bytes(model / "tokenizer.json")
    if ours != theirs[: len(ours)]:
        raise UserError(
            f"{model}: its tokenizer is not that of {folder.path}; prepare the shards with "
            "[tokenizer] kind = file and this folder, or choose another proxy"
        )
    lm: Any = AutoModelForCausalLM.from_pretrained(
        model,
        config=model_config(model, "--model"),
        local_files_only=True,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
    )
    longest = getattr(lm.config, "max_position_embeddings", window)
    if window > longest:
        raise UserError(f"{model}: takes {longest} tokens; give --window {longest} or less")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return lm.eval().requires_grad_(False).to(device)


def _annotate_shard(
    folder: ShardFolder,
    name: str,
    target: Path,
    lm: Any,
    windows: tuple[int, int],
    batch_tokens: int,
    count: _Count,
) -> None:
    with SidecarWriter(target) as writer:
        for document in folder.file(name):
            ids = torch.from_numpy(document.ids.astype(np.int64))
            entropy, loss, rank = scored(lm, ids, windows[0], batch_tokens)
            _, short, _ = scored(lm, ids, windows[1], batch_tokens)
            columns = (entropy.numpy(), loss.numpy(), short.numpy(), rank.numpy().astype(np.uint32))
            writer.add([Annotation(document.document_id, *columns)])
            count.add(document)


@torch.no_grad()
def scored(
    lm: Any, ids_T: Int[Tensor, " T"], window: int, batch_tokens: int
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"], Int[Tensor, " T"]]:
    """Entropy, -log p and rank of every token; NaN, NaN and 0 at the first, which nothing predicts.

    Windows of ``window`` tokens start every half window, and each scores the tokens of its second half.
    """
    entropy_T, loss_T = (torch.full((len(ids_T),), torch.nan) for _ in range(2))
    rank_T = torch.zeros(len(ids_T), dtype=torch.int64)
    for starts, ids_NT in _windows(ids_T, window, batch_tokens):
        logp_NTV = lm(input_ids=ids_NT.to(lm.device)).logits.float().log_softmax(-1)[:, :-1].cpu()
        gold_NT1 = logp_NTV.gather(-1, ids_NT[:, 1:, None])
        entropy_NT = -(logp_NTV.exp() * logp_NTV).nansum(-1)
        rank_NT = (logp_NTV > gold_NT1).sum(-1)
        for row, start in enumerate(starts):
            # Of all windows but the first, the first half has been scored with more context.
            first = 0 if start == 0 else window // 2 - 1
            into = slice(start + first + 1, start + ids_NT.shape[1])
            entropy_T[into] = entropy_NT[row, first:]
            loss_T[into] = -gold_NT1[row, first:, 0]
            rank_T[into] = rank_NT[row, first:]
    return entropy_T, loss_T, rank_T


def _windows(
    ids_T: Int[Tensor, " T"], window: int, batch_tokens: int
) -> Iterator[tuple[list[int], Int[Tensor, "N W"]]]:
    """Starts of windows and their ids; those of one batch are equally long."""
    half = max(1, window // 2)
    starts = list(range(0, max(1, len(ids_T) - half), half))
    whole = [start for start in starts if start + window <= len(ids_T)]
    per_batch = max(1, batch_tokens // window)
    for at in range(0, len(whole), per_batch):
        group = whole[at : at + per_batch]
        yield group, torch.stack([ids_T[start : start + window] for start in group])
    for start in starts[len(whole) :]:
        if len(ids_T) - start > 1:
            yield [start], ids_T[None, start:]
