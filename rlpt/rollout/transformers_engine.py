"""The reference engine: plain transformers with a key/value cache, on any device.

Under the layout "shared" a document is computed once for all thoughts of all its cuts (`TrunkDecoder`); under "naive"
the context of a prompt is computed once and its cache repeated for every thought (`PaddedDecoder`).
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from rlpt import rng
from rlpt.config import ThoughtConfig
from rlpt.phases import CLOCK
from rlpt.policy.attention import implementation
from rlpt.policy.packing import Layout
from rlpt.rollout.decoding import Decoder, Decoding
from rlpt.rollout.padded_decoder import PaddedDecoder
from rlpt.rollout.trunk_decoder import TrunkDecoder
from rlpt.rollout.wire import DType
from rlpt.types import Group, Markers, Prompt, Sums


class TransformersEngine:
    """One model replica on one device. See `rlpt.rollout.engine.Engine` for the contract."""

    dtype: DType = "float32"
    is_reference = True

    def __init__(
        self,
        config: Any,
        layout: Layout,
        markers: Markers,
        thought: ThoughtConfig,
        seed: int,
        prompts_per_batch: int,
        device: torch.device,
    ) -> None:
        lm = transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation=implementation(layout)
        )
        self.lm = lm.to(device).eval().requires_grad_(False)
        self.layout: Layout = layout
        self.markers = markers
        self.thought = thought
        self.seed = seed
        self.prompts_per_batch = prompts_per_batch
        self.device = device
        self.version = -1
        self._queue: dict[str, tuple[Prompt, int, str, int, bool]] = {}
        self._asked = 0

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

    def submit(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        purpose: str,
        budget: int | None = None,
        *,
        greedy: bool = False,
    ) -> list[str]:
        budget = budget or self.thought.budget_tokens
        tickets = [str(self._asked + p) for p in range(len(prompts))]
        self._asked += len(prompts)
        jobs = ((prompt, group_size, purpose, budget, greedy) for prompt in prompts)
        self._queue |= zip(tickets, jobs, strict=True)
        return tickets

    def collect(self, tickets: Sequence[str]) -> list[Group]:
        if self.version < 0:
            raise RuntimeError("collect: no weights were published to the engine")
        jobs = {ticket: self._queue.pop(ticket) for ticket in tickets}
        kinds: dict[tuple[int, str, int, bool], list[str]] = {}
        for ticket, (_, group_size, purpose, budget, greedy) in jobs.items():
            kinds.setdefault((group_size, purpose, budget, greedy), []).append(ticket)
        found: dict[str, Group] = {}
        for kind, alike in kinds.items():
            groups = self._generate([jobs[ticket][0] for ticket in alike], *kind)
            found |= zip(alike, groups, strict=True)
        return [found[ticket] for ticket in tickets]

    def cancel(self, tickets: Sequence[str]) -> None:
        for ticket in tickets:
            self._queue.pop(ticket, None)

    def rest(self) -> None:
        """Its weights stay: the reference engine has no memory to give back."""

    def counters(self) -> Sums:
        return {}

    def close(self) -> None:
        self._queue.clear()

    def _generate(
        self, prompts: Sequence[Prompt], group_size: int, purpose: str, budget: int, greedy: bool
    ) -> list[Group]:
        groups: dict[int, Group] = {}
        for batch in batches(prompts, self.prompts_per_batch):
            chosen = [prompts[p] for p in batch]
            found = self._decode(chosen, group_size, purpose, budget, greedy)
            groups |= zip(batch, found, strict=True)
            CLOCK.beat()
        return [groups[p] for p in range(len(prompts))]

    @torch.inference_mode()
    def _decode(
        self, prompts: Sequence[Prompt], group_size: int, purpose: str, budget: int, greedy: bool
    ) -> list[Group]:
        keys = [
            rng.key(self.seed, purpose, *prompt.key, g)
            for prompt in prompts
            for g in range(group_size)
        ]
        made = TrunkDecoder if self.layout == "shared" else PaddedDecoder
        decoder: Decoder = made(self.lm, prompts, group_size, self.device)
        key_N = torch.tensor(keys, device=self.device)
        thought = self.thought.model_copy(
            update={"budget_tokens": budget} | ({"temperature": 0.0} if greedy else {})
        )
        decoding = Decoding(decoder, key_N, thought, self.markers).run()
        return decoding.groups(prompts, group_size, self.version)


def batches(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Indices of prompts, ``size`` or fewer a batch. All cuts of a document go together, unless they alone are more."""
    documents: dict[int, list[int]] = {}
    for p, prompt in enumerate(prompts):
        documents.setdefault(id(prompt.trunk), []).append(p)
    found: list[list[int]] = []
    for document in documents.values():
        for start in range(0, len(document), size):
            part = document[start : start + size]
            if not found or len(found[-1]) + len(part) > size:
                found.append([])
            found[-1] += part
    return found
