"""Log-probabilities from hidden states and the LM head, always in fp32. The only door to `rlpt_kernels`."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from rlpt_data.strict import UserError
from rlpt_kernels import LogProb, PolicyLoss, linear_logprob, linear_policy_loss
from rlpt_kernels.objective import Ratio

__all__ = ["PolicyLoss", "Ratio", "check_head", "head_logprob", "head_policy_loss"]


def head_logprob(
    head: nn.Linear,
    config: object,
    hidden_MD: Float[Tensor, "M D"],
    rows_R: Int[Tensor, " R"],
    target_R: Int[Tensor, " R"],
    banned: tuple[int, ...],
    temperature: float = 1.0,
    entropy: bool = False,
) -> LogProb:
    """Log-probability of ``target_R`` at rows of hidden, ``banned`` ids outside the softmax; argmax beside it."""
    return linear_logprob(
        hidden_MD, head.weight, target_R, rows=rows_R, banned=banned, argmax=True, entropy=entropy,
        **_head(head, config, temperature),
    )  # fmt: skip


def head_policy_loss(
    head: nn.Linear,
    config: object,
    hidden_MD: Float[Tensor, "M D"],
    rows_R: Int[Tensor, " R"],
    target_R: Int[Tensor, " R"],
    banned: tuple[int, ...],
    temperature: float,
    behaviour_logp_R: Float[Tensor, " R"],
    advantage_R: Float[Tensor, " R"],
    weight_R: Float[Tensor, " R"],
    ratio: Ratio,
) -> PolicyLoss:
    """-sum of weight * M * min(rho, max_ratio) * advantage * log pi over rows, the head's logits never whole."""
    return linear_policy_loss(
        hidden_MD, head.weight, target_R, behaviour_logp_R, advantage_R, weight_R, rows=rows_R, banned=banned,
        trust_region=ratio.trust_region, clip_low=ratio.clip_low, clip_high=ratio.clip_high,
        tv_delta=ratio.tv_delta, max_ratio=ratio.max_ratio, **_head(head, config, temperature),
    )  # fmt: skip


def _head(head: nn.Linear, config: object, temperature: float) -> dict[str, Any]:
    """What lies between hidden states and log-probabilities, as the kernels' keywords."""
    softcap = getattr(config, "final_logit_softcapping", None)
    return {"bias": head.bias, "softcap": softcap, "temperature": temperature * _divisor(config)}


def _divisor(config: object) -> float:
    """What logits are divided by: Granite divides by ``logits_scaling``, Cohere multiplies by ``logit_scale``."""
    divisor = getattr(config, "logits_scaling", None)
    factor = getattr(config, "logit_scale", None)
    return (1.0 if divisor is None else divisor) / (1.0 if factor is None else factor)


def check_head(lm: nn.Module) -> None:
    """Refuse, by its class, a model that is not ``lm.model`` (with ``layers``) under a linear ``lm.lm_head``, or one
    whose forward makes other logits of the last hidden state than `head_logprob` does.
    """
    name, body = type(lm).__name__, getattr(lm, "model", None)
    if not isinstance(getattr(body, "layers", None), nn.ModuleList):
        raise UserError(
            f"policy: {name} keeps no decoder blocks in model.layers; choose a model laid out like Llama"
        )
    if not isinstance(getattr(lm, "lm_head", None), nn.Linear):
        raise UserError(
            f"policy: {name} has no linear lm_head; choose a decoder-only causal LM laid out like Llama"
        )
    try:
        error = _logit_error(lm)
    except AttributeError as cause:
        raise UserError(
            f"policy: {name} computes logits from more than hidden states ({cause}); choose another model"
        ) from cause
    if not error < 1e-3:
        raise UserError(
            f"policy: {name} treats its logits in a way rlpt does not know (log-probabilities differ by "
            f"{error:.3g} nats on a trial); choose another model"
        )


class _Body(nn.Module):
    """Stands in for a decoder: the same hidden states whatever it is asked."""

    def __init__(self, hidden_NTD: Float[Tensor, "N T D"]) -> None:
        super().__init__()
        self.hidden_NTD = hidden_NTD

    def forward(self, *args: Any, **kwargs: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self.hidden_NTD)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def _logit_error(lm: Any) -> float:
    """Largest difference between the model's own log-probabilities and `head_logprob`'s, in nats, on a small head.

    Scalings hide in forward code under names that mean different things in different models; a trial finds them all.
    """
    body, head = lm.model, lm.lm_head
    rows, ids, width = 3, 5, head.in_features
    draw = torch.Generator().manual_seed(0)
    trial: Any = nn.utils.skip_init(nn.Linear, width, ids, bias=head.bias is not None)
    for parameter in trial.parameters():
        parameter.normal_(std=width**-0.5, generator=draw)
    # Logits of about 8, where a softcap of 30 shows.
    hidden_NTD = torch.empty(1, rows, width).normal_(std=8.0, generator=draw)
    try:
        lm.model, lm.lm_head = _Body(hidden_NTD), trial
        logits = lm(input_ids=torch.zeros(1, rows, dtype=torch.long), use_cache=False).logits
    finally:
        lm.model, lm.lm_head = body, head
    rows_R, target_R = torch.arange(rows).repeat_interleave(ids), torch.arange(ids).repeat(rows)
    own = head_logprob(trial, lm.config, hidden_NTD[0], rows_R, target_R, ())
    return float((logits[0].log_softmax(-1).flatten() - own.logp).abs().max())
