"""What every arm works on: a policy of random weights, and random documents with their cuts."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from rlpt import rng
from rlpt.config import FreshPolicy, PolicyConfig, PromptConfig
from rlpt.policy.load import Blueprint, blueprint
from rlpt.prompts import prompts_of
from rlpt.types import Markers, Prompt, Trunk
from rlpt_data.shards import ShardFolder
from rlpt_data.writing import Facts, write_folder

SEED = 0
WORDS = 4096
"""Text ids; the two markers follow."""
POLICIES = {
    "toy": FreshPolicy(layers=2, width=32, heads=2),
    "1M": FreshPolicy(layers=2, width=128, heads=2),
    "4M": FreshPolicy(layers=4, width=256, heads=4),
    "14M": FreshPolicy(layers=8, width=384, heads=6),
    "120M": FreshPolicy(layers=16, width=768, heads=12),
}


class Size(NamedTuple):
    """One step: ``documents * cuts`` prompts of ``group`` thoughts each. All counts of tokens are exact."""

    context: int
    group: int
    thought: int
    cuts: int = 1
    continuation: int = 16
    spread: bool = False
    """Cuts lie all over the document instead of at its end, where every context has P tokens or a few more."""
    documents: int = 2

    @property
    def positions(self) -> tuple[int, ...]:
        """Of the cuts."""
        if self.spread:
            return tuple(self.context * (k + 1) // self.cuts for k in range(self.cuts))
        return tuple(self.context + k * self.continuation for k in range(self.cuts))

    @property
    def window(self) -> int:
        """Tokens of a document: up to the end of its last continuation."""
        return self.positions[-1] + self.continuation

    @property
    def sequences(self) -> int:
        return self.documents * self.cuts * self.group

    @property
    def token_ratio(self) -> float:
        """A sequence per thought / a trunk and its branches, in tokens: K G (P + T + C) / (P + K G (T + C)).

        Where cuts are spread, each counts with the context that it has.
        """
        branches = self.cuts * self.group
        own = branches * (self.thought + self.continuation)
        contexts = self.group * sum(self.positions) if self.spread else branches * self.context
        return (contexts + own) / (self.context + own)


@dataclass(frozen=True)
class Problem:
    """A policy's plan and one step's prompts. Nothing here holds weights."""

    size: Size
    policy: PolicyConfig
    plan: Blueprint
    """With the naive layout, which needs nothing but transformers."""
    prompts: list[Prompt]
    shards: ShardFolder
    """Holds the tokenizer alone."""

    @property
    def markers(self) -> Markers:
        return self.plan.vocabulary.markers

    def planned(self, layout: str) -> Blueprint:
        """The same policy under another layout."""
        return planned(self.policy.model_copy(update={"layout": layout}), self.shards)


def problem(name: str, size: Size, dtype: str, folder: Path) -> Problem:
    """Documents of random words; their tokenizer is written to ``folder``."""
    shards = vocabulary(folder / "shards")
    # Opener and closer are the two tokens beyond trunk and thought.
    longest = size.window + size.thought + 2
    fresh = POLICIES[name].model_copy(update={"max_positions": longest})
    policy = PolicyConfig(fresh=fresh, compute_dtype=dtype, layout="naive")
    plan = planned(policy, shards)
    cfg = PromptConfig(horizon_tokens=size.continuation)
    markers = plan.vocabulary.markers
    trunks = [trunk(number, size) for number in range(size.documents)]
    prompts = [prompt for each in trunks for prompt in prompts_of(each, cfg, markers)]
    return Problem(size, policy, plan, prompts, shards)


def vocabulary(folder: Path) -> ShardFolder:
    """A shard folder of no documents, with a tokenizer that makes one token of a word."""
    tokenizer = Tokenizer(WordLevel({word(index): index for index in range(WORDS)}, word(0)))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    write_folder(folder, {}, tokenizer.to_str().encode(), Facts(vocab_size=WORDS))
    return ShardFolder.open(folder)


def planned(policy: PolicyConfig, shards: ShardFolder) -> Blueprint:
    assert policy.fresh is not None
    return blueprint(policy, shards, policy.fresh.max_positions)


def word(index: int) -> str:
    """The text of a token: single words, so that a trainer that starts from text reads the same ids."""
    return f"w{index}"


def trunk(number: int, size: Size) -> Trunk:
    """A document of random words."""
    ids = rng.generator(SEED, "bench", number).integers(WORDS, size=size.window)
    offsets = np.arange(size.window + 1)
    return Trunk(f"random-{number}", "random", 0, 0, ids, offsets, size.positions)
