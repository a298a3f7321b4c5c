"""Decoding with a copy of its context for every rollout: plain transformers, whatever the architecture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from rlpt.types import Prompt


class PaddedDecoder:
    """Left-padded contexts, each computed once, their caches repeated G times. See `rlpt.rollout.decoding.Decoder`."""

    def __init__(
        self, lm: Any, prompts: Sequence[Prompt], group_size: int, device: torch.device
    ) -> None:
        self.lm = lm
        width = max(len(prompt.policy_ids) for prompt in prompts)
        ids_PT = np.zeros((len(prompts), width), dtype=np.int64)
        mask_PT = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids_PT[row, width - len(prompt.policy_ids) :] = prompt.policy_ids
            mask_PT[row, width - len(prompt.policy_ids) :] = 1
        self.mask_NT = torch.from_numpy(mask_PT).to(device)
        self.cache: Any = None
        self._forward(torch.from_numpy(ids_PT).to(device))
        self.cache.batch_repeat_interleave(group_size)
        self.mask_NT = self.mask_NT.repeat_interleave(group_size, dim=0)
        self.logits_NV = self.logits_NV.repeat_interleave(group_size, dim=0)

    def _forward(self, ids_NT: Tensor) -> None:
        position_NT = (self.mask_NT.cumsum(dim=1) - 1).clamp(min=0)[:, -ids_NT.shape[1] :]
        output = self.lm(
            input_ids=ids_NT, attention_mask=self.mask_NT, position_ids=position_NT, past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        self.logits_NV, self.cache = output.logits[:, -1], output.past_key_values

    def extend(self, ids_N: Int[Tensor, " N"]) -> None:
        self.mask_NT = torch.cat([self.mask_NT, torch.ones_like(ids_N)[:, None]], dim=1)
        self._forward(ids_N[:, None])

    def keep(self, rows_A: Int[Tensor, " A"]) -> None:
        self.cache.batch_select_indices(rows_A)
        self.mask_NT = self.mask_NT[rows_A]
