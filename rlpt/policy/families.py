"""Which architectures may share trunks: those whose every layer was tried to be causal attention and nothing else.

The list is of what is tested (tests/policy/test_shared_families.py), not of what would work: a model that mixes tokens
in any other way would be silently wrong. The naive layout is exact for all of them.
"""

from typing import Any, Literal

import torch

from rlpt_data.strict import UserError

TRIED = (
    "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "glm", "glm4", "granite", "helium",
    "hunyuan_v1_dense", "hyperclovax", "jais2", "llama", "ministral", "ministral3", "mistral", "nanochat", "olmo",
    "olmo2", "olmo3", "persimmon", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
"""``model_type`` of the families that are tested against one sequence at a time."""

MOVING_ROPE = ("dynamic", "longrope")
"""Rotary frequencies that depend on the longest sequence of a batch."""

Asked = Literal["auto", "shared", "naive"]


def why_not_shared(config: Any, longest: int) -> str | None:
    """Why a model cannot share trunks on paths of up to ``longest`` tokens; None where it can."""
    name = type(config).__name__.removesuffix("Config")
    if config.model_type not in TRIED:
        return f"{name} was not tried; the families that were are {', '.join(TRIED)}"
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    if window is not None and slides and window < longest:
        return f"{name} has a sliding window of {window} tokens, and paths have up to {longest}"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head < 16 and torch.cuda.is_available():
        return f"{name} has heads of {head}, and flex_attention takes 16 and more on a GPU"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{name} caps its attention scores"
    if getattr(config, "use_bidirectional_attention", None):
        return f"{name} attends in both directions (use_bidirectional_attention)"
    for rope in _rope_types(getattr(config, "rope_parameters", None) or {}):
        if rope in MOVING_ROPE:
            return f"{name} has rotary positions of type {rope}, which depend on the longest sequence of a batch"
    return None


def _rope_types(rope: dict[str, Any]) -> list[str]:
    """The kinds of rotary positions: one, or one for every kind of layer."""
    return [
        part.get("rope_type", "default")
        for part in (rope, *rope.values())
        if isinstance(part, dict)
    ]


def choose(asked: Asked, config: Any, longest: int) -> tuple[Literal["shared", "naive"], str]:
    """The layout, and the line that says why. Raises UserError where "shared" is asked for and cannot be."""
    if asked == "naive":
        return "naive", "policy.layout = 'naive': every branch carries a copy of its context"
    reason = why_not_shared(config, longest)
    if reason is None:
        return "shared", "policy.layout: trunks are shared by their branches"
    if asked == "shared":
        raise UserError(
            f"policy.layout = 'shared': {reason}; set policy.layout = 'naive' (exact, and slower)"
        )
    return "naive", f"policy.layout: naive, because {reason}"


def check_positions(config: Any, longest: int) -> None:
    """Refuse paths that run past a model's last position. Raises UserError."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise UserError(
            f"policy: {type(config).__name__.removesuffix('Config')} has {limit} positions, and the longest sequence "
            f"(context or window with its thoughts and horizon, or evaluation window) has {longest} tokens; lower "
            "prompts.context_tokens, thought.budget_tokens, window_tokens or evaluation.bits_per_byte_tokens"
        )
