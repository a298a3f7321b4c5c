"""Tiny models that close early, prompts of every shape, and rollouts one at a time: what engines are held against."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rlpt import rng
from rlpt.config import ThoughtConfig
from rlpt.rollout import server
from rlpt.rollout.client import EngineClient
from rlpt.rollout.transformers_engine import TransformersEngine
from rlpt.types import Markers, Prompt, Rollout, Trunk, concat

VOCAB = 61
MARKERS = Markers(opener=59, closer=60)
SEED = 3
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Matrices large enough that attention is far from flat.
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
OWN: dict[str, dict[str, Any]] = {
    # Its own factor would flatten every distribution.
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    # Shorter than all prompts together, and longer than any path.
    "mistral": {"sliding_window": 40},
}
"""What the configuration of a family has beside the sizes."""


class Bench:
    """One model as an engine of either layout and as plain transformers."""

    def __init__(self, family: str, **changes: Any) -> None:
        sizes = SIZES | OWN.get(family, {}) | changes
        self.config = transformers.AutoConfig.for_model(family, **sizes)
        torch.manual_seed(0)
        self.lm = transformers.AutoModelForCausalLM.from_config(
            self.config, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        _close_early(self.lm)

    def engine(
        self, layout: str, thought: ThoughtConfig, prompts_per_batch: int = 32
    ) -> TransformersEngine:
        made = TransformersEngine(
            self.config, layout, MARKERS, thought, SEED, prompts_per_batch, torch.device("cpu")
        )
        made.publish(self.lm.named_parameters(), version=2)
        _close_early(made.lm)
        return made

    @torch.no_grad()
    def alone(self, prompt: Prompt, g: int, purpose: str, thought: ThoughtConfig) -> Rollout:
        """One rollout, every token from a whole forward of plain transformers and a float64 softmax."""
        key = torch.tensor([rng.key(SEED, purpose, *prompt.key, g)])
        ids, logp, action = [], [], []
        closed, ended = -1, False
        while not ended:
            position = len(ids)
            logits = self.lm(torch.from_numpy(concat(prompt.policy_ids, ids))[None]).logits[0, -1]
            logits = logits.double()
            logits[MARKERS.opener] = -torch.inf
            likely = torch.log_softmax(logits, -1)
            drawn = int((likely + rng.gumbel(key, position, VOCAB)[0]).argmax())
            forced = closed < 0 and position == thought.budget_tokens
            ids.append(MARKERS.closer if forced else drawn)
            logp.append(0.0 if forced else float(likely[drawn]))
            action.append(not forced)
            again = ids[-1] == MARKERS.closer and closed >= 0
            if ids[-1] == MARKERS.closer and closed < 0:
                closed = position
            ended = again or (closed >= 0 and position - closed >= thought.prediction_tokens)
        finish = "closer" if action[closed] else "budget"
        version = np.full(len(ids), 2)
        return Rollout(np.array(ids), np.array(action), np.array(logp), version, closed, finish)


def _close_early(lm: Any) -> None:
    def lifted(_head: Any, _input: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[..., MARKERS.closer] += 3.0
        return logits

    lm.lm_head.register_forward_hook(lifted)


def trunk(name: str, length: int) -> Trunk:
    """A document of random text."""
    draw = np.random.default_rng(sum(name.encode()))
    return Trunk(name, "x", 0, 0, draw.integers(0, 59, length), np.arange(length + 1), ())


def prompt(of: Trunk, cut: int, suffix: Sequence[int] = (MARKERS.opener,)) -> Prompt:
    """A cut whose policy reads the context and ``suffix``."""
    ids = concat(of.ids[:cut], suffix)
    return Prompt(of, cut, horizon=2, policy_ids=ids, score_ids=ids)


@pytest.fixture(scope="session")
def fake(module_at):
    """The module `fake_backend`: engines without a model."""
    return module_at(Path(__file__).with_name("fake_backend.py"))


@pytest.fixture
def served(fake, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    monkeypatch.setattr(server, "_IDLE", 0.02)
    one = fake.Served(fake.FakeBackend(fake.specification()))
    yield one
    one.die()


@pytest.fixture
def connect(served, fake) -> Iterator:
    """Clients by name."""
    made: list[EngineClient] = []

    def client(name: str = "a", token: str = fake.TOKEN, timeout: float = 5.0) -> EngineClient:
        made.append(EngineClient(served.address, token, name, timeout))
        return made[-1]

    yield client
    for each in made:
        each.close()


@pytest.fixture(name="prompt")
def _prompt():
    return prompt


@pytest.fixture(name="trunk")
def _trunk():
    return trunk


@pytest.fixture(scope="session")
def bench():
    """Models by family and sizes, made once."""
    return functools.cache(lambda family="llama", **changes: Bench(family, **changes))


@pytest.fixture
def forest() -> list[Prompt]:
    """Cuts of three documents in any order: at 1, at the end, and two prompts at one cut."""
    first, second, third = trunk("first", 19), trunk("second", 11), trunk("third", 24)
    places = ((first, 7), (second, 1), (first, 19), (third, 24), (second, 10), (third, 5))
    again = prompt(trunk("again", 19), 7)
    return [*(prompt(of, cut) for of, cut in places), again]
