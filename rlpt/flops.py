"""Floating-point operations and tokens of one step, decoding included: counted in one place, from shapes alone.

A matrix of M parameters costs 2 M per token forward and 4 M backward; attention over T positions adds 4 L T Q per token
forward, Q the width of all query heads: 2 L T Q for the scores and as much for the weighted values. Nothing is taken
off for the causal mask; Kaplan et al. 2020 (arXiv 2001.08361, section 2.1) count half of this. Norms, rotary
positions, softmax and the embedding lookup are left out.
"""

from dataclasses import dataclass
from typing import Any

from rlpt.config import RunConfig
from rlpt.stages import NextTokenStage, RLStage, Stage


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
    # Queries and output, keys and values, the three matrices of a gated MLP.
    block = 2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size
    return 2.0 * (layers * block + width * config.vocab_size) + 4.0 * layers * context * queries


def step_cost(cfg: RunConfig, stage: Stage, config: Any) -> Cost:
    """The cost of one step of a stage at its longest contexts and thoughts: an upper bound, padding included.

    Worked thoughts count as ``thought.budget_tokens`` each: their lengths are the shards' and not known here.
    """
    # Checkpointed blocks run forward once more before their backward.
    passes = 4 if cfg.policy.gradient_checkpointing else 3
    if isinstance(stage, NextTokenStage):
        width = stage.window_tokens + _inserted(cfg, stage)
        tokens = stage.documents_per_step * width
        return Cost(0, 0, tokens, passes * tokens * per_token(config, width))
    return _rl_cost(cfg, stage, config, passes)


def _inserted(cfg: RunConfig, stage: NextTokenStage) -> int:
    """Most tokens that the thoughts of one frame add to its window: opener, thought, closer each."""
    mix, full = stage.mix, cfg.thought.budget_tokens + 2
    return max(
        full * mix.thoughts_per_window if mix.copied else 0,
        2 * mix.thoughts_per_window if mix.empty else 0,
        full if mix.worked else 0,
    )


def _rl_cost(cfg: RunConfig, stage: RLStage, config: Any, passes: int) -> Cost:
    prompts = stage.documents_per_step * cfg.prompts.cuts_per_document
    rollouts = prompts * stage.group_size
    context, horizon = cfg.prompts.context_tokens, cfg.prompts.horizon_tokens
    # Thought, closer and prediction; the opener belongs to the prompt.
    thought = cfg.thought.budget_tokens + 1 + cfg.thought.prediction_tokens
    longest = context + 1 + thought + horizon
    sampled = rollouts * thought
    thoughts, trunks = _scoring_passes(stage)
    scored = thoughts * rollouts * longest + trunks * prompts * (context + horizon)
    trained = rollouts * (context + 1 + thought)
    if stage.objective.next_token_weight:
        # Trunks lie beside the rollouts and are padded with them to one width.
        width = context + max(1 + thought, horizon)
        trained = (rollouts + stage.documents_per_step) * width
    forward = sampled + prompts * (context + 1) + scored + passes * trained
    return Cost(sampled, scored, trained, forward * per_token(config, longest))


def _scoring_passes(stage: RLStage) -> tuple[int, int]:
    """How often a reward scores all thoughts, and how often all trunks. The policy's own gain is always measured."""
    reward = stage.reward
    if reward.kind != "gain":
        return 0, 0
    # Without a clip a centred advantage cancels the baseline, which is then not computed.
    cancels = stage.advantage.baseline != "none" and reward.clip is None
    own_baseline = reward.baseline in ("ema", "frozen") and not cancels
    return 1 + (reward.scorer != "policy"), 1 + own_baseline


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
