"""What every engine is: prompts in, groups out, weights in.

In the reference engine sampling is a pure function of the weights and (seed, purpose, epoch, document, cut, rollout,
position): batches, ranks and schedules cannot change a thought. vLLM keeps this up to rounding.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from rlpt.types import Group, Prompt, Sums

Ticket = str
"""Names one group that was asked for."""


@runtime_checkable
class Sampler(Protocol):
    """What evaluation needs of an engine: thoughts that depend on the prompt's key and the purpose alone."""

    def submit(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        purpose: str,
        budget: int | None = None,
        *,
        greedy: bool = False,
    ) -> list[Ticket]:
        """Ask for ``group_size`` rollouts of each prompt; the cuts of a document stand together.

        Thoughts have up to ``budget`` tokens, at most `thought.budget_tokens`, which None stands for. ``greedy``: at
        temperature 0, so that one rollout is all there is.
        """
        ...

    def collect(self, tickets: Sequence[Ticket]) -> list[Group]:
        """Wait for these groups; each can be had once."""
        ...


@runtime_checkable
class Engine(Sampler, Protocol):
    """Token in, token out. Implementations raise RuntimeError naming the call that failed."""

    version: int
    """Of the weights, -1 where there are none."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """What it computes in."""
    is_reference: bool
    """Whether it computes with the trainer's own code, so that its log-probabilities need no watching."""

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Nobody will collect these."""
        ...

    def publish(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights, of groups under way too. ``named_tensors`` are full tensors under transformers names.

        Collective: every rank calls it.
        """
        ...

    def rest(self) -> None:
        """Nothing is asked before the next publish: memory may be given back."""
        ...

    def counters(self) -> Sums:
        """What is to be logged of the time since the last call."""
        ...

    def close(self) -> None: ...


def generate(
    engine: Engine, prompts: Sequence[Prompt], group_size: int, purpose: str
) -> list[Group]:
    """Submit and wait."""
    return engine.collect(engine.submit(prompts, group_size, purpose))
