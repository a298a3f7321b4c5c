"""Tokens and floating-point operations of one step, decoding included: counted in one place, from shapes alone.

A matrix of M parameters costs 2 M per token forward and 4 M backward. A query that looks at a key costs 4 Q per layer
forward, Q the width of all query heads (2 Q for the score, as much for the weighted value), and 10 Q backward, where
scores are computed again. Nothing is taken off for the causal mask; Kaplan et al. 2020 (arXiv 2001.08361, section 2.1)
count half of that. Norms, rotary positions, softmax and the embedding lookup are left out.

A step is counted at its longest: every document has the longest context and all its cuts, every thought its whole
budget. Real steps cost less, never more.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from rlpt.config import RunConfig
from rlpt.stages import NextTokenStage, RLStage, Stage

Layout = Literal["shared", "naive"]
POLICY_ROW, SCORED_ROW = 3, 4
"""Products of the head for a row that is trained: the fused policy loss leaves the gradients in its forward; where a
log-probability is differentiated, its logits are computed again."""


@dataclass(frozen=True)
class Work:
    """What forwards compute, padding included."""

    tokens: int = 0
    """Through the blocks."""
    pairs: int = 0
    """Of a query and a key that attention compares, in one layer."""
    rows: int = 0
    """Through the head, once for every product."""

    def __add__(self, other: "Work") -> "Work":
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.rows + other.rows)

    def times(self, count: int) -> "Work":
        return Work(self.tokens * count, self.pairs * count, self.rows * count)


@dataclass(frozen=True)
class Cost:
    """One optimiser step over all ranks."""

    prefilled_tokens: int
    """Contexts and openers that the engine reads before it samples."""
    sampled_tokens: int
    scored_tokens: int
    """Computed without gradient, for rewards."""
    trained_tokens: int
    """Computed forward and backward."""
    sampling_flops: float
    scoring_flops: float
    training_flops: float

    @property
    def flops(self) -> float:
        return self.sampling_flops + self.scoring_flops + self.training_flops


@dataclass(frozen=True)
class Documents:
    """The documents of one step on one rank, each at its largest. Lengths in tokens."""

    count: int
    cuts: int
    group: int
    context: int
    thought: int
    """Most actions of a rollout, prediction included: a closer is an action only before the budget is spent."""
    horizon: int
    budget: int
    """``micro_batch_tokens``."""
    batch: int
    """Prompts that the engine decodes together."""
    predicts: bool = False
    """Whether tokens follow the closer; where none do, a forced closer needs no forward."""
    frame: int = 0
    """Most tokens of a chat on a branch; there are none where the document goes on."""
    trunks: int = 1
    """Of one document: a masker's paragraph, and all its masks."""

    @property
    def branches(self) -> int:
        """Rollouts of one document."""
        return self.trunks * self.cuts * self.group

    @property
    def own(self) -> int:
        """Opener, thought, closer and prediction of one rollout, in their frame."""
        return self.thought + 2 + self.frame


def documents(cfg: RunConfig, stage: RLStage, ranks: int = 1) -> Documents:
    """One rank's share of a step."""
    frames = cfg.frames(stage)
    return Documents(
        -(-stage.documents_per_step // ranks),
        cfg.prompts.cuts_per_document,
        stage.group_size,
        cfg.prompts.context_tokens + max(frame.most_before for frame in frames),
        cfg.thought.budget_tokens + cfg.thought.prediction_tokens,
        cfg.prompts.horizon_tokens,
        stage.micro_batch_tokens,
        cfg.engine.prompts_per_batch,
        cfg.thought.prediction_tokens > 0,
        max(frame.most_after for frame in frames),
        1 if stage.masker is None else 1 + stage.group_size,
    )


# ---- FLOPs ---------------------------------------------------------------------------------------


def widths(config: Any) -> tuple[int, int, int]:
    """(of the hidden states, of all query heads, of all key heads) of a transformers configuration."""
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    return width, heads * head_dim, config.num_key_value_heads * head_dim


def body_flops(config: Any, work: Work) -> tuple[float, float]:
    """(of the matrices, of attention) in all blocks, forward."""
    width, queries, keys = widths(config)
    # Queries and output, keys and values, the three matrices of a gated MLP.
    block = 2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size
    layers = config.num_hidden_layers
    return 2.0 * layers * block * work.tokens, 4.0 * layers * queries * work.pairs


def head_flops(config: Any, work: Work) -> float:
    return 2.0 * config.hidden_size * config.vocab_size * work.rows


def forward_flops(config: Any, work: Work) -> float:
    """Without gradient."""
    return sum(body_flops(config, work)) + head_flops(config, work)


def training_flops(config: Any, work: Work, checkpointed: bool) -> float:
    """Forward and backward; checkpointed blocks run forward once more in between, but for their last matrix."""
    matrices, attention = body_flops(config, work)
    last = 2.0 * config.num_hidden_layers * config.intermediate_size * config.hidden_size
    again = matrices + attention - last * work.tokens if checkpointed else 0.0
    return 3.0 * matrices + 3.5 * attention + again + head_flops(config, work)


def step_cost(cfg: RunConfig, stage: Stage, config: Any, layout: Layout, ranks: int = 1) -> Cost:
    """The cost of one step of a stage at its longest contexts and thoughts.

    ``config`` is the transformers configuration. Worked thoughts count as ``thought.budget_tokens`` each: their lengths
    are the shards' and not known here. On CUDA, rows of the shared layout are padded by up to an eighth, not counted.
    """
    checkpointed = cfg.policy.gradient_checkpointing
    if isinstance(stage, NextTokenStage):
        work = framed_work(cfg, stage)
        return Cost(0, 0, 0, work.tokens, 0.0, 0.0, training_flops(config, work, checkpointed))
    shape = documents(cfg, stage, ranks)
    # A prefix cache reads a document once, whatever the trainer's layout.
    reads: Layout = "shared" if cfg.engine.kind == "vllm" else layout
    prefill, decode = (part.times(ranks) for part in engine_work(shape, reads))
    scored = scoring_work(shape, stage, layout).times(ranks)
    trained = training_work(shape, stage, layout).times(ranks)
    return Cost(
        prefill.tokens,
        ranks * shape.count * shape.branches * (shape.thought + 1),
        scored.tokens,
        trained.tokens,
        forward_flops(config, prefill + decode),
        forward_flops(config, scored),
        training_flops(config, trained, checkpointed),
    )


# ---- what a step computes ------------------------------------------------------------------------


def framed_work(cfg: RunConfig, stage: NextTokenStage) -> Work:
    """Of a next-token step: one padded row per document, every token but the first a target."""
    width = stage.window_tokens + _inserted(cfg, stage)
    return Work(width, width**2, SCORED_ROW * (width - 1)).times(stage.documents_per_step)


def _inserted(cfg: RunConfig, stage: NextTokenStage) -> int:
    """Most tokens that the thoughts of one frame add to its window: opener, thought, closer each."""
    mix, full = stage.mix, cfg.thought.budget_tokens + 2
    return max(
        full * mix.thoughts_per_window if mix.copied else 0,
        2 * mix.thoughts_per_window if mix.empty else 0,
        full if mix.worked else 0,
    )


def engine_work(shape: Documents, layout: Layout) -> tuple[Work, Work]:
    """(reading the prompts, decoding): the first token of a rollout comes from the prompt's last hidden state."""
    prompts, seen = shape.count * shape.trunks * shape.cuts, shape.context + 1 + shape.frame
    if layout == "naive":
        prefill = Work(prompts * seen, prompts * seen**2, prompts)
    else:
        # A document with more cuts than a batch has prompts is read again.
        trunks = shape.count * shape.trunks * -(-shape.cuts // shape.batch)
        prefill = Work(shape.context, shape.context**2).times(trunks)
        prefill += Work(prompts, prompts * seen, prompts)
    steps = shape.thought - (not shape.predicts)
    decode = Work(steps, steps * seen + steps * (steps + 1) // 2, steps)
    return prefill, decode.times(prompts * shape.group)


def document_work(shape: Documents, layout: Layout, own: int, whole: bool) -> Work:
    """Of one document with ``own`` tokens on every branch; ``whole``: its trunks are computed beyond the last cut."""
    trunk, count = shape.context + shape.horizon * whole, shape.branches
    # In a chat, text without a thought is a branch, too: counted like one with a thought.
    count += shape.cuts * whole * (shape.frame > 0)
    if layout == "naive":
        # One row per branch and one for the trunk, padded to the longest.
        width = max(shape.context + own, trunk)
        return Work(width, width**2).times(count + whole * shape.trunks)
    trunks = Work(trunk, trunk**2).times(shape.trunks)
    return trunks + Work(own, own * (shape.context + own)).times(count)


def training_work(shape: Documents, stage: RLStage, layout: Layout) -> Work:
    """Of what is computed forward and backward: thoughts, the text where it is wanted, what rewards are read off."""
    objective, horizon = stage.objective, shape.horizon
    read = reads_training_forward(shape, stage, layout)
    after, text = wanted(stage, read)
    own = shape.own + horizon * after
    rows = POLICY_ROW * shape.branches * shape.thought
    rows += SCORED_ROW * (shape.context + horizon - 1) * text
    rows += SCORED_ROW * shape.branches * horizon * (objective.gold_weight > 0)
    # After every thought, and after none.
    rows += (shape.branches + shape.cuts) * horizon * read
    return (document_work(shape, layout, own, after or text) + Work(rows=rows)).times(shape.count)


def wanted(stage: RLStage, continuations: bool) -> tuple[bool, bool]:
    """Whether a training forward has (held-out text after the thoughts, all of the trunk's own text)."""
    objective = stage.objective
    return continuations or objective.gold_weight > 0, objective.next_token_weight > 0


def scoring_work(shape: Documents, stage: RLStage, layout: Layout) -> Work:
    """Of the forwards without gradient, which score what the training forward does not."""
    read = reads_training_forward(shape, stage, layout)
    thoughts, trunks = _scoring_passes(stage, read)
    parts = micro_batches(shape, stage, layout, True) if read else [shape.count]
    work = Work()
    for part in parts:
        work += _thoughts_work(shape, layout, part).times(thoughts)
        work += _trunks_work(shape, layout, part).times(trunks)
    return work


def _scoring_passes(stage: RLStage, read: bool) -> tuple[int, int]:
    """How often all thoughts are scored without gradient, and how often all trunks."""
    thoughts, trunks = stage.reward.passes(read, stage.cancels_baselines)
    critic = stage.objective.critic
    whole = stage.objective.mask == "m2" or (critic is not None and critic.centre)
    return thoughts + bool(stage.kl.weight) + whole, trunks


def _thoughts_work(shape: Documents, layout: Layout, count: int) -> Work:
    """Of ``count`` documents' held-out text after every thought."""
    own, branches = shape.own + shape.horizon, count * shape.branches
    rows = Work(rows=branches * shape.horizon)
    if layout == "naive":
        width = shape.context + own
        return Work(width, width**2).times(branches) + rows
    alike = shape.branches // shape.trunks
    trunks = _times_computed(count * shape.trunks, alike, shape.context, own, shape.budget)
    trunk = Work(shape.context, shape.context**2).times(trunks)
    return trunk + Work(own, own * (shape.context + own)).times(branches) + rows


def _times_computed(count: int, branches: int, trunk: int, own: int, budget: int) -> int:
    """How many trunks are computed where documents are split between forwards of ``budget`` tokens.

    Branches follow each other, document by document; a trunk counts once a forward.
    """
    computed, total, last = 0, budget, -1
    for branch in range(count * branches):
        new = branch // branches != last
        if total + own + trunk * new > budget:
            new, total = True, 0
        computed, total, last = computed + new, total + own + trunk * new, branch // branches
    return computed


def _trunks_work(shape: Documents, layout: Layout, count: int) -> Work:
    """Of ``count`` documents' held-out text without a thought: the trunks alone, one row each in both layouts."""
    if shape.frame:
        return _thoughts_work(replace(shape, group=1), layout, count)
    width, spans = shape.context + shape.horizon, count * shape.cuts
    # A forward of the naive layout counts a trunk for every cut, and computes it once.
    together = max(1, shape.budget // width) if layout == "naive" else spans
    trunks = len({(span // together, span // shape.cuts) for span in range(spans)})
    return Work(width, width**2).times(trunks) + Work(rows=spans * shape.horizon)


# ---- micro-batches -------------------------------------------------------------------------------


def document_tokens(cfg: RunConfig, stage: RLStage, layout: Layout, continuations: bool) -> int:
    """Most tokens of one document in one training forward, padding included: what micro-batches are packed by."""
    return _document_tokens(documents(cfg, stage), stage, layout, continuations)


def _document_tokens(shape: Documents, stage: RLStage, layout: Layout, continuations: bool) -> int:
    after, text = wanted(stage, continuations)
    return document_work(shape, layout, shape.own + shape.horizon * after, after or text).tokens


def micro_batches(
    shape: Documents, stage: RLStage, layout: Layout, continuations: bool
) -> list[int]:
    """Documents in each micro-batch of a rank's share: as few as fit, about as many in each."""
    cost = _document_tokens(shape, stage, layout, continuations)
    bins = max(1, min(shape.count, -(-shape.count * cost // shape.budget)))
    while bins < shape.count and -(-shape.count // bins) * cost > shape.budget:
        bins += 1
    return [shape.count // bins + (b < shape.count % bins) for b in range(bins)]


def reads_training_forward(shape: Documents, stage: RLStage, layout: Layout) -> bool:
    """Whether rewards come out of the forward that is trained. Where these documents do not let them, shorter may."""
    whole = len(micro_batches(shape, stage, layout, continuations=True)) == 1
    return stage.update.score_with != "separate_pass" and stage.why_separate(whole) is None


def plan(
    cfg: RunConfig, config: Any, layout: Layout, ranks: int = 1
) -> dict[str, dict[str, float]]:
    """The cost of a step and of the whole stage, stage by stage."""
    return {
        stage.name: table(step_cost(cfg, stage, config, layout, ranks), stage.steps)
        for stage in cfg.stage
    }


def table(cost: Cost, steps: int) -> dict[str, float]:
    """For people and files."""
    return {
        "prefilled_tokens": cost.prefilled_tokens,
        "sampled_tokens": cost.sampled_tokens,
        "scored_tokens": cost.scored_tokens,
        "trained_tokens": cost.trained_tokens,
        "step_gflops": cost.flops / 1e9,
        "stage_tflops": cost.flops * steps / 1e12,
    }
