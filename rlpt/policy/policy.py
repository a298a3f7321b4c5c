"""The policy as one root module: everything that touches a parameter happens inside `Policy.forward`.

FSDP2 gathers parameters around the root's forward; a body or a head called from outside would meet sharded ones.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlpt.policy.attention import check_implementation
from rlpt.policy.logprobs import PolicyLoss, Ratio, head_logprob, head_policy_loss
from rlpt.policy.packing import Layout, Packed, Rows

T = TypeVar("T")


class RowScores(NamedTuple):
    """Scores of one kind of row, fp32."""

    logp_R: Float[Tensor, " R"]
    argmax_R: Int[Tensor, " R"]


class RowCertainty(NamedTuple):
    """How sure the policy is at rows, fp32, whatever their targets. See `rlpt.types.Certainty`."""

    entropy_R: Float[Tensor, " R"]
    confidence_R: Float[Tensor, " R"]


class Readout:
    """The head over the hidden states of one forward. Exists inside `Policy.forward` only."""

    def __init__(self, lm: Any, hidden_MD: Float[Tensor, "M D"]) -> None:
        self._lm = lm
        self._hidden_MD = hidden_MD

    def scores(self, kind: Rows) -> RowScores:
        """Log-probabilities of rows, differentiable."""
        found = head_logprob(
            self._lm.lm_head, self._lm.config, self._hidden_MD, kind.hidden_R, kind.target_R, kind.banned,
            kind.temperature,
        )  # fmt: skip
        assert found.argmax is not None
        return RowScores(found.logp, found.argmax)

    @torch.no_grad()
    def certainty(self, kind: Rows) -> RowCertainty:
        """Of rows whose targets are their likeliest ids, as `scores` gives them."""
        found = head_logprob(
            self._lm.lm_head, self._lm.config, self._hidden_MD, kind.hidden_R, kind.target_R, kind.banned,
            kind.temperature, entropy=True,
        )  # fmt: skip
        assert found.entropy is not None
        return RowCertainty(found.entropy, found.logp)

    def hidden(self, kind: Rows) -> Float[Tensor, "R D"]:
        """The states that predict rows."""
        return self._hidden_MD[kind.hidden_R]

    @torch.no_grad()
    def constants(self, kind: Rows) -> RowScores:
        """The same without gradient: for rewards."""
        return self.scores(kind)

    def policy_loss(
        self,
        kind: Rows,
        behaviour_logp_R: Float[Tensor, " R"],
        advantage_R: Float[Tensor, " R"],
        weight_R: Float[Tensor, " R"],
        ratio: Ratio,
    ) -> PolicyLoss:
        """The policy-gradient loss of rows, fused with the head (`rlpt_kernels.linear_policy_loss`)."""
        return head_policy_loss(
            self._lm.lm_head, self._lm.config, self._hidden_MD, kind.hidden_R, kind.target_R, kind.banned,
            kind.temperature, behaviour_logp_R, advantage_R, weight_R, ratio,
        )  # fmt: skip


class Policy(nn.Module):
    """A transformers causal LM behind one forward: packed trunks and branches in, what is read off them out."""

    def __init__(self, lm: Any, layout: Layout = "naive") -> None:
        super().__init__()
        self.lm = lm
        self.layout: Layout = layout

    def forward(self, packed: Packed, read: Callable[[Readout], T]) -> T:
        """Run the body once and let ``read`` use the head.

        Tensors with a gradient must come back in tuples, lists or dicts, where FSDP finds them.
        """
        told: dict[str, Any] = {}
        if packed.tree is not None:
            check_implementation(self.lm)
            told["tree"] = packed.tree
        hidden_NTD = self.lm.model(
            input_ids=packed.ids_NT, position_ids=packed.position_NT, use_cache=False, **told
        ).last_hidden_state
        return read(Readout(self.lm, hidden_NTD.reshape(-1, hidden_NTD.shape[-1])))

    def reshard(self) -> None:
        """Free gathered parameters. `fully_shard` replaces this; an unsharded policy has nothing to free."""


def scores_of(rows: Sequence[Rows]) -> Callable[[Readout], list[RowScores]]:
    """Read the log-probabilities of every kind of row."""
    return lambda readout: [readout.scores(kind) for kind in rows]
