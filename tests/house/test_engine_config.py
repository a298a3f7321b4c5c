"""Engines and rollouts that cannot be are refused before anything is loaded: where, what and the remedy in one line."""

from pathlib import Path

import pytest

from rlpt.config import RunConfig
from rlpt.engines import DECODED_TOGETHER, RolloutConfig
from rlpt_data.strict import UserError, load

BASE = """
run_dir = "runs/x"
data = { shards = "shards" }
policy = { path = "model" }

[[stage]]
kind = "rl"
name = "rl"
steps = 4
documents_per_step = 2
"""
SEPARATE = 'kind = "vllm"\nvllm = { placement = "separate"'


@pytest.fixture
def toml(tmp_path: Path):
    def written(*tables: str) -> Path:
        (tmp_path / "run.toml").write_text("\n\n".join([BASE, *tables]))
        return tmp_path / "run.toml"

    return written


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(RunConfig, path, overrides)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(str(path))
    return line


ENGINES = [
    # (keys of [engine.vllm], what is said, the remedy)
    ("engines = 2", "engine.vllm.engines", "needs engine.vllm.placement = 'separate'"),
    ('addresses = ["http://a:1"]', "engine.vllm.addresses", "placement = 'separate'"),
    ("devices = [0]", "engine.vllm.devices", "placement = 'separate'"),
    ('placement = "separate"\naddresses = ["a:1"]', "'a:1'", "of the form http://host:port"),
    (
        'placement = "separate"\naddresses = ["http://a:1", "http://b"]',
        "'http://b'",
        "of the form http://host:port",
    ),
    (
        'placement = "separate"\naddresses = ["https://a:1"]',
        "'https://a:1'",
        "of the form http://host:port",
    ),
    *(
        (f'placement = "separate"\naddresses = ["{given}"]', given, "of the form http://host:port")
        for given in (
            "http://a:99999",
            "http://a:\u00b2",
            "http://a..b:1",
            "http://a/b:1",
            "http://:1",
        )
    ),
    (
        'placement = "separate"\naddresses = ["http://a:1"]\npublish = "ipc"',
        "engine.vllm.publish = 'ipc'",
        "use 'directory'",
    ),
    ('placement = "separate"\npublish = "ipc"', "engine.vllm.publish = 'ipc'", "use 'directory'"),
    (
        'weights_dir = "w"\npublish = "broadcast"',
        "engine.vllm.weights_dir has no effect with publish = 'broadcast'",
        "leave it out",
    ),
    ('weights_dir = "w"\npublish = "ipc"', "no effect with publish = 'ipc'", "leave it out"),
    ('placement = "elsewhere"', '"elsewhere"', "'colocated' or 'separate'"),
    ('dtype = "fp8"', '"fp8"', "'auto', 'float32', 'bfloat16' or 'float16'"),
    ('publish = "pigeon"', '"pigeon"', "'directory'"),
    ("kv_cache_gib = 0.0", "kv_cache_gib = 0.0", "greater than 0"),
    ("max_sequences = 0", "max_sequences = 0", "greater than"),
    ("timeout_seconds = -1.0", "timeout_seconds = -1.0", "greater than 0"),
    ("max_restarts = -1", "max_restarts = -1", "greater than or equal to 0"),
    ("restarts = 3", "unknown key 'restarts'", "did you mean 'max_restarts'?"),
]


@pytest.mark.parametrize(("keys", "what", "remedy"), ENGINES)
def test_an_impossible_engine_is_refused(toml, keys: str, what: str, remedy: str) -> None:
    line = refused(toml('[engine]\nkind = "vllm"', f"[engine.vllm]\n{keys}"))
    assert what in line
    assert remedy in line
    assert "[engine" in line


def test_settings_without_effect_are_mistakes(toml) -> None:
    line = refused(toml("[engine.vllm]\nmax_sequences = 8"))
    assert "[engine.vllm] has no effect while engine.kind = 'transformers'" in line
    assert "set kind = 'vllm'" in line
    line = refused(toml('[engine]\nkind = "vllm"\nprompts_per_batch = 4'))
    assert "engine.prompts_per_batch is the transformers engine's" in line
    assert "use engine.vllm.max_sequences" in line


ROLLOUTS = [
    ('source = "saved"', "rollout.saved = RUN_DIR", "go together"),
    ('saved = "runs/y"', "rollout.source = 'saved'", "go together"),
    ('source = "saved"\nsaved = "runs/y"\nmax_reuse = 2', "trains on given groups", "max_reuse"),
    ('source = "saved"\nsaved = "runs/y"\nmax_staleness = 1', "given groups", "max_staleness"),
    ('source = "saved"\nsaved = "runs/y"\nsave_groups = true', "given groups", "save_groups"),
    ("max_age = 3", "rollout.max_age", "needs rollout.max_reuse >= 2"),
    ("ahead = 1", "rollout.ahead = 1", "older than max_staleness = 0 allows"),
    ("max_staleness = -1", "max_staleness = -1", "greater than or equal to 0"),
    ("max_reuse = 0", "max_reuse = 0", "greater than"),
    ("max_age = -1\nmax_reuse = 2", "max_age = -1", "greater than or equal to 0"),
    ("max_stale = 1", "unknown key 'max_stale'", "did you mean 'max_staleness'?"),
]


@pytest.mark.parametrize(("keys", "what", "remedy"), ROLLOUTS)
def test_impossible_rollouts_are_refused(toml, keys: str, what: str, remedy: str) -> None:
    line = refused(toml(f"[rollout]\n{keys}"))
    assert what in line
    assert remedy in line
    assert "[rollout]" in line or "rollout" in line.partition(": ")[0]


@pytest.mark.parametrize(
    "engine",
    ['kind = "transformers"', 'kind = "vllm"', 'kind = "vllm"\nvllm = { placement = "colocated" }'],
)
def test_sampling_ahead_needs_engines_beside_the_trainer(toml, engine: str) -> None:
    line = refused(toml(f"[engine]\n{engine}", "[rollout]\nmax_staleness = 2"))
    assert "rollout.max_staleness = 2 needs engines that sample while the trainer trains" in line
    assert "engine.kind = 'vllm' with engine.vllm.placement = 'separate'" in line


def test_an_override_is_named_as_the_place(toml) -> None:
    line = refused(toml(), "rollout.max_age=3")
    assert "needs rollout.max_reuse >= 2" in line
    line = refused(toml(), "engine.vllm.max_restarts=-1")
    assert "--set engine.vllm.max_restarts=-1" in line


# ---- what is possible --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "rollout"),
    [
        ("", ""),
        ("", "max_reuse = 3\nmax_age = 0"),
        ("", 'source = "saved"\nsaved = "runs/y"'),
        ("", "save_groups = true\ntrain = false"),
        ('kind = "vllm"', ""),
        (f"{SEPARATE}, engines = 3, devices = [1, 2, 3] }}", "max_staleness = 4"),
        (
            f'{SEPARATE}, addresses = ["http://a:1", "http://b:22"] }}',
            "max_staleness = 1\nahead = 3",
        ),
        # Staleness without running ahead: weights change under thoughts of other runs' engines only.
        ('kind = "vllm"', "max_staleness = 1\nahead = 0"),
    ],
)
def test_possible_ones_are_accepted(toml, engine: str, rollout: str) -> None:
    load(RunConfig, toml(f"[engine]\n{engine}", f"[rollout]\n{rollout}"))


def test_what_is_absent_follows_from_the_rest() -> None:
    plain, ahead = RolloutConfig(), RolloutConfig(max_staleness=3)
    assert (plain.steps_ahead, ahead.steps_ahead) == (0, 3)
    assert RolloutConfig(max_staleness=3, ahead=0).steps_ahead == 0
    assert [RolloutConfig(max_reuse=n).oldest_reused for n in (1, 2, 3)] == [4, 8, 12]
    assert RolloutConfig(max_reuse=2, max_age=0).oldest_reused == 0


def test_the_two_engines_decode_as_many_together_unless_told(toml) -> None:
    cfg = load(RunConfig, toml())
    assert cfg.engine.prompts_per_batch == DECODED_TOGETHER
    assert cfg.engine.kind == "transformers"
