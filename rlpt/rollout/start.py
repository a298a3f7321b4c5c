"""Configuration -> the engine of a run, started and checked before any training."""

import copy
import hashlib
import os
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch

from rlpt import dist
from rlpt.config import PolicyConfig, RunConfig, ThoughtConfig
from rlpt.console import say
from rlpt.dist import together
from rlpt.engines import EngineConfig, VLLMConfig
from rlpt.mixture import open_shards
from rlpt.policy.load import Blueprint, blueprint, meta_model
from rlpt.rollout.broadcasting import own_address
from rlpt.rollout.client import EngineClient
from rlpt.rollout.engine import Engine
from rlpt.rollout.fleet import Fleet
from rlpt.rollout.live import BroadcastPublisher, IPCPublisher
from rlpt.rollout.prefixes import BLOCK
from rlpt.rollout.process import EngineProcess
from rlpt.rollout.publishing import DirectoryPublisher, Publisher
from rlpt.rollout.seat import Seat
from rlpt.rollout.serve import TOKEN, serve
from rlpt.rollout.transformers_engine import TransformersEngine
from rlpt.rollout.wire import DType, EngineSpec
from rlpt_data.strict import UserError


def open_engine(
    cfg: EngineConfig,
    policy: PolicyConfig,
    plan: Blueprint,
    thought: ThoughtConfig,
    longest: int,
    tokenizer: str,
    folder: Path,
    seed: int,
    world: dist.World,
) -> Engine:
    """The engine of a configuration, without weights. ``longest`` is the longest path in tokens, ``folder`` where
    engine processes keep their files. Collective. Raises UserError for everything that can be known beforehand."""
    if cfg.kind == "transformers":
        return TransformersEngine(
            *(plan.config, plan.layout, plan.vocabulary.markers, thought, seed),
            *(cfg.prompts_per_batch, world.device),
        )
    spec = specification(
        cfg.vllm, policy, plan, thought, longest, tokenizer, folder, seed, world.device
    )
    check_memory(plan.config, spec)
    together(lambda: write_model(plan, spec) if world.is_main else None, world)
    seats = _seats(cfg.vllm, spec, folder, world)
    fleet = Fleet(
        seats,
        _publisher(cfg.vllm, spec, seats, folder, world),
        plan.vocabulary.markers,
        thought,
        seed,
        world,
        spec.sleeps,
    )
    say(f"starting {len(seats)} vLLM engine(s) for each of {world.size} rank(s)", world.is_main)
    try:
        together(lambda: _open(seats), world)
    except BaseException:
        fleet.close()
        raise
    return fleet


def _open(seats: list[Seat]) -> None:
    for seat in seats:
        if seat.process is not None:
            seat.process.start()
    for seat in seats:
        seat.open()


def specification(
    cfg: VLLMConfig,
    policy: PolicyConfig,
    plan: Blueprint,
    thought: ThoughtConfig,
    longest: int,
    tokenizer: str,
    folder: Path,
    seed: int,
    device: torch.device,
) -> EngineSpec:
    """What an engine of this policy is started with."""
    dtype: DType = policy.compute_dtype if cfg.dtype == "auto" else cfg.dtype
    cuda = device.type == "cuda"
    return EngineSpec(
        model=str((folder / "model").resolve()),
        architecture=type(meta_model(plan.config)).__name__,
        vocabulary=plan.vocabulary.size,
        tokenizer=tokenizer,
        opener=plan.vocabulary.markers.opener,
        closer=plan.vocabulary.markers.closer,
        longest=longest,
        dtype=dtype,
        # Without a lower precision below it there is nothing to lift.
        head_dtype="model" if dtype == "float32" else cfg.head_dtype,
        temperature=thought.temperature,
        kv_cache_gib=cfg.kv_cache_gib,
        max_sequences=cfg.max_sequences,
        device="cuda" if cuda else "cpu",
        sleeps=cuda and cfg.placement == "colocated",
        seed=seed & 0x7FFFFFFF,
    )


def write_model(plan: Blueprint, spec: EngineSpec) -> None:
    """The configuration that vLLM reads; its weights are published."""
    config: Any = copy.deepcopy(plan.config)
    config.architectures = [spec.architecture]
    Path(spec.model).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(spec.model)


def cache_bytes_per_token(config: Any, dtype: DType) -> int:
    """Keys and values of one token in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * (4 if dtype == "float32" else 2)


def check_memory(config: Any, spec: EngineSpec) -> None:
    """vLLM finds out after ten seconds, in other words. Raises UserError."""
    tokens = -(-spec.longest // BLOCK) * BLOCK
    needed = tokens * cache_bytes_per_token(config, spec.dtype) / 2**30
    if needed > spec.kv_cache_gib:
        raise UserError(
            f"engine.vllm.kv_cache_gib = {spec.kv_cache_gib}: one path of {spec.longest} tokens takes "
            f"{needed:.3g} GiB; raise it"
        )
    free = psutil.virtual_memory().available / 2**30
    if spec.device == "cpu" and spec.kv_cache_gib > 0.9 * free:
        raise UserError(
            f"engine.vllm.kv_cache_gib = {spec.kv_cache_gib}: {free:.1f} GiB of memory are free; lower it, or free some"
        )


def _seats(cfg: VLLMConfig, spec: EngineSpec, folder: Path, world: dist.World) -> list[Seat]:
    """This rank's engines: its own processes, or its share of the addresses."""
    if cfg.addresses:
        return [_remote(cfg, spec, i, folder, world) for i in _share(len(cfg.addresses), world)]
    return [_local(cfg, spec, i, folder, world) for i in range(cfg.engines)]


def _share(count: int, world: dist.World) -> list[int]:
    """Every rank has at least one of the ``count`` engines, and every engine a rank."""
    if count < world.size:
        return [world.rank % count]
    return list(range(world.rank, count, world.size))


def _remote(cfg: VLLMConfig, spec: EngineSpec, i: int, folder: Path, world: dist.World) -> Seat:
    client = EngineClient(
        cfg.addresses[i],
        _token("engine.vllm.addresses"),
        _client(folder, world),
        cfg.timeout_seconds,
    )
    publishes = world.rank < len(cfg.addresses)
    return Seat(f"engine {i}", spec, client, None, cfg.start_seconds, cfg.max_restarts, publishes)


def _token(where: str) -> str:
    """Raises UserError where there is none that a header can carry: what refuses it later would repeat it."""
    token = os.environ.get(TOKEN, "")
    if not token:
        raise UserError(
            f"{where}: set the environment variable {TOKEN} to a secret of the run, the same for trainer and engines"
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"{where}: environment variable {TOKEN} holds spaces, line breaks or letters beyond ASCII; set it to the "
            "token alone"
        )
    return token


def _local(cfg: VLLMConfig, spec: EngineSpec, i: int, folder: Path, world: dist.World) -> Seat:
    number = world.rank * cfg.engines + i
    token = secrets.token_hex(16)
    log = folder / f"engine_{number}.log"
    process = EngineProcess(spec, log, token, cfg.threads, _device(cfg, spec, i), cfg.start_seconds)
    client = EngineClient("", token, _client(folder, world), cfg.timeout_seconds)
    return Seat(f"engine {number}", spec, client, process, cfg.start_seconds, cfg.max_restarts)


def _client(folder: Path, world: dist.World) -> str:
    """Names this rank to engines that other runs may ask, too."""
    path = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=4).hexdigest()
    return f"{folder.parent.name}-{path}/{world.rank}"


def _device(cfg: VLLMConfig, spec: EngineSpec, i: int) -> str | None:
    """The GPU of an engine process, as CUDA_VISIBLE_DEVICES names it: the rank's own, or one of `devices`."""
    if spec.device == "cpu":
        if cfg.devices:
            raise UserError(
                f"engine.vllm.devices = {list(cfg.devices)}: this machine shows no GPU; drop it"
            )
        return None
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cfg.placement == "colocated":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        return visible[rank] if len(visible) > rank and visible[0] else str(rank)
    number = rank * cfg.engines + i
    if number >= len(cfg.devices):
        raise UserError(
            f"engine.vllm.devices = {list(cfg.devices)}: engine {number} of this machine has no GPU; name one for each "
            "of the engines that its ranks start"
        )
    return str(cfg.devices[number])


def _publisher(
    cfg: VLLMConfig, spec: EngineSpec, seats: list[Seat], folder: Path, world: dist.World
) -> Publisher:
    """Collective. Raises UserError for a way that these engines cannot be reached by."""
    way = _way(cfg, spec)
    if way == "directory":
        # A folder of its own: it goes with the run, and what else lies in `weights_dir` stays.
        own = dist.gathered(f"{folder.parent.name}-{secrets.token_hex(4)}", world)[0]
        where = folder / "weights" if cfg.weights_dir is None else cfg.weights_dir / own
        return DirectoryPublisher(where, spec.dtype, world)
    kind = BroadcastPublisher if way == "broadcast" else IPCPublisher
    host = _own_host(cfg.addresses, world)
    return kind(seats, spec.dtype, host, cfg.timeout_seconds, world)


def _way(cfg: VLLMConfig, spec: EngineSpec) -> str:
    colocated = cfg.placement == "colocated"
    if cfg.publish == "auto":
        return "directory"
    if cfg.publish == "ipc" and spec.device == "cpu":
        raise UserError(
            "engine.vllm.publish = 'ipc' shares the memory of a GPU, and there is none; use 'directory'"
        )
    if cfg.publish == "broadcast" and colocated and spec.device == "cuda":
        raise UserError(
            "engine.vllm.publish = 'broadcast' needs a GPU for each of its members (NCCL), and colocated engines "
            "share the trainer's; use 'ipc' or 'directory'"
        )
    return cfg.publish


def _own_host(addresses: Sequence[str], world: dist.World) -> str:
    """The address of rank 0 as engines reach it: loopback where all run on its machine. Collective."""
    machines = dist.gathered(socket.gethostname(), world)
    hosts = [str(urlsplit(address).hostname) for address in addresses]
    hosts += [machine for machine in machines if machine != machines[0]]
    away = [host for host in hosts if host not in ("127.0.0.1", "localhost", "::1")]
    found = "127.0.0.1"

    def look() -> None:
        nonlocal found
        found = own_address(away[0], 9) if away and world.is_main else found

    together(look, world)
    return dist.gathered(found, world)[0]


def serve_engine(cfg: RunConfig, host: str, port: int) -> None:
    """One engine of a run on this machine, until a signal comes: for `engine.vllm.addresses` of its trainer.

    Raises UserError where the token is not set, the policy cannot be served, or the port is taken.
    """
    _token("rlpt engine")
    shards = open_shards(cfg.data)
    plan = blueprint(cfg.policy, shards, cfg.longest_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder, tokenizer = cfg.run_dir / "engine", str(shards.manifest.tokenizer_hash)
    vllm = cfg.engine.vllm.model_copy(update={"placement": "separate"})
    spec = specification(
        vllm,
        cfg.policy,
        plan,
        cfg.thought,
        cfg.longest_branch,
        tokenizer,
        folder,
        cfg.seed,
        device,
    )
    check_memory(plan.config, spec)
    write_model(plan, spec)
    serve(spec, host, port, lambda address: say(f"engine: {address}"))
