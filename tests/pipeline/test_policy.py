"""Layout, loading and scoring: the numbers are transformers' own."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from rlpt import dist
from rlpt.config import FreshPolicy, PolicyConfig, PromptConfig
from rlpt.policy import load
from rlpt.policy.markers import read_tokenizer, vocabulary
from rlpt.policy.packing import pack, rows
from rlpt.policy.policy import Policy, scores_of
from rlpt.policy.scoring import Scorer
from rlpt.prompts import held_out
from rlpt.types import Branch, concat, thought_branch
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError

CFG = PromptConfig(context_tokens=24, min_context_tokens=6, horizon_tokens=5)


def plain_model(policy: Policy) -> torch.nn.Module:
    """The same weights in an ordinary transformers model."""
    lm = transformers.AutoModelForCausalLM.from_config(policy.lm.config, dtype=torch.float32)
    lm.load_state_dict(dict(load.named_full_tensors(policy)), strict=False)
    return lm.eval()


def expected_logp(
    lm: torch.nn.Module, prefix: np.ndarray, target: np.ndarray, banned: tuple[int, ...]
) -> np.ndarray:
    """One sequence at a time, full logits, float64 softmax."""
    ids = torch.from_numpy(concat(prefix, target))[None]
    with torch.no_grad():
        logits = lm(input_ids=ids).logits[0].double()
    logits[:, list(banned)] = -torch.inf
    logp = torch.log_softmax(logits, -1)
    rows = torch.arange(len(prefix) - 1, len(prefix) + len(target) - 1)
    return logp[rows, torch.from_numpy(target)].numpy()


def test_scores_are_those_of_one_sequence_at_a_time(
    policy: Policy, plan: load.Blueprint, shards: ShardFolder, world: dist.World
) -> None:
    markers, lm = plan.vocabulary.markers, plain_model(policy)
    prompts = held_out(shards.split("train"), CFG, markers, 9, 0, ())
    scorer = Scorer(policy, markers.ids, world, tokens=200)
    thoughts = [np.arange(n % 4) + 3 for n in range(9)]
    own = scorer.branches(
        [(p.trunk, thought_branch(p, markers, z)) for p, z in zip(prompts, thoughts, strict=True)]
    )
    bare = scorer.trunks([(p.trunk, p.cut, p.cut + p.horizon) for p in prompts])
    for prompt, thought, with_thought, without in zip(prompts, thoughts, own, bare, strict=True):
        context = prompt.trunk.ids[: prompt.cut]
        prefix = concat(context, [markers.opener], thought, [markers.closer])
        assert np.allclose(
            with_thought.logp,
            expected_logp(lm, prefix, prompt.continuation_ids, markers.ids),
            atol=2e-6,
        )
        assert np.allclose(
            without.logp,
            expected_logp(lm, context, prompt.continuation_ids, markers.ids),
            atol=2e-6,
        )


def test_the_null_control_is_zero_to_the_bit_width(
    policy: Policy, plan: load.Blueprint, shards: ShardFolder, world: dist.World
) -> None:
    prompts = held_out(shards.split("train"), CFG, plan.vocabulary.markers, 12, 0, ())
    scorer = Scorer(policy, plan.vocabulary.markers.ids, world, tokens=300)
    trunk = scorer.trunks([(p.trunk, p.cut, p.cut + p.horizon) for p in prompts])
    branch = scorer.branches([(p.trunk, Branch(p.cut, p.continuation_ids, 0)) for p in prompts])
    assert max(np.abs(a.logp - b.logp).max() for a, b in zip(trunk, branch, strict=True)) < 1e-5


def test_scores_do_not_depend_on_the_batch(
    policy: Policy, plan: load.Blueprint, shards: ShardFolder, world: dist.World
) -> None:
    markers = plan.vocabulary.markers
    prompts = held_out(shards.split("train"), CFG, markers, 7, 0, ())
    pairs = [(p.trunk, thought_branch(p, markers, [5, 6][: i % 3])) for i, p in enumerate(prompts)]
    one, many = (Scorer(policy, markers.ids, world, batch).branches(pairs) for batch in (1, 10_000))
    assert all(
        np.allclose(a.logp, b.logp, atol=2e-6) and np.array_equal(a.argmax, b.argmax)
        for a, b in zip(one, many, strict=True)
    )


def test_markers_leave_the_softmax(
    policy: Policy, plan: load.Blueprint, shards: ShardFolder, world: dist.World
) -> None:
    markers = plan.vocabulary.markers
    (prompt,) = held_out(shards.split("train"), CFG, markers, 1, 0, ())
    every = [Branch(prompt.cut, np.array([v]), 0) for v in range(plan.vocabulary.size)]
    scores = Scorer(policy, markers.ids, world, 2000).branches(
        [(prompt.trunk, branch) for branch in every]
    )
    p = np.exp([s.total for s in scores])
    assert p[list(markers.ids)].tolist() == [0.0, 0.0]
    assert abs(p.sum() - 1.0) < 1e-5


def test_a_model_made_on_meta_is_the_model_made_for_real(policy: Policy) -> None:
    # Rotary frequencies are in no file: made on the meta device they must be rebuilt, or these logits are noise.
    lm = plain_model(policy)
    ids = torch.arange(40)[None] % 300
    assert torch.equal(policy.lm.model.rotary_emb.inv_freq, lm.model.rotary_emb.inv_freq)
    with torch.no_grad():
        hidden = lm.model(input_ids=ids).last_hidden_state
    assert hidden.std() > 0.1


def test_fresh_weights_depend_on_the_seed_alone(plan: load.Blueprint, world: dist.World) -> None:
    cfg = PolicyConfig(fresh=FreshPolicy(layers=2, width=32, heads=2, mlp_width=64, init_std=0.1))
    one, same, other = (
        dict(load.named_full_tensors(load.load(cfg, plan, world, seed))) for seed in (0, 0, 1)
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    assert abs(one[name].std().item() - 0.1) < 0.01
    assert one["model.norm.weight"].unique().tolist() == [1.0]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_saved_model_loads_with_its_own_logits(
    family: str, tie: bool, shards: ShardFolder, world: dist.World, tmp_path: Path
) -> None:
    fresh = FreshPolicy(
        architecture=family,
        layers=1,
        width=32,
        heads=2,
        kv_heads=1,
        mlp_width=48,
        tie_embeddings=tie,
    )
    source = load.blueprint(PolicyConfig(fresh=fresh), shards, 100)
    torch.manual_seed(0)
    config = source.config
    config.vocab_size = source.vocabulary.text_size
    lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lm.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(shards.tokenizer_path.read_bytes())
    cfg = PolicyConfig(path=tmp_path)
    plan = load.blueprint(cfg, shards, 100)
    assert plan.vocabulary.size == source.vocabulary.text_size + 2
    policy = load.load(cfg, plan, world, seed=0)
    loaded = plain_model(policy)
    ids = torch.arange(30)[None] % 200
    with torch.no_grad():
        own, theirs = loaded(ids).logits[..., :-2], lm.float().eval()(ids).logits
    assert torch.allclose(own, theirs, atol=1e-5)
    assert all(p.dtype == torch.float32 for p in policy.parameters())


def test_markers_use_added_tokens_then_spare_rows_then_new_ones() -> None:
    tokenizer = {
        "model": {"vocab": {"a": 0, "b": 1}},
        "added_tokens": [{"content": "<think>", "id": 2}],
    }
    cfg = PolicyConfig(fresh=FreshPolicy())
    assert vocabulary(cfg, tokenizer, 0).markers.ids == (2, 3)
    assert vocabulary(cfg, tokenizer, 0).size == 4
    assert vocabulary(cfg, tokenizer, 8).size == 8
    assert vocabulary(cfg, tokenizer, 3).size == 4


def test_markers_of_several_ids_are_refused() -> None:
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}
    with pytest.raises(UserError, match=r"no single id for '<think>'.*add_markers"):
        vocabulary(PolicyConfig(fresh=FreshPolicy(), add_markers=False), tokenizer, 0)


def test_a_foreign_tokenizer_is_refused(shards: ShardFolder, tmp_path: Path) -> None:
    lm = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    lm.save_pretrained(tmp_path)
    text = shards.tokenizer_path.read_text().replace('"merges": [', '"merges": [["z", "q"],', 1)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer is not the one of the shards"):
        load.blueprint(PolicyConfig(path=tmp_path), shards, 100)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"model"', "damaged"),
        (b"\xff{}", "damaged"),
        (b"[]", "no model.vocab"),
        (b"{}", "no model"),
    ],
)
def test_a_tokenizer_that_is_none_is_the_users_mistake(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"tokenizer\.json: no tokenizer there"):
        read_tokenizer(path)
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"tokenizer\.json: {said}.*; put"):
        read_tokenizer(path)


def test_checkpointed_activations_give_the_same_gradient(
    shards: ShardFolder, world: dist.World
) -> None:
    gradients = []
    for checkpointing in (False, True):
        fresh = FreshPolicy(layers=2, width=32, heads=2, mlp_width=64, init_std=0.1)
        cfg = PolicyConfig(fresh=fresh, gradient_checkpointing=checkpointing)
        plan = load.blueprint(cfg, shards, 100)
        policy = load.load(cfg, plan, world, seed=0)
        prompts = held_out(shards.split("train"), CFG, plan.vocabulary.markers, 4, 0, ())
        packed = pack([prompt.trunk for prompt in prompts], [], world.device, policy.layout)
        hidden = [packed.trunk_rows(k, 1, len(p.trunk.ids)) for k, p in enumerate(prompts)]
        kind = rows(hidden, [p.trunk.ids[1:] for p in prompts], (), world.device)
        policy(packed, scores_of([kind]))[0].logp_R.sum().backward()
        gradients.append([load.local(p.grad) for p in policy.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_bf16_compute_keeps_fp32_masters_and_logits(shards: ShardFolder, world: dist.World) -> None:
    fresh = FreshPolicy(layers=2, width=32, heads=2, mlp_width=64, init_std=0.1)
    found = []
    for dtype in ("float32", "bfloat16"):
        cfg = PolicyConfig(fresh=fresh, compute_dtype=dtype)
        plan = load.blueprint(cfg, shards, 100)
        policy = load.load(cfg, plan, world, seed=0)
        assert all(p.dtype == torch.float32 for p in policy.parameters())
        prompts = held_out(shards.split("train"), CFG, plan.vocabulary.markers, 12, 0, ())
        scorer = Scorer(policy, plan.vocabulary.markers.ids, world, 500)
        found.append(
            np.concatenate(
                [s.logp for s in scorer.trunks([(p.trunk, 1, len(p.trunk.ids)) for p in prompts])]
            )
        )
    assert found[1].dtype == np.float32
    error = np.abs(found[1] - found[0])
    # bf16 has 8 bits: an error of its size, and not that of bf16 logits (steps of 2^-6 here), which would be coarser.
    assert 1e-5 < error.max() < 0.1
    assert len(np.unique(found[1])) > 0.9 * len(found[1])
