"""A model folder of somebody else is numbers and names: no code that it brings is run, no pickle of it is opened."""

import io
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rlpt import annotate, downstream
from rlpt.config import PolicyConfig
from rlpt.policy import foreign, load
from rlpt.policy.given import model_config
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError

Edited = Callable[..., Path]


class Strikes:
    """A pickle of it leaves a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.fixture
def given(tmp_path: Path, hostile_shards: Path) -> Edited:
    """A small model whose folder has code of its own, with some keys of its config.json replaced."""

    def make(**replaced: Any) -> Path:
        folder = tmp_path / "model"
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
        )  # fmt: skip
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        (folder / "tokenizer.json").write_bytes((hostile_shards / "tokenizer.json").read_bytes())
        code = f"open({str(tmp_path / 'struck')!r}, 'w')\n"
        code += "from transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
        (folder / "own.py").write_text(code)
        table = json.loads((folder / "config.json").read_text())
        table["auto_map"] = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
        (folder / "config.json").write_text(json.dumps(table | replaced))
        return folder

    return make


def doors(folder: Path, shards: ShardFolder) -> dict[str, Callable[[], Any]]:
    """Every way of rlpt to a model folder."""
    plan = load.blueprint(PolicyConfig(fresh={"layers": 1, "width": 32, "heads": 2}), shards, 100)  # pyright: ignore
    table = {"model": str(folder), "out_dir": str(folder.parent / "down"), "tasks": []}
    return {
        "policy": lambda: load.meta_model(
            load.blueprint(PolicyConfig(path=folder), shards, 100).config
        ),
        "foreign": lambda: foreign.described(folder, plan, 100),
        "annotate": lambda: annotate._loaded(folder, shards, 100),
        "downstream": lambda: downstream.run(
            downstream.DownstreamConfig.model_construct(**table | {"model": folder})
        ),
    }


DOORS = ("policy", "foreign", "annotate", "downstream")


@pytest.mark.parametrize("door", DOORS)
def test_code_that_a_model_brings_is_refused_whatever_stdin_says(
    door: str, given: Edited, tmp_path: Path, hostile_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unasked, transformers asks on the terminal, and a `y` in a job's input runs it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))
    folder = given(model_type="of-its-own")
    with pytest.raises(UserError, match="never run: give a model of a known type") as refused:
        doors(folder, ShardFolder.open(hostile_shards))[door]()
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "struck").exists()


@pytest.mark.parametrize("door", DOORS[:3])
def test_a_known_model_is_transformers_own_and_its_code_is_left_behind(
    door: str, given: Edited, tmp_path: Path, hostile_shards: Path
) -> None:
    folder = given()
    doors(folder, ShardFolder.open(hostile_shards))[door]()
    config = model_config(folder, "policy.path")
    config.save_pretrained(tmp_path / "handed_on")
    assert "auto_map" not in json.loads((tmp_path / "handed_on/config.json").read_text())
    assert not (tmp_path / "struck").exists()


@pytest.mark.parametrize("door", DOORS)
def test_weights_that_are_a_pickle_are_refused(
    door: str, given: Edited, tmp_path: Path, hostile_shards: Path
) -> None:
    folder = given()
    (folder / "model.safetensors").unlink()
    data = pickle.dumps({"lm_head.weight": torch.zeros(1), "x": Strikes(tmp_path / "struck")})
    (folder / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(UserError, match="no safetensors there, and nothing else is loaded"):
        doors(folder, ShardFolder.open(hostile_shards))[door]()
    assert not (tmp_path / "struck").exists()


@pytest.mark.parametrize("content", ["[1]", "{", "[" * 100_000, '{"model_type": 7}', ""])
def test_a_configuration_that_is_none_is_one_line(content: str, given: Edited) -> None:
    folder = given()
    (folder / "config.json").write_text(content)
    with pytest.raises(
        UserError, match=r"config\.json is of no model that transformers has"
    ) as said:
        model_config(folder, "policy.path")
    assert "\n" not in str(said.value)
    assert len(str(said.value)) < 1000
