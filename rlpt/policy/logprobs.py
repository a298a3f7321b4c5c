"""Log-probabilities from hidden states and the LM head, always in fp32. The only door to `rlpt_kernels`."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from rlpt_data.strict import UserError
from rlpt_kernels import LogProb, linear_logprob


def head_logprob(
    head: nn.Linear,
    config: object,
    hidden_RD: Float[Tensor, "R D"],
    target_R: Int[Tensor, " R"],
    banned: tuple[int, ...],
) -> LogProb:
    """Log-probability, entropy-free, of ``target_R`` with ``banned`` ids removed from the softmax; argmax beside it."""
    softcap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return linear_logprob(
        hidden_RD,
        head.weight,
        target_R,
        bias=head.bias,
        softcap=softcap,
        temperature=divisor,
        banned=banned,
        argmax=True,
    )


def check_head(model: nn.Module) -> None:
    """Refuse models whose logits are not a linear head (softcap or constant divisor) on the last hidden state."""
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"policy: {type(model).__name__} has no linear LM head; rlpt trains decoder-only causal LMs"
        )
