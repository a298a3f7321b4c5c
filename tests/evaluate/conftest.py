"""An exact tiny world: six ids of text, two markers, and a scorer whose probabilities can be worked
out by hand.
"""

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from rlpt import rng
from rlpt.dist import World
from rlpt.evaluate.continuation import Procedure
from rlpt.types import (
    Branch,
    Certainty,
    Group,
    Markers,
    Prompt,
    Rollout,
    Scores,
    Trunk,
    concat,
)

NUM_TEXT_IDS = 6
MARKERS = Markers(opener=6, closer=7)


@dataclass
class CountingScorer:
    """Every id of text is as likely as any other, but ``odds`` times as likely where it stands in
    the thought.

    So with odds 3 and a thought that holds the target beside one other id: p = 3 / (3 + 3 + 4).
    ``seam`` is added to every token that is scored in a branch without markers, to fake a broken
    seam.
    """

    odds: float = 3.0
    seam: float = 0.0
    calls: list[str] = field(default_factory=list)

    def branches(self, pairs):
        self.calls.append("branches")
        return [self._branch(trunk, branch) for trunk, branch in pairs]

    def trunks(self, spans):
        self.calls.append("trunks")
        return [self._score(trunk.ids[start:stop], [], 0.0) for trunk, start, stop in spans]

    def _branch(self, trunk: Trunk, branch: Branch) -> Scores:
        head = branch.ids[: branch.score_start].tolist()
        thought = [i for i in head if i not in MARKERS.ids]
        return self._score(branch.ids[branch.score_start :], thought, 0.0 if head else self.seam)

    def _score(self, target, thought, seam: float) -> Scores:
        weight = np.ones(NUM_TEXT_IDS)
        weight[list(set(thought))] = self.odds
        share = weight / weight.sum()
        logp = np.log(share) + seam
        sure = Certainty(-float(share @ np.log(share)), float(np.log(share.max())))
        likeliest = np.full(len(target), int(weight.argmax()))
        return Scores(logp[target].astype(np.float32), likeliest, sure)


class KeyedEngine:
    """Thoughts of 0 to 4 ids, drawn from the prompt's key, the purpose and the sample alone."""

    def submit(
        self, prompts, group_size: int, purpose: str, budget: int | None = None, *, greedy=False
    ) -> list[str]:
        purpose = "greedy" if greedy else purpose
        groups = [
            Group(
                prompt,
                tuple(self._rollout(prompt, purpose, sample) for sample in range(group_size)),
            )
            for prompt in prompts
        ]
        self.groups = {str(p): group for p, group in enumerate(groups)}
        return list(self.groups)

    def collect(self, tickets) -> list[Group]:
        return [self.groups[ticket] for ticket in tickets]

    def _rollout(self, prompt: Prompt, purpose: str, sample: int) -> Rollout:
        draw = rng.generator(0, purpose, *prompt.key, sample)
        return rollout(draw.integers(NUM_TEXT_IDS, size=draw.integers(5)).tolist())


def rollout(thought: list[int]) -> Rollout:
    ids = concat(thought, [MARKERS.closer])
    size = len(ids)
    return Rollout(
        ids=ids,
        action=np.ones(size, bool),
        logp=np.zeros(size, np.float32),
        version=np.zeros(size, np.int64),
        thought_len=size - 1,
        finish="closer",
    )


def make_prompt(
    document: str, context: list[int], continuation: list[int], domain: str = "d", start: int = 0
) -> Prompt:
    """A prompt of a document whose tokens are two bytes each."""
    ids = np.array([*context, *continuation])
    cut = len(context)
    trunk = Trunk(document, domain, 0, start, ids, 2 * np.arange(len(ids) + 1), (cut,))
    reads = concat(context, [MARKERS.opener])
    return Prompt(trunk, cut, len(continuation), reads, reads)


def make_prompts(count: int, seed: int = 0) -> list[Prompt]:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(3, 8, size=count)
    return [
        make_prompt(
            f"doc{i // 2}",
            draw.integers(NUM_TEXT_IDS, size=size).tolist(),
            draw.integers(NUM_TEXT_IDS, size=2).tolist(),
            domain="ab"[i // 2 % 2],
            start=10 * i,
        )
        for i, size in enumerate(sizes)
    ]


@pytest.fixture
def world() -> World:
    return World(0, 1, torch.device("cpu"))


@pytest.fixture
def procedure() -> Procedure:
    controls = (
        "empty",
        "filler",
        "context_copy",
        "other_document",
        "shuffled",
        "wrong_target",
        "null",
    )
    return Procedure(MARKERS, neutral_ids=(5,), thoughts=2, controls=controls, seed=3, batch=4)


class Tiny:
    """What the tests build with, in one place: modules of tests do not import each other."""

    scorer = CountingScorer
    engine = KeyedEngine
    markers = MARKERS
    rollout = staticmethod(rollout)
    prompt = staticmethod(make_prompt)
    prompts = staticmethod(make_prompts)


@pytest.fixture
def tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(scope="session")
def jobs(module_at) -> ModuleType:
    """The module `tiny_jobs`: shards, run folders and jobs."""
    return module_at(Path(__file__).with_name("tiny_jobs.py"))


@pytest.fixture(scope="session")
def shards_dir(jobs, tmp_path_factory) -> Path:
    """Shards of 240 pages."""
    return jobs.shards(tmp_path_factory.mktemp("eval"))
