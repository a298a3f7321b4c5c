"""Sampling one batch of thoughts: what is drawn, when a thought closes, when a rollout ends.

How logits come about is a decoder's affair: `PaddedDecoder` repeats a context for every thought, `TrunkDecoder` shares
it. Both give the same numbers up to rounding.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlpt.config import ThoughtConfig
from rlpt.rollout.sampling import sample
from rlpt.types import Group, Markers, Prompt, Rollout


@runtime_checkable
class Decoder(Protocol):
    """A model over the prompts of one batch and what their rollouts have sampled so far."""

    logits_NV: Float[Tensor, "N V"]
    """Of the next token of every rollout, prompt by prompt."""

    def extend(self, ids_N: Int[Tensor, " N"]) -> None:
        """Append one token to every rollout."""
        ...

    def keep(self, rows_A: Int[Tensor, " A"]) -> None:
        """Forget all rollouts but these, in ascending order. The logits may stay as they are until `extend`."""
        ...


class Decoding:
    """N rollouts, of which A are still decoded; they grow by one token a step."""

    def __init__(
        self, decoder: Decoder, key_N: Int[Tensor, " N"], thought: ThoughtConfig, markers: Markers
    ) -> None:
        self.decoder = decoder
        self.thought = thought
        self.markers = markers
        self.row_A = torch.arange(len(key_N), device=key_N.device)
        self.key_A = key_N
        self.closed_at_A = torch.full_like(key_N, -1)
        self.done_A = torch.zeros_like(key_N, dtype=torch.bool)
        shape = (len(key_N), thought.budget_tokens + 1 + thought.prediction_tokens)
        self.ids_NL = key_N.new_zeros(shape)
        self.logp_NL = torch.zeros(shape, device=key_N.device)
        self.action_NL = torch.zeros(shape, dtype=torch.bool, device=key_N.device)
        self.closed_at_N = torch.full_like(key_N, -1)

    def run(self) -> "Decoding":
        """Decode until every rollout has ended, which the budget sees to."""
        for position in range(self.ids_NL.shape[1]):
            if position > 0 and not self._all_forced(position):
                self._extend(position)
            ids_A, logp_A, action_A = self._next(position)
            self.ids_NL[self.row_A, position] = ids_A
            self.logp_NL[self.row_A, position] = logp_A
            self.action_NL[self.row_A, position] = action_A
            self._close(ids_A, position)
            left = len(self.done_A) - int(self.done_A.sum())
            if not left:
                break
            if 2 * left <= len(self.done_A):
                self._keep(torch.nonzero(~self.done_A)[:, 0])
        return self

    def _all_forced(self, position: int) -> bool:
        """Whether every rollout that is still open gets its closer now, whatever the logits."""
        return position == self.thought.budget_tokens and not self.thought.prediction_tokens

    def _extend(self, position: int) -> None:
        self.decoder.extend(self.ids_NL[self.row_A, position - 1])

    def _next(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """One token per rollout, or the closer where the budget is spent: (ids, log-probabilities, sampled?)."""
        if self._all_forced(position):
            nothing_A = torch.zeros_like(self.done_A)
            return torch.full_like(self.key_A, self.markers.closer), nothing_A.float(), nothing_A
        draw = sample(
            self.decoder.logits_NV,
            (self.markers.opener,),
            self.key_A,
            position,
            self.thought.temperature,
        )
        forced_A = (self.closed_at_A < 0) & (position == self.thought.budget_tokens)
        ids_A = torch.where(forced_A, self.markers.closer, draw.ids_N)
        action_A = ~forced_A & ~self.done_A
        return ids_A, torch.where(action_A, draw.logp_N, 0.0), action_A

    def _close(self, ids_A: Tensor, position: int) -> None:
        """A row closes its thought at the first closer, and ends at the second or with a full prediction."""
        closer_A = ids_A == self.markers.closer
        open_A = self.closed_at_A < 0
        self.closed_at_A = torch.where(closer_A & open_A, position, self.closed_at_A)
        self.closed_at_N[self.row_A] = self.closed_at_A
        full_A = position - self.closed_at_A >= self.thought.prediction_tokens
        self.done_A |= (closer_A & ~open_A) | ((self.closed_at_A >= 0) & full_A)

    def _keep(self, rows_A: Tensor) -> None:
        """Rows that have ended cost nothing once they are half of the batch."""
        self.decoder.keep(rows_A)
        for name in ("row_A", "key_A", "closed_at_A", "done_A"):
            setattr(self, name, getattr(self, name)[rows_A])

    def groups(self, prompts: Sequence[Prompt], group_size: int, version: int) -> list[Group]:
        ids, logp, action, closed = (
            x.cpu().numpy() for x in (self.ids_NL, self.logp_NL, self.action_NL, self.closed_at_N)
        )
        rollouts = [
            _rollout(ids[n], logp[n], action[n], int(closed[n]), version) for n in range(len(ids))
        ]
        return [
            Group(
                prompt,
                tuple(rollouts[p * group_size : (p + 1) * group_size]),
                self.thought.budget_tokens,
            )
            for p, prompt in enumerate(prompts)
        ]


def _rollout(
    ids: np.ndarray, logp: np.ndarray, action: np.ndarray, closed: int, version: int
) -> Rollout:
    forced = not action[closed]
    # Everything sampled is an action; only a forced closer among the kept tokens is not.
    length = max(closed + 1, int(np.flatnonzero(action).max(initial=-1)) + 1)
    kept = (ids[:length], action[:length], logp[:length], np.full(length, version, dtype=np.int64))
    return Rollout(*kept, thought_len=closed, finish="budget" if forced else "closer")
