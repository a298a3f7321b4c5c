"""linear_logprob beside its peer, plain torch on full logits, in one run -> kernels/bench/results.jsonl (append-only).

    python kernels/bench/linear_logprob.py [--threads N] [--quick]

Ratios to the peer are what to quote: machines are noisy, and both are measured in turn.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rlpt_kernels import linear_logprob

RESULTS = Path(__file__).with_name("results.jsonl")
SHAPES = ((2048, 512, 32_000), (4096, 256, 4096), (4096, 128, 2050), (8192, 128, 258))
QUICK = ((512, 128, 4096),)
ROUNDS = 5

LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """The peer: full logits in the inputs' dtype, then a float32 softmax."""
    logits_NV = (hidden_ND @ weight_VD.T).float()
    return torch.log_softmax(logits_NV, -1).gather(1, target_N[:, None])[:, 0]


def ours(impl: Literal["reference", "slabs"]) -> LogProb:
    return lambda hidden, weight, target: linear_logprob(hidden, weight, target, impl=impl).logp


METHODS: dict[str, LogProb] = {
    "naive": naive,
    "reference": ours("reference"),
    "slabs": ours("slabs"),
}


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def forward_backward(method: LogProb, hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    method(hidden, weight, target).sum().backward()


def measure(shape: tuple[int, int, int], dtype: torch.dtype) -> list[dict]:
    """One row per method: best of the rounds, methods in turn, and the error against float64 on 256 rows."""
    count, width, vocabulary = shape
    torch.manual_seed(0)
    hidden = torch.randn(count, width).to(dtype)
    weight = (torch.randn(vocabulary, width) * 2 * width**-0.5).to(dtype)
    target = torch.randint(vocabulary, (count,))
    exact = naive64(hidden[:256], weight, target[:256])
    best = {name: [float("inf"), float("inf")] for name in METHODS}
    for _ in range(ROUNDS):
        for name, method in METHODS.items():
            with torch.no_grad():
                forward = seconds(lambda method=method: method(hidden, weight, target))
            both = seconds(lambda method=method: forward_backward(method, hidden, weight, target))
            best[name] = [min(best[name][0], forward), min(best[name][1], both)]
    rows = []
    for name, method in METHODS.items():
        error = (method(hidden[:256], weight, target[:256]).double() - exact).abs().max().item()
        rows.append(
            {
                "method": name, "N": count, "D": width, "V": vocabulary, "dtype": str(dtype).removeprefix("torch."),
                "forward_ms": round(best[name][0] * 1e3, 1), "forward_backward_ms": round(best[name][1] * 1e3, 1),
                "forward_over_naive": round(best[name][0] / best["naive"][0], 2),
                "forward_backward_over_naive": round(best[name][1] / best["naive"][1], 2),
                "max_error": float(f"{error:.1e}"),
            }
        )  # fmt: skip
    return rows


def naive64(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    logp_NV = torch.log_softmax(hidden_ND.double() @ weight_VD.double().T, -1)
    return logp_NV.gather(1, target_N[:, None])[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description="linear_logprob beside plain torch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one small shape, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = {
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "threads": str(options.threads),
        "torch": torch.__version__,
    }
    for shape in QUICK if options.quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for row in measure(shape, dtype):
                print(json.dumps(row), flush=True)
                if not options.quick:
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(where | row) + "\n")


if __name__ == "__main__":
    main()
