"""Numbers and verdicts in plain words. Says no more than the numbers do."""

import math
from typing import Any

from rlpt.report.run import Run

MINUS = "\N{MINUS SIGN}"
CONTROLS = {
    "own": ("own thought", "what the policy wrote itself"),
    "empty": ("empty", "opener and closer with nothing between: what the markers do"),
    "filler": ("filler", "as many neutral tokens: what length and computation do"),
    "context_copy": ("context copy", "a span of the context again: what repeating does"),
    "other_document": ("other document", "a thought about another text"),
    "shuffled": ("shuffled", "its own tokens in another order: what its words alone do"),
}


def number(value: float | int | None, digits: int = 3) -> str:
    """A number without a forced sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    text = f"{value:,d}" if isinstance(value, int) else f"{value:,.{digits}f}"
    return text.replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """A difference: always with its sign."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    return f"{value:+.{digits}f}".replace("-", MINUS)


def interval(table: dict[str, Any] | None, digits: int = 3, sign: bool = True) -> str:
    """``mean [low, high]``; without bounds the reason for their absence is for the reader to find
    beside it.
    """
    if not table:
        return "\N{EN DASH}"
    show = signed if sign else number
    mean = show(table.get("mean"), digits)
    if table.get("ci_low") is None:
        return f"{mean} (no interval)"
    return f"{mean} [{show(table['ci_low'], digits)}, {show(table.get('ci_high'), digits)}]"


def duration(seconds: float | None) -> str:
    """Seconds as people say them; a dash where nobody can."""
    if seconds is None or not math.isfinite(seconds):
        return "\N{EN DASH}"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


_SENTENCES = {
    "useful": (
        "Thinking helps: the policy predicts held-out text better after its own thought than "
        "without one, and better than after an empty thought, filler or a thought about another "
        "document."
    ),
    "harmless": (
        "Thinking neither helps nor hurts: after its own thought the policy predicts held-out "
        "text as well as without one, to within 0.005 nats per token."
    ),
    "harmful": (
        "Thinking hurts: the policy predicts held-out text worse after its own thought than "
        "without one."
    ),
    "inconclusive": (
        "No verdict: the held-out numbers do not settle whether thinking helps, hurts or does "
        "nothing."
    ),
}
_TINY = 100e6
"""Parameters below which nobody should expect thoughts to help on ordinary text."""
_LITTLE = (
    "On ordinary text a tiny policy has nothing in store that a thought could bring up: the "
    "context is already in front of it, and a thought stands between the context and the text. "
    "Untrained thoughts therefore hurt. What training can be expected to do here is to move "
    "thinking from harmful towards harmless; it cannot be expected to make it useful."
)
_NO_EVIDENCE = (
    "A gain that rises towards zero shows that the policy learned not to be disturbed by what it "
    "writes. It is not evidence of reasoning. Thoughts become useful where the text needs a "
    "computation in several steps; the proving ground (make prove) shows that on generated pages "
    "whose optimum is known."
)
_USEFUL = (
    "Useful means that every one of four intervals lies above zero: own thought against none, "
    "against an empty one, against filler and against a thought about another document. It says "
    "nothing about other text, longer horizons or other policies."
)


def verdict(run: Run) -> tuple[str, str]:
    """(label, sentence). The label is the computed one; where nothing was evaluated it says so."""
    label = run.summary.get("verdict") or run.last_evaluation.get("verdict")
    if label not in _SENTENCES:
        return "not evaluated", "No verdict: this run holds no held-out evaluation."
    return label, _SENTENCES[label]


def figures(run: Run) -> str:
    """The sentence with the figures that the verdict rests on."""
    after = run.summary.get("gain_heldout_after") or run.last_evaluation.get("gain_heldout")
    if not after:
        return ""
    text = f"Held-out gain {interval(after)} nats per token"
    change = run.summary.get("gain_change")
    before = run.summary.get("gain_heldout_before")
    if change and before:
        text += f", {interval(before)} before: a change of {interval(change)}"
    if after.get("ci_low") is None and after.get("reason"):
        text += f" ({after['reason']})"
    return f"{text}. Brackets are 95% intervals."


def expectation(run: Run) -> list[str]:
    """What such a policy can and cannot gain, and what a change of the gain does not show."""
    if verdict(run)[0] == "useful":
        return [f"{_who(run)} {_USEFUL}"]
    told = [f"{_who(run)} {_LITTLE if _is_tiny(run) else ''}".strip(), _NO_EVIDENCE]
    return told + ([silence] if (silence := _silence(run)) else [])


def _silence(run: Run) -> str:
    """Said where most held-out thoughts are empty: then the gain is that of the two markers."""
    thought = run.last_evaluation.get("thought") or {}
    if thought.get("empty_rate", 0.0) <= 0.5:
        return ""
    first = (run.evaluations[0]["summary"].get("thought") or {}).get("mean_len")
    before = f", from {number(first, 1)} tokens a thought" if first is not None else ""
    return (
        f"The policy stopped thinking: {number(100 * thought['empty_rate'], 0)}% of its last "
        f"held-out thoughts are empty ({number(thought['mean_len'], 1)} tokens a thought{before}). "
        "What moved the gain is that it writes nothing."
    )


def _is_tiny(run: Run) -> bool:
    count = run.summary.get("parameters")
    if count is None:
        return bool((run.config.get("policy") or {}).get("fresh"))
    return count < _TINY


def _who(run: Run) -> str:
    policy = run.config.get("policy") or {}
    fresh = policy.get("fresh")
    count = run.summary.get("parameters")
    size = f", {number(count / 1e6, 1)} million parameters" if count else ""
    if fresh:
        shape = f"{fresh.get('layers')} layers, {fresh.get('width')} wide{size}"
        return f"This policy is fresh: {shape}, random weights at first."
    return f"This policy started from given weights{size}." if policy.get("path") else ""
