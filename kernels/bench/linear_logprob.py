"""Every implementation of linear_logprob and linear_policy_loss beside every installed peer, in one run.

    python kernels/bench/linear_logprob.py [--shape N,D,V] [--dtype bfloat16] [--threads 1] [--json] [--write]

Prints time, TFLOP/s (2NDV forward, 6NDV with backward), the share of the library's matmul rate, memory beyond inputs
and gradients, and the error against float64. `--write` keeps the rows, with hardware and date, in results.json.
"""

import argparse
import json
import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from measure import measured
from methods import METHODS, Shape, random_data

RESULTS = Path(__file__).with_name("results.json")
SHAPES = {
    "cpu": [Shape(2048, 512, 32_000), Shape(4096, 256, 4096), Shape(8192, 128, 258)],
    "cuda": [Shape(n, d, 151_936) for d in (1024, 2048, 4096) for n in (8192, 16_384, 32_768)],
}
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16"]}
ROUNDS = {"cpu": 5, "cuda": 15}
QUICK = Shape(128, 64, 4096)

SHARED = {
    "ms": "ms", "min_ms": "least", "over_naive": "/naive", "over_upcast": "/upcast", "tflops": "TFLOP/s",
    "share": "/matmul", "extra_mib": "MiB", "extra_of_logits": "/logits",
}  # fmt: skip
TABLES = {
    "forward": {f"forward_{key}": title for key, title in SHARED.items()}
    | {"max_error": "max err", "rms_error": "rms err"},
    "forward_backward": {f"forward_backward_{key}": title for key, title in SHARED.items()}
    | {"gradient_error": "dH err"},
}
"""Fields of a row, and what stands above them."""


def shape(text: str) -> Shape:
    """N,D,V."""
    sizes = [int(word) for word in text.split(",")]
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not N,D,V, such as 2048,512,32000")
    return Shape(*sizes)


def arguments() -> argparse.Namespace:
    """What the user asked for, defaults of the device filled in."""
    parser = argparse.ArgumentParser(
        description="linear_logprob and linear_policy_loss beside their peers"
    )
    parser.add_argument("--shape", type=shape, action="append", help="N,D,V; may be repeated")
    choices = ["float32", "bfloat16", "float16"]
    parser.add_argument(
        "--dtype", choices=choices, action="append", help="of the inputs; may be repeated"
    )
    parser.add_argument("--rounds", type=int, help="how often every method runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda where there is one")
    parser.add_argument(
        "--quick", action="store_true", help="one tiny shape, two rounds, nothing written"
    )
    parser.add_argument("--json", action="store_true", help="one machine-readable line at the end")
    parser.add_argument("--write", action="store_true", help=f"append to {RESULTS.name}")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available; choose cpu")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.device = torch.device(device)
    options.shape = options.shape or ([QUICK] if options.quick else SHAPES[device])
    options.dtype = options.dtype or DTYPES[device]
    options.rounds = options.rounds or (2 if options.quick else ROUNDS[device])
    if min(options.rounds, options.threads) < 1:
        parser.error("--rounds and --threads must be 1 or more")
    return options


def surroundings(options: argparse.Namespace) -> dict:
    """What a figure means nothing without."""
    on_gpu = options.device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "threads": options.threads,
        "torch": torch.__version__,
        "triton": installed_version("triton"),
    }


def cpu_name() -> str:
    """As the kernel of a Linux machine calls it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def installed_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def printed(value: float | None) -> str:
    """Three digits; - where there is nothing to compare with."""
    if value is None:
        return "-"
    return (
        f"{value:.1e}"
        if 0 < abs(value) < 1e-2
        else f"{value:.0f}"
        if value >= 100
        else f"{value:.3g}"
    )


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """One line a method."""
    lines = ["".join([" " * 29, *(f"{title:>9}" for title in columns.values())])]
    for row in rows:
        values = (f"{printed(row[key]):>9}" for key in columns)
        lines.append("".join([f"{row['method']:<29}", *values]))
    return "\n".join(lines)


def report(rows: list[dict], reasons: dict[str, str]) -> None:
    """Two tables, what is missing from them, and how much of the machine there was."""
    for name, columns in TABLES.items():
        print(f"\n{name.replace('_', ' + ')}\n{table(rows, columns)}")
    print()
    for method, reason in reasons.items():
        print(f"not measured: {method}: {reason}")
    if rows and rows[0]["cpu_share"] is not None:
        print(
            f"this process had {rows[0]['cpu_share']:.0%} of its threads' time; the rest it waited or ran serially"
        )
    print(flush=True)


def write(rows: list[dict]) -> None:
    """Append to the list in results.json, one object a line. Interrupted, the file stays as it was."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    lines = ",\n".join(json.dumps(row) for row in [*kept, *rows])
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(f"[\n{lines}\n]\n")
    os.replace(temporary, RESULTS)


def main() -> None:
    """One problem after another; what is measured is kept at once."""
    options = arguments()
    torch.set_num_threads(options.threads)
    where = surroundings(options)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(
        "ratios are time / the peer's time within a round, medians over rounds; below 1 is faster"
    )
    found, missing = [], []
    for size in options.shape:
        for dtype in options.dtype:
            print(
                f"\nN {size.N}, D {size.D}, V {size.V}, {dtype}, {options.rounds} rounds",
                flush=True,
            )
            data = random_data(size, getattr(torch, dtype), options.device)
            rows, reasons = measured(METHODS, data, options.rounds)
            report(rows, reasons)
            found += [where | row for row in rows]
            missing += [
                {"method": x, **size._asdict(), "dtype": dtype, "reason": reasons[x]}
                for x in reasons
            ]
            if options.write and not options.quick:
                write([where | row for row in rows])
    if options.write:
        print("nothing written: --quick" if options.quick else f"written to {RESULTS.name}")
    if options.json:
        print(json.dumps({"results": found, "not_measured": missing}))


if __name__ == "__main__":
    main()
