"""A whole run folder, made by hand: every number on its page is known."""

import json

import pytest
import zstandard

from rlpt.report import charts, clock, curves, guarded, judged, signs


def interval(mean, half=0.02):
    return {"mean": mean, "ci_low": mean - half, "ci_high": mean + half, "clusters": 128}


def summary_of(gain, text="d"):
    control = {"gain": interval(-0.2), "own_minus_control": interval(gain + 0.2)}
    return {
        "verdict": "harmful",
        "verdict_reasons": [f"own - no_think = {gain} {text}"],
        "gain_heldout": {**interval(gain), "per_byte": gain / 4, "marginal_n": gain + 0.04},
        "controls": dict.fromkeys(("empty", "filler", "other_document", "shuffled"), control),
        "null": {"mean": -2e-8, "max_abs": 4e-7, "limit": 1e-5, "passes": True},
        "wrong_target": {**interval(0.1), "passes": False},
        "bits_per_byte": interval(2.4),
        "next_token_accuracy_no_think": 0.3,
        "next_token_accuracy_thought": 0.25,
        "thought": {
            "mean_len": 1.5,
            "len_histogram": [1, 2, 3],
            "closer_rate": 0.5,
            "empty_rate": 0.1,
            "distinct_rate": 0.9,
            "named_answer_rate": 0.2,
            "opener_mass": None,
        },
        "per_domain": {
            name: {
                "verdict": "inconclusive",
                "prompts": 3,
                "gain_heldout": interval(gain),
                "first_token": {"gain": interval(gain), "logp_thought": interval(-2.0)},
            }
            for name in ("R", text)
        },
        "evaluation": {
            "prompts": 128,
            "documents": 120,
            "thoughts_per_prompt": 2,
            "continuation_tokens": 8,
            "unit": "document",
        },
    }


def make_group(step, text="plain"):
    return {
        "step": step,
        "document": text,
        "domain": text,
        "context": text * 3,
        "continuation_tokens": [" a", text, "\n"],
        "no_think_logp": [-1.0, -2.0, -3.0],
        "rollouts": [
            {
                "thought": f"{text} thought {g}",
                "logp": [-1.0 + g, -2.0, -3.5],
                "gain": (g - 0.5) / 3,
                "reward": 0.1,
                "advantage": 0.2,
                "finish": "budget",
            }
            for g in range(-5, 2)
        ],
    }


def build_run(folder, text="plain"):
    """A whole run folder; ``text`` stands wherever a run holds a web page's or a user's words."""
    (folder / "rollouts").mkdir(parents=True)
    config = {"policy": {"fresh": {"layers": 4, "width": 256}}, "note": text}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps({"platform": text}))
    rows = [
        {
            "step": s,
            "stage": "warm" if s < 20 else text,
            "reward/mean": s / 10,
            "x/" + text: 1.0,
        }
        for s in range(1, 41)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluations = [
        {"step": s, "stage": "warm", "summary": summary_of(-0.5 + s / 100, text)} for s in (0, 40)
    ]
    (folder / "evaluations.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in evaluations)
    )
    for step in (10, 40):
        data = zstandard.compress((json.dumps(make_group(step, text)) + "\n").encode())
        (folder / "rollouts" / f"step_{step:06d}.jsonl.zst").write_bytes(data)
    table = {
        "verdict": "harmful",
        "gain_heldout_before": interval(-0.5),
        "gain_heldout_after": interval(-0.1),
        "gain_change": interval(0.4),
        "bits_per_byte_before": interval(2.6),
        "bits_per_byte_after": interval(2.4),
        "next_token_accuracy_thought_before": 0.2,
        "next_token_accuracy_thought_after": 0.25,
        "steps": 40,
        "wall_seconds": 125.0,
        "train_tokens_per_second": 1234.5,
        "parameters": 4_200_000,
    }
    (folder / "summary.json").write_text(json.dumps(table))
    return folder


@pytest.fixture(scope="session")
def group():
    return make_group


@pytest.fixture(scope="session")
def make_run():
    return build_run


@pytest.fixture
def undrawn(monkeypatch):
    """Where the words count: figures are set up, but not drawn, which is what takes the time."""
    for module in (charts, clock, curves, guarded, judged, signs):
        monkeypatch.setattr(module, "svg", lambda figure, name, title: f"<svg>{title}</svg>")
