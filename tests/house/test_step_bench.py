"""The step benchmark measures what it says: equal work in every arm, ratios by hand, and the memory of a step."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "launch" / "bench"
ARMS = ["naive", "two_passes", "shared"]
MIB = 2**20


@pytest.fixture(scope="module")
def quick():
    """One toy run of rlpt's arms: (what was printed, rows by arm, what was left out)."""
    command = [sys.executable, str(BENCH / "step.py"), "--quick", "--json"]
    command += [word for arm in ARMS for word in ("--arm", arm)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rows = {row["arm"]: row for row in found["results"]}
    return done.stdout, rows, found["not_measured"]


@pytest.fixture
def sibling(monkeypatch):
    """A module of the bench, imported as the script imports it."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for name in ("step", "rounds", "peer", "arms", "problem"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_all_arms_take_the_same_step(quick):
    """The same rewards and the same loss from the same weights, whatever is shared."""
    _, rows, missing = quick
    assert list(rows) == ARMS
    assert not missing
    naive = rows["naive"]
    assert naive["loss"] != 0
    for row in rows.values():
        assert abs(row["loss"] - naive["loss"]) < min(1e-5, 1e-2 * abs(naive["loss"]))
        assert abs(row["reward"] - naive["reward"]) < 1e-5


@pytest.mark.slow
def test_figures_of_a_row_agree_with_each_other(quick):
    printed, rows, _ = quick
    for row in rows.values():
        assert (row["context"], row["group"], row["thought"], row["cuts"]) == (32, 2, 4, 1)
        assert row["sequences"] == 4
        # 2 (32 + 4 + 4) / (32 + 2 (4 + 4)), by hand.
        assert row["token_ratio"] == pytest.approx(80 / 48, abs=1e-3)
        # Of two rounds the median is the mean, so medians of parts add up.
        whole = row["generate_s"] + row["score_train_s"]
        assert row["step_s"] == pytest.approx(whole, rel=1e-2)
        assert 0 < row["score_s"] + row["train_s"] <= 1.01 * row["score_train_s"]
        # One thread computes no more than the time that passes.
        assert 0 < row["score_train_cpu_s"] <= 1.01 * row["score_train_s"]
        assert row["score_train_cpu_s"] < row["step_cpu_s"] <= 1.01 * row["step_s"]
        for phase in ("step", "generate", "score_train", "step_cpu", "score_train_cpu"):
            assert 0 < row[f"{phase}_min_s"] <= row[f"{phase}_s"] * 1.001
            assert row[f"{phase}_over_shared"] > 0
        rate = row["score_train_gflop"] / row["score_train_s"]
        assert row["score_train_gflop_per_s"] == pytest.approx(rate, rel=1e-2)
        assert row["peak_mib"] is None
        assert row["date"] in printed
        assert row["torch"] == torch.__version__
    assert rows["shared"]["step_over_shared"] == rows["shared"]["score_train_over_shared"] == 1


@pytest.mark.slow
def test_the_profile_accounts_for_most_of_a_step_and_never_for_more(quick):
    for row in quick[1].values():
        parts = [row[f"{name}_share"] for name in ("engine_forward", "forward", "backward")]
        assert row["compute_share"] == pytest.approx(sum(parts), abs=1e-3)
        assert min(parts) > 0
        assert 0 < row["engine_forward_share"] < row["engine_share"]
        assert 0.3 < row["compute_share"] <= 1


@pytest.mark.parametrize(("numbers", "spread", "ratio"), [
    ((1024, 16, 64, 1), False, 16 * 1104 / (1024 + 16 * 80)),
    ((1024, 16, 64, 4), False, 64 * 1104 / (1024 + 64 * 80)),
    ((1024, 16, 64, 4, 8), False, 64 * 1096 / (1024 + 64 * 72)),
    ((1024, 16, 64, 1), True, 16 * 1104 / (1024 + 16 * 80)),
    ((1024, 16, 64, 4), True, 16 * (256 + 512 + 768 + 1024 + 4 * 80) / (1024 + 64 * 80)),
])  # fmt: skip
def test_token_ratios_by_hand(sibling, numbers, spread, ratio):
    size = sibling("problem").Size(*numbers)._replace(spread=spread)
    assert size.token_ratio == pytest.approx(ratio, rel=1e-12)


def test_a_document_ends_with_its_last_continuation(sibling, tmp_path):
    module = sibling("problem")
    for spread, cuts in ((False, [12, 15, 18]), (True, [4, 8, 12])):
        size = module.Size(12, 2, 4, 3, 3)._replace(spread=spread)
        prompts = module.problem("toy", size, "float32", tmp_path / str(spread)).prompts
        assert [prompt.cut for prompt in prompts] == cuts * size.documents
        assert {len(prompt.trunk.ids) for prompt in prompts} == {cuts[-1] + 3}
        assert {len(prompt.continuation_ids) for prompt in prompts} == {3}
        assert prompts[0].trunk.ids.tolist() != prompts[-1].trunk.ids.tolist()


def test_a_trainer_that_reads_text_gets_the_same_ids(sibling, tmp_path):
    module, peer = sibling("problem"), sibling("peer")
    given = module.problem("toy", module.Size(8, 2, 4, 2, 3), "float32", tmp_path)
    tokenizer = peer.tokenizer(given)
    for row, prompt in zip(peer.rows(given), given.prompts, strict=True):
        assert tokenizer(row["prompt"])["input_ids"] == prompt.policy_ids.tolist()
    assert tokenizer.eos_token_id == given.markers.closer


def test_where_trl_is_absent_its_arm_has_a_reason(sibling, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    assert "pip install 'trl>=1.16'" in sibling("peer").why_not()


class Steady:
    """An arm that takes given seconds, and holds given bytes meanwhile."""

    def __init__(self, module, seconds=(), held=0):
        self.name, self.module, self.seconds, self.held = "steady", module, list(seconds), held

    def step(self):
        held = torch.ones(self.held, dtype=torch.uint8)
        second = self.seconds.pop(0) if self.seconds else 1.0
        del held
        return self.module.Step(*[second] * 7, reward=0.0)


def test_a_ratio_is_the_median_of_the_ratios_within_rounds(sibling):
    rounds, arms = sibling("rounds"), sibling("arms")
    # The machine slows down by ten: medians of each side would give 20 / 20 = 1.
    mine, other = (
        [Steady(arms, [second]).step() for second in seconds]
        for seconds in ((1.0, 20.0, 30.0), (2.0, 20.0, 60.0))
    )
    assert rounds.ratio(mine, other, "step") == 0.5
    assert rounds.ratio(mine, None, "step") is None


def test_every_arm_steps_once_a_round_after_warming_up_and_the_order_rotates(sibling):
    rounds, arms = sibling("rounds"), sibling("arms")
    called = []

    class Named(Steady):
        def step(self):
            called.append(self.name)
            return super().step()

    pair = [Named(arms, [9.0]), Named(arms, [9.0])]
    pair[0].name, pair[1].name = "a", "b"
    first, steps, _ = rounds.timed(pair, 2)
    assert "".join(called) == "ab" + "ab" + "ba"
    assert [first[name][0].step for name in "ab"] == [9.0, 9.0]
    assert [step.step for name in "ab" for step in steps[name]] == [1.0] * 4


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_memory_of_a_step_is_what_it_held_at_once(sibling):
    rounds, arms = sibling("rounds"), sibling("arms")
    # Neither what is there before the step nor an earlier peak counts.
    before = torch.ones(64 * MIB, dtype=torch.uint8)
    earlier = torch.ones(512 * MIB, dtype=torch.uint8)
    del earlier
    peak = rounds.peak_bytes(Steady(arms, held=96 * MIB), torch.device("cpu"))
    assert 95 * MIB < peak < 100 * MIB
    del before


@pytest.mark.parametrize("text", ["1024,16,64", "1024,1,64,1", "a,b,c,d", "0,2,4,1"])
def test_a_size_that_is_none_is_refused_in_one_line(sibling, text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not P,G,T,K"):
        sibling("step").size(text)


def test_results_are_appended_one_object_a_line(sibling, tmp_path, monkeypatch):
    bench = sibling("step")
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results.json")
    bench.write([{"arm": "a"}])
    bench.write([{"arm": "b"}])
    assert bench.RESULTS.read_text() == '[\n{"arm": "a"},\n{"arm": "b"}\n]\n'
