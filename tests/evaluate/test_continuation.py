"""Measuring: every number of a record by hand, and none of them moved by batches, ranks or the text
after the cut.
"""

import math
import threading
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rlpt import dist
from rlpt.evaluate.continuation import measure
from rlpt.evaluate.records import write_parquet


def same(left, right):
    if [r.key for r in left] != [r.key for r in right]:
        return False
    return all(
        a.logp.keys() == b.logp.keys()
        and all(np.array_equal(a.logp[name], b.logp[name]) for name in a.logp)
        and np.array_equal(a.thought_ids, b.thought_ids)
        for a, b in zip(left, right, strict=True)
    )


def test_a_record_by_hand(tiny, procedure, world):
    """Flat over six ids; ids of the thought are three times as likely as the others."""
    prompts = [tiny.prompt("a", [1, 1, 1], [2, 3], start=40), tiny.prompt("b", [4, 4], [5, 0])]
    engine = tiny.engine()
    engine._rollout = lambda prompt, purpose, sample: tiny.rollout([2, 2, 4] if sample == 0 else [])
    first, second, *_ = measure(tiny.scorer(), engine, prompts, procedure, world)

    assert first.key == (0, "a", 43, 0)
    assert (first.num_tokens, first.num_bytes, first.named_prefix, first.finish) == (
        2,
        4,
        1,
        "closer",
    )
    assert first.logp["no_think"] == pytest.approx(np.log([1 / 6, 1 / 6]))
    assert first.logp["own"] == pytest.approx(np.log([3 / 10, 1 / 10]))  # thought {2, 4}: 3 + 3 + 4
    assert first.logp["empty"] == pytest.approx(np.log([1 / 6, 1 / 6]))
    assert first.logp["filler"] == pytest.approx(np.log([1 / 8, 1 / 8]))  # {5}: 3 + 5
    assert first.logp["context_copy"] == pytest.approx(np.log([1 / 8, 1 / 8]))  # {1}
    assert first.logp["other_document"] == pytest.approx(np.log([3 / 10, 1 / 10]))
    assert first.logp["shuffled"] == pytest.approx(first.logp["own"])
    assert first.logp["wrong_target"] == pytest.approx(np.log([1 / 10, 1 / 10]))
    assert first.logp["wrong_no_think"] == pytest.approx(np.log([1 / 6, 1 / 6]))
    assert first.logp["null"] == pytest.approx(first.logp["no_think"])
    # The likeliest id is 0 without a thought and 2, the true one, after it.
    assert (first.first_correct("no_think"), first.first_correct("own")) == (False, True)

    assert second.key == (0, "a", 43, 1)
    assert second.logp["own"] == pytest.approx(np.log([1 / 6, 1 / 6]))
    assert second.logp["other_document"] == pytest.approx(np.log([1 / 6, 1 / 6]))


def test_records_are_in_the_order_of_prompts_and_samples(tiny, procedure, world):
    prompts = tiny.prompts(7)
    records = measure(tiny.scorer(), tiny.engine(), prompts, procedure, world)
    assert [r.key for r in records] == [(*p.key, sample) for p in prompts for sample in range(2)]


def test_the_batch_does_not_change_a_record(tiny, procedure, world):
    prompts = tiny.prompts(9)
    whole = measure(tiny.scorer(), tiny.engine(), prompts, replace(procedure, batch=100), world)
    for batch in (1, 2, 9):
        other = measure(
            tiny.scorer(), tiny.engine(), prompts, replace(procedure, batch=batch), world
        )
        assert same(whole, other)


def test_another_purpose_samples_other_thoughts(tiny, procedure, world):
    prompts = tiny.prompts(9)
    records = measure(tiny.scorer(), tiny.engine(), prompts, procedure, world)
    others = measure(
        tiny.scorer(), tiny.engine(), prompts, replace(procedure, purpose="other"), world
    )
    assert not same(records, others)


def test_the_text_after_the_cut_does_not_reach_the_thoughts(tiny, procedure, world):
    """The leak test: other held-out text, the same requests and the same thoughts."""
    prompts = [tiny.prompt(f"d{i}", [i % 6, 1], [2, i % 3]) for i in range(6)]
    replaced = [tiny.prompt(f"d{i}", [i % 6, 1], [5, (i + 1) % 3]) for i in range(6)]
    before, after = tiny.engine(), tiny.engine()
    left = measure(tiny.scorer(), before, prompts, procedure, world)
    right = measure(tiny.scorer(), after, replaced, procedure, world)
    for ticket, group in before.groups.items():
        other = after.groups[ticket]
        assert np.array_equal(group.prompt.policy_ids, other.prompt.policy_ids)
    for record, other in zip(left, right, strict=True):
        assert np.array_equal(record.thought_ids, other.thought_ids)
        assert not np.array_equal(record.continuation_ids, other.continuation_ids)


def on_ranks(monkeypatch, size, work):
    """Run ``work(world)`` on ``size`` threads whose gathers meet at a barrier: unequal call counts
    hang and fail.
    """
    barrier, parts, results = threading.Barrier(size, timeout=10), [None] * size, [None] * size

    def unshare(items, world):
        parts[world.rank] = list(items)
        barrier.wait()
        count = sum(map(len, parts))
        everything = [parts[i % size][i // size] for i in range(count)]
        barrier.wait()
        return everything

    monkeypatch.setattr(dist, "unshare", unshare)

    def run(rank):
        results[rank] = work(dist.World(rank, size, torch.device("cpu")))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(("size", "count"), [(2, 9), (3, 9), (3, 1)])
def test_ranks_agree_with_one_rank_and_call_the_scorer_equally_often(
    tiny, procedure, world, monkeypatch, size, count
):
    prompts = tiny.prompts(count)
    plain = replace(procedure, controls=("empty", "filler", "null")) if count == 1 else procedure
    alone = measure(tiny.scorer(), tiny.engine(), prompts, plain, world)
    scorers = [tiny.scorer() for _ in range(size)]
    found = on_ranks(
        monkeypatch, size, lambda w: measure(scorers[w.rank], tiny.engine(), prompts, plain, w)
    )
    assert all(same(alone, records) for records in found)
    assert all(scorer.calls == scorers[0].calls for scorer in scorers)
    share = math.ceil(count / size)
    assert len(scorers[0].calls) == 2 * math.ceil(share / plain.batch)


def test_the_opener_mass_is_measured_where_an_unbanned_scorer_is_given(tiny, procedure, world):
    class KeepsMarkers(tiny.scorer):
        def _score(self, target, thought, seam):
            weight = np.array([1, 1, 1, 1, 1, 1, 2, 2])
            logp = np.log(weight / weight.sum())
            assert target.tolist() == [tiny.markers.opener]
            return (
                super()
                ._score(np.array([0]), [], 0.0)
                .__class__(logp[target].astype(np.float32), target)
            )

    prompts = tiny.prompts(3)
    found = measure(tiny.scorer(), tiny.engine(), prompts, procedure, world, KeepsMarkers())
    assert [record.opener_mass for record in found] == pytest.approx([0.2] * 6)
    without = measure(tiny.scorer(), tiny.engine(), prompts, procedure, world)
    assert {record.opener_mass for record in without} == {None}


def test_the_parquet_file_holds_the_sums_and_the_token_scores(tiny, procedure, world, tmp_path):
    records = measure(tiny.scorer(), tiny.engine(), tiny.prompts(5), procedure, world)
    write_parquet(tmp_path / "prompts.parquet", records, lambda ids: " ".join(map(str, ids)))
    rows = pq.read_table(tmp_path / "prompts.parquet").to_pylist()
    assert len(rows) == 10
    for row, record in zip(rows, records, strict=True):
        assert row["logp_own"] == pytest.approx(sum(row["token_logp_own"]))
        assert row["gain"] == pytest.approx(
            (row["logp_own"] - row["logp_no_think"]) / row["num_tokens"]
        )
        assert row["thought"].split() == [str(i) for i in record.thought_ids]
        assert row["logp_wrong_target"] == pytest.approx(record.total("wrong_target"))
