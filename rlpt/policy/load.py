"""Configuration -> a sharded policy. Parameters are made on the meta device, sharded with FSDP2, then filled shard by
shard: no rank ever holds more than one full tensor at a time. Masters are fp32 whatever the file or the compute dtype.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rlpt import dist, rng
from rlpt.config import FreshPolicy, PolicyConfig
from rlpt.phases import CLOCK
from rlpt.policy.attention import implementation
from rlpt.policy.chat import frame_of
from rlpt.policy.families import check_positions, choose
from rlpt.policy.given import model_config
from rlpt.policy.logprobs import check_head
from rlpt.policy.markers import Vocabulary, read_tokenizer, same_text_tokenizer, vocabulary
from rlpt.policy.packing import Layout
from rlpt.policy.policy import Policy
from rlpt.templates import INLINE, ChatFrame, InlineFrame
from rlpt_data.shards import ShardFolder, digest_file
from rlpt_data.strict import UserError

Source = Callable[[str, torch.Size], Tensor]
"""(parameter name, shape) -> the full tensor."""

_CONFIGS = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}


@dataclass(frozen=True)
class Blueprint:
    """Everything about a policy but its numbers: the transformers configuration and the vocabulary."""

    config: Any
    vocabulary: Vocabulary
    tokenizer: dict[str, Any]
    layout: Layout
    note: str
    """Why this layout."""

    def token_bytes(self, shards: ShardFolder) -> list[bytes]:
        """Of every id of the policy; the markers and spare rows stand for no text."""
        known = shards.token_bytes()
        return [*known, *[b""] * (self.vocabulary.size - len(known))]


def blueprint(
    cfg: PolicyConfig,
    shards: ShardFolder,
    longest: int,
    frame: InlineFrame | ChatFrame = INLINE,
) -> Blueprint:
    """Resolve architecture, markers and their frame, and layout for paths of up to ``longest`` tokens.

    Raises UserError where the tokenizer is not the shards', or the model cannot do what the layout or the paths ask.
    """
    config, vocab, tokenizer = _described(cfg, shards)
    check_positions(config, longest)
    markers = replace(vocab.markers, frame=frame_of(frame, cfg, shards, tokenizer))
    vocab = replace(vocab, markers=markers)
    return Blueprint(config, vocab, tokenizer, *choose(cfg.layout, config, longest))


def _described(cfg: PolicyConfig, shards: ShardFolder) -> tuple[Any, Vocabulary, dict[str, Any]]:
    tokenizer = read_tokenizer(shards.tokenizer_path)
    if cfg.fresh is not None:
        vocab = vocabulary(cfg, tokenizer, embedding_rows=0)
        return _fresh_config(cfg.fresh, vocab.size), vocab, tokenizer
    assert cfg.path is not None
    config = model_config(cfg.path, "policy.path")
    own = read_tokenizer(cfg.path / "tokenizer.json")
    if not same_text_tokenizer(own, tokenizer):
        raise UserError(
            f"policy.path = {cfg.path}: its tokenizer is not the one of the shards in {shards.path} (hash "
            f"{digest_file(cfg.path / 'tokenizer.json')}, theirs {shards.manifest.tokenizer_hash}); prepare shards "
            f"with [tokenizer] kind = 'file', path = {str(cfg.path)!r}"
        )
    vocab = vocabulary(cfg, own, embedding_rows=config.vocab_size)
    config.vocab_size = vocab.size
    return config, vocab, own


def _fresh_config(cfg: FreshPolicy, vocab_size: int) -> Any:
    mlp_width = cfg.mlp_width or -(-cfg.width * 8 // 3 // 32) * 32
    return _CONFIGS[cfg.architecture](
        vocab_size=vocab_size,
        hidden_size=cfg.width,
        intermediate_size=mlp_width,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads or cfg.heads,
        head_dim=cfg.width // cfg.heads,
        max_position_embeddings=cfg.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        tie_word_embeddings=cfg.tie_embeddings,
        initializer_range=cfg.init_std,
        bos_token_id=None,
        eos_token_id=None,
    )


def meta_model(config: Any, layout: Layout = "naive") -> Any:
    """The transformers model without storage, its non-persistent buffers real."""
    # transformers writes the attention's name into the configuration, which engines share.
    with torch.device("meta"):
        lm = transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=torch.float32,
            attn_implementation=implementation(layout),
            trust_remote_code=False,
        )
    check_head(lm)
    for name, module in list(lm.named_modules()):
        if module._non_persistent_buffers_set:
            _restore(lm, name, module)
    return lm


def _restore(lm: Any, name: str, module: nn.Module) -> None:
    """Fill buffers that no file holds (rotary frequencies, Gemma's embedding scale) by transformers' own rules."""
    leaves = [
        leaf for leaf in module._non_persistent_buffers_set if module._buffers[leaf] is not None
    ]
    for leaf in leaves:
        meta = module.get_buffer(leaf)
        if not meta.is_floating_point():
            raise UserError(_unfilled(f"{name}.{leaf}", lm))
        setattr(module, leaf, torch.full_like(meta, torch.nan, device="cpu"))
    lm._init_weights(module)
    for leaf in leaves:
        if module.get_buffer(leaf).isnan().any():
            raise UserError(_unfilled(f"{name}.{leaf}", lm))


def _unfilled(name: str, lm: nn.Module) -> str:
    return f"policy: nothing fills the buffer {name} of {type(lm).__name__}; choose another model"


def sharded(cfg: PolicyConfig, plan: Blueprint, world: dist.World) -> Policy:
    """The policy on the mesh, unfilled: one FSDP unit per decoder block, the root holds embedding, norm and head."""
    lm = meta_model(plan.config, plan.layout)
    if cfg.gradient_checkpointing:
        _refuse_dropout(plan.config)
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(lm, plan.layout)
    compute = None if cfg.compute_dtype == "float32" else getattr(torch, cfg.compute_dtype)
    precision = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32 if compute else None
    )
    mesh = dist.mesh(world, cfg.replicas)
    for block in lm.model.layers:
        if cfg.compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    assert isinstance(policy, Policy)
    _materialise(policy, world.device)
    return policy.train(cfg.gradient_checkpointing)


def _materialise(policy: Policy, device: torch.device) -> None:
    buffers = dict(policy.named_buffers())
    for name, buffer in buffers.items():
        # `fill` copies parameters only: a buffer that is not filled yet would stay noise.
        if buffer.is_meta:
            raise UserError(_unfilled(name.removeprefix("lm."), policy.lm))
    policy.to_empty(device=device)
    for name, buffer in buffers.items():
        module, _, leaf = name.rpartition(".")
        getattr(policy.get_submodule(module), leaf).copy_(buffer)
    if policy.lm.config.tie_word_embeddings:
        policy.lm.lm_head.weight = policy.lm.model.embed_tokens.weight


def _refuse_dropout(config: Any) -> None:
    for key, value in config.to_dict().items():
        if key.endswith("dropout") and value:
            raise UserError(
                f"policy: {key} = {value} in config.json; rewards and losses need dropout 0"
            )


def load(cfg: PolicyConfig, plan: Blueprint, world: dist.World, seed: int) -> Policy:
    """The policy of a configuration, filled from its folder or from the seed."""
    policy = sharded(cfg, plan, world)
    source = _from_seed(plan, seed) if cfg.path is None else _from_folder(cfg.path, plan, seed)
    fill(policy, source)
    return policy


@torch.no_grad()
def fill(policy: Policy, source: Source) -> None:
    """Copy each parameter's own shard out of the full tensor, one tensor at a time."""
    for name, parameter in policy.lm.named_parameters():
        CLOCK.beat()
        full = source(name, parameter.shape)
        assert isinstance(parameter, DTensor), name
        part = distribute_tensor(
            full.float(), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
        parameter.to_local().copy_(part.to_local())


@torch.no_grad()
def copy_weights(target: Policy, source: Policy) -> None:
    """Copy shard by shard between two policies of one blueprint."""
    for into, out in zip(target.parameters(), source.parameters(), strict=True):
        local(into).copy_(local(out))


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def named_full_tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """(transformers name, full fp32 tensor), one at a time. Collective: every rank iterates to the end."""
    for name, parameter in policy.lm.named_parameters():
        CLOCK.beat()
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        yield name, full.detach()


def _from_seed(plan: Blueprint, seed: int) -> Source:
    """Normal(0, init_std) matrices, norms of 1, biases of 0: each tensor from its own key, whatever the ranks."""
    std = plan.config.initializer_range

    def make(name: str, shape: torch.Size) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(rng.key(seed, "init", name) & (2**63 - 1))
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    return make


def _from_folder(folder: Path, plan: Blueprint, seed: int) -> Source:
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), path)

    def read(name: str, shape: torch.Size) -> Tensor:
        if name not in files:
            raise UserError(
                f"{folder}: no tensor {name!r} in its safetensors files; is it a complete {type(plan.config).__name__}?"
            )
        with safe_open(files[name], "pt") as tensors:
            return _grown(tensors.get_tensor(name), name, shape, seed)

    return read


def _grown(tensor: Tensor, name: str, shape: torch.Size, seed: int) -> Tensor:
    """New vocabulary rows: the mean of the old ones plus a tenth of their spread, so that the markers differ."""
    missing = shape[0] - tensor.shape[0]
    if missing == 0 and tensor.shape == shape:
        return tensor
    if missing < 0 or tensor.shape[1:] != shape[1:]:
        raise UserError(
            f"policy: tensor {name!r} has shape {tuple(tensor.shape)}, config.json implies {tuple(shape)}"
        )
    generator = torch.Generator().manual_seed(rng.key(seed, "grow", name) & (2**63 - 1))
    noise = torch.empty(missing, *shape[1:]).normal_(generator=generator)
    rows = tensor.float().mean(0, keepdim=True) + 0.1 * tensor.float().std(0, keepdim=True) * noise
    return torch.cat([tensor.float(), rows])
