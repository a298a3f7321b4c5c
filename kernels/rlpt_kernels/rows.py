"""What happens to a chunk of logits once a matmul has written them: in torch, or in one Triton kernel per row."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlpt_kernels.head import Problem, Wanted, scores, through_head
from rlpt_kernels.launch import bias_pointer, keep_pointer, launching
from rlpt_kernels.objective import TRUST_REGIONS, Coefficients, Ratio, coefficients
from rlpt_kernels.softmax import BASE_2, BASE_E, Pull, Softmax


@dataclass(frozen=True)
class Terms:
    """What the objective needs of N tokens beside their log-probabilities."""

    behaviour_logp_N: Float[Tensor, " N"]
    advantage_N: Float[Tensor, " N"]
    weight_N: Float[Tensor, " N"] | Bool[Tensor, " N"]
    """0 is padding; the rest hold the denominators."""
    ratio: Ratio

    def of_rows(self, index_K: Tensor | slice) -> "Terms":
        """The same for some of the tokens."""
        behaviour_K, advantage_K = self.behaviour_logp_N[index_K], self.advantage_N[index_K]
        return Terms(behaviour_K, advantage_K, self.weight_N[index_K], self.ratio)

    def to(self, dtype: torch.dtype) -> "Terms":
        """In the dtype of the log-probabilities."""
        behaviour_N, advantage_N = self.behaviour_logp_N.to(dtype), self.advantage_N.to(dtype)
        return Terms(behaviour_N, advantage_N, self.weight_N.to(dtype), self.ratio)

    def coefficients(self, logp_N: Float[Tensor, " N"]) -> Coefficients:
        """See `objective.coefficients`."""
        return coefficients(
            logp_N, self.behaviour_logp_N, self.advantage_N, self.weight_N, self.ratio
        )


class Scored(NamedTuple):
    """One chunk of the policy loss."""

    logp_N: Float[Tensor, " N"]
    coefficient_N: Float[Tensor, " N"]
    entropy_N: Float[Tensor, " N"] | None


@runtime_checkable
class Rows(Protocol):
    """Arithmetic over a chunk of logits. ``raw_NV`` is hidden @ weight, without the bias, and is used up."""

    unit: float

    def scan(self, raw_NV: Float[Tensor, "N V"], chunk: Problem, wanted: Wanted) -> Softmax:
        """The softmax of every row."""
        ...

    def pull(self, raw_NV: Float[Tensor, "N V"], chunk: Problem, pull: Pull) -> Tensor:
        """The gradient of the logits."""
        ...

    def policy(
        self, raw_NV: Float[Tensor, "N V"], chunk: Problem, terms: Terms, entropy: bool
    ) -> tuple[Scored, Float[Tensor, "N V"]]:
        """Log-probabilities, coefficients and, in the dtype that the next matmul takes, the gradient of the logits."""
        ...


class TorchRows:
    """Passes over the chunk, most of them in place."""

    unit = BASE_E

    def scan(self, raw_NV: Float[Tensor, "N V"], chunk: Problem, wanted: Wanted) -> Softmax:
        """See `Rows`."""
        return self._softmax(self._scores(raw_NV, chunk), chunk, wanted)

    def pull(self, raw_NV: Float[Tensor, "N V"], chunk: Problem, pull: Pull) -> Tensor:
        """See `Rows`."""
        d_score_NV = pull.scores(self._scores(raw_NV, chunk), 0)
        return through_head(d_score_NV, raw_NV, chunk.head).to(chunk.operand_dtype)

    def policy(
        self, raw_NV: Float[Tensor, "N V"], chunk: Problem, terms: Terms, entropy: bool
    ) -> tuple[Scored, Float[Tensor, "N V"]]:
        """See `Rows`."""
        score_NV = self._scores(raw_NV, chunk)
        softmax = self._softmax(score_NV, chunk, Wanted(entropy=entropy))
        logp_N = softmax.logp()
        value_N = terms.coefficients(logp_N).coefficient_N
        # `Softmax.add` has left exp(score - max) where the scores were.
        d_score_NV = score_NV.mul_((value_N / softmax.sum_N)[:, None])
        d_score_NV.scatter_add_(1, chunk.target_N.clamp(min=0)[:, None], -value_N[:, None])
        d_raw_NV = through_head(d_score_NV, raw_NV, chunk.head).to(chunk.operand_dtype)
        return Scored(logp_N, value_N, softmax.entropy()), d_raw_NV

    def _scores(self, raw_NV: Tensor, chunk: Problem) -> Tensor:
        if chunk.bias_V is not None:
            raw_NV += chunk.bias_V
        return scores(raw_NV, chunk.head, 0)

    def _softmax(self, score_NV: Tensor, chunk: Problem, wanted: Wanted) -> Softmax:
        softmax = Softmax.empty(chunk, wanted.entropy, wanted.argmax)
        softmax.add(score_NV, chunk.target_N, 0)
        return softmax


class TritonRows:
    """One program per row; see `triton_rows`."""

    unit = BASE_2
    BLOCK = 2048
    """Logits per step of a row."""

    def scan(self, raw_NV: Float[Tensor, "N V"], chunk: Problem, wanted: Wanted) -> Softmax:
        """See `Rows`."""
        from rlpt_kernels.triton_rows import scan_rows_kernel

        found_4N = raw_NV.new_empty(4, len(raw_NV))
        max_N, sum_N, score_N, moment_N = found_4N
        argmax_N = torch.empty_like(chunk.target_N)
        self._launch(scan_rows_kernel, raw_NV, chunk, found_4N, argmax_N, ENTROPY=wanted.entropy)
        moment = moment_N if wanted.entropy else None
        return Softmax(max_N, sum_N, score_N, moment, argmax_N if wanted.argmax else None, BASE_2)

    def pull(self, raw_NV: Float[Tensor, "N V"], chunk: Problem, pull: Pull) -> Tensor:
        """See `Rows`."""
        from rlpt_kernels.triton_rows import pull_rows_kernel

        d_raw_NV = torch.empty_like(raw_NV, dtype=chunk.operand_dtype)
        self._launch(
            pull_rows_kernel, raw_NV, chunk, pull.packed(), d_raw_NV, d_raw_NV.stride(0),
            ENTROPY=pull.entropy_factor_N is not None,
        )  # fmt: skip
        return d_raw_NV

    def policy(
        self, raw_NV: Float[Tensor, "N V"], chunk: Problem, terms: Terms, entropy: bool
    ) -> tuple[Scored, Float[Tensor, "N V"]]:
        """See `Rows`."""
        from rlpt_kernels.triton_rows import policy_rows_kernel

        logp_N, value_N, entropy_N = raw_NV.new_empty(3, len(raw_NV))
        d_raw_NV = torch.empty_like(raw_NV, dtype=chunk.operand_dtype)
        ratio = terms.ratio
        values = (terms.behaviour_logp_N, terms.advantage_N, terms.weight_N)
        self._launch(
            policy_rows_kernel, raw_NV, chunk, *(x.float().contiguous() for x in values),
            logp_N, value_N, entropy_N, d_raw_NV, d_raw_NV.stride(0),
            ratio.log_low, ratio.log_high, ratio.tv_delta, ratio.log_cap,
            ENTROPY=entropy, TRUST=TRUST_REGIONS.index(ratio.trust_region),
        )  # fmt: skip
        return Scored(logp_N, value_N, entropy_N if entropy else None), d_raw_NV

    def _launch(
        self, kernel: Any, raw_NV: Tensor, chunk: Problem, *rest: Any, **features: Any
    ) -> None:
        if not len(raw_NV):
            return
        head = chunk.head
        with launching(raw_NV.device):
            kernel[(len(raw_NV),)](
                raw_NV, raw_NV.stride(0), chunk.target_N, head.scale(raw_NV, BASE_2),
                bias_pointer(chunk), keep_pointer(chunk), *raw_NV.shape, head.softcap or 1.0, *rest,
                BIAS=chunk.bias_V is not None, SOFTCAP=head.softcap is not None, BANNED=head.banned_B is not None,
                BLOCK=self.BLOCK, num_warps=8, **features,
            )  # fmt: skip
