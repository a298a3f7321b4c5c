"""The proving ground: generated pages whose endings are worth a known number of nats.

A page is ``<tag><digits>=<answer><checksum>.``, every character one byte and so one token of a
byte-level tokenizer without merges. The only cut lies before the answer. Strata (``domain``):

* R  the answer is the sum of the digits mod 10. A two-layer policy cannot add six digits at once
     but can write the running sums, one a token: the optimum gain is ln 10 nats per answer.
* C  the answer is the first digit. No thought is needed and none may help.
* N  answer and checksum are uniformly random: expected log p(answer) cannot exceed -ln 10.
* H  as R, with more digits than the thought budget has tokens. Never in the train split.

The rule that must not be broken: a thought is made from the context alone, never from the ending.
"""

import math
import random
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from rlpt_data.documents import SourceDocument, SourceThought
from rlpt_data.provenance import Source
from rlpt_data.strict import Strict

STRATA = ("R", "C", "N", "H")
ENDING = 3  # bytes: answer, checksum, terminator
TERMINATOR = "."

Share = Field(ge=0.0, le=1.0)


class StratumShares(Strict):
    """Share of the pages in each stratum; the four add up to 1."""

    R: float = Share
    C: float = Share
    N: float = Share
    H: float = Share

    @model_validator(mode="after")
    def _sum_to_one(self) -> "StratumShares":
        total = self.R + self.C + self.N + self.H
        if not math.isclose(total, 1.0, abs_tol=1e-9):
            raise ValueError(f"the shares of R, C, N and H add up to {total:g}; make it 1")
        return self


class ProvingConfig(Source):
    """What to generate. The same config gives the same pages."""

    kind: Literal["proving"] = "proving"
    seed: int = 0
    documents: int = Field(default=40_000, ge=1)
    """Pages, all with different contexts, so that no held-out context was ever trained on."""
    digits: int = Field(default=6, ge=2, le=64)
    """Digits of a page in R, C and N."""
    long_digits: int = Field(default=24, ge=2, le=512)
    """Digits of a page in H: more than the thought budget."""
    shares: StratumShares = StratumShares(R=0.7, C=0.12, N=0.13, H=0.05)
    thought_share: float = Field(default=0.8, ge=0.0, le=1.0)
    """Share of the pages that carry a thought; the others are plain text."""
    empty_share: float = Field(default=0.15, ge=0.0, le=1.0)
    """Share of those thoughts that are empty, so that an empty thought stays in distribution."""
    right_share: float = Field(default=0.65, ge=0.0, le=1.0)
    """Share of the worked thoughts of R that are right: what RL has to raise to 1. The others add
    correctly too, so every one of them teaches the same addition."""
    unfinished_share: float = Field(default=0.7, ge=0.0, le=1.0)
    """Share of the other worked thoughts that stop early; the rest start from a wrong digit, so
    that neither length nor arithmetic betrays them."""

    @model_validator(mode="after")
    def _enough_contexts(self) -> "ProvingConfig":
        # Drawing a context that is still free must stay easy: at most half of them are used.
        if 2 * self.documents > 10**self.digits:
            raise ValueError(
                f"documents = {self.documents}: pages of {self.digits} digits have "
                f"{10**self.digits} contexts and at most half are used; raise digits"
            )
        return self


def documents(config: ProvingConfig) -> Iterator[SourceDocument]:
    """The pages, in order. H alternates between dev and test; the others are split by hash."""
    used: set[str] = set()
    for index in range(config.documents):
        rng = random.Random(f"proving/{config.seed}/{index}")
        yield _page(config, rng, index, used)


def running_sums(digits: list[int]) -> list[int]:
    """The right thought: s_i = d_1 + ... + d_i mod 10. The last one is the answer of R and H."""
    sums, total = [], 0
    for digit in digits:
        total = (total + digit) % 10
        sums.append(total)
    return sums


def _page(config: ProvingConfig, rng: random.Random, index: int, used: set[str]) -> SourceDocument:
    shares = config.shares
    stratum = rng.choices(STRATA, (shares.R, shares.C, shares.N, shares.H))[0]
    context, digits = _context(config, rng, stratum, used)
    text = context + _ending(rng, stratum, digits)
    cut = len(context)
    return SourceDocument(
        text=text,
        domain=stratum,
        split=("dev", "test")[index % 2] if stratum == "H" else None,
        cuts=(cut,),
        thoughts=_thoughts(config, rng, stratum, digits, cut),
        target_spans=((cut, cut + ENDING),),
    )


def _context(
    config: ProvingConfig, rng: random.Random, stratum: str, used: set[str]
) -> tuple[str, list[int]]:
    """A context that no earlier page has, and its digits. H wears the tag of R: the same task."""
    count = config.long_digits if stratum == "H" else config.digits
    while True:
        digits = [rng.randrange(10) for _ in range(count)]
        context = f"{'R' if stratum == 'H' else stratum}{_text(digits)}="
        if context not in used:
            used.add(context)
            return context, digits


def _ending(rng: random.Random, stratum: str, digits: list[int]) -> str:
    """Answer, checksum (the answer's letter; in N a letter of its own), terminator."""
    if stratum == "N":
        answer, checksum = rng.randrange(10), rng.randrange(10)
    else:
        answer = digits[0] if stratum == "C" else running_sums(digits)[-1]
        checksum = answer
    return f"{answer}{'abcdefghij'[checksum]}{TERMINATOR}"


def _thoughts(
    config: ProvingConfig, rng: random.Random, stratum: str, digits: list[int], cut: int
) -> tuple[SourceThought, ...]:
    if stratum == "H" or rng.random() >= config.thought_share:
        return ()
    if rng.random() < config.empty_share:
        return (SourceThought(cut, "", "empty"),)
    if stratum == "R":
        return (_worked(config, rng, digits, cut),)
    length = rng.randint(1, len(digits))
    # C repeats what it read; N rambles. Their lengths vary, so the closer has to be learned.
    words = digits if stratum == "C" else [rng.randrange(10) for _ in digits]
    return (SourceThought(cut, _text(words[:length]), "arbitrary"),)


def _worked(
    config: ProvingConfig, rng: random.Random, digits: list[int], cut: int
) -> SourceThought:
    """One sum per digit: digit and sum keep one distance, which is what a small model can learn."""
    sums = running_sums(digits)
    if rng.random() < config.right_share:
        return SourceThought(cut, _text(sums), "right")
    if rng.random() < config.unfinished_share:
        return SourceThought(cut, _text(sums[: rng.randrange(1, len(sums))]), "unfinished")
    slip = rng.randrange(1, 10)
    return SourceThought(cut, _text([(value + slip) % 10 for value in sums]), "wrong")


def _text(digits: list[int]) -> str:
    return "".join(map(str, digits))
