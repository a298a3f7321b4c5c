"""Floating-point operations and tokens of one step, decoding included: counted in one place, from shapes alone.

A matrix of M parameters costs 2 M per token forward and 4 M backward; causal attention over T positions adds
2 L T D per token forward (Kaplan et al. 2020, arXiv 2001.08361, section 2.1; half of it is masked and still counted).
"""

from dataclasses import dataclass
from typing import Any

from rlpt.config import NextTokenStage, RLStage, RunConfig, Stage


@dataclass(frozen=True)
class Cost:
    """Tokens and FLOPs of one optimiser step over all ranks."""

    sampled_tokens: int
    scored_tokens: int
    trained_tokens: int
    flops: float


def per_token(config: Any, context: int) -> float:
    """Forward FLOPs of one token through body and head with ``context`` positions in view."""
    width, layers = config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    block = 2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size
    return 2.0 * (layers * block + width * config.vocab_size) + 2.0 * layers * context * queries * 2


def step_cost(cfg: RunConfig, stage: Stage, config: Any) -> Cost:
    """The cost of one step of a stage at its longest contexts and thoughts: an upper bound."""
    if isinstance(stage, NextTokenStage):
        tokens = stage.documents_per_step * stage.window_tokens
        return Cost(0, 0, tokens, 3 * tokens * per_token(config, stage.window_tokens))
    return _rl_cost(cfg, stage, config)


def _rl_cost(cfg: RunConfig, stage: RLStage, config: Any) -> Cost:
    prompts = stage.documents_per_step * cfg.prompts.cuts_per_document
    rollouts = prompts * stage.group_size
    context, horizon = cfg.prompts.context_tokens, cfg.prompts.horizon_tokens
    thought = cfg.thought.budget_tokens + 2 + cfg.thought.prediction_tokens
    one = per_token(config, context + thought + horizon)
    sampled = rollouts * thought
    scored = (
        rollouts * (context + thought + horizon) + prompts * (context + horizon)
        if stage.reward.kind == "gain"
        else 0
    )
    trained = rollouts * (context + thought)
    return Cost(
        sampled, scored, trained, one * (sampled + prompts * context + scored + 3 * trained)
    )


def plan(cfg: RunConfig, config: Any) -> dict[str, dict[str, float]]:
    """The cost of a step and of the whole stage, stage by stage."""
    table = {}
    for stage in cfg.stage:
        cost = step_cost(cfg, stage, config)
        table[stage.name] = {
            "sampled_tokens": cost.sampled_tokens,
            "scored_tokens": cost.scored_tokens,
            "trained_tokens": cost.trained_tokens,
            "step_gflops": cost.flops / 1e9,
            "stage_tflops": cost.flops * stage.steps / 1e12,
        }
    return table
