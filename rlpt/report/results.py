"""One run's held-out results as rows of text, and what it lacks."""

from typing import Any

from rlpt.report import words
from rlpt.report.drawing import finite
from rlpt.report.run import Row, Run
from rlpt.report.words import interval, number, signed


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """(what, figure, unit or remark) of the first row of the page; only what was measured."""
    summary = run.summary
    found = []
    if summary.get("gain_change"):
        found.append(
            (
                "Change of the gain",
                signed(summary["gain_change"]["mean"]),
                "nats per token, held out",
            )
        )
    if summary.get("bits_per_byte_after"):
        before = (summary.get("bits_per_byte_before") or {}).get("mean")
        remark = f"without thought, {number(before)} before"
        found.append(("Bits per byte", number(summary["bits_per_byte_after"]["mean"]), remark))
    if summary.get("steps") is not None:
        found.append(
            ("Steps", number(summary["steps"]), f"in {words.duration(summary.get('wall_seconds'))}")
        )
    for kind, name in (("rollout", "Thoughts written"), ("train", "Tokens trained")):
        rate = summary.get(f"{kind}_tokens_per_second")
        if rate is not None:
            found.append((name, number(float(rate), 0), "tokens per second"))
    return found


def ends(run: Run) -> list[tuple[str, str, str, str]]:
    """(quantity, before, after, change) of the summary table."""
    summary = run.summary
    rows = []
    for title, name, change, sign in (
        ("Gain, nats per token", "gain_heldout", "gain_change", True),
        ("Bits per byte, without thought", "bits_per_byte", "bits_per_byte_change", False),
    ):
        pair = [interval(summary.get(f"{name}_{end}"), sign=sign) for end in ("before", "after")]
        if summary.get(f"{name}_after"):
            rows.append((title, *pair, interval(summary.get(change))))
    gains = [summary.get(f"gain_heldout_{end}") or {} for end in ("before", "after")]
    for title, key in (
        ("Gain, nats per byte", "per_byte"),
        ("Gain of the marginal over thoughts", "marginal_n"),
    ):
        if any(gain.get(key) is not None for gain in gains):
            rows.append((title, *_moved([gain.get(key) for gain in gains], signed)))
    for title, name in (
        ("First token right, without thought", "next_token_accuracy_no_think"),
        ("First token right, after a thought", "next_token_accuracy_thought"),
    ):
        values = [summary.get(f"{name}_{end}") for end in ("before", "after")]
        if any(value is not None for value in values):
            rows.append((title, *_moved(values, number)))
    return rows + _questions(summary.get("rlvr") or {})


def _questions(found: Row) -> list[tuple[str, str, str, str]]:
    """`ends` of the held-out questions of an RLVR stage."""
    rows = []
    for title, name in (("after a thought", "accuracy"), ("without a thought", "accuracy_empty")):
        if change := found.get(f"{name}_change"):
            pair = [accuracy(found, end, name) for end in ("before", "after")]
            rows.append((f"Held-out questions right, {title}", *pair, interval(change)))
    return rows


def accuracy(found: Row, end: str, name: str = "accuracy") -> str:
    """Share of held-out questions that are right at one end of an RLVR stage, with its interval."""
    values = found.get(end) or {}
    keys = {"mean": name, "ci_low": f"{name}_ci_low", "ci_high": f"{name}_ci_high"}
    table = {key: values.get(f"rlvr/{of}") for key, of in keys.items()}
    return interval(table if values else None, sign=False)


def _moved(values: list[float | None], show: Any) -> tuple[str, str, str]:
    before, after = values
    change = signed(after - before) if before is not None and after is not None else signed(None)
    return show(before), show(after), change


def control_rows(summary: Row) -> list[tuple[str, str, str, str]]:
    """(control, what it is, its gain, own minus control)."""
    if "gain_heldout" not in summary:
        return []
    rows = [(*words.CONTROLS["own"], interval(summary["gain_heldout"]), "")]
    for name, found in (summary.get("controls") or {}).items():
        title, meaning = words.CONTROLS.get(name, (name, ""))
        rows.append((title, meaning, interval(found["gain"]), interval(found["own_minus_control"])))
    return rows


def checks(summary: Row) -> list[tuple[str, bool, str]]:
    """(check, passed, figures) of the controls that must come out one way."""
    found = []
    null, wrong = summary.get("null"), summary.get("wrong_target")
    if null:
        mean, limit, largest = (null[key] for key in ("mean", "limit", "max_abs"))
        text = f"mean {mean:+.1e} nats per token, limit {limit:.0e}, largest {largest:.1e}"
        found.append(
            (
                "null: the same number along two paths",
                null["passes"],
                text.replace("-", words.MINUS),
            )
        )
    if wrong:
        text = f"{interval(wrong)} nats per token; must not be above 0"
        found.append(("wrong target: own thought, another text", wrong["passes"], text))
    if leak := summary.get("leak"):
        text = (
            f"{leak['requests_changed']} of {leak['prompts']} requests and the thoughts of "
            f"{leak['thoughts_changed']} changed; none may"
        )
        found.append(("leak test: other text after the cut", leak["passes"], text))
    return found


def stages(run: Run) -> list[str]:
    return [
        str(name)
        for name in dict.fromkeys(row.get("stage") for row in run.metrics)
        if name is not None
    ]


def domains(summary: Row) -> list[Row]:
    """Rows of the table by domain; none where there is only one."""
    blocks = summary.get("per_domain") or {}
    if len(blocks) < 2:
        return []
    return [
        {
            "name": name or "(none)",
            "prompts": block["prompts"],
            "verdict": block["verdict"],
            "gain": interval(block["gain_heldout"]),
            "first": interval(block["first_token"]["gain"]),
            "answer": interval(block["first_token"]["logp_thought"]),
        }
        for name, block in blocks.items()
    ]


def missing(run: Run) -> list[str]:
    """What the page cannot show, file by file and number by number."""
    found = list(run.missing)
    last = run.last_evaluation
    for piece in ("controls", "null", "wrong_target", "bits_per_byte"):
        if run.evaluations and not last.get(piece):
            found.append(
                f"last evaluation: no {piece}; it was switched off or could not be measured"
            )
    for piece in ("gain_heldout_before", "gain_heldout_after", "gain_change", "verdict"):
        if run.summary and not run.summary.get(piece):
            found.append(f"summary.json: no {piece}")
    found += _not_finite(run)
    if any(group.get("no_think_logp") is None for group in run.rollouts):
        found.append(
            "rollouts: this reward scores no tokens without a thought, so nothing is coloured"
        )
    if len(run.evaluations) == 1:
        found.append(
            "evaluations.jsonl: a single evaluation, so nothing is said about before and after"
        )
    return found


def _not_finite(run: Run) -> list[str]:
    """Metrics with steps that are no number a curve could show."""
    names = sorted({name for row in run.metrics for name in row} - {"step", "stage"})
    found = []
    for name in names:
        steps = sum(name in row for row in run.metrics)
        if odd := steps - len(finite(run.metrics, name)):
            found.append(f"metrics.jsonl: {name} is no finite number in {odd} of {steps} steps")
    return found
