"""Which models may share trunks: each tried exact, every other refused by name with a way on."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rlpt.policy.families import TRIED, check_positions, choose, why_not_shared
from rlpt.policy.packing import pack
from rlpt.types import Branch, Trunk
from rlpt_data.strict import UserError

LONGEST = 18
SHAPES = ((17, ((5, 4), (5, 7), (17, 1), (5, 0), (12, 3))), (9, ((1, 3), (9, 5))))
"""Tokens of every trunk, and (cut, tokens) of its branches."""


@pytest.fixture(scope="module", name="tree")
def _tree():
    """Two trunks, wanted whole, and their branches."""
    draw = np.random.default_rng(0)
    trunks, pairs = [], []
    for size, branches in SHAPES:
        trunk = Trunk("d", "x", 0, 0, draw.integers(0, 61, size), np.arange(size + 1), ())
        trunks.append(trunk)
        pairs += [(trunk, Branch(cut, draw.integers(0, 61, n), 0)) for cut, n in branches]
    return trunks, pairs


def test_every_tried_family_is_tried_here(families) -> None:
    assert set(families) == set(TRIED)
    assert list(TRIED) == sorted(TRIED)


@pytest.mark.parametrize("family", TRIED)
def test_a_tried_family_is_exact_and_a_wrong_mask_would_be_seen(
    family: str, tree, tiny, as_policy, one_at_a_time, in_one_forward, assert_exact
) -> None:
    trunks, pairs = tree
    lm = tiny(family)
    assert lm.config.model_type == family
    policy = as_policy(lm)
    right = in_one_forward(policy, trunks, pairs)
    assert_exact(lm, policy, one_at_a_time(lm, trunks, pairs), right)
    packed = pack(trunks, pairs, torch.device("cpu"), "shared")
    assert packed.tree is not None
    assert packed.position_NT is not None
    assert packed.tree.longest == LONGEST
    crossings = [
        each._replace(trunk_stop=max(each.trunk_start + 1, each.trunk_stop - 1))
        for each in packed.tree.crossings
    ]
    for wrong in (
        replace(packed, tree=replace(packed.tree, crossings=tuple(crossings))),
        replace(packed, position_NT=packed.position_NT + (packed.position_NT >= 5)),
    ):
        with torch.no_grad():
            found = in_one_forward(policy, trunks, pairs, wrong)
        assert (torch.cat(found) - torch.cat(right)).abs().max() > 0.05


@pytest.mark.parametrize("family", TRIED)
def test_a_tried_family_may_share_its_trunks(family: str, tiny) -> None:
    config = tiny(family).config
    assert why_not_shared(config, LONGEST) is None
    for asked in ("auto", "shared"):
        assert choose(asked, config, LONGEST) == (
            "shared",
            "policy.layout: trunks are shared by their branches",
        )
    layout, note = choose("naive", config, LONGEST)
    assert (layout, note.partition(":")[0]) == ("naive", "policy.layout = 'naive'")


def sliding(**changes: Any) -> dict[str, Any]:
    return {"rope_theta": 10_000.0, "rope_type": "default"} | changes


# Name in the message -> (configuration, what else it says).
REFUSED: dict[str, tuple[Any, str]] = {
    "Gemma2": (transformers.Gemma2Config(), "was not tried"),
    "Gemma3Text": (transformers.Gemma3TextConfig(sliding_window=16), "was not tried"),
    "GptOss": (transformers.GptOssConfig(), "was not tried"),
    "Mamba": (transformers.MambaConfig(), "was not tried"),
    "RecurrentGemma": (transformers.RecurrentGemmaConfig(), "was not tried"),
    "Rwkv": (transformers.RwkvConfig(), "was not tried"),
    "Qwen3Next": (transformers.Qwen3NextConfig(), "was not tried"),
    "Lfm2": (transformers.Lfm2Config(), "was not tried"),
    "Llama4Text": (transformers.Llama4TextConfig(), "was not tried"),
    "Nemotron": (transformers.NemotronConfig(), "was not tried"),
    "StableLm": (transformers.StableLmConfig(), "was not tried"),
    "Mixtral": (transformers.MixtralConfig(), "was not tried"),
    "Olmo3": (transformers.Olmo3Config(sliding_window=99), "sliding window of 99 tokens"),
    "Cohere2": (transformers.Cohere2Config(sliding_window=99), "sliding window of 99 tokens"),
    "Qwen2": (
        transformers.Qwen2Config(use_sliding_window=True, sliding_window=16, max_window_layers=2),
        "sliding window of 16 tokens",
    ),
    "Phi3": (
        transformers.Phi3Config(
            hidden_size=32,
            num_attention_heads=4,
            max_position_embeddings=4096,
            original_max_position_embeddings=2048,
            rope_parameters=sliding(
                rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4
            ),
        ),
        "rotary positions of type longrope",
    ),
    "Llama": (
        transformers.LlamaConfig(rope_parameters=sliding(rope_type="dynamic", factor=2.0)),
        "rotary positions of type dynamic",
    ),
    "Gemma": (transformers.GemmaConfig(use_bidirectional_attention=True), "both directions"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_share_is_refused_by_name_and_the_naive_layout_offered(name: str) -> None:
    config, why = REFUSED[name]
    with pytest.raises(UserError) as refused:
        choose("shared", config, 100)
    said = str(refused.value)
    assert said.startswith(f"policy.layout = 'shared': {name} ")
    assert why in said
    assert said.endswith("; set policy.layout = 'naive' (exact, and slower)")
    layout, note = choose("auto", config, 100)
    assert layout == "naive"
    assert note.startswith(f"policy.layout: naive, because {name} ")
    assert why in note
    assert choose("naive", config, 100)[0] == "naive"


def test_positions_that_move_are_found_in_any_kind_of_layer() -> None:
    ropes = {"sliding_attention": sliding(), "full_attention": sliding()}
    config = transformers.Olmo3Config(rope_parameters=ropes)
    assert why_not_shared(config, 100) is None
    config.rope_parameters["full_attention"] = sliding(rope_type="dynamic", factor=2.0)
    assert "of type dynamic" in str(why_not_shared(config, 100))


def test_an_attention_softcap_is_refused_in_any_family() -> None:
    config = transformers.LlamaConfig()
    assert why_not_shared(config, 100) is None
    config.attn_logit_softcapping = 50.0
    assert why_not_shared(config, 100) == "Llama caps its attention scores"


@pytest.mark.parametrize("family", ["mistral", "olmo3"])
def test_a_window_is_no_hindrance_to_paths_inside_it(family: str) -> None:
    config = transformers.AutoConfig.for_model(family)
    assert config.sliding_window == 4096
    assert why_not_shared(config, 4096) is None
    reason = f"{type(config).__name__[:-6]} has a sliding window of 4096 tokens, and paths have up to 4097"
    assert why_not_shared(config, 4097) == reason
    config.sliding_window = None
    assert why_not_shared(config, 4097) is None


def test_a_window_that_no_layer_uses_is_no_hindrance() -> None:
    config = transformers.Qwen2Config(use_sliding_window=True, sliding_window=16)
    assert "sliding_attention" in config.layer_types
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    assert why_not_shared(config, 100) is None


@pytest.mark.parametrize("window", [4, 17])
def test_a_model_whose_window_is_shorter_than_a_path_stops_in_its_layer(
    window: int, tree, tiny, as_policy, in_one_forward
) -> None:
    """Whatever the configuration said: the layer itself is asked, shared or not."""
    trunks, pairs = tree
    policy = as_policy(tiny("olmo3", sliding_window=window))
    message = (
        rf"Olmo3Attention: a sliding window of {window} tokens is shorter than the longest path, 18"
    )
    for layout in ("shared", "naive"):
        packed = pack(trunks, pairs, torch.device("cpu"), layout)
        with pytest.raises(ValueError, match=message):
            in_one_forward(policy, trunks, pairs, packed)


def test_paths_past_the_last_position_are_refused_with_what_to_lower() -> None:
    config = transformers.Qwen3Config(max_position_embeddings=64)
    check_positions(config, 64)
    with pytest.raises(UserError) as refused:
        check_positions(config, 65)
    said = str(refused.value)
    assert said.startswith("policy: Qwen3 has 64 positions, and the longest sequence ")
    assert "has 65 tokens; lower prompts.context_tokens, thought.budget_tokens" in said
    check_positions(transformers.MambaConfig(), 10**9)
