"""Vocabulary slabs in torch: an online softmax, and a backward that computes every slab again.

`SLABS` is exact: N x SLAB logits in float32 whatever the inputs are. `SLABS_BF16` lets every product
round to bfloat16: fast where the CPU has such units, and wrong by about 1e-2 nats a token. Each slab
of dW is written once; dH is summed in float32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlpt_kernels.head import Gradients, Needs, Problem, Wanted, scores, through_head
from rlpt_kernels.matmul import (
    add_product,
    add_rounded_product,
    product,
    rounded_product,
)
from rlpt_kernels.softmax import BASE_E, Pull, Softmax, concatenated

SLAB = 2048
"""Ids per slab. Constant: every batch then sums over the vocabulary in the same order."""
BLOCK = {"cpu": 2048, "cuda": 8192}
"""Rows per block: however many rows there are, no more than BLOCK x SLAB logits are held. 16 MiB stay in a CPU's
cache, which is worth 1.9x on small vocabularies; a GPU wants large matmuls."""


@dataclass(frozen=True)
class Slabs:
    """See the module."""

    product: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    add_product: Callable[[Tensor, Tensor, Tensor], None]
    rounded: bool

    def unit(self, problem: Problem, wanted: Wanted) -> float:
        """Natural."""
        return BASE_E

    def scan(self, problem: Problem, wanted: Wanted) -> Softmax:
        """The softmax of every row."""
        blocks = self._blocks(problem)
        parts = [Softmax.empty(block, wanted.entropy, wanted.argmax) for block in blocks]
        for start, weight_SD, bias_S in self._slabs(problem):
            for part, block in zip(parts, blocks, strict=True):
                part.add(self._scores(block, weight_SD, bias_S, start)[1], block.target_N, start)
        return concatenated(parts)

    def count(self, problem: Problem, threshold_N: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
        """How many scores are above a threshold that the first walk has found."""
        blocks, thresholds = self._blocks(problem), threshold_N.split(_height(problem))
        counts = [torch.zeros_like(block.target_N) for block in blocks]
        for start, weight_SD, bias_S in self._slabs(problem):
            for block, bar_N, count_N in zip(blocks, thresholds, counts, strict=True):
                score_NS = self._scores(block, weight_SD, bias_S, start)[1]
                count_N += (score_NS > bar_N[:, None]).sum(dim=1)
        return torch.cat(counts)

    def pull(self, problem: Problem, pull: Pull, needs: Needs) -> Gradients:
        """From the gradients of the outputs to those of the inputs."""
        blocks, found = self._blocks(problem), Gradients.zeros(problem, needs)
        height = _height(problem)
        for start, weight_SD, bias_S in self._slabs(problem):
            slab, d_weight_SD = slice(start, start + len(weight_SD)), None
            if found.weight_VD is not None:
                d_weight_SD = found.weight_VD[slab].to(problem.dtype)
            for number, block in enumerate(blocks):
                rows = slice(number * height, (number + 1) * height)
                d_raw_NS = self._gradient(block, pull.of_rows(rows), weight_SD, bias_S, start)
                if found.hidden_ND is not None:
                    self.add_product(found.hidden_ND[rows], d_raw_NS, weight_SD)
                if d_weight_SD is not None:
                    self.add_product(d_weight_SD, d_raw_NS.T, block.hidden_ND)
                if found.bias_V is not None:
                    found.bias_V[slab] += d_raw_NS.sum(dim=0, dtype=problem.dtype)
                # Not to be alive beside the next one.
                del d_raw_NS
            if found.weight_VD is not None and d_weight_SD is not None:
                found.weight_VD[slab] = d_weight_SD
        return found

    def _gradient(
        self, block: Problem, pull: Pull, weight_SD: Tensor, bias_S: Tensor | None, start: int
    ) -> Float[Tensor, "N S"]:
        """Of one block's logits over one slab, ready to be multiplied."""
        raw_NS, score_NS = self._scores(block, weight_SD, bias_S, start)
        d_raw_NS = through_head(pull.scores(score_NS, start), raw_NS, block.head)
        return d_raw_NS.to(self._operand_dtype(block))

    def _operand_dtype(self, problem: Problem) -> torch.dtype:
        return torch.bfloat16 if self.rounded else problem.operand_dtype

    def _blocks(self, problem: Problem) -> list[Problem]:
        ready = replace(problem, hidden_ND=problem.hidden_ND.to(self._operand_dtype(problem)))
        height = _height(problem)
        firsts = range(0, max(len(problem.target_N), 1), height)
        return [ready.of_rows(slice(first, first + height)) for first in firsts]

    def _slabs(self, problem: Problem) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """(start, weight, bias) of one slab after another."""
        for start in range(0, len(problem.weight_VD), SLAB):
            weight_SD = problem.weight_VD[start : start + SLAB].to(self._operand_dtype(problem))
            bias_V = problem.bias_V
            yield start, weight_SD, None if bias_V is None else bias_V[start : start + SLAB]

    def _scores(
        self, block: Problem, weight_SD: Tensor, bias_S: Tensor | None, start: int
    ) -> tuple[Float[Tensor, "N S"], Float[Tensor, "N S"]]:
        """(logits, scores): the same memory where there is no softcap."""
        raw_NS = self.product(block.hidden_ND, weight_SD.T, block.dtype)
        if bias_S is not None:
            raw_NS += bias_S
        return raw_NS, scores(raw_NS, block.head, start)


def _height(problem: Problem) -> int:
    return BLOCK["cuda" if problem.hidden_ND.is_cuda else "cpu"]


SLABS = Slabs(product, add_product, rounded=False)
SLABS_BF16 = Slabs(rounded_product, add_rounded_product, rounded=True)
