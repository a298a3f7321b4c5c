"""The policy as one root module: everything that touches a parameter happens inside `Policy.forward`.

FSDP2 gathers parameters around the root's forward; a body or a head called from outside would meet sharded ones.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from rlpt.policy.logprobs import head_logprob
from rlpt.policy.packing import Packed, Rows


class RowScores(NamedTuple):
    """Scores of one kind of row, fp32."""

    logp_R: Float[Tensor, " R"]
    argmax_R: Int[Tensor, " R"]


class Policy(nn.Module):
    """A transformers causal LM behind one forward: packed trunks and branches in, scored rows out."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, packed: Packed, rows: Sequence[Rows]) -> list[RowScores]:
        """Score every kind of row of ``packed``; differentiable in ``logp_R``."""
        hidden_NTD = self.lm.model(input_ids=packed.ids_NT, use_cache=False).last_hidden_state
        hidden_flat = hidden_NTD.reshape(-1, hidden_NTD.shape[-1])
        return [self._score(hidden_flat, kind) for kind in rows]

    def reshard(self) -> None:
        """Free gathered parameters. `fully_shard` replaces this; an unsharded policy has nothing to free."""

    def _score(self, hidden_flat: Float[Tensor, "M D"], kind: Rows) -> RowScores:
        scored = head_logprob(
            self.lm.lm_head, self.lm.config, hidden_flat, kind.hidden_R, kind.target_R, kind.banned
        )
        assert scored.argmax is not None
        return RowScores(scored.logp, scored.argmax)
