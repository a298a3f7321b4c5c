"""Another model as scorer: loaded like a policy, never trained, never sampled from."""

from pathlib import Path

from rlpt import dist
from rlpt.config import PolicyConfig
from rlpt.policy.families import check_positions
from rlpt.policy.given import model_config
from rlpt.policy.load import Blueprint, load
from rlpt.policy.markers import read_tokenizer, same_text_tokenizer, tokenizer_size
from rlpt.policy.policy import Policy
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError


def described(path: Path, plan: Blueprint, longest: int) -> Blueprint:
    """What is at ``path``; ``plan`` is the policy's. Raises UserError where ids would mean other text there."""
    where = f"reward.foreign.path = {path}"
    config = model_config(path, "reward.foreign.path")
    own = read_tokenizer(path / "tokenizer.json")
    if not same_text_tokenizer(own, plan.tokenizer):
        raise UserError(
            f"{where}: its tokenizer is not the policy's, so ids would be other text; choose a model of one family"
        )
    if config.vocab_size < tokenizer_size(own):
        raise UserError(
            f"{where}: {config.vocab_size} embedding rows for {tokenizer_size(own)} ids"
        )
    check_positions(config, longest)
    return Blueprint(config, plan.vocabulary, own, "naive", "a scorer")


def foreign(path: Path, plan: Blueprint, longest: int, world: dist.World) -> Policy:
    """The model at ``path``, in float32 and without gradients."""
    policy = load(PolicyConfig(path=path), described(path, plan, longest), world, seed=0)
    return policy.requires_grad_(False)


def encoded(text: str, shards: ShardFolder) -> list[int]:
    """The ids of a separator, as the shards' tokenizer writes it."""
    ids = shards.encode(text)
    if not len(ids):
        raise UserError("reward.foreign.separator is empty; give some text, such as a line break")
    return ids.tolist()
