"""The real engine on a CPU: its log-probabilities are the trainer's, before and after every publication."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rlpt.agreement import check_engine
from rlpt.policy.load import local
from rlpt.policy.scoring import Scorer
from rlpt.prompts import held_out
from rlpt.rollout import sync, transport
from rlpt.rollout.engine import generate
from rlpt.rollout.fleet import Fleet
from rlpt.types import Branch, concat
from rlpt_data.strict import UserError

EXACT = 2e-5
"""Nats; measured 3e-6 to 5e-6."""


def prompts_of(bench, count: int = 24):
    return held_out(bench.shards.split("dev"), bench.cfg.prompts, bench.markers, count, 0, ())


def largest(bench, engine: Fleet) -> float:
    return check_engine(
        *(engine, bench.policy, prompts_of(bench), bench.markers, bench.world, "float32", 8192)
    ).largest


@torch.no_grad()
def moved(bench) -> None:
    """Every weight changes, norms too."""
    for parameter in bench.policy.parameters():
        local(parameter).add_(torch.randn_like(local(parameter)) * 0.05)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_generate_publish_generate(bench, opened, architecture: str, tied: bool) -> None:
    made = bench(architecture=architecture, tie_embeddings=tied, kv_heads=1)
    engine = opened(made)
    try:
        for version in (0, 1):
            sync.publish(made.policy, engine, version)
            assert largest(made, engine) < EXACT
            groups = generate(engine, prompts_of(made), 3, "train")
            assert {int(v) for g in groups for r in g.rollouts for v in r.version} == {version}
            moved(made)
        # Weights that were not published are seen at once.
        with pytest.raises(
            UserError, match=r"log-probabilities are not the trainer's.*worst token"
        ):
            largest(made, engine)
    finally:
        engine.close()


def test_a_corrupted_publication_names_its_tensor(shared, monkeypatch: pytest.MonkeyPatch) -> None:
    made, engine = shared
    written = transport.write_directory

    def corrupted(named, folder):
        def one_bit(pairs):
            for name, tensor in pairs:
                if name == "model.layers.1.self_attn.v_proj.weight":
                    tensor = tensor.clone()
                    tensor.view(torch.int32)[3, 5] ^= 1
                yield name, tensor

        named = list(named)
        tensors = written(iter(named), folder)
        written(one_bit(named), folder)
        return tensors

    monkeypatch.setattr(transport, "write_directory", corrupted)
    try:
        with pytest.raises(
            RuntimeError, match=r"version 0: tensor model\.layers\.1\.self_attn\.v_proj\.weight has"
        ):
            sync.publish(made.policy, engine, 0)
    finally:
        engine.close()


def test_a_publication_that_does_not_arrive_is_seen(
    shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, engine = shared
    sync.publish(made.policy, engine, 0)
    kept = made.cfg.run_dir / "kept"
    (made.cfg.run_dir / "engine/weights/version_000000").rename(kept)
    moved(made)
    client = engine.seats[0].client
    deliver, old = client.publish, {"place": str(kept)}
    monkeypatch.setattr(client, "publish", lambda m: deliver(m.model_copy(update=old)))
    with pytest.raises(RuntimeError, match=r"version 1: tensor .* \(\d+ of \d+ tensors differ\)"):
        sync.publish(made.policy, engine, 1)


def test_a_thought_belongs_to_its_seed_not_to_its_batch(shared) -> None:
    made, engine = shared
    sync.publish(made.policy, engine, 2)
    prompts = prompts_of(made)
    whole = generate(engine, prompts, 4, "train")
    alone = [generate(engine, [prompt], 4, "train")[0] for prompt in prompts[:6]]
    for one, other in zip(alone, whole, strict=False):
        pairs = zip(one.rollouts, other.rollouts, strict=True)
        assert all(np.array_equal(a.ids, b.ids) for a, b in pairs)
    assert not np.array_equal(whole[0].rollouts[0].ids, whole[0].rollouts[1].ids)
    assert all(made.markers.opener not in r.ids for g in whole for r in g.rollouts)


def test_weights_change_in_flight_and_tokens_know_it(
    shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token has the log-probability of the very version that it names."""
    made, engine = shared
    monkeypatch.setattr(
        engine, "thought", engine.thought.model_copy(update={"budget_tokens": 1500})
    )
    prompts = prompts_of(made, 4)
    sync.publish(made.policy, engine, 3)
    tickets = engine.submit(prompts, 4, "in flight")
    begun = steps(engine)
    while steps(engine) < begun + 40:
        pass
    old = [local(parameter).clone() for parameter in made.policy.parameters()]
    moved(made)
    sync.publish(made.policy, engine, 4)
    groups = engine.collect(tickets)
    both = [r for g in groups for r in g.rollouts if set(r.version.tolist()) == {3, 4}]
    assert both
    assert all((np.diff(r.version) >= 0).all() for r in both)
    assert distance(made, groups, 4) < EXACT
    assert distance(made, groups, 3) > 0.1
    with torch.no_grad():
        for parameter, before in zip(made.policy.parameters(), old, strict=True):
            local(parameter).copy_(before)
    assert distance(made, groups, 3) < EXACT


def steps(engine: Fleet) -> int:
    return engine.seats[0].client.collect((), 0.0)[1]


def distance(bench, groups, version: int) -> float:
    """The largest difference to the policy's log-probabilities, over tokens of one version."""
    scorer = Scorer(bench.policy, (bench.markers.opener,), bench.world, 8192)
    rollouts = [(g.prompt, r) for g in groups for r in g.rollouts]
    opener = [bench.markers.opener]
    pairs = [(p.trunk, Branch(p.cut, concat(opener, r.ids), 1)) for p, r in rollouts]
    scored = scorer.branches(pairs)
    chosen = [r.action & (r.version == version) for _, r in rollouts]
    assert any(c.any() for c in chosen)
    return max(
        float(np.abs(s.logp[c] - r.logp[c]).max(initial=0.0))
        for s, (_, r), c in zip(scored, rollouts, chosen, strict=True)
    )


def test_a_run_of_two_ranks_has_the_thoughts_of_one(train, tmp_path: Path) -> None:
    """Each rank has an engine of its own; at the first step the weights are the same."""
    found = []
    for ranks in (1, 2):
        run_dir = tmp_path / f"ranks_{ranks}"
        done = train(run_dir, "stage.0.steps=2", "rollout.save_groups=true", ranks=ranks).run()
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(thoughts(run_dir, 1))
    assert found[0] == found[1]


def thoughts(run_dir: Path, step: int) -> dict[int, list]:
    from rlpt.rollout.records import unpacked
    from rlpt.saved_supply import groups_path

    path = groups_path(run_dir, step)
    rows = unpacked(path.read_bytes(), str(path))
    return {
        row["position"]: [r["ids"] for g in row["groups"] for r in g["rollouts"]] for row in rows
    }


def test_an_asynchronous_run_goes_on_from_a_checkpoint_with_every_group_once(
    train, tmp_path: Path
) -> None:
    words = (
        *("engine.vllm.placement=separate", "rollout.max_staleness=2", "rollout.save_groups=true"),
        *("stage.0.steps=12", "checkpoint.every=4", "checkpoint.keep_last=9"),
    )
    command = train(tmp_path / "run", *words)
    process = command.start(tmp_path / "log")
    while len(lines(tmp_path / "run")) < 6 and process.poll() is None:
        pass
    process.kill()
    process.wait()
    done = command.run()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "at step 4" in done.stderr or "at step 8" in done.stderr
    order = [p for step in range(1, 13) for p in thoughts(tmp_path / "run", step)]
    # Whatever was under way at the kill: each document of the order was trained once.
    assert sorted(order) == list(range(12 * 32))
    assert all(row["staleness/worst"] <= 2 for row in lines(tmp_path / "run"))


def lines(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    whole = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in whole if line.endswith("}")]
