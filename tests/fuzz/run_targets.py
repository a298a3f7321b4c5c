"""What a run leaves behind, read by those who show it, fit it and go on from it."""

import functools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing import Target
from mutations import Mutate, either, flipped, of_json, of_lines, wrapped
from shard_targets import document

from rlpt import checkpoint
from rlpt.checkpoint import folders
from rlpt.compute import summed
from rlpt.config import PromptConfig
from rlpt.evaluate import answers, files
from rlpt.evaluate.answers import Answered
from rlpt.evaluate.bits_per_byte import WindowRecord
from rlpt.evaluate.evaluation import Evaluation
from rlpt.evaluate.quantities import Resampling
from rlpt.evaluate.records import First, Greedy, Prediction, Record
from rlpt.law import curves
from rlpt.lots import Lot, lot_of, lot_row
from rlpt.prompts import Samples, prompts_of, trunk
from rlpt.report import run as report
from rlpt.rollout.records import packed, supply_rows
from rlpt.rows import unzipped, zipped
from rlpt.runlog import read_config, read_journal
from rlpt.types import Group, Markers, Rollout
from rlpt.watch import numbers
from rlpt.watch.following import Watched
from rlpt.watch.frame import alarms, frame

_ROWS = [
    {"step": n, "stage": "warm" if n < 3 else "rl", "loss/next_token": 2.5 / n, "time/step": 0.5,
     "tokens/train": 64.0, "reward/mean": None if n < 3 else 0.1, "mismatch/ess": 0.9}
    for n in range(1, 7)
]  # fmt: skip
_INTERVAL = {"mean": 0.1, "ci_low": 0.0, "ci_high": 0.2, "clusters": 9}
_EVALUATIONS = [
    {"step": n, "stage": "rl", "summary": {"gain_heldout": _INTERVAL, "verdict": "helps"}}
    for n in (0, 6)
]
_CONFIG = {
    "run_dir": "x",
    "stage": [
        {"name": "warm", "kind": "next_token", "steps": 2},
        {"name": "rl", "kind": "rl", "steps": 9},
    ],
}
_DUMP = {
    "step": 6, "document": "ab", "context": "It", "continuation_tokens": [" ra", "ins"],
    "rollouts": [{"thought": "t", "gain": 0.5, "reward": 0.5, "logp": [-1.0, -2.0]}],
}  # fmt: skip


def lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


_zipped_lines: Mutate = wrapped(of_lines, unzipped, zipped)
_zipped_json: Mutate = wrapped(either(of_json, flipped), unzipped, zipped)
FILES: dict[str, tuple[bytes, Mutate]] = {
    "metrics.jsonl": (lines(_ROWS), of_lines),
    "evaluations.jsonl": (lines(_EVALUATIONS), of_lines),
    "config.json": (json.dumps(_CONFIG).encode(), either(of_json, flipped)),
    "summary.json": (b'{"steps": 6, "wall_seconds": 3.5}', either(of_json, flipped)),
    "rollouts/step_000006.jsonl.zst": (zipped(lines([_DUMP])), _zipped_lines),
}
"""A run folder: name -> valid bytes, and how they are mutated."""


def run_folder(folder: Path) -> Path:
    (folder / "rollouts").mkdir(parents=True)
    for name, (data, _) in FILES.items():
        (folder / name).write_bytes(data)
    return folder


def targets(scratch: Path) -> Iterator[Target]:
    run = run_folder(scratch / "run")
    yield from _views(run)
    yield from _fits(scratch, run)
    yield from _evaluations(scratch)
    yield Target("run: supply rows", _supply(_Alone()), [_lots(_Alone())], _zipped_lines)
    yield from _checkpoints(scratch)


# ---- views ---------------------------------------------------------------------------------------


def _views(run: Path) -> Iterator[Target]:
    names = list(FILES)
    samples = [bytes([n]) + FILES[name][0] for n, name in enumerate(names)]

    def any_file(rng: random.Random, _: Sequence[bytes]) -> bytes:
        """The number of a file, and what stands in it."""
        n = rng.randrange(len(names))
        data, mutate = FILES[names[n]]
        return bytes([n]) + mutate(rng, [data])

    def with_file(read: Callable[[], object]) -> Callable[[bytes], None]:
        def changed(data: bytes) -> None:
            name = names[data[0]]
            (run / name).write_bytes(data[1:])
            try:
                read()
            finally:
                (run / name).write_bytes(FILES[name][0])

        return changed

    def journals() -> None:
        read_config(run / "config.json")
        summed(read_journal(run / "metrics.jsonl"), {"warm": 1.0, "rl": 2.0})
        read_journal(run / "evaluations.jsonl")

    def watched() -> None:
        known = Watched(run).look()
        numbers(known)
        alarms(known)
        frame(known)

    yield Target("run: journals", with_file(journals), samples, any_file)
    yield Target("run: report's reader", with_file(lambda: report.read(run)), samples, any_file)
    yield Target("run: watch", with_file(watched), samples, any_file)
    law = with_file(lambda: curves.read(run, "steps", "gain_heldout.mean", None))
    yield Target("fit: run", law, samples, any_file)


def _fits(scratch: Path, run: Path) -> Iterator[Target]:
    rungs = [
        {"name": f"r{n}", "training": {"flops": 1e9 * n, "steps": n}, "gain_heldout": _INTERVAL}
        for n in (1, 2)
    ]
    table = b"flops,gain,gain.ci_low,gain.ci_high\n1e9,0.1,0.0,0.2\n2e9,,,\n"

    def read(name: str, y: str) -> Callable[[bytes], object]:
        def curve(data: bytes) -> object:
            (scratch / name).write_bytes(data)
            return curves.read(scratch / name, "flops", y, None)

        return curve

    ladder = json.dumps({"rungs": rungs}).encode()
    yield Target(
        "fit: ladder", read("ladder.json", "gain_heldout.mean"), [ladder], either(of_json, flipped)
    )
    yield Target("fit: table", read("table.csv", "gain"), [table], flipped)


# ---- evaluations ---------------------------------------------------------------------------------


def _evaluations(scratch: Path) -> Iterator[Target]:
    record = Record(
        epoch=0, document="ab", domain="", cut=3, sample=0, num_bytes=4,
        continuation_ids=np.array([1, 2]), logp={"own": np.array([-1.0, -2.0], np.float32)},
        firsts={"own": First(1, -0.5)}, thought_ids=np.array([5]), finish="closer", named_prefix=0,
        thought_nats=1.5, thought_actions=2, prediction=Prediction((1, 2), 1, 1.0),
        greedy=Greedy((5,), None),
    )  # fmt: skip
    window = WindowRecord("ab", "", 0, 3.5, 4, 9)
    file = scratch / "e.json.zst"
    files.save(file, Evaluation([record], [window], {"v": 1}, Resampling("document", 50, 0)))

    def load(data: bytes) -> None:
        file.write_bytes(data)
        found = files.load(file)
        for each in found.records:
            assert isinstance(each.key, tuple)
            each.total("own") if "own" in each.logp else None

    yield Target("eval: evaluation", load, [file.read_bytes()], _zipped_json)
    path = scratch / "a.jsonl.zst"
    answers.save(
        path, [Answered("ab", "2?", "2", ["t"], ["2"], [True], ["3"], [False], [1], [True])] * 2
    )

    def load_answers(data: bytes) -> None:
        path.write_bytes(data)
        answers.load(path)

    yield Target("eval: answers", load_answers, [path.read_bytes()], _zipped_lines)


# ---- what a run goes on from ---------------------------------------------------------------------

_PROMPTS = PromptConfig(context_tokens=8, min_context_tokens=1, horizon_tokens=4)
_MARKERS = Markers(256, 257)


class _Alone(Samples):
    """A stream of one document."""

    def at(self, position: int):
        return position, document("It rains. We stay in.")

    @functools.cached_property
    def lot(self) -> Lot:
        prompts = prompts_of(trunk(self.at(3)[1], 3, _PROMPTS, 0), _PROMPTS, _MARKERS)
        two = np.array([70, 257])
        rollout = Rollout(two, two > 0, np.zeros(2, np.float32), np.zeros(2, np.int64), 1, "closer")
        return Lot(3, prompts, [], [Group(prompt, (rollout,)) for prompt in prompts], 1)


def _lots(stream: _Alone) -> bytes:
    rating = {"place": "rated", "position": -1, "of": "document", "name": "ab", "rating": [1.0, 2]}
    return packed([lot_row(stream.lot, "kept"), rating])


def _supply(stream: _Alone) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        for row in sorted(supply_rows(data, "f"), key=lambda row: row["position"]):
            if "of" not in row:
                lot_of(row, stream, _PROMPTS, _MARKERS, 0, "f")

    return read


def _checkpoints(scratch: Path) -> Iterator[Target]:
    path = scratch / "run/checkpoints/step_000006"
    path.mkdir(parents=True)
    (path / "a.distcp").write_bytes(b"x" * 9)
    entry = folders.entry_of(path / "a.distcp")
    marker = folders.marker_text({"a.distcp": entry}).encode()

    def complete(data: bytes) -> None:
        (path / folders.MARKER).write_bytes(data)
        try:
            folders.manifest(path)
        except ValueError:
            assert folders.defect(path)
            raise

    yield Target(
        "checkpoint: COMPLETE", complete, [marker], either(of_json, flipped), (ValueError,)
    )
    progress = json.dumps(asdict(folders.Progress(step=6, seconds=0.5, journals={"a": 3}))).encode()

    def where(data: bytes) -> None:
        (path / "progress.json").write_bytes(data)
        found = checkpoint.read_progress(path)
        assert found.step >= 0

    yield Target("checkpoint: progress", where, [progress], either(of_json, flipped))
