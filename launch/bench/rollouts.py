"""vLLM inside the loop beside vLLM alone: the same requests through rlpt's engine process and a bare `generate`.

    python launch/bench/rollouts.py [--policy 4M] [--size P,G,T,K] [--rounds 5] [--json] [--write]

P tokens of context, G thoughts of up to T tokens for each of K cuts of 2 documents. Both engines stand side by side
with the same weights; in every round each empties its cache and answers all requests, in turn. The loop's time begins
with the prompts and ends with groups: calls, JSON and arrays are in it. The hit rates of the prefix cache stand beside
what an endless cache would have found.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from problem import POLICIES, SEED, Problem, problem
from rich.console import Console
from rich.table import Table
from step import cpu_name, size

from rlpt import dist
from rlpt.config import ThoughtConfig
from rlpt.engines import EngineConfig, VLLMConfig
from rlpt.policy import load
from rlpt.rollout import sync
from rlpt.rollout.engine import generate
from rlpt.rollout.fleet import Fleet
from rlpt.rollout.start import open_engine

RESULTS = Path(__file__).with_name("rollouts.json")
BARE = Path(__file__).with_name("bare_vllm.py")


class Loop:
    """rlpt's engine, as a run uses it."""

    def __init__(self, given: Problem, folder: Path, world: dist.World) -> None:
        self.given = given
        thought = ThoughtConfig(budget_tokens=given.size.thought)
        cfg = EngineConfig(kind="vllm", vllm=VLLMConfig(threads=1, kv_cache_gib=1.0))
        longest = given.size.window + given.size.thought + 2
        engine = open_engine(
            *(cfg, given.policy, given.plan, thought, longest, "bench", folder / "run" / "engine"),
            *(SEED, world),
        )
        assert isinstance(engine, Fleet)
        self.engine = engine
        self.policy = load.load(given.policy, given.plan, world, SEED)
        self.version = 0

    def round(self) -> dict[str, float]:
        """One publication, which empties the cache, then all requests."""
        sync.publish(self.policy, self.engine, self.version)
        self.version += 1
        self.engine.counters()
        started = time.perf_counter()
        groups = generate(
            self.engine, self.given.prompts, self.given.size.group, f"round {self.version}"
        )
        seconds = time.perf_counter() - started
        tokens = sum(rollout.num_actions for group in groups for rollout in group.rollouts)
        counted = self.engine.counters()
        names = ("prefix_hit_rate", "prefix_hit_possible")
        return {"seconds": seconds, "tokens": tokens} | {
            n: counted[f"engine/{n}"][0] / counted[f"engine/{n}"][1] for n in names
        }

    @property
    def requests(self) -> dict[str, Any]:
        """What the bare engine is asked."""
        markers, given = self.given.plan.vocabulary.markers, self.given
        return {
            "prompts": [prompt.policy_ids.tolist() for prompt in given.prompts],
            "count": given.size.group, "budget": given.size.thought, "opener": markers.opener, "closer": markers.closer,
            "longest": self.engine.seats[0].spec.longest, "model": self.engine.seats[0].spec.model,
            "weights": str(self.engine.publisher.folder),  # pyright: ignore[reportAttributeAccessIssue]
        }  # fmt: skip


class Bare:
    """`vllm.LLM` in a process of its own, told what to do over a pipe."""

    def __init__(self, requests: dict[str, Any], folder: Path) -> None:
        (folder / "requests.json").write_text(json.dumps(requests))
        self.process = subprocess.Popen(
            [sys.executable, str(BARE), str(folder / "requests.json")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._line()

    def round(self, number: int) -> dict[str, float]:
        assert self.process.stdin
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{BARE} ended with exit code {self.process.wait()}")
        return line

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)


def measured(given: Problem, rounds: int, folder: Path, world: dist.World) -> dict[str, Any]:
    """Tokens per second of both, round by round; the ratio is the median of ratios within rounds."""
    loop = Loop(given, folder, world)
    try:
        loop.round()
        bare = Bare(loop.requests, folder)
        bare.round(0)
        pairs = []
        for number in range(1, rounds + 1):
            arms = [loop.round, lambda number=number: bare.round(number)]
            order = (0, 1) if number % 2 else (1, 0)
            found: dict[int, dict[str, float]] = {i: arms[i]() for i in order}
            pairs.append((found[0], found[1]))
        bare.close()
    finally:
        loop.engine.close()
    speed = [[one["tokens"] / one["seconds"] for one in pair] for pair in pairs]
    return {
        "loop_tokens_per_s": statistics.median(mine for mine, _ in speed),
        "bare_tokens_per_s": statistics.median(its for _, its in speed),
        "loop_over_bare": statistics.median(mine / its for mine, its in speed),
        "loop_over_bare_range": [min(m / i for m, i in speed), max(m / i for m, i in speed)],
        "prefix_hit_rate": pairs[-1][0]["prefix_hit_rate"],
        "prefix_hit_possible": pairs[-1][0]["prefix_hit_possible"],
        "tokens_a_round": pairs[-1][0]["tokens"],
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--policy", choices=POLICIES, default="4M")
    parser.add_argument("--size", type=size, action="append", help="P,G,T,K; may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help=f"keep the rows in {RESULTS.name}")
    chosen = parser.parse_args()
    rows = []
    for each in chosen.size or [size("1024,16,64,1"), size("1024,16,64,4")]:
        with tempfile.TemporaryDirectory() as folder, dist.world() as world:
            given = problem(chosen.policy, each, "float32", Path(folder))
            row = measured(given, chosen.rounds, Path(folder), world)
        rows.append({"policy": chosen.policy, "size": list(each)} | row)
    _show(rows)
    if chosen.write:
        facts = {
            "date": date.today().isoformat(),
            "hardware": cpu_name(),
            "vllm": "0.32.0, CPU",
            "threads": 1,
        }
        RESULTS.write_text(json.dumps([facts | row for row in rows], indent=1) + "\n")
    if chosen.json:
        print(json.dumps(rows))


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="sampled tokens per second, one thread")
    for heading in ("P,G,T,K", "loop", "bare generate", "loop / bare", "prefix hits", "possible"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            ",".join(map(str, row["size"][:4])), f"{row['loop_tokens_per_s']:.0f}", f"{row['bare_tokens_per_s']:.0f}",
            f"{row['loop_over_bare']:.3f}", f"{row['prefix_hit_rate']:.4f}", f"{row['prefix_hit_possible']:.4f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
