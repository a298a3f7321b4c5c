"""What every engine is: prompts in, groups out, weights in.

Sampling is a pure function of the weights and (seed, purpose, epoch, document, cut, rollout, position): batches, ranks
and engines' schedules cannot change a thought.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from rlpt.types import Group, Prompt


@runtime_checkable
class Engine(Protocol):
    """Token in, token out. Implementations raise RuntimeError naming the call that failed."""

    def submit(self, prompts: Sequence[Prompt], group_size: int, purpose: str) -> None:
        """Queue ``group_size`` rollouts of each prompt."""
        ...

    def collect(self) -> list[Group]:
        """The groups of everything submitted since the last collect, in the order of submission."""
        ...

    def publish(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights. ``named_tensors`` are full tensors under transformers names."""
        ...

    def close(self) -> None: ...


def generate(
    engine: Engine, prompts: Sequence[Prompt], group_size: int, purpose: str
) -> list[Group]:
    """Submit and wait."""
    engine.submit(prompts, group_size, purpose)
    return engine.collect()
