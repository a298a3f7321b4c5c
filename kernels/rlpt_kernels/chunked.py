"""Row chunks: a library matmul writes the logits of some rows, a row kernel turns them into statistics or gradients.

The fastest way to train on a large head (a one-pass policy loss costs 6NDV), at the price of CHUNK_BYTES of
logits and a float32 gradient of the weight.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlpt_kernels.head import Gradients, Needs, Problem, Wanted, scores
from rlpt_kernels.launch import why_not
from rlpt_kernels.matmul import add_product, product
from rlpt_kernels.rows import Rows, Scored, Terms, TorchRows, TritonRows
from rlpt_kernels.softmax import Pull, Softmax, concatenated

CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 1 << 23}
"""Of float32 logits held at a time: a GPU needs a thousand rows or so to fill its matmuls, a CPU wants its cache."""
LEAST_ROWS = 256
"""However large the vocabulary: products of fewer rows run far below a machine's rate."""


def rows_for(problem: Problem, rank: bool = False) -> Rows:
    """One Triton kernel on a GPU that has Triton; torch elsewhere, for float64, and for ranks.

    A rank compares scores of two walks, so both must round them alike: base e, as in `count`.
    """
    device = problem.hidden_ND.device
    on_gpu = device.type == "cuda" and problem.dtype == torch.float32 and not rank
    return TritonRows() if on_gpu and why_not(device) is None else TorchRows()


class Chunked:
    """See the module."""

    def unit(self, problem: Problem, wanted: Wanted) -> float:
        """That of the row arithmetic."""
        return rows_for(problem, wanted.rank).unit

    def scan(self, problem: Problem, wanted: Wanted) -> Softmax:
        """The softmax of every row."""
        rows = rows_for(problem, wanted.rank)
        chunks = [rows.scan(_raw(chunk), chunk, wanted) for _, chunk in _chunks(problem)]
        return concatenated(chunks or [Softmax.empty(problem, wanted.entropy, wanted.argmax)])

    def count(self, problem: Problem, threshold_N: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
        """How many scores are above a threshold that the first walk has found."""
        above_N = torch.zeros_like(problem.target_N)
        for where, chunk in _chunks(problem):
            raw_NV = _raw(chunk)
            if chunk.bias_V is not None:
                raw_NV += chunk.bias_V
            score_NV = scores(raw_NV, chunk.head, 0)
            above_N[where] = (score_NV > threshold_N[where, None]).sum(dim=1)
        return above_N

    def pull(self, problem: Problem, pull: Pull, needs: Needs) -> Gradients:
        """From the gradients of the outputs to those of the inputs."""
        # In the units of the forward, whoever computed it.
        rows = TorchRows() if pull.unit == TorchRows.unit else TritonRows()
        sums = _Sums(problem, needs)
        for where, chunk in _chunks(problem):
            sums.add(where, chunk, rows.pull(_raw(chunk), chunk, pull.of_rows(where)))
        return sums.final()

    def policy(
        self, problem: Problem, terms: Terms, entropy: bool, needs: Needs
    ) -> tuple[Scored, Gradients]:
        """Log-probabilities, coefficients and float32 gradients in one pass over the rows: 6NDV."""
        rows, sums, parts = rows_for(problem), _Sums(problem, needs), []
        for where, chunk in _chunks(problem):
            scored, d_raw_NV = rows.policy(_raw(chunk), chunk, terms.of_rows(where), entropy)
            sums.add(where, chunk, d_raw_NV)
            parts.append(scored)
            # Not to be alive beside the next one.
            del d_raw_NV
        empty_0 = problem.hidden_ND.new_empty(0, dtype=problem.dtype)
        parts = parts or [Scored(empty_0, empty_0, empty_0 if entropy else None)]
        entropies = [part.entropy_N for part in parts if part.entropy_N is not None]
        return Scored(
            torch.cat([part.logp_N for part in parts]),
            torch.cat([part.coefficient_N for part in parts]),
            torch.cat(entropies) if entropy else None,
        ), sums.found


class _Sums:
    """Gradients summed over chunks in float32."""

    def __init__(self, problem: Problem, needs: Needs) -> None:
        self._problem = problem
        self.found = Gradients.zeros(problem, needs)
        if needs.weight:
            weight_VD = problem.weight_VD
            self.found.weight_VD = weight_VD.new_zeros(weight_VD.shape, dtype=problem.dtype)

    def add(self, where: slice, chunk: Problem, d_raw_NV: Float[Tensor, "N V"]) -> None:
        """One chunk's share."""
        found, dtype = self.found, chunk.dtype
        if found.hidden_ND is not None:
            found.hidden_ND[where] = product(d_raw_NV, chunk.weight_VD, dtype)
        if found.weight_VD is not None:
            add_product(found.weight_VD, d_raw_NV.T, chunk.hidden_ND)
        if found.bias_V is not None:
            found.bias_V += d_raw_NV.sum(dim=0, dtype=dtype)

    def final(self) -> Gradients:
        """The weight's gradient rounded, once, to the weight's dtype."""
        if self.found.weight_VD is not None:
            self.found.weight_VD = self.found.weight_VD.to(self._problem.weight_VD.dtype)
        return self.found


CHUNKED = Chunked()


def _raw(chunk: Problem) -> Float[Tensor, "N V"]:
    return product(chunk.hidden_ND, chunk.weight_VD.T, chunk.dtype)


def _chunks(problem: Problem) -> Iterator[tuple[slice, Problem]]:
    budget = CHUNK_BYTES["cuda" if problem.hidden_ND.is_cuda else "cpu"]
    height = max(LEAST_ROWS, budget // (4 * len(problem.weight_VD)))
    # Where operands must be upcast, once for all chunks.
    hidden_ND = problem.hidden_ND.to(problem.operand_dtype)
    weight_VD = problem.weight_VD.to(problem.operand_dtype)
    wide = replace(problem, hidden_ND=hidden_ND, weight_VD=weight_VD)
    for first in range(0, len(problem.target_N), height):
        where = slice(first, first + height)
        yield where, wide.of_rows(where)
