"""Shards -> prompts: stateless order, exact windows, cuts from (seed, epoch, document)."""

import numpy as np
import pytest

from rlpt.config import PromptConfig
from rlpt.prompts import eligible_cuts, held_out, prompt_stream, prompts_of, trunk, window_stream
from rlpt.types import Markers
from rlpt_data.shards import CUT_KINDS, ShardFolder
from rlpt_data.strict import UserError

MARKERS = Markers(320, 321)
CFG = PromptConfig(context_tokens=24, min_context_tokens=6, horizon_tokens=5, cuts_per_document=3)


def test_an_epoch_visits_every_usable_document_once(shards: ShardFolder) -> None:
    stream = prompt_stream(shards.split("train"), CFG, seed=3, purpose="train")
    count = len(stream.usable)
    for epoch in (0, 1):
        seen = [stream.at(epoch * count + i) for i in range(count)]
        assert {e for e, _ in seen} == {epoch}
        assert len({d.document_id for _, d in seen}) == count
    assert [stream.at(i)[1].document_id for i in range(9)] != [
        stream.at(count + i)[1].document_id for i in range(9)
    ]


def test_ranks_share_one_stream_exactly_once(shards: ShardFolder) -> None:
    stream = window_stream(shards.split("train"), 0, "train")
    whole = [d.document_id for _, d in stream.take(40, 12, 0, 1)]
    for size in (2, 3, 4):
        shares = [
            [d.document_id for _, d in stream.take(40, 12, rank, size)] for rank in range(size)
        ]
        assert [shares[i % size][i // size] for i in range(12)] == whole


def test_prompts_are_views_of_the_document(shards: ShardFolder) -> None:
    split = shards.split("train")
    stream = prompt_stream(split, CFG, seed=0, purpose="train")
    token_bytes = shards.token_bytes()
    for position in range(30):
        epoch, document = stream.at(position)
        made = trunk(document, epoch, CFG, seed=0)
        assert 1 <= len(made.cuts) <= 3
        assert list(made.cuts) == sorted(set(made.cuts))
        for prompt in prompts_of(made, CFG, MARKERS):
            at = made.start + prompt.cut
            assert prompt.key == (epoch, document.document_id, at)
            assert at in eligible_cuts(document, CFG)
            assert 6 <= prompt.cut <= 24
            assert prompt.policy_ids.tolist() == [*document.ids[made.start : at], MARKERS.opener]
            assert prompt.continuation_ids.tolist() == document.ids[at : at + 5].tolist()
            assert prompt.continuation_bytes == sum(
                len(token_bytes[i]) for i in prompt.continuation_ids
            )


def test_cuts_depend_on_seed_epoch_and_document_alone(shards: ShardFolder) -> None:
    document = max(shards.split("train"), key=lambda d: len(d.cuts))
    first = trunk(document, 0, CFG, seed=0)
    assert trunk(document, 0, CFG, seed=0).cuts == first.cuts
    others = {
        (trunk(document, e, CFG, seed=s).start, trunk(document, e, CFG, seed=s).cuts)
        for e in range(4)
        for s in range(4)
    }
    assert len(others) > 4


def test_the_text_after_the_horizon_cannot_reach_a_prompt(shards: ShardFolder) -> None:
    for prompt in held_out(shards.split("train"), CFG, MARKERS, 40, seed=0, domains=()):
        assert len(prompt.trunk.ids) == prompt.trunk.cuts[-1] + CFG.horizon_tokens


def test_held_out_prompts_are_the_same_every_time(shards: ShardFolder) -> None:
    one, two = (held_out(shards.split("train"), CFG, MARKERS, 20, 0, ()) for _ in range(2))
    assert [p.key for p in one] == [p.key for p in two]


def test_documents_shorter_than_a_cut_are_passed_over(shards: ShardFolder) -> None:
    longest = int(shards.split("train").num_tokens.max())
    cfg = PromptConfig(context_tokens=longest, min_context_tokens=longest - 80, horizon_tokens=4)
    stream = prompt_stream(shards.split("train"), cfg, 0, "train")
    assert 0 < len(stream.usable) < len(shards.split("train"))
    assert all(shards.split("train").num_tokens[i] >= longest - 76 for i in stream.usable)


@pytest.mark.parametrize(
    ("least", "horizon", "kinds"),
    [(6, 5, CUT_KINDS), (60, 30, ("sentence",)), (70, 8, ("random",)), (20, 90, ("paragraph",))],
)
def test_usable_documents_are_those_with_an_eligible_cut_and_none_is_decoded_to_know(
    shards: ShardFolder, monkeypatch: pytest.MonkeyPatch, least: int, horizon: int, kinds: tuple
) -> None:
    cfg = PromptConfig(min_context_tokens=least, horizon_tokens=horizon, cut_kinds=kinds)
    split = shards.split("train")
    expected = [n for n, document in enumerate(split) if len(eligible_cuts(document, cfg))]
    assert len(kinds) == 6 or 0 < len(expected) < len(split)

    def decoded(*_: object) -> None:
        raise AssertionError("a document was decoded")

    monkeypatch.setattr(type(split), "__getitem__", decoded)
    assert prompt_stream(split, cfg, 0, "train").usable.tolist() == expected


def test_no_document_long_enough_is_the_users_mistake(shards: ShardFolder) -> None:
    cfg = PromptConfig(context_tokens=10**6, min_context_tokens=10**6)
    with pytest.raises(UserError, match=r"no document is long enough.*min_context_tokens"):
        prompt_stream(shards.split("train"), cfg, 0, "train")
    with pytest.raises(UserError, match="no document in them"):
        prompt_stream(shards.split("train"), CFG, 0, "train", domains=["nowhere.example"])


def test_offsets_count_bytes_of_windows(shards: ShardFolder) -> None:
    document = shards.split("train")[0]
    made = trunk(document, 0, CFG, seed=0)
    text = document.text.encode()[int(document.offsets[made.start]) :]
    assert made.num_bytes(0, len(made.ids)) == len(
        b"".join(shards.token_bytes()[i] for i in made.ids)
    )
    assert text.startswith(b"".join(shards.token_bytes()[int(i)] for i in made.ids))
    assert np.all(np.diff(made.offsets) > 0)
