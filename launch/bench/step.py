"""One optimiser step end to end: trunks and branches beside the naive layout and TRL's GRPOTrainer, in one run.

    python launch/bench/step.py [--policy 4M] [--size P,G,T,K[,C]] [--arm shared] [--rounds 3] [--json] [--write]

P tokens of context, G thoughts of T tokens for each of K cuts of a document. The arms work in turn on the same random
weights and prompts. Where trl is not installed its arm is left out with a reason: the interpreter that runs this needs
rlpt and trl>=1.16 (the extra `bench`). `--write` keeps the rows, with hardware, versions and date, in results.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import peer
import torch
from arms import OURS, RlptArm, profile
from problem import POLICIES, Problem, Size, problem
from rich.console import Console
from rich.table import Table
from rounds import Arm, peak_bytes, rows, timed

from rlpt import dist

RESULTS = Path(__file__).with_name("results.json")
ARMS = (*OURS, "trl")
# The first is what the bars are about; in each of the others one thing differs.
GRID = [
    Size(1024, 16, 64, 1), Size(1024, 16, 64, 4), Size(1024, 16, 64, 4, spread=True), Size(1024, 4, 64, 1),
    Size(256, 16, 64, 1), Size(2048, 16, 64, 1), Size(1024, 16, 16, 1), Size(1024, 16, 256, 1),
]  # fmt: skip
QUICK = Size(32, 2, 4, 1, continuation=4)
COLUMNS = {
    "step_s": "step s", "generate_s": "generate", "score_s": "score", "train_s": "train",
    "score_train_s": "score+train", "score_train_over_shared": "score+train /shared",
    "step_over_shared": "step /shared", "score_train_gflop": "GFLOP", "score_train_gflop_per_s": "GFLOP/s",
    "peak_mib": "peak MiB",
}  # fmt: skip
"""Fields of a row, and what stands above them."""


def size(text: str) -> Size:
    """P,G,T,K or P,G,T,K,C."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (4, 5) or min(numbers) < 1 or numbers[1] < 2:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not P,G,T,K or P,G,T,K,C with G >= 2, such as 1024,16,64,1"
        )
    return Size(*numbers)


def arguments() -> argparse.Namespace:
    """What the user asked for, defaults of the device filled in."""
    parser = argparse.ArgumentParser(description="one optimiser step, shared, naive and TRL's")
    parser.add_argument("--policy", nargs="+", choices=POLICIES, help="4M unless told")
    parser.add_argument("--size", type=size, action="append", help="P,G,T,K[,C]; repeatable")
    parser.add_argument("--spread", action="store_true", help="cuts all over a document")
    parser.add_argument("--arm", choices=ARMS, action="append", help="may be repeated")
    parser.add_argument("--rounds", type=int, help="how often every arm steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    parser.add_argument("--micro-batch-tokens", type=int, help="of rlpt; unless told its default")
    parser.add_argument(
        "--trl-batch", type=int, help="sequences of a forward of TRL; G unless told"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one toy size, no memory, nothing written"
    )
    parser.add_argument("--json", action="store_true", help="one machine-readable line at the end")
    parser.add_argument("--write", action="store_true", help=f"append to {RESULTS.name}")
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.policy = options.policy or (["toy"] if options.quick else ["4M"])
    options.size = options.size or ([QUICK] if options.quick else GRID)
    if options.spread:
        options.size = [shape._replace(spread=True) for shape in options.size]
    options.arm = options.arm or list(ARMS)
    options.rounds = options.rounds or (2 if options.quick else 3)
    if min(options.rounds, options.threads) < 1:
        parser.error("--rounds and --threads must be 1 or more")
    for shape in options.size:
        if options.trl_batch and shape.sequences % options.trl_batch:
            parser.error(
                f"--trl-batch {options.trl_batch} must divide the {shape.sequences} sequences of a step"
            )
    return options


def surroundings(options: argparse.Namespace, device: torch.device) -> dict:
    """What a figure means nothing without."""
    on_gpu = device.type == "cuda"
    packages = ("rlpt", "torch", "transformers", "trl", "accelerate")
    return {
        "date": date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "threads": options.threads,
        # Both sides compute in it; masters are float32.
        "dtype": "bfloat16" if on_gpu else "float32",
        **{package: installed_version(package) for package in packages},
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


def arm_of(
    name: str, given: Problem, world: dist.World, folder: Path, options: argparse.Namespace
) -> Arm:
    if name == "trl":
        return peer.TrlArm(given, world, folder, options.trl_batch)
    return RlptArm(name, given, world, options.micro_batch_tokens)


def memory(name: str, policy: str, shape: Size, options: argparse.Namespace) -> float | None:
    """MiB of one step, from a process of its own."""
    words = [sys.executable, __file__, "--memory-of", name, "--policy", policy]
    words += ["--size", ",".join(map(str, shape[:5])), "--threads", str(options.threads)]
    words += ["--spread"] if shape.spread else []
    for flag in ("trl_batch", "micro_batch_tokens"):
        if (value := getattr(options, flag)) is not None:
            words += [f"--{flag.replace('_', '-')}", str(value)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout.splitlines()[-1])
    return None if peak is None else peak / 2**20


def measured(
    policy: str, shape: Size, world: dist.World, options: argparse.Namespace
) -> tuple[list[dict], dict[str, float]]:
    """(one row per arm, where the time of the shared arm's step goes)."""
    with tempfile.TemporaryDirectory() as scratch:
        given = problem(policy, shape, options.dtype, Path(scratch))
        arms = [arm_of(name, given, world, Path(scratch), options) for name in options.arm]
        ours = [arm for arm in arms if isinstance(arm, RlptArm)]
        gflop = {arm.name: (arm.cost.scoring_flops + arm.cost.training_flops) / 1e9 for arm in ours}
        first, steps, cpu_share = timed(arms, options.rounds)
        found = rows(given, first, steps, gflop)
        shares = {arm.name: profile(arm) for arm in ours}
    for row in found:
        name = row["arm"]
        row |= {"policy": policy, "cpu_share": cpu_share if world.device.type == "cpu" else None}
        row["peak_mib"] = None if options.quick else memory(name, policy, shape, options)
        row |= shares.get(name, {})
    return [rounded(row) for row in found], shares.get("shared", {})


def rounded(row: dict) -> dict:
    exact = ("loss", "reward")
    return {
        key: float(f"{x:.4g}") if isinstance(x, float) and key not in exact else x
        for key, x in row.items()
    }


def printed(value: float | None) -> str:
    """Three digits; - where there is nothing."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def report(console: Console, found: list[dict], shares: dict[str, float]) -> None:
    """One table a problem, the ratios it is held against, and where the time goes."""
    head = found[0]
    table = Table(title=title(head), title_justify="left")
    table.add_column("arm")
    for name in COLUMNS.values():
        table.add_column(name, justify="right")
    for row in found:
        table.add_row(row["arm"], *(printed(row.get(key)) for key in COLUMNS))
    console.print(table)
    told = f"a sequence per thought / trunks and branches: {head['token_ratio']:.2f} in tokens"
    if head["cpu_share"] is not None:
        told += f"; this process had {head['cpu_share']:.0%} of its threads' time"
    console.print(told)
    for phase in ("score_train_cpu", "step_cpu"):
        ratios = ((row["arm"], row[f"{phase}_over_shared"]) for row in found)
        parts = ", ".join(f"{name} {printed(ratio)}" for name, ratio in ratios)
        console.print(f"{phase.removesuffix('_cpu')} /shared in CPU time: {parts}")
    if shares:
        parts = ", ".join(f"{key.removesuffix('_share')} {x:.1%}" for key, x in shares.items())
        console.print(f"shares of a shared step: {parts}")


def title(row: dict) -> str:
    return (
        f"{row['policy']}: {row['documents']} documents, context P {row['context']}, G {row['group']} thoughts of "
        f"T {row['thought']}, K {row['cuts']} cuts{' all over' if row['spread'] else ''}, "
        f"continuation {row['continuation']}, {row['rounds']} rounds"
    )


def write(found: list[dict]) -> None:
    """Append to the list in results.json, one object a line. Interrupted, the file stays as it was."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    lines = ",\n".join(json.dumps(row) for row in [*kept, *found])
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(f"[\n{lines}\n]\n")
    os.replace(temporary, RESULTS)


def main() -> None:
    """One problem after another; what is measured is kept at once."""
    options = arguments()
    torch.set_num_threads(options.threads)
    with dist.world() as world:
        where = surroundings(options, world.device)
        options.dtype = where["dtype"]
        if options.memory_of:
            memory_of(options, world)
        else:
            bench(options, world, where)


def memory_of(options: argparse.Namespace, world: dist.World) -> None:
    """The other side of `memory`."""
    with tempfile.TemporaryDirectory() as scratch:
        given = problem(options.policy[0], options.size[0], options.dtype, Path(scratch))
        arm = arm_of(options.memory_of, given, world, Path(scratch), options)
        print(json.dumps(peak_bytes(arm, world.device)))


def bench(options: argparse.Namespace, world: dist.World, where: dict) -> None:
    console = Console(width=140)
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    reason = peer.why_not() if "trl" in options.arm else None
    missing = [] if reason is None else [{"arm": "trl", "reason": reason}]
    if reason is not None:
        options.arm.remove("trl")
        console.print(f"not measured: trl: {reason}")
    found = []
    for policy in options.policy if options.arm else []:
        for shape in options.size:
            new, shares = measured(policy, shape, world, options)
            report(console, new, shares)
            found += [where | row for row in new]
            if options.write and not options.quick:
                write([where | row for row in new])
    if options.write:
        console.print("nothing written: --quick" if options.quick else f"written to {RESULTS.name}")
    if options.json:
        print(json.dumps({"results": found, "not_measured": missing}))


if __name__ == "__main__":
    main()
