"""Several methods from one start, on the same prompts and budget, in one table: mean and interval over seeds."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from rlpt.arms import Arm, after_config, arm_config, next_token_config, rl_stage
from rlpt.compute import cumulative_costs, step_costs
from rlpt.config import RunConfig
from rlpt.console import say
from rlpt.flops import Cost
from rlpt.report.words import duration
from rlpt.runlog import read_journal, write_json
from rlpt.statistics import seed_interval
from rlpt.train import run as train
from rlpt_data.strict import Strict, UserError, load

FIGURES = {
    "gain": "gain after, nats per token",
    "gain_change": "change of gain",
    "accuracy": "next-token accuracy with thought",
    "bits_per_byte": "bits per byte",
    "thought_length": "tokens of a thought",
    "named_answer_rate": "thoughts that name the answer",
    "answers": "accuracy on held-out questions after RLVR",
    "answers_before": "before it",
    "sampled_tokens": "sampled tokens",
    "trained_tokens": "trained tokens",
    "tflops": "TFLOPs, decoding included",
    "seconds": "wall seconds",
}
"""Columns of the table."""


class CompareConfig(Strict):
    """What `rlpt compare` reads."""

    out_dir: Path
    base: Path
    """A run with one RL stage: weights to start from, prompts, budgets, steps, optimiser."""
    start: str | None = None
    """Weights that every run starts from, as `RUN_DIR@STEP`; {seed} stands for the seed. Absent: the base run's."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)]
    set: tuple[str, ...] = ()
    """Changes to the base run and so to every arm, as for --set; `after` stays as it is."""
    after: Path | None = None
    """A run with an RLVR stage that follows every arm, the same for all but for policy, shards and seed, which are the
    arm's: what is learned before shows its worth only then (Tang et al., arXiv 2608.23256). Absent: none."""
    least_gain: float | None = None
    """Bar: the mean gain over seeds of every arm that is no control. Absent: none."""
    most_control_change: float | None = None
    """Bar: the upper end of the interval of every control's change of gain. It may lose any amount."""
    domain: str | None = None
    """Gains of this domain alone; absent: of all."""

    @model_validator(mode="after")
    def _names(self) -> "CompareConfig":
        names = [arm.name for arm in self.arms]
        if len({*names}) < len(names):
            raise ValueError(f"arms must differ in name; got {', '.join(names)}")
        if self.arms[0].next_token is not None:
            raise ValueError(
                f"arm {names[0]}: the first arm is what next_token is matched with; put a method first"
            )
        return self


def run(cfg: CompareConfig) -> dict[str, Any]:
    """Train every arm with every seed, write compare.json and return it. Finished runs are taken as they are.

    All runs are resolved before the first is trained. Raises UserError for any that makes no sense.
    """
    plans = list(_plans(cfg))
    found: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in cfg.arms}
    started = time.monotonic()
    for done, (name, seed, resolved, after) in enumerate(plans):
        each = (time.monotonic() - started) / max(1, done)
        left = f", about {duration(each * (len(plans) - done))} left" if done else ""
        say(f"-- {name}, seed {seed}: run {done + 1} of {len(plans)}{left}")
        row = figures(resolved, train(resolved), cfg.domain)
        found[name].append(row if after is None else row | answer_figures(train(after)))
    table = {
        "seeds": list(cfg.seeds),
        "arms": {name: over_seeds(rows) for name, rows in found.items()},
        "runs": {name: [row["run_dir"] for row in rows] for name, rows in found.items()},
    }
    table["failed"] = missed(cfg, table["arms"])
    cfg.out_dir.mkdir(parents=True, exist_ok=True)
    write_json(cfg.out_dir / "compare.json", table)
    return table


def missed(cfg: CompareConfig, arms: dict[str, Any]) -> list[str]:
    """The bars that were not met, in words."""
    lines = []
    for arm in cfg.arms:
        gain, change = arms[arm.name]["gain"]["mean"], arms[arm.name]["gain_change"]
        if not arm.control and cfg.least_gain is not None and not gain >= cfg.least_gain:
            lines.append(f"{arm.name}: gain {gain:.3f} is below {cfg.least_gain}")
        most = cfg.most_control_change
        high = change["ci_high"] if change["ci_high"] is not None else change["mean"]
        if arm.control and most is not None and not high <= most:
            lines.append(f"{arm.name}: a control gained {high:.3f}, more than {most}")
    return lines


def _plans(cfg: CompareConfig) -> Iterator[tuple[str, int, RunConfig, RunConfig | None]]:
    """Every run, and the one after it, resolved."""
    base = load(RunConfig, cfg.base, cfg.set)
    rl_stage(base, str(cfg.base))
    for seed in cfg.seeds:
        start = [] if cfg.start is None else [f"init_from={cfg.start.format(seed=seed)}"]
        first: RunConfig | None = None
        for arm in cfg.arms:
            folder = cfg.out_dir / arm.name / f"seed_{seed}"
            resolved = arm_config(arm, base, folder, seed, start)
            first = first or resolved
            if arm.next_token is not None:
                resolved = next_token_config(
                    resolved, matched_steps(resolved, first, arm.next_token)
                )
            yield arm.name, seed, resolved, after_config(cfg.after, resolved)


def costs(cfg: RunConfig) -> tuple[Cost, int]:
    """Of a step of the last stage, and how many there are."""
    stage = cfg.stage[-1]
    return step_costs(cfg)[stage.name], stage.steps


def matched_steps(cfg: RunConfig, first: RunConfig, what: str) -> int:
    """Steps of next-token learning that cost what the first arm's RL stage does, at its longest."""
    theirs, steps = costs(first)
    mine, _ = costs(next_token_config(cfg, 1))
    if what == "flops":
        return max(1, round(steps * theirs.flops / mine.flops))
    return max(1, round(steps * theirs.trained_tokens / mine.trained_tokens))


def figures(cfg: RunConfig, summary: dict[str, Any], domain: str | None) -> dict[str, Any]:
    """One run's columns."""
    journal = [row["summary"] for row in read_journal(cfg.run_dir / "evaluations.jsonl")]
    gains = [_gain(row, domain) for row in (journal[0], journal[-1])]
    last = journal[-1]
    *_, spent = cumulative_costs(cfg.run_dir).values()
    assert spent.flops is not None
    thought = last["thought"]
    return {
        "run_dir": str(cfg.run_dir),
        "gain": gains[1],
        "gain_change": gains[1] - gains[0],
        "accuracy": summary["next_token_accuracy_thought_after"],
        "bits_per_byte": (summary["bits_per_byte_after"] or {}).get("mean"),
        "thought_length": thought["mean_len"],
        "named_answer_rate": thought["named_answer_rate"],
        "sampled_tokens": spent.sampled_tokens,
        "trained_tokens": spent.trained_tokens,
        "tflops": spent.flops / 1e12,
        "seconds": summary["wall_seconds"],
        "answers": None,
        "answers_before": None,
    }


def answer_figures(summary: dict[str, Any]) -> dict[str, float]:
    """The columns of a run after an arm."""
    ends = {"answers": "after", "answers_before": "before"}
    return {name: summary["rlvr"][end]["rlvr/accuracy"] for name, end in ends.items()}


def _gain(evaluated: dict[str, Any], domain: str | None) -> float:
    """Held-out gain of one evaluation, nats per token. Raises UserError for a domain it has not seen."""
    if domain is None:
        return float(evaluated["gain_heldout"]["mean"])
    if domain not in evaluated["per_domain"]:
        known = ", ".join(sorted(evaluated["per_domain"]))
        raise UserError(f"domain = {domain!r}: evaluated were {known}")
    return float(evaluated["per_domain"][domain]["gain_heldout"]["mean"])


def over_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and 95% interval of every column, by Student's t over the seeds; no interval for fewer than three."""
    return {name: seed_interval([row[name] for row in rows]) for name in FIGURES}


def markdown(table: dict[str, Any]) -> str:
    """The table, an arm a row; an interval reads mean [low, high]."""
    lines = ["| arm | " + " | ".join(FIGURES.values()) + " |", "|---" * (len(FIGURES) + 1) + "|"]
    for name, columns in table["arms"].items():
        cells = [_cell(columns[key]) for key in FIGURES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "-"
    if value["ci_low"] is None:
        return f"{value['mean']:.4g}"
    return f"{value['mean']:.4g} [{value['ci_low']:.4g}, {value['ci_high']:.4g}]"
