"""What a report and `rlpt watch` rely on in the files of a run (`rlpt.rows.fitting`). A file without it is damaged, and
said to be.
"""

from rlpt.rows import COUNT, NUMBER, TEXT, TRUTH

_INTERVAL = {
    "mean": NUMBER,
    "ci_low": NUMBER,
    "ci_high": NUMBER,
    "per_byte": NUMBER,
    "marginal_n": NUMBER,
}
_RATES = ("mean_len", "closer_rate", "empty_rate", "distinct_rate", "named_answer_rate")
_TOKEN_ACCURACIES = ("next_token_accuracy_no_think", "next_token_accuracy_thought")
_BOUNDS = ("", "_ci_low", "_ci_high")
_ANSWERS = {
    f"rlvr/{name}{end}": NUMBER for name in ("accuracy", "accuracy_empty") for end in _BOUNDS
}

_OF_DOMAIN = {
    "prompts!": NUMBER,
    "verdict!": TEXT,
    "gain_heldout!": _INTERVAL,
    "first_token!": {"gain!": _INTERVAL, "logp_thought!": _INTERVAL},
}
EVALUATION = {
    "summary!": {
        "verdict": TEXT,
        "verdict_reasons": [TEXT],
        "gain_heldout": _INTERVAL,
        "bits_per_byte": _INTERVAL,
        "controls": {"*": {"gain!": _INTERVAL, "own_minus_control!": _INTERVAL}},
        "null": {"mean!": NUMBER, "limit!": NUMBER, "max_abs!": NUMBER, "passes!": TRUTH},
        "wrong_target": _INTERVAL | {"passes!": TRUTH},
        "leak": {
            **{f"{name}!": NUMBER for name in ("prompts", "requests_changed", "thoughts_changed")},
            "passes!": TRUTH,
        },
        "thought": {
            **{f"{name}!": NUMBER for name in _RATES},
            "opener_mass": NUMBER,
            "len_histogram": [NUMBER],
        },
        "per_domain": {"*": _OF_DOMAIN},
        "evaluation": {},
        **dict.fromkeys(_TOKEN_ACCURACIES, NUMBER),
    }
}
"""A line of evaluations.jsonl."""

SUMMARY = {
    "verdict": TEXT,
    "verdict_reasons": [TEXT],
    **{
        f"{name}_{end}": _INTERVAL
        for name in ("gain_heldout", "bits_per_byte")
        for end in ("before", "after", "change")
    },
    "gain_change": _INTERVAL,
    **{f"{name}_{end}": NUMBER for name in _TOKEN_ACCURACIES for end in ("before", "after")},
    **{f"{name}_tokens_per_second": NUMBER for name in ("rollout", "train")},
    **dict.fromkeys(("steps", "wall_seconds", "peak_memory_gib", "parameters"), NUMBER),
    "rlvr": {
        "before": _ANSWERS,
        "after": _ANSWERS,
        "accuracy_change": _INTERVAL,
        "accuracy_empty_change": _INTERVAL,
    },
}
"""summary.json."""

CONFIG = {
    "stage": [{"name!": TEXT, "kind": TEXT, "steps": COUNT}],
    "data": {"shards": TEXT, "mixture": [{"shards": TEXT}]},
    "policy": {"compute_dtype": TEXT},
    "engine": {"kind": TEXT, "vllm": {"dtype": TEXT}},
}
"""config.json."""

ENVIRONMENT = {
    "packages": {},
    "checks": {
        "layout": {"largest!": NUMBER, "bar!": NUMBER},
        "engine": {"largest!": NUMBER, "tokens!": NUMBER, "rms!": NUMBER, "dtype!": TEXT},
    },
}
"""environment.json."""

GROUP = {
    "step!": NUMBER,
    "document!": TEXT,
    "domain": TEXT,
    "context!": TEXT,
    "continuation_tokens!": [TEXT],
    "no_think_logp": [NUMBER],
    "rollouts!": [
        {
            "thought!": TEXT,
            "prediction": TEXT,
            "logp": [NUMBER],
            "ids": [NUMBER],
            **dict.fromkeys(("gain", "reward", "advantage", "thought_tokens"), NUMBER),
        }
    ],
}
"""A line of a dump of rollouts."""
