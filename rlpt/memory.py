"""Bytes that a step needs on one rank, from shapes alone, at the longest contexts and thoughts.

Blocks are counted as those of Llama and Qwen3: two norms, one attention, a gated MLP. What allocators lose to
fragmentation, libraries and parameters that FSDP gathers for a block are left out.
"""

from dataclasses import dataclass
from typing import Any

from rlpt.config import RunConfig
from rlpt.flops import (
    Documents,
    Layout,
    document_work,
    documents,
    framed_work,
    reads_training_forward,
    wanted,
    widths,
)
from rlpt.stages import NextTokenStage, RLStage, Stage

STATE_BYTES, COPY_BYTES = 16, 4
"""Of a parameter: float32 weight, gradient and the two moments of AdamW; a float32 copy (EMA, frozen, engine)."""
FLOAT = 4
CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 1 << 23}
LEAST_ROWS = 256
"""Of the head's logits, as in `rlpt_kernels.chunked`."""
CACHE_ROOM = 64
"""Tokens of a rollout that have room in its cache at first, as in `rlpt.rollout.trunk_decoder`."""
VOCABULARY_COPIES = 4
"""Of an embedding's gradient at the end of a backward: the head's, the lookup's, their sum, and FSDP's."""


@dataclass(frozen=True)
class Memory:
    """What one rank holds beside weights and optimiser while it takes a step."""

    micro_batch_tokens: int
    """Of the largest micro-batch."""
    activation_bytes: int
    head_bytes: int
    cache_bytes: int
    """Of the reference engine before the update, or what one vLLM engine keeps for itself."""

    @property
    def peak_bytes(self) -> int:
        """Caches are gone when the update begins."""
        return max(self.activation_bytes + self.head_bytes, self.cache_bytes)


def step_memory(
    cfg: RunConfig, stage: Stage, config: Any, layout: Layout, ranks: int = 1, device: str = "cpu"
) -> Memory:
    """The memory of one step of a stage; ``config`` is the transformers configuration."""
    tokens = micro_batch_tokens(cfg, stage, layout, ranks)
    cache = 0
    if isinstance(stage, RLStage):
        cache = cache_bytes(documents(cfg, stage, ranks), config, layout)
        if cfg.engine.kind == "vllm":
            cache = int(cfg.engine.vllm.kv_cache_gib * 2**30)
    return Memory(
        tokens,
        activation_bytes(config, tokens, cfg),
        head_bytes(config, tokens, device),
        cache,
    )


def micro_batch_tokens(cfg: RunConfig, stage: Stage, layout: Layout, ranks: int = 1) -> int:
    """Most tokens of one forward and backward, padding included: a budget's worth, or one document that exceeds it."""
    if isinstance(stage, NextTokenStage):
        most = framed_work(cfg, stage).tokens // stage.documents_per_step
        count = -(-stage.documents_per_step // ranks)
    else:
        shape = documents(cfg, stage, ranks)
        after, text = wanted(stage, reads_training_forward(shape, stage, layout))
        own = shape.own + shape.horizon * after
        most, count = document_work(shape, layout, own, after or text).tokens, shape.count
    return min(count * most, max(most, stage.micro_batch_tokens))


def activation_bytes(config: Any, tokens: int, cfg: RunConfig) -> int:
    """What autograd keeps of the body until the backward: every block's tensors, or with checkpoints every block's
    input and one block's tensors; the last norm's, and the hidden states that the head reads.
    """
    compute = FLOAT if cfg.policy.compute_dtype == "float32" else 2
    width, layers = config.hidden_size, config.num_hidden_layers
    block = block_bytes(config, compute)
    kept = layers * block
    if cfg.policy.gradient_checkpointing:
        kept = layers * compute * width + block
    return tokens * (kept + _norm_bytes(width, compute))


def block_bytes(config: Any, compute: int) -> int:
    """Of one token in one block, for products in ``compute`` bytes."""
    width, queries, keys = widths(config)
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    # Queries, keys, values and output; gate, its activation, the other factor and the product.
    kept = compute * (2 * queries + 2 * keys + 4 * config.intermediate_size) + FLOAT * heads
    if "qwen3" in config.model_type:
        # The norms of queries and keys: rotary positions keep nothing of their outputs.
        kept += (FLOAT + compute) * (queries + keys) + FLOAT * (heads + key_heads)
    return kept + 2 * _norm_bytes(width, compute)


def _norm_bytes(width: int, compute: int) -> int:
    """Input in float32, its scale, the normed input and the output."""
    return (FLOAT + 2 * compute) * width + FLOAT


def head_bytes(config: Any, tokens: int, device: str = "cpu") -> int:
    """Gradients that the policy loss leaves in its forward, beside two chunks of logits; or, where that is more, the
    gradients of the vocabulary's matrices at the end of the backward.
    """
    width, vocabulary = config.hidden_size, config.vocab_size
    matrix, row = FLOAT * width * vocabulary, FLOAT * vocabulary
    chunk = min(tokens, max(LEAST_ROWS, CHUNK_BYTES[device] // row)) * row
    left = FLOAT * width * tokens + matrix
    return max(left + 2 * chunk, VOCABULARY_COPIES * matrix)


def cache_bytes(shape: Documents, config: Any, layout: Layout) -> int:
    """Keys and values of one batch of the reference engine, float32: contexts once a rollout, or once a document."""
    prompts = min(shape.count * shape.trunks * shape.cuts, shape.batch)
    rollouts, own = prompts * shape.group, 1 + shape.thought
    tokens = rollouts * (shape.context + own)
    if layout == "shared":
        # Openers lie beside the trunk, too; the room of a rollout doubles.
        room = max(CACHE_ROOM, 1 << (own - 1).bit_length())
        tokens = -(-prompts // shape.cuts) * shape.context + prompts + rollouts * room
    return tokens * 2 * config.num_hidden_layers * widths(config)[2] * FLOAT


def state_bytes(cfg: RunConfig, parameters: int, ranks: int = 1) -> int:
    """Of one rank: its shard of the training state and of the copies that rewards need; the engine's whole model."""
    stages = [stage for stage in cfg.stage if isinstance(stage, RLStage)]
    copies = max((len(stage.replicas) for stage in stages), default=0)
    shard = -(-parameters * cfg.policy.replicas // ranks)
    return shard * (STATE_BYTES + COPY_BYTES * copies) + COPY_BYTES * parameters
