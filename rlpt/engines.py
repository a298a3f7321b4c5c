"""Engines of a run, as configurations: what samples thoughts, where it runs, and how old a thought may get."""

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import model_validator

from rlpt.stages import Count, Positive, Rate
from rlpt_data.strict import Strict

DECODED_TOGETHER = 32


class VLLMConfig(Strict):
    placement: Literal["colocated", "separate"] = "colocated"
    """colocated: one engine process per trainer rank, on its device, asleep while the rank trains. separate: processes
    of their own, which sample while the rank trains."""
    engines: Positive = 1
    """separate: processes that each rank starts on its machine. Unused with `addresses`."""
    addresses: tuple[str, ...] = ()
    """separate: engines that run already (`rlpt engine`), as http://host:port; the ranks share them out. The token is
    in the environment variable RLPT_ENGINE_TOKEN."""
    devices: tuple[Count, ...] = ()
    """separate: GPUs of this machine for the engines, one each, in the order of ranks."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: what the policy computes in."""
    head_dtype: Literal["model", "float32"] = "float32"
    """Precision of the engine's logits; the trainer's are always float32."""
    publish: Literal["auto", "directory", "broadcast", "ipc"] = "auto"
    """How weights travel. directory: files that trainer and engines see. broadcast: from rank 0 through a group (NCCL,
    gloo on CPUs). ipc: memory of the rank's own GPU. auto: directory; ipc and NCCL have not run on a GPU yet.
    With broadcast and ipc rank 0 keeps a copy in main memory, for engines that are restarted."""
    weights_dir: Path | None = None
    """Folder for `directory`, seen by trainer and engines alike; absent: in the run folder."""
    kv_cache_gib: Rate = 0.5
    max_sequences: Positive = 256
    """Rollouts that one engine decodes together."""
    threads: Positive | None = None
    """CPU threads of one engine process; absent: as many as the trainer's."""
    timeout_seconds: Rate = 120.0
    """Longest time without an answer, or without a new token, before an engine counts as dead."""
    start_seconds: Rate = 300.0
    """Longest time that an engine may take to load."""
    max_restarts: Count = 100
    """Restarts of one engine, over the run, before the run gives up."""

    @model_validator(mode="after")
    def _placed(self) -> "VLLMConfig":
        if self.placement == "colocated":
            given = {
                "engines": self.engines > 1,
                "addresses": self.addresses,
                "devices": self.devices,
            }
            for name, value in given.items():
                if value:
                    raise ValueError(f"engine.vllm.{name} needs engine.vllm.placement = 'separate'")
        for name, given in {
            "engines": self.engines > 1,
            "devices": self.devices,
            "threads": self.threads,
        }.items():
            if given and self.addresses:
                raise ValueError(
                    f"engine.vllm.{name} is of engines that the run starts itself, and addresses names others; drop one"
                )
        for address in self.addresses:
            if "@" in address:
                raise ValueError(
                    "engine.vllm.addresses: a name or a password would be written to config.json; put the token in the "
                    "environment variable RLPT_ENGINE_TOKEN"
                )
            if not _is_of_an_engine(address):
                raise ValueError(
                    f"engine.vllm.addresses: {address!r} is not of the form http://host:port"
                )
        if self.placement == "separate" and self.publish == "ipc":
            raise ValueError(
                "engine.vllm.publish = 'ipc' needs engines on the rank's own GPU; use 'directory'"
            )
        if self.weights_dir is not None and self.publish in ("broadcast", "ipc"):
            raise ValueError(
                f"engine.vllm.weights_dir has no effect with publish = {self.publish!r}; leave it out"
            )
        return self


class EngineConfig(Strict):
    kind: Literal["transformers", "vllm"] = "transformers"
    prompts_per_batch: Positive = DECODED_TOGETHER
    """transformers: prompts decoded together; all cuts of a document go together. Changes speed and memory, never a
    sample."""
    vllm: VLLMConfig = VLLMConfig()

    @model_validator(mode="after")
    def _used(self) -> "EngineConfig":
        """A setting that would be ignored is a mistake."""
        if self.kind == "transformers" and self.vllm != VLLMConfig():
            raise ValueError(
                "[engine.vllm] has no effect while engine.kind = 'transformers'; set kind = 'vllm'"
            )
        if self.kind == "vllm" and self.prompts_per_batch != DECODED_TOGETHER:
            raise ValueError(
                "engine.prompts_per_batch is the transformers engine's; use engine.vllm.max_sequences"
            )
        return self


class RolloutConfig(Strict):
    """How far sampling may run ahead of training, and how often a group is trained."""

    max_staleness: Count = 0
    """Most versions between the weights that sampled a token and those that are trained. 0: strictly on-policy."""
    ahead: Count | None = None
    """Steps of prompts that engines have in hand beside the one in training; absent: max_staleness. More keeps slow
    engines busy, and what a fast one samples too early is dropped."""
    max_reuse: Positive = 1
    """Most times a group is trained. Its rewards are computed anew each time, by the policy of that step."""
    max_age: Count | None = None
    """Most versions a group may be old when it is trained again; absent: 4 x max_reuse."""
    source: Literal["engine", "saved"] = "engine"
    """saved: every step trains on the groups that `saved` holds for it; the engine is asked by evaluations alone."""
    saved: Path | None = None
    """Run folder with groups (`save_groups`) for source = "saved"."""
    save_groups: bool = False
    """Write every step's groups in full, for source = "saved" and `rlpt replay`."""
    train: bool = True
    """false: rollouts only. Steps sample, score and log, and leave the weights alone."""

    @property
    def steps_ahead(self) -> int:
        return self.max_staleness if self.ahead is None else self.ahead

    @property
    def oldest_reused(self) -> int:
        return self.max_age if self.max_age is not None else 4 * self.max_reuse

    @model_validator(mode="after")
    def _combinations(self) -> "RolloutConfig":
        if (self.source == "saved") != (self.saved is not None):
            raise ValueError("rollout.source = 'saved' and rollout.saved = RUN_DIR go together")
        if self.source == "saved" and (
            self.max_staleness or self.max_reuse > 1 or self.save_groups
        ):
            raise ValueError(
                "rollout.source = 'saved' trains on given groups: max_staleness, max_reuse and save_groups have no part"
            )
        if self.max_age is not None and self.max_reuse == 1:
            raise ValueError("rollout.max_age needs rollout.max_reuse >= 2")
        if self.steps_ahead and not self.max_staleness:
            raise ValueError(
                f"rollout.ahead = {self.ahead}: groups sampled ahead are older than max_staleness = 0 allows"
            )
        return self


def _is_of_an_engine(address: str) -> bool:
    try:
        parts = urlsplit(address)
        # A port that is no number raises here; so does a host that no name server can be asked for.
        whole = parts.port and parts.hostname and parts.hostname.encode("idna")
    except ValueError:
        return False
    return bool(whole) and address == f"http://{parts.netloc}"
