"""What trainers and engine processes say to each other, as JSON: token ids, log-probabilities, versions, names.

Weights travel beside it (`rlpt.rollout.transport`). Every message is checked where it arrives: a wrong key or type is
an error of the call, never of the engine.
"""

from typing import Literal

import numpy as np
from pydantic import model_validator

from rlpt.stages import Count, Positive, Rate
from rlpt.types import Finish, Prompt, Rollout
from rlpt_data.strict import Strict

_MOST = 2**53
DType = Literal["float32", "bfloat16", "float16"]


class EngineSpec(Strict):
    """What an engine process is started with, and what it says it is."""

    model: str
    """Folder with config.json alone: the first weights are published."""
    architecture: str
    vocabulary: Positive
    tokenizer: str
    """Hash of the tokenizer whose ids the model knows."""
    opener: Count
    closer: Count
    longest: Positive
    """Tokens of the longest path: context, opener, thought, closer, prediction."""
    dtype: DType
    head_dtype: Literal["model", "float32"] = "model"
    temperature: Rate = 1.0
    kv_cache_gib: Rate
    max_sequences: Positive
    device: Literal["cpu", "cuda"] = "cpu"
    sleeps: bool = False
    """Whether the engine gives its memory back between rollouts (CUDA)."""
    seed: int = 0

    def differs(self, other: "EngineSpec") -> str | None:
        """The first thing that another engine must have in common with this one and has not."""
        for name in (
            "architecture",
            "vocabulary",
            "tokenizer",
            "opener",
            "closer",
            "dtype",
            "head_dtype",
            "temperature",
        ):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                return f"{name} {its!r} instead of {mine!r}"
        if other.longest < self.longest:
            return f"room for paths of {other.longest} tokens instead of {self.longest}"
        return None


class Job(Strict):
    """One prompt, and the group that is wanted of it."""

    ticket: str
    ids: tuple[int, ...]
    """Context and opener."""
    count: Positive
    """Rollouts of the group."""
    seed: Count
    """Rollout g samples with seed + g."""
    budget: Positive
    prediction: Count = 0
    greedy: bool = False
    """At temperature 0 instead of the engine's own; then `count` is 1."""


class Span(Strict):
    """Tokens [start, stop) were sampled by one version of the weights."""

    version: int
    start: Count
    stop: Count


class Sampled(Strict):
    """One rollout as it was sampled: a forced closer is not among its tokens."""

    thought: tuple[int, ...]
    """A sampled closer included."""
    thought_logp: tuple[float, ...]
    prediction: tuple[int, ...] = ()
    prediction_logp: tuple[float, ...] = ()
    spans: tuple[Span, ...]
    """Over thought and prediction, in order, without gaps."""

    @model_validator(mode="after")
    def _whole(self) -> "Sampled":
        """Memory is taken for what spans and ids say."""
        ids, logps = [*self.thought, *self.prediction], (self.thought_logp, self.prediction_logp)
        if (len(self.thought), len(self.prediction)) != tuple(map(len, logps)):
            raise ValueError("a token without its log-probability, or the other way round")
        if not all(0 <= index < _MOST for index in ids):
            raise ValueError("an id that is none")
        edges = [0, *(edge for span in self.spans for edge in (span.start, span.stop)), len(ids)]
        touch = all(a == b for a, b in zip(edges[::2], edges[1::2], strict=True))
        if not ids or not touch or edges != sorted(edges):
            raise ValueError("spans that are not those of its tokens")
        if not all(-1 <= span.version < _MOST for span in self.spans):
            raise ValueError("a version that is none")
        return self


class Finished(Strict):
    ticket: str
    rollouts: tuple[Sampled, ...]


class Submit(Strict):
    client: str
    jobs: tuple[Job, ...]


class Collect(Strict):
    client: str
    acknowledged: tuple[str, ...] = ()
    """Tickets whose results have arrived: the engine forgets them."""
    wait: float = 0.0
    """Seconds to wait for the first result."""


class Cancel(Strict):
    client: str
    tickets: tuple[str, ...]


class Tensor(Strict):
    """Name, shape and checksum of one published tensor, in the dtype of the engine."""

    name: str
    shape: tuple[int, ...]
    checksum: int


class Header(Strict):
    """What the numbers of one bucket are, in order."""

    dtype: DType
    tensors: tuple[Tensor, ...]


class Join(Strict):
    """Form a group with the trainer's first rank (0) and other engines. Only weights go through it."""

    name: str
    host: str
    port: Count
    rank: Count
    size: Positive
    seconds: Rate
    """Longest wait for the others, and later for each of their messages."""


class Handle(Strict):
    """Memory of the trainer on the GPU that both use, as CUDA names it; bytes are in hexadecimal."""

    gpu: str
    memory: str
    size: Count
    offset: Count
    counter: str
    counter_offset: Count
    event: str
    event_sync: bool


class Publish(Strict):
    version: int
    transport: Literal["directory", "spare", "broadcast", "ipc"]
    place: str = ""
    """Folder of the safetensors files, address of the spare copy, or name of the group."""
    secret: str = ""
    """What the spare copy asks for."""
    seconds: Rate = 120.0
    """Longest wait for the next bucket."""
    tensors: tuple[Tensor, ...] = ()
    """All of them, where they are known beforehand."""
    bucket: Header | None = None
    handle: Handle | None = None
    """ipc: one bucket, in memory that is the trainer's again with the answer."""
    first: bool = True
    last: bool = True
    """Several calls make one publication; the engine stands still between them."""


def job(
    ticket: str,
    prompt: Prompt,
    count: int,
    key: int,
    budget: int,
    prediction: int,
    greedy: bool = False,
) -> Job:
    """A request; the seed is the counter-based key of the group, cut to what engines take."""
    return Job(
        ticket=ticket,
        ids=tuple(prompt.policy_ids.tolist()),
        count=count,
        seed=key & (2**62 - 1),
        budget=budget,
        prediction=prediction,
        greedy=greedy,
    )


def rollout(sampled: Sampled, closer: int) -> Rollout:
    """A sampled closer is an action; one that the budget forced is spliced in here and is none."""
    closed = sampled.thought[-1:] == (closer,)
    thought_len = len(sampled.thought) - closed
    forced = [] if closed else [closer]
    ids = [*sampled.thought, *forced, *sampled.prediction]
    action = np.ones(len(ids), dtype=bool)
    logp = np.array(
        [*sampled.thought_logp, *([0.0] * len(forced)), *sampled.prediction_logp], dtype=np.float32
    )
    versions = np.concatenate(
        [np.full(s.stop - s.start, s.version, dtype=np.int64) for s in sampled.spans]
    )
    if forced:
        # It has no sampler: it counts as the weights that wrote the token before it.
        action[thought_len] = False
        versions = np.insert(versions, thought_len, versions[thought_len - 1])
    finish: Finish = "closer" if closed else "budget"
    return Rollout(np.array(ids, dtype=np.int64), action, logp, versions, thought_len, finish)
