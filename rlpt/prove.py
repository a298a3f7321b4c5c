"""The proving ground: generated pages whose optimum is known, through the real pipeline, with its controls.

Per seed: warm up, then reinforce by gain; and, from the same warm weights, by permuted and by random rewards. Bars:
MEASURING, section 5, stated in `checks`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlpt.config import RunConfig
from rlpt.console import say
from rlpt.evaluate import files
from rlpt.evaluate.evaluation import Evaluation
from rlpt.evaluate.paired import change
from rlpt.runlog import read_journal, write_json
from rlpt.train import run as train
from rlpt_data.strict import UserError, load

CONFIGS = Path("configs/proving")
OUT = Path("runs/proving")
CONTROLS = ("permuted", "random")
CHANCE = -math.log(10)
LEAST_GAIN = 2.0
"""Nats per answer in stratum R after RL; the optimum is ln 10 = 2.303."""
MOST_CONTROL_CHANGE = 0.10
"""Nats per answer that a control may seem to gain (upper bound of its interval). It may lose any amount."""


def run(seeds: Sequence[int], overrides: Sequence[str]) -> dict[str, Any]:
    """Run all seeds, write runs/proving/summary.json and return it. ``overrides`` begin with `warmup.` or `rl.`."""
    by_stage = _split(overrides)
    found = {seed: prove_seed(seed, by_stage) for seed in seeds}
    summary = summarise(found)
    OUT.mkdir(parents=True, exist_ok=True)
    write_json(OUT / "summary.json", summary)
    for line in summary["failed"]:
        say(f"FAILED {line}")
    return summary


def _split(overrides: Sequence[str]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {"warmup": [], "rl": []}
    for override in overrides:
        which, _, rest = override.partition(".")
        if which not in parts or "=" not in rest:
            raise UserError(
                f"--set {override}: begin with warmup. or rl., as in rl.stage.0.steps=30"
            )
        parts[which].append(rest)
    return parts


def prove_seed(seed: int, overrides: dict[str, list[str]]) -> dict[str, Any]:
    """One seed: four runs, and the figures of the strata."""
    folder = OUT / f"seed_{seed}"
    _train("warmup.toml", folder / "warmup", seed, overrides["warmup"])
    start = [f"init_from={folder / 'warmup'}@last", *overrides["rl"]]
    real = _train("rl.toml", folder / "gain", seed, start)
    before, after = ends(folder / "gain")
    table: dict[str, Any] = strata(before, after)
    for control in CONTROLS:
        _train("rl.toml", folder / control, seed, [*start, f"stage.0.reward_control={control}"])
        table[f"{control}_reward_gain_change"] = _change_of_sums(*ends(folder / control))
    seconds = {name: read_seconds(folder / name) for name in ("warmup", "gain", *CONTROLS)}
    return table | {
        "warmup_steps": read_steps(folder / "warmup"),
        "steps": real["steps"],
        "wall_seconds": seconds,
    }


def _train(config: str, run_dir: Path, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    say(f"-- {run_dir}")
    return train(
        load(RunConfig, CONFIGS / config, [f"run_dir={run_dir}", f"seed={seed}", *overrides])
    )


def ends(run_dir: Path) -> tuple[Evaluation, Evaluation]:
    """The first and the last evaluation of a run."""
    steps = [row["step"] for row in read_journal(run_dir / "evaluations.jsonl")]
    first, last = (files.load(files.path_of(run_dir, step)) for step in (steps[0], steps[-1]))
    return first, last


def strata(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """The figures of every stratum, per answer: the horizon is the answer token."""
    table: dict[str, Any] = {}
    for name, block in after.summary["per_domain"].items():
        table[name] = {
            "gain_heldout_before": before.summary["per_domain"][name]["gain_heldout"],
            "gain_heldout_after": block["gain_heldout"],
            "logp_answer": block["first_token"]["logp_thought"],
            "logp_answer_no_think": block["first_token"]["logp_no_think"],
            "controls": block["controls"],
            "verdict": block["verdict"],
            "verdict_reasons": block["verdict_reasons"],
        }
    return table


def _change_of_sums(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    chosen = [[record for record in end.records if record.domain == "R"] for end in (before, after)]
    return change(chosen[0], chosen[1], after.resampling)["gain"].as_dict()


def checks(found: dict[str, Any]) -> dict[str, bool]:
    """The bars of one seed."""
    answer = found["N"]["logp_answer"]
    return {
        f"R gain_heldout_after >= {LEAST_GAIN}": found["R"]["gain_heldout_after"]["mean"]
        >= LEAST_GAIN,
        "R verdict is useful": found["R"]["verdict"] == "useful",
        "N log p(answer) is not above -ln 10 beyond its interval": answer["ci_low"] is not None
        and answer["ci_low"] <= CHANCE,
        f"permuted reward gains <= {MOST_CONTROL_CHANGE} (upper bound)": _bounded(
            found["permuted_reward_gain_change"]
        ),
        f"random reward gains <= {MOST_CONTROL_CHANGE} (upper bound)": _bounded(
            found["random_reward_gain_change"]
        ),
    }


def _bounded(interval: dict[str, Any]) -> bool:
    return interval["ci_high"] is not None and interval["ci_high"] <= MOST_CONTROL_CHANGE


def summarise(found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The first seed's figures on top, every seed's below, and whether all bars were met."""
    first = next(iter(found.values()))
    failed = [
        f"seed {seed}: {name}"
        for seed, table in found.items()
        for name, met in checks(table).items()
        if not met
    ]
    table = {
        "verdict": first["R"]["verdict"],
        "gain_heldout_before": first["R"]["gain_heldout_before"],
        "gain_heldout_after": first["R"]["gain_heldout_after"],
        **{
            f"{control}_reward_gain_change": first[f"{control}_reward_gain_change"]
            for control in CONTROLS
        },
        "optimum": -CHANCE,
        "passed": not failed,
        "failed": failed,
        "wall_seconds": sum(sum(part["wall_seconds"].values()) for part in found.values()),
        "strata": {name: first[name] for name in ("R", "C", "N", "H") if name in first},
        "seeds": {str(seed): part for seed, part in found.items()},
    }
    return table | {
        "mean_gain_heldout_after": float(
            np.mean([part["R"]["gain_heldout_after"]["mean"] for part in found.values()])
        )
    }


def read_seconds(run_dir: Path) -> float:
    import json

    return float(json.loads((run_dir / "summary.json").read_text())["wall_seconds"])


def read_steps(run_dir: Path) -> int:
    return int(read_journal(run_dir / "metrics.jsonl")[-1]["step"])
