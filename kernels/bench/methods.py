"""The competitors: log-probabilities of targets, and a policy loss on top, from hidden states and an output embedding.

Every method takes the same `Data` and returns (logp, loss). The loss weighs every token differently, as a policy
gradient does: a method that can only sum its rows would not do. Peers that are absent or cannot run say why, by name.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy

from rlpt_kernels import linear_logprob, linear_policy_loss
from rlpt_kernels.launch import why_not


class Shape(NamedTuple):
    """Rows, width, vocabulary."""

    N: int
    D: int
    V: int


@dataclass(frozen=True)
class Data:
    """One random problem. No row is padding: what dropping rows saves is not measured here."""

    hidden_ND: Tensor
    weight_VD: Tensor
    target_N: Tensor
    behaviour_logp_N: Tensor
    advantage_N: Tensor

    @property
    def shape(self) -> Shape:
        """N, D, V."""
        return Shape(*self.hidden_ND.shape, len(self.weight_VD))

    def rows(self, count: int) -> "Data":
        """The first rows."""
        per_row = (self.target_N, self.behaviour_logp_N, self.advantage_N)
        return Data(self.hidden_ND[:count], self.weight_VD, *(x[:count] for x in per_row))

    def leaves(self) -> "Data":
        """The same numbers, and hidden and weight want gradients."""
        hidden_ND, weight_VD = (
            x.detach().requires_grad_() for x in (self.hidden_ND, self.weight_VD)
        )
        return replace(self, hidden_ND=hidden_ND, weight_VD=weight_VD)

    def upcast(self) -> "Data":
        """float32 inputs, differentiably."""
        return replace(self, hidden_ND=self.hidden_ND.float(), weight_VD=self.weight_VD.float())


def random_data(shape: Shape, dtype: torch.dtype, device: torch.device) -> Data:
    """Normal hidden states, logits of standard deviation 2, a behaviour policy 0.1 nats away."""
    torch.manual_seed(0)
    hidden_ND = torch.randn(shape.N, shape.D, device=device).to(dtype)
    weight_VD = (torch.randn(shape.V, shape.D, device=device) * 2 * shape.D**-0.5).to(dtype)
    target_N = torch.randint(shape.V, (shape.N,), device=device)
    with torch.no_grad():
        logp_N = linear_logprob(hidden_ND, weight_VD, target_N, impl="slabs").logp
    advantage_N = torch.randn(shape.N, device=device)
    return Data(
        hidden_ND, weight_VD, target_N, logp_N + 0.1 * torch.randn_like(logp_N), advantage_N
    )


class Scored(NamedTuple):
    """What every method returns."""

    logp_N: Tensor
    loss: Tensor


def weighted_loss(logp_N: Tensor, data: Data) -> Tensor:
    """-sum_n A_n log p_n."""
    return -(data.advantage_N * logp_N).sum()


def policy_loss(logp_N: Tensor, data: Data) -> Tensor:
    """-sum_n A_n sg(exp(log p_n - behaviour_n)) log p_n, as every trainer writes it on top of log-probabilities."""
    ratio_N = (logp_N - data.behaviour_logp_N).exp().detach()
    return -(data.advantage_N * ratio_N * logp_N).sum()


Loss = Callable[[Tensor, Data], Tensor]
Call = Callable[[Data], Scored]


def anywhere(data: Data) -> str | None:
    """No reason not to run."""
    return None


@dataclass(frozen=True)
class Method:
    """A name in the table, and how to get its numbers."""

    name: str
    call: Call
    loss: Loss = weighted_loss
    why_not: Callable[[Data], str | None] = anywhere
    """Why it cannot run on such data; None where it can."""
    foreign: bool = False
    """Another project's: when it fails it is reported, and the others go on."""

    @property
    def naive(self) -> str:
        """The peer it is compared with."""
        return "naive" if self.loss is weighted_loss else "policy_naive"


# ---- full logits -------------------------------------------------------------------------------


def full_logits(data: Data) -> Tensor:
    """What everybody writes first: logits in the inputs' dtype, then a float32 softmax."""
    logits_NV = (data.hidden_ND @ data.weight_VD.T).float()
    return torch.log_softmax(logits_NV, -1).gather(1, data.target_N[:, None])[:, 0]


def naive(loss: Loss) -> Call:
    """Full logits, rounded to the inputs' dtype."""

    def call(data: Data) -> Scored:
        logp_N = full_logits(data)
        return Scored(logp_N, loss(logp_N, data))

    return call


def naive_upcast(loss: Loss) -> Call:
    """Full logits of float32 inputs: the exact way without a kernel."""
    call = naive(loss)
    return lambda data: call(data.upcast())


def is_float32(data: Data) -> str | None:
    """An upcast changes nothing there."""
    return (
        "the inputs are float32: the same as naive"
        if data.hidden_ND.dtype == torch.float32
        else None
    )


# ---- other projects ----------------------------------------------------------------------------


def torch_linear_cross_entropy(options: LinearCrossEntropyOptions | None) -> Call:
    """PyTorch's own; it returns the inputs' dtype."""

    def call(data: Data) -> Scored:
        logp_N = -linear_cross_entropy(
            data.hidden_ND, data.weight_VD, data.target_N, reduction="none", options=options
        )
        return Scored(logp_N, weighted_loss(logp_N, data))

    return call


def liger(data: Data) -> Scored:
    """liger-kernel: chunks of full logits around one Triton row kernel."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    # bias, class weights, ignore_index, z-loss, label smoothing, reduction.
    settings = (None, None, -100, 0.0, 0.0, "none")
    found: Any = LigerFusedLinearCrossEntropyFunction.apply(
        data.hidden_ND, data.weight_VD, data.target_N, *settings
    )
    return Scored(-found[0], weighted_loss(-found[0], data))


def cut_cross_entropy(data: Data) -> Scored:
    """Apple's: fused Triton, and a backward that skips small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    logp_N = -linear_cross_entropy(data.hidden_ND, data.weight_VD, data.target_N, reduction="none")
    return Scored(logp_N, weighted_loss(logp_N, data))


def needs_cuda(package: str) -> Callable[[Data], str | None]:
    """A package that may be absent and launches Triton kernels."""

    def reason(data: Data) -> str | None:
        if find_spec(package) is None:
            return f"not installed: pip install {package.replace('_', '-')}"
        return None if data.hidden_ND.is_cuda else "runs on CUDA only"

    return reason


# ---- ours --------------------------------------------------------------------------------------


def ours(impl: Any) -> Call:
    """`linear_logprob`."""

    def call(data: Data) -> Scored:
        logp_N = linear_logprob(data.hidden_ND, data.weight_VD, data.target_N, impl=impl).logp
        return Scored(logp_N, weighted_loss(logp_N, data))

    return call


def our_policy_loss(impl_of: Callable[[Data], Any]) -> Call:
    """`linear_policy_loss`."""

    def call(data: Data) -> Scored:
        found = linear_policy_loss(
            data.hidden_ND, data.weight_VD, data.target_N, data.behaviour_logp_N, data.advantage_N,
            torch.ones_like(data.advantage_N), impl=impl_of(data),
        )  # fmt: skip
        return Scored(found.logp, found.loss)

    return call


def triton_refuses(data: Data) -> str | None:
    """Triton's interpreter computes on a CPU too, but its time says nothing."""
    device = data.hidden_ND.device
    return why_not(device) if device.type == "cuda" else "runs on CUDA only"


def recomputing(data: Data) -> str:
    """The fused kernel where it runs, vocabulary slabs elsewhere."""
    return "slabs" if triton_refuses(data) else "triton"


METHODS = (
    Method("naive", naive(weighted_loss)),
    Method("naive_upcast", naive_upcast(weighted_loss), why_not=is_float32),
    Method("linear_cross_entropy", torch_linear_cross_entropy(None), foreign=True),
    Method("linear_cross_entropy_chunked", torch_linear_cross_entropy(LinearCrossEntropyOptions()), foreign=True),
    Method("liger_kernel", liger, why_not=needs_cuda("liger_kernel"), foreign=True),
    Method("cut_cross_entropy", cut_cross_entropy, why_not=needs_cuda("cut_cross_entropy"), foreign=True),
    Method("reference", ours("reference")),
    Method("slabs", ours("slabs")),
    Method("slabs_bf16", ours("slabs_bf16")),
    Method("chunked", ours("chunked")),
    Method("triton", ours("triton"), why_not=triton_refuses),
    Method("policy_naive", naive(policy_loss), policy_loss),
    Method("policy_naive_upcast", naive_upcast(policy_loss), policy_loss, is_float32),
    Method("policy_one_pass", our_policy_loss(lambda data: "chunked"), policy_loss),
    Method("policy_recompute", our_policy_loss(recomputing), policy_loss),
)  # fmt: skip
"""In the order of the table."""
