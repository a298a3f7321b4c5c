"""In which order a sleeping engine gets weights, and which way they take to which engine."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlpt import dist
from rlpt.engines import VLLMConfig
from rlpt.rollout import start
from rlpt.rollout.publishing import DirectoryPublisher
from rlpt.rollout.server import Server
from rlpt.rollout.vllm_engine import VLLMBackend
from rlpt_data.strict import UserError

ALONE = dist.World(0, 1, torch.device("cpu"))


class SleepingEngine:
    """vLLM's LLMEngine as far as weights and sleep go: `wake_up` of a tag that does not sleep is an error here."""

    def __init__(self) -> None:
        self.asleep: set[str] = set()
        self.calls: list[tuple] = []
        self.engine_core = SimpleNamespace(set_weight_version=self._named)
        self.model = SimpleNamespace(load_weights=self._load, named_parameters=dict)

    def _named(self, version: str) -> None:
        self.calls.append(("version", version))

    def _load(self, named) -> None:
        assert "weights" not in self.asleep
        assert "kv_cache" in self.asleep
        self.calls.append(("load", [name for name, _ in named]))

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))
        self.asleep = {"weights", "kv_cache"}

    def wake_up(self, tags: list[str]) -> None:
        self.asleep -= set(tags)
        self.calls.append(("wake_up", tags))

    def apply_model(self, call) -> list:
        return [call(self.model)]

    def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        self.calls.append(("reset", reset_running_requests))
        return True

    def has_unfinished_requests(self) -> bool:
        return False


def test_after_sleep_weights_wake_before_they_are_loaded_and_the_cache_after(
    fake, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper = SleepingEngine()
    made = object.__new__(VLLMBackend)
    made.version = 2
    made.spec = fake.specification(sleeps=True, dtype="bfloat16")
    made._engine = sleeper
    publisher = DirectoryPublisher(tmp_path, "bfloat16", ALONE)
    message = publisher.send(iter({"norm": torch.ones(4)}.items()), 3)
    server = Server(made, "token")
    made.sleep()
    assert made.version == -1
    monkeypatch.setattr(VLLMBackend, "checksums", lambda self, shapes: dict.fromkeys(shapes, 0))
    assert server._publish(message) == {"norm": 0}
    assert sleeper.calls == [
        ("sleep", 2), ("wake_up", ["weights"]), ("load", ["norm"]), ("version", "3"), ("reset", True),
        ("wake_up", ["kv_cache"]),
    ]  # fmt: skip
    assert made.version == 3


@pytest.mark.parametrize(
    ("device", "cfg", "way"),
    [
        ("cpu", {}, "directory"),
        ("cuda", {}, "directory"),
        ("cuda", {"weights_dir": Path("shared")}, "directory"),
        ("cuda", {"placement": "separate"}, "directory"),
        ("cuda", {"placement": "separate", "publish": "broadcast"}, "broadcast"),
        ("cpu", {"publish": "broadcast"}, "broadcast"),
        ("cuda", {"publish": "directory"}, "directory"),
    ],
)
def test_the_way_of_the_weights_follows_from_where_engines_are(fake, device, cfg, way) -> None:
    assert start._way(VLLMConfig(**cfg), fake.specification(device=device)) == way


@pytest.mark.parametrize(
    ("device", "publish", "said"),
    [
        ("cpu", "ipc", "there is none; use 'directory'"),
        ("cuda", "broadcast", "use 'ipc' or 'directory'"),
    ],
)
def test_a_way_that_cannot_be_gone_is_refused_with_the_remedy(fake, device, publish, said) -> None:
    with pytest.raises(UserError, match=rf"engine.vllm.publish = '{publish}' .*{said}"):
        start._way(VLLMConfig(publish=publish), fake.specification(device=device))
