"""The reference engine: plain transformers with a key/value cache, on any device.

The context of a prompt is computed once, its cache repeated for the G thoughts, and all thoughts decode together.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from rlpt import rng
from rlpt.config import ThoughtConfig
from rlpt.rollout.sampling import sample
from rlpt.types import Group, Markers, Prompt, Rollout


class TransformersEngine:
    """One model replica on one device. See `rlpt.rollout.engine.Engine` for the contract."""

    def __init__(
        self,
        config: Any,
        markers: Markers,
        thought: ThoughtConfig,
        seed: int,
        prompts_per_batch: int,
        device: torch.device,
    ) -> None:
        lm = transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation="sdpa"
        )
        self.lm = lm.to(device).eval().requires_grad_(False)
        self.markers = markers
        self.thought = thought
        self.seed = seed
        self.prompts_per_batch = prompts_per_batch
        self.device = device
        self.version = -1
        self._queue: list[tuple[Sequence[Prompt], int, str]] = []

    def publish(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        parameters = dict(self.lm.named_parameters())
        missing = set(parameters)
        for name, tensor in named_tensors:
            parameters[name].data.copy_(tensor)
            missing.discard(name)
        if missing:
            raise RuntimeError(
                f"publish: no tensor for {sorted(missing)[:3]} and {max(len(missing) - 3, 0)} more"
            )
        self.version = version

    def submit(self, prompts: Sequence[Prompt], group_size: int, purpose: str) -> None:
        self._queue.append((prompts, group_size, purpose))

    def collect(self) -> list[Group]:
        if self.version < 0:
            raise RuntimeError("collect: no weights were published to the engine")
        queue, self._queue = self._queue, []
        return [group for job in queue for group in self._generate(*job)]

    def close(self) -> None:
        self._queue.clear()

    def _generate(self, prompts: Sequence[Prompt], group_size: int, purpose: str) -> list[Group]:
        step = self.prompts_per_batch
        batches = [prompts[start : start + step] for start in range(0, len(prompts), step)]
        return [group for batch in batches for group in self._decode(batch, group_size, purpose)]

    @torch.inference_mode()
    def _decode(self, prompts: Sequence[Prompt], group_size: int, purpose: str) -> list[Group]:
        decoding = _Decoding(self, prompts, group_size, purpose)
        limit = self.thought.budget_tokens + 1 + self.thought.prediction_tokens
        for position in range(limit):
            decoding.advance(position)
            if decoding.finished():
                break
        return decoding.groups()


class _Decoding:
    """The state of one batch: N = P * G rows that grow by one token a step."""

    def __init__(
        self, engine: TransformersEngine, prompts: Sequence[Prompt], group_size: int, purpose: str
    ) -> None:
        self.engine = engine
        self.prompts = prompts
        self.group_size = group_size
        self.key_N = torch.tensor(
            [
                rng.key(engine.seed, purpose, *prompt.key, g)
                for prompt in prompts
                for g in range(group_size)
            ],
            device=engine.device,
        )
        self.closed_at_N = torch.full_like(self.key_N, -1)
        self.done_N = torch.zeros_like(self.key_N, dtype=torch.bool)
        self.columns: list[tuple[Tensor, Tensor, Tensor]] = []
        self.logits_NV, self.cache, self.mask_NT = self._prefill()

    def _prefill(self) -> tuple[Tensor, Any, Tensor]:
        """Left-padded contexts, each computed once, their caches repeated G times."""
        width = max(len(prompt.policy_ids) for prompt in self.prompts)
        ids_PT = np.zeros((len(self.prompts), width), dtype=np.int64)
        mask_PT = np.zeros((len(self.prompts), width), dtype=np.int64)
        for row, prompt in enumerate(self.prompts):
            ids_PT[row, width - len(prompt.policy_ids) :] = prompt.policy_ids
            mask_PT[row, width - len(prompt.policy_ids) :] = 1
        mask = torch.from_numpy(mask_PT).to(self.engine.device)
        output = self._forward(torch.from_numpy(ids_PT).to(self.engine.device), mask, None)
        output.past_key_values.batch_repeat_interleave(self.group_size)
        repeated = mask.repeat_interleave(self.group_size, dim=0)
        return (
            output.logits[:, -1].repeat_interleave(self.group_size, dim=0),
            output.past_key_values,
            repeated,
        )

    def _forward(self, ids_NT: Tensor, mask_NT: Tensor, cache: Any) -> Any:
        position_NT = (mask_NT.cumsum(dim=1) - 1).clamp(min=0)[:, -ids_NT.shape[1] :]
        return self.engine.lm(
            input_ids=ids_NT, attention_mask=mask_NT, position_ids=position_NT, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip

    def advance(self, position: int) -> None:
        """Sample one token per row, or force the closer where the budget is spent, and extend the cache."""
        if position > 0:
            self._extend()
        ids_N, logp_N, action_N = self._next(position)
        self.columns.append((ids_N, logp_N, action_N))
        self._close(ids_N, position)

    def _extend(self) -> None:
        ids_N = self.columns[-1][0]
        self.mask_NT = torch.cat([self.mask_NT, torch.ones_like(ids_N)[:, None]], dim=1)
        output = self._forward(ids_N[:, None], self.mask_NT, self.cache)
        self.logits_NV, self.cache = output.logits[:, -1], output.past_key_values

    def _next(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        draw = sample(self.logits_NV, (self.engine.markers.opener,), self.key_N, position)
        forced_N = (self.closed_at_N < 0) & (position == self.engine.thought.budget_tokens)
        ids_N = torch.where(forced_N, self.engine.markers.closer, draw.ids_N)
        action_N = ~forced_N & ~self.done_N
        return ids_N, torch.where(action_N, draw.logp_N, 0.0), action_N

    def _close(self, ids_N: Tensor, position: int) -> None:
        """A row closes its thought at the first closer, and ends at the second or with a full prediction."""
        closer_N = (ids_N == self.engine.markers.closer) & ~self.done_N
        again_N = closer_N & (self.closed_at_N >= 0)
        self.closed_at_N = torch.where(
            closer_N & (self.closed_at_N < 0), position, self.closed_at_N
        )
        full_N = position - self.closed_at_N >= self.engine.thought.prediction_tokens
        self.done_N |= again_N | ((self.closed_at_N >= 0) & full_N)

    def finished(self) -> bool:
        return bool(self.done_N.all())

    def groups(self) -> list[Group]:
        ids, logp, action = (
            torch.stack(column, dim=1).cpu().numpy() for column in zip(*self.columns, strict=True)
        )
        closed = self.closed_at_N.cpu().numpy()
        rollouts = [
            self._rollout(ids[n], logp[n], action[n], int(closed[n])) for n in range(len(ids))
        ]
        size = self.group_size
        return [
            Group(prompt, tuple(rollouts[p * size : (p + 1) * size]))
            for p, prompt in enumerate(self.prompts)
        ]

    def _rollout(
        self, ids: np.ndarray, logp: np.ndarray, action: np.ndarray, closed: int
    ) -> Rollout:
        forced = not action[closed]
        # Everything sampled is an action; only a forced closer among the kept tokens is not.
        length = max(closed + 1, int(np.flatnonzero(action).max(initial=-1)) + 1)
        version = np.full(length, self.engine.version, dtype=np.int64)
        kept = (ids[:length], action[:length], logp[:length], version)
        return Rollout(*kept, thought_len=closed, finish="budget" if forced else "closer")
