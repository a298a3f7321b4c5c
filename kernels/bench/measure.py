"""Time, memory and error of every method on one problem, in turn and in one process.

Machines are noisy and drift, so nothing is compared across rounds: every method runs once a round, the order rotates,
and a ratio is the median of the ratios within rounds.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from methods import Data, Loss, Method, Scored
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

CHECKED_ROWS = 256
"""Rows that are held against float64."""
PASSES = {"forward": 2, "forward_backward": 6}
"""Products of N x D x V that each pass counts for, whatever a method recomputes."""

Rounds = list[float]
"""Milliseconds, one entry per round."""


def forward(method: Method, data: Data) -> Scored:
    """Scoring: no graph is kept."""
    with torch.no_grad():
        return method.call(data)


def forward_backward(method: Method, data: Data) -> Data:
    """Training: gradients of hidden and weight, on the leaves that are returned."""
    leaves = data.leaves()
    method.call(leaves).loss.backward()
    return leaves


# ---- time --------------------------------------------------------------------------------------


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call. What it returns is freed after the clock has stopped."""
    if device.type == "cuda":
        return _cuda_milliseconds(call)
    started = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - started
    del result
    return elapsed * 1e3


def _cuda_milliseconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started, stopped = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    result = call()
    stopped.record()
    torch.cuda.synchronize()
    del result
    return started.elapsed_time(stopped)


def matmul_milliseconds(data: Data) -> float:
    """The library's N x D x V product in the inputs' dtype, into memory that has been touched before."""
    out_NV = data.hidden_ND.new_zeros(data.shape.N, data.shape.V)
    return milliseconds(
        lambda: torch.mm(data.hidden_ND, data.weight_VD.T, out=out_NV), out_NV.device
    )


@dataclass
class Times:
    """Rounds of every method."""

    matmul: Rounds = field(default_factory=list)
    of: dict[str, dict[str, Rounds]] = field(default_factory=lambda: {name: {} for name in PASSES})
    """Pass, then method."""
    cpu_share: float | None = None
    """Of the threads' time, what this process computed. Far below 1 on one thread: others used it. CPU only."""


def timed(methods: list[Method], data: Data, num_rounds: int) -> Times:
    """Every method once a round; the first of one round is the last of the next."""
    times, device = Times(), data.hidden_ND.device
    wall, cpu = time.perf_counter(), time.process_time()
    for number in range(num_rounds):
        times.matmul.append(matmul_milliseconds(data))
        first = number % max(len(methods), 1)
        for method in methods[first:] + methods[:first]:
            for name, run in (("forward", forward), ("forward_backward", forward_backward)):
                spent = milliseconds(lambda run=run, method=method: run(method, data), device)
                times.of[name].setdefault(method.name, []).append(spent)
    if device.type == "cpu":
        available = (time.perf_counter() - wall) * torch.get_num_threads()
        times.cpu_share = (time.process_time() - cpu) / available
    return times


def ratio(rounds: Rounds, peer: Rounds | None) -> float | None:
    """The median over rounds of time / the peer's time; None without a peer."""
    if peer is None:
        return None
    return median(mine / other for mine, other in zip(rounds, peer, strict=True))


# ---- memory ------------------------------------------------------------------------------------


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that PyTorch's allocator held during a call beyond what it held before."""
    return _cuda_peak(call) if device.type == "cuda" else _cpu_peak(call)


def _cuda_peak(call: Callable[[], object]) -> int:
    # Workspaces and tuning come with the first call and stay.
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(call: Callable[[], object]) -> int:
    """From the profiler's record of every allocation: it sees into custom operators, and not into oneDNN's scratch."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = call()
    del result
    events = [x for x in found.profiler.kineto_results.events() if x.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def extra_bytes(method: Method, data: Data) -> dict[str, int]:
    """Beyond inputs, and beyond the gradients that a step has to hold anyway."""
    device = data.hidden_ND.device
    gradients = data.hidden_ND.nbytes + data.weight_VD.nbytes
    return {
        "forward": peak_bytes(lambda: forward(method, data), device),
        "forward_backward": peak_bytes(lambda: forward_backward(method, data), device) - gradients,
    }


# ---- error -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """float64 log-probabilities of some rows, and the gradient of a loss of these."""

    data: Data
    logp_N: Tensor
    d_hidden_ND: dict[Loss, Tensor]


def exact(data: Data, losses: set[Loss]) -> Exact:
    """By the definition, with autograd."""
    hidden_ND = data.hidden_ND.double().requires_grad_()
    logp_NV = torch.log_softmax(hidden_ND @ data.weight_VD.double().T, -1)
    logp_N = logp_NV.gather(1, data.target_N[:, None])[:, 0]
    gradients = {
        loss: torch.autograd.grad(loss(logp_N, data), hidden_ND, retain_graph=True)[0]
        for loss in losses
    }
    return Exact(data, logp_N.detach(), gradients)


def errors(method: Method, wanted: Exact) -> dict[str, float]:
    """Nats of log p, and the relative error of dH, whose rounding to the inputs' dtype is in it."""
    wrong_N = forward(method, wanted.data).logp_N.double() - wanted.logp_N
    d_hidden_ND = wanted.d_hidden_ND[method.loss]
    found_ND = forward_backward(method, wanted.data).hidden_ND.grad
    assert found_ND is not None, method.name
    return {
        "max_error": wrong_N.abs().max().item(),
        "rms_error": wrong_N.square().mean().sqrt().item(),
        "gradient_error": ((found_ND.double() - d_hidden_ND).norm() / d_hidden_ND.norm()).item(),
    }


# ---- all of it ---------------------------------------------------------------------------------


def measured(
    methods: tuple[Method, ...], data: Data, num_rounds: int
) -> tuple[list[dict], dict[str, str]]:
    """(one row per method that ran, why each of the others did not)."""
    wanted = exact(data.rows(CHECKED_ROWS), {method.loss for method in methods})
    ready, facts, reasons = [], {}, {}
    for method in methods:
        found = method.why_not(data) or inspected(method, data, wanted)
        if isinstance(found, str):
            reasons[method.name] = found
            continue
        ready.append(method)
        facts[method.name] = found
    times = timed(ready, data, num_rounds)
    return [row(method, data, times, facts[method.name]) for method in ready], reasons


def inspected(method: Method, data: Data, wanted: Exact) -> dict[str, float | int] | str:
    """Errors and memory, or why there are none: no room, or a failure of somebody else's code."""
    try:
        return errors(method, wanted) | extra_bytes(method, data)
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:
        if not method.foreign:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if data.hidden_ND.is_cuda:
        torch.cuda.empty_cache()
    return reason


def row(method: Method, data: Data, times: Times, facts: dict[str, float | int]) -> dict:
    """Everything known of a method, flat. A ratio is time over time: below 1 is faster than the peer."""
    shape = data.shape
    products = shape.N * shape.D * shape.V
    found = {
        "method": method.name, **shape._asdict(), "dtype": str(data.hidden_ND.dtype).removeprefix("torch."),
        "rounds": len(times.matmul), "cpu_share": times.cpu_share,
        "matmul_tflops": 2 * products / median(times.matmul) / 1e9,
    }  # fmt: skip
    for name, count in PASSES.items():
        rounds, extra = times.of[name][method.name], facts[name]
        share = ratio([2 / count * x for x in rounds], times.matmul)
        found |= {
            f"{name}_ms": median(rounds),
            f"{name}_min_ms": min(rounds),
            f"{name}_over_naive": ratio(rounds, times.of[name].get(method.naive)),
            f"{name}_over_upcast": ratio(rounds, times.of[name].get(f"{method.naive}_upcast")),
            f"{name}_tflops": count * products / median(rounds) / 1e9,
            f"{name}_share": 1 / share if share else None,
            f"{name}_extra_mib": extra / 2**20,
            f"{name}_extra_of_logits": extra / (4 * shape.N * shape.V),
        }
    found |= {name: facts[name] for name in ("max_error", "rms_error", "gradient_error")}
    return {key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in found.items()}
