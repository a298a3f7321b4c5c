"""Evaluations of several rungs -> one table: what each cost, what it gained, and the paired change to one of them.

Rungs are asked the same prompts, so every difference is taken prompt by prompt before anything is resampled. Several
seeds are pooled for the interval over prompts; from three on there is one over seeds, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlpt.compute import Spent, cumulative_costs
from rlpt.evaluate import files
from rlpt.evaluate.bits_per_byte import WindowRecord
from rlpt.evaluate.evaluation import Evaluation
from rlpt.evaluate.paired import bits_change, change_over_seeds
from rlpt.evaluate.rungs import Ladder, Rung
from rlpt.evaluate.summary import summarise
from rlpt.runlog import read_config
from rlpt.statistics import seed_interval
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError

FIGURES = (
    *("verdict", "gain_heldout", "controls", "logp_no_think", "logp_thought", "bits_per_byte"),
    *("next_token_accuracy_no_think", "next_token_accuracy_thought"),
)
"""Of a summary: what a row of the table has."""
_EPOCHS = 1 << 32


def table(
    ladder: Ladder,
    folders: Mapping[str, Sequence[Path]],
    shards: ShardFolder,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """The table of a finished ladder, from the files of its evaluations; a rung has a folder for each seed."""
    base = [files.load(folder / files.WHOLE) for folder in folders[ladder.against.name]]
    costs: dict[Path, dict[int, Spent] | str] = {}
    rows = []
    for rung in ladder.rungs:
        found = [files.load(folder / files.WHOLE) for folder in folders[rung.name]]
        row = {"name": rung.name, "of": rung.origin, "step": rung.step}
        row |= {"budget_tokens": rung.budget, "training": _training(rung, shards, costs)}
        row |= figures(found) | {"seconds": _seconds(folders[rung.name])}
        if rung is not ladder.against:
            row["change"] = changes(base, found)
        rows.append(row | {"evaluations": [str(folder) for folder in folders[rung.name]]})
    return {
        "shards": shards.manifest.hash,
        "seeds": list(seeds),
        "against": ladder.against.name,
        "missing": list(ladder.missing),
        "rungs": rows,
    }


def figures(found: Sequence[Evaluation]) -> dict[str, Any]:
    """The headline of a rung: pooled over its seeds, and over them where there are several."""
    summary = pooled(found).summary if len(found) > 1 else found[0].summary
    row = {name: summary[name] for name in FIGURES}
    reasons = [line for each in found for line in each.summary["verdict_reasons"]]
    row["warnings"] = [line for line in dict.fromkeys(reasons) if line.startswith("warning")]
    row["thinking"] = {
        name: sum(each.summary["thinking"][name] for each in found)
        / (len(found) if name.endswith("per_thought") else 1)
        for name in found[0].summary["thinking"]
    }
    if len(found) > 1:
        row["over_seeds"] = {"gain": seed_interval([each.gain for each in found])}
    return row


def changes(before: Sequence[Evaluation], after: Sequence[Evaluation]) -> dict[str, Any]:
    """Paired, seed by seed and prompt by prompt: over the prompts of all seeds, and over seeds."""
    old, new = ([each.records for each in found] for found in (before, after))
    row = change_over_seeds(old, new, after[0].resampling)
    first, last = _windows(before), _windows(after)
    if first:
        row["bits_per_byte"] = bits_change(first, last, after[0].resampling).as_dict()
    return row


def pooled(found: Sequence[Evaluation]) -> Evaluation:
    """Several seeds as one evaluation: what a seed asks are other prompts, as those of another epoch are."""
    if len(found) == 1:
        return found[0]
    records = [
        replace(record, epoch=record.epoch + _EPOCHS * number)
        for number, each in enumerate(found)
        for record in each.records
    ]
    windows, resampling = _windows(found), found[0].resampling
    return Evaluation(records, windows, summarise(records, windows, resampling), resampling)


def _windows(found: Sequence[Evaluation]) -> list[WindowRecord]:
    """Without a thought the beginning of a document reads the same whatever the seed."""
    return list({window.key: window for each in found for window in each.windows}.values())


def _training(
    rung: Rung, shards: ShardFolder, costs: dict[Path, dict[int, Spent] | str]
) -> dict[str, Any]:
    """What its run had spent at its checkpoint; where that is unknown, why."""
    if rung.run_dir is None or rung.step is None:
        return {"unknown": "it is no checkpoint of a run"}
    if rung.run_dir not in costs:
        costs[rung.run_dir] = _costs(rung.run_dir, shards)
    known = costs[rung.run_dir]
    if isinstance(known, str):
        return {"unknown": known}
    if rung.step not in known:
        return {"unknown": f"{rung.run_dir / 'metrics.jsonl'} has no step {rung.step}"}
    return known[rung.step].as_dict()


def _costs(run_dir: Path, shards: ShardFolder) -> dict[int, Spent] | str:
    try:
        return cumulative_costs(run_dir, shards)
    except UserError as error:
        return str(error)


def _seconds(folders: Sequence[Path]) -> dict[str, float]:
    """What the evaluations of a rung took: to think, and all in all."""
    clocks = [read_config(folder / files.CLOCK) for folder in folders]
    parts = [(name, seconds) for clock in clocks for name, seconds in clock.items()]
    thinking = [seconds for name, seconds in parts if name.startswith("thoughts")]
    return {"thinking": sum(thinking), "all": sum(seconds for _, seconds in parts)}
