"""Decoding over one cache per document: a trunk is computed and kept once, for all thoughts of all its cuts.

A rollout's next token attends to what its prompt has before it, in the cache that all its siblings read, and to the
rollout's own tokens, which alone are kept per rollout: one softmax over both (`rlpt.policy.attention`).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from rlpt.policy.attention import merge, stretch
from rlpt.policy.packing import Packed, pack
from rlpt.types import Branch, Prompt, Trunk

ROOM = 64
"""Tokens of a rollout that have room in its cache at first; then the room doubles."""

Pair = tuple[Trunk, Branch]
Cached = tuple[Tensor, Tensor]
"""Keys and values."""


class TrunkDecoder:
    """One flat row of tokens, a rollout each. See `rlpt.rollout.decoding.Decoder`.

    transformers hands it its queries, keys and values through `rlpt.policy.attention.branch_attention`.
    """

    def __init__(
        self, lm: Any, prompts: Sequence[Prompt], group_size: int, device: torch.device
    ) -> None:
        self.lm = lm
        pairs = [_pair(prompt) for prompt in prompts]
        packed = pack([], pairs, device, "shared")
        self.logits_NV, caches = _prefill(lm, packed, pairs)
        self.logits_NV = self.logits_NV.repeat_interleave(group_size, dim=0)
        # The last tokens of a prompt are copied to its rollouts, as many as every prompt has of its own: so opener and
        # thought are one stretch of keys.
        self.length = min(len(branch.ids) for _, branch in pairs)
        self.layers = [_Layer.of(cache, packed, pairs, self.length, group_size) for cache in caches]
        ends = np.array([branch.cut + len(branch.ids) for _, branch in pairs])
        self.longest = int(ends.max())
        self.position_N = torch.from_numpy(ends).to(device).repeat_interleave(group_size)
        self.prompt_N = np.arange(len(pairs)).repeat(group_size)
        self.spans = _spans(self.prompt_N)

    def extend(self, ids_N: Int[Tensor, " N"]) -> None:
        self.length += 1
        self.longest += 1
        output = self.lm(
            input_ids=ids_N[None], position_ids=self.position_N[None], use_cache=False, tree=self
        )
        self.logits_NV, self.position_N = output.logits[0], self.position_N + 1

    def keep(self, rows_A: Int[Tensor, " A"]) -> None:
        for layer in self.layers:
            layer.keep(rows_A)
        self.position_N = self.position_N[rows_A]
        self.prompt_N = self.prompt_N[rows_A.cpu().numpy()]
        self.spans = _spans(self.prompt_N)

    def attend(
        self,
        layer_idx: int,
        query: Float[Tensor, "1 H N d"],
        key: Float[Tensor, "1 h N d"],
        value: Float[Tensor, "1 h N d"],
        scale: float,
    ) -> Float[Tensor, "1 N H d"]:
        """Attention of every rollout's newest token, whose key and value are kept."""
        layer, query_NHd = self.layers[layer_idx], query[0].transpose(0, 1)
        own = layer.append(key, value, self.length)
        # Heads that share keys are rows of one product.
        grouped = query_NHd.reshape(len(query_NHd), key.shape[1], -1, key.shape[3])
        out, lse = stretch(grouped, *own, False, scale)
        whole, _ = merge(
            *layer.before(query_NHd, self.spans, scale),
            out.reshape(query_NHd.shape), lse.reshape(query_NHd.shape[:2]),
        )  # fmt: skip
        return whole[None]


class _Span(NamedTuple):
    """Rows [start, stop) are rollouts of one prompt."""

    prompt: int
    start: int
    stop: int


def _spans(prompt_N: Int[np.ndarray, " N"]) -> list[_Span]:
    found, starts, counts = np.unique(prompt_N, return_index=True, return_counts=True)
    return [
        _Span(int(p), int(start), int(start + count))
        for p, start, count in zip(found, starts, counts, strict=True)
    ]


class _Layer:
    """Keys and values of one layer: what prompts have, shared, and what rollouts have, their own."""

    def __init__(self, shared_P: list[list[Cached]], own: list[Tensor]) -> None:
        self.shared_P = shared_P
        """Stretches before the rollouts of every prompt: views of one cache."""
        self.own = own
        """Keys and values of the rollouts, (N, h, room, d)."""

    @classmethod
    def of(
        cls, cache: Cached, packed: Packed, pairs: Sequence[Pair], copied: int, group_size: int
    ) -> "_Layer":
        """``copied`` tokens at the end of every prompt begin the caches of its rollouts."""
        stretches_P = [
            [(packed.context_at[b], branch.cut), (packed.own_at[b], len(branch.ids) - copied)]
            for b, (_, branch) in enumerate(pairs)
        ]
        shared_P = [
            [_part(cache, int(at), length) for at, length in stretches if length]
            for stretches in stretches_P
        ]
        ends = [int(packed.own_at[b]) + len(branch.ids) for b, (_, branch) in enumerate(pairs)]
        tails = zip(*(_part(cache, end - copied, copied) for end in ends), strict=True)
        own = [torch.cat(tail).repeat_interleave(group_size, dim=0) for tail in tails]
        return cls(shared_P, own)

    def append(
        self, key: Float[Tensor, "1 h N d"], value: Float[Tensor, "1 h N d"], length: int
    ) -> Cached:
        """Keep a token for every rollout; all that they have now, (N, h, length, d)."""
        for i, new in enumerate((key, value)):
            self.own[i] = _with_room(self.own[i], length)
            self.own[i][:, :, length - 1] = new[0].transpose(0, 1)
        keys, values = (x[:, :, :length] for x in self.own)
        return keys, values

    def before(
        self, query_NHd: Float[Tensor, "N H d"], spans: Sequence[_Span], scale: float
    ) -> tuple[Float[Tensor, "N H d"], Float[Tensor, "N H"]]:
        """Attention to the shared stretches, prompt by prompt; log-sum-exp -inf where there is none."""
        out = torch.zeros_like(query_NHd)
        lse = torch.full_like(query_NHd[..., 0], -torch.inf)
        for prompt, start, stop in spans:
            query = query_NHd[start:stop].transpose(0, 1)
            found = [
                stretch(query.reshape(1, key.shape[1], -1, key.shape[3]), key, value, False, scale)
                for key, value in self.shared_P[prompt]
            ]
            if found:
                part, part_lse = reduce(lambda one, other: merge(*one, *other), found)
                out[start:stop] = part.reshape(query.shape).transpose(0, 1)
                lse[start:stop] = part_lse.reshape(query.shape[:2]).transpose(0, 1)
        return out, lse

    def keep(self, rows_A: Int[Tensor, " A"]) -> None:
        self.own = [x[rows_A] for x in self.own]


def _pair(prompt: Prompt) -> Pair:
    """A prompt as a branch of at least one token; off a trunk of its own where a method hides the context."""
    cut, ids = prompt.cut, prompt.policy_ids
    if len(ids) > cut and np.array_equal(ids[:cut], prompt.trunk.ids[:cut]):
        return prompt.trunk, Branch(cut, ids[cut:], 0)
    # What it reads is no text of the document, so it has no bytes.
    hidden = replace(prompt.trunk, ids=ids[:-1], offsets=np.zeros(len(ids), dtype=np.int64))
    return hidden, Branch(len(ids) - 1, ids[-1:], 0)


def _prefill(
    lm: Any, packed: Packed, pairs: Sequence[Pair]
) -> tuple[Float[Tensor, "P V"], list[Cached]]:
    """Every token of every prompt once: the logits after each prompt, and every layer's keys and values."""
    last = [
        packed.branch_rows(b, len(branch.ids), len(branch.ids) + 1)[0]
        for b, (_, branch) in enumerate(pairs)
    ]
    # Without a configuration the cache keeps all tokens, in layers with a sliding window, too: they lie in one row.
    cache: Any = DynamicCache()
    output = lm(
        input_ids=packed.ids_NT, position_ids=packed.position_NT, past_key_values=cache, use_cache=True,
        logits_to_keep=torch.tensor(last, device=packed.ids_NT.device), tree=packed.tree,
    )  # fmt: skip
    return output.logits[0], [(layer.keys, layer.values) for layer in cache.layers]


def _part(cache: Cached, at: int, length: int) -> Cached:
    keys, values = (x[:, :, at : at + length] for x in cache)
    return keys, values


def _with_room(kept: Float[Tensor, "N h room d"], length: int) -> Float[Tensor, "N h more d"]:
    room = kept.shape[2]
    if length <= room:
        return kept
    grown = kept.new_empty(*kept.shape[:2], max(ROOM, 2 * room), kept.shape[3])
    grown[:, :, :room] = kept
    return grown
