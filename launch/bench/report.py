"""Opening the report of a run with 10,000 rollouts, beside the same rollouts as a plain HTML table.

    python launch/bench/report.py [--rollouts 10000] [--rounds 5] [--json] [--write]

1,250 prompts of 8 thoughts, 40 to 200 words each, with 16 held-out tokens; random words, frequent ones frequent. Both
pages are opened in turn by one headless Chromium. Seconds are from the navigation to the first prompt on the screen (of
the table: to the end of its load and one frame); CPU seconds are the main thread's. Needs Chromium; see chromium.py.
"""

import argparse
import html
import json
import os
import random
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import chromium
import zstandard
from step import cpu_name

from rlpt.report import write

RESULTS = Path(__file__).with_name("report.json")
GROUP, PER_DUMP, TOKENS = 8, 10, 16
OPENED = "document.documentElement.dataset.ready"
PAINTED = "new Promise(done => requestAnimationFrame(() => done(performance.now())))"


def text(draw: random.Random, lexicon: list[str], words: int) -> str:
    """The n-th word is as likely as 1 / n, as in any language."""
    places = (int(len(lexicon) ** draw.random()) - 1 for _ in range(words))
    return " ".join(lexicon[place] for place in places)


def group(draw: random.Random, lexicon: list[str], step: int) -> dict[str, Any]:
    without = [-9 * draw.random() for _ in range(TOKENS)]
    return {
        "step": step,
        "document": f"{draw.getrandbits(128):032x}",
        "domain": f"site{draw.randrange(40)}.example",
        "cut": draw.randrange(4000),
        "context": text(draw, lexicon, 80),
        "continuation_tokens": [" " + text(draw, lexicon, 1) for _ in range(TOKENS)],
        "no_think_logp": without,
        "rollouts": [rollout(draw, lexicon, without) for _ in range(GROUP)],
    }


def rollout(draw: random.Random, lexicon: list[str], without: list[float]) -> dict[str, Any]:
    own = [value + draw.gauss(0, 0.4) for value in without]
    gain = (sum(own) - sum(without)) / TOKENS
    words = draw.randrange(40, 200)
    return {
        "thought": text(draw, lexicon, words),
        "thought_tokens": words,
        "logp": own,
        "gain": gain,
        "reward": gain,
        "advantage": draw.gauss(0, 1),
        "finish": draw.choice(("closer", "budget")),
    }


def make_run(folder: Path, rollouts: int) -> list[dict[str, Any]]:
    """A run folder with its metrics and so many rollouts; the groups."""
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    lexicon = ["".join(draw.choices(letters, k=draw.randrange(2, 10))) for _ in range(6000)]
    (folder / "rollouts").mkdir(parents=True)
    steps = range(10, 10 + 10 * (rollouts // GROUP // PER_DUMP), 10)
    dumps = {step: [group(draw, lexicon, step) for _ in range(PER_DUMP)] for step in steps}
    for step, rows in dumps.items():
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path = folder / "rollouts" / f"step_{step:06d}.jsonl.zst"
        path.write_bytes(zstandard.compress(data))
    names = (
        "reward/mean",
        "gain/mean",
        "loss/next_token",
        "time/step",
        "time/train",
        "mismatch/ess",
    )
    metrics = [
        {"step": s, "stage": "rl", **{name: draw.random() for name in names}}
        for s in range(1, steps[-1] + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return [row for rows in dumps.values() for row in rows]


def table(path: Path, groups: list[dict[str, Any]]) -> Path:
    """The peer: every rollout a row, nothing folded, nothing hidden."""
    rows = (cells_of(row, each) for row in groups for each in row["rollouts"])
    cells = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    path.write_text(
        f"<!doctype html><meta charset=utf-8><title>rollouts</title><table>{cells}</table>"
    )
    return path


def cells_of(row: dict[str, Any], each: dict[str, Any]) -> list[Any]:
    where = [row[name] for name in ("step", "document", "domain", "context")]
    numbers = [f"{each[name]:.4f}" for name in ("gain", "reward")]
    return [*where, "".join(row["continuation_tokens"]), each["thought"], *numbers, each["finish"]]


def opened(browser: chromium.Browser, path: Path, ours: bool) -> dict[str, float]:
    """Seconds until the first prompt can be seen, and the main thread's share of them."""
    page = browser.page()
    page.size(1280, 900)
    page.call("Performance.enable", timeDomain="threadTicks")
    page.open(path.as_uri(), OPENED if ours else "true", seconds=300)
    milliseconds = float(page.ask(OPENED if ours else PAINTED))
    metrics = {row["name"]: row["value"] for row in page.call("Performance.getMetrics")["metrics"]}
    page.call("Page.close")
    return {"seconds": milliseconds / 1000, "cpu_seconds": metrics["TaskDuration"]}


def measured(rollouts: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, chromium.browser() as browser:
        folder = Path(name)
        groups = make_run(folder / "run", rollouts)
        started = time.process_time()
        ours = write([folder / "run"])
        writing = time.process_time() - started
        pages = {"report": ours, "table": table(folder / "table.html", groups)}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in pages}
        for _ in range(rounds):
            for name, path in pages.items():
                found[name].append(opened(browser, path, name == "report"))
        version = browser.call("Browser.getVersion", {})["product"]
        return {
            "machine": {
                **{"date": date.today().isoformat(), "cpu": cpu_name(), "browser": version},
                **{"cores": os.cpu_count(), "load": os.getloadavg()[0]},
            },
            "rollouts": rollouts,
            "rounds": rounds,
            "cpu_seconds_to_write": writing,
            **{name: row(pages[name], found[name]) for name in pages},
        }


def row(path: Path, found: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the rounds; the least, too, which others on the machine disturbed least."""
    return {
        "bytes": path.stat().st_size,
        "seconds": statistics.median(each["seconds"] for each in found),
        "least_seconds": min(each["seconds"] for each in found),
        "cpu_seconds": statistics.median(each["cpu_seconds"] for each in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--write", action="store_true", help=f"keep the result in {RESULTS.name}")
    given = parser.parse_args()
    found = measured(given.rollouts, given.rounds)
    for name in ("report", "table"):
        said = ", ".join(f"{key} {value:,.4g}" for key, value in found[name].items())
        print(f"{name:8}{said}")
    if given.write:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
