"""Middle segments: what follows and what precedes are the context, and nothing of the segment is in it."""

import numpy as np
import pytest

from rlpt.config import PromptConfig
from rlpt.prompts import eligible_cuts, held_out, middle, prompt_stream, prompts_of, trunk
from rlpt.types import Markers
from rlpt_data.shards import Document, ShardFolder

MARKERS = Markers(320, 321)
CFG = PromptConfig(
    context_tokens=24, min_context_tokens=6, horizon_tokens=5, segment="middle", after_tokens=7
)


def _numbered(length: int) -> Document:
    """Token i is i + 1 bytes long: every token and every byte says where it is from."""
    offsets = np.concatenate([[0], np.cumsum(np.arange(1, length + 1))]).astype(np.uint32)
    return Document(
        document_id="numbered",
        url=None,
        domain="",
        text="",
        ids=np.arange(length, dtype=np.uint32),
        offsets=offsets,
        cuts=np.array([10, 35], dtype=np.uint32),
        cut_kinds=np.array([0, 0], dtype=np.uint8),
    )


def test_a_middle_segment_reads_what_follows_then_what_precedes() -> None:
    made = middle(_numbered(40), 2, 10, CFG)
    assert made.ids.tolist() == [*range(15, 22), *range(10), *range(10, 15)]
    (prompt,) = prompts_of(made, CFG, MARKERS)
    assert prompt.policy_ids.tolist() == [*range(15, 22), *range(10), MARKERS.opener]
    assert prompt.continuation_ids.tolist() == [10, 11, 12, 13, 14]
    assert prompt.continuation_bytes == 11 + 12 + 13 + 14 + 15
    assert made.num_bytes(0, 7) == sum(range(16, 23))
    assert made.num_bytes(7, 17) == sum(range(1, 11))
    assert prompt.key == (2, "numbered", 10)


def test_what_follows_and_what_precedes_share_the_context() -> None:
    made = middle(_numbered(60), 0, 40, CFG)
    assert made.ids.tolist() == [*range(45, 52), *range(23, 45)]
    assert made.cuts == (CFG.context_tokens,)
    short = middle(_numbered(47), 0, 40, CFG)
    assert short.ids.tolist() == [45, 46, *range(18, 45)]


def test_a_middle_segment_has_something_after_it() -> None:
    assert eligible_cuts(_numbered(40), CFG).tolist() == [10]
    assert eligible_cuts(_numbered(41), CFG).tolist() == [10, 35]


def test_nothing_of_a_middle_segment_is_in_its_context(shards: ShardFolder) -> None:
    split = shards.split("train")
    stream = prompt_stream(split, CFG, 0, "train")
    for position in range(60):
        epoch, document = stream.at(position)
        at = int(eligible_cuts(document, CFG)[0])
        held = set(range(at, at + CFG.horizon_tokens))
        ids = np.arange(len(document.ids), dtype=np.uint32)
        places = Document(**{**document.__dict__, "ids": ids})
        (prompt,) = prompts_of(middle(places, epoch, at, CFG), CFG, MARKERS)
        context = prompt.policy_ids[:-1].tolist()
        assert not held & set(context)
        assert len(set(context)) == len(context) <= CFG.context_tokens
        assert set(prompt.continuation_ids.tolist()) == held
        assert max(context) > max(held)
        assert sum(place < at for place in context) >= CFG.min_context_tokens


def test_middle_prompts_have_keys_of_their_own_and_the_bytes_of_their_tokens(
    shards: ShardFolder,
) -> None:
    token_bytes = shards.token_bytes()
    prompts = held_out(shards.split("train"), CFG, MARKERS, 40, seed=0, domains=())
    assert len({prompt.key for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        sizes = [len(token_bytes[i]) for i in prompt.trunk.ids]
        assert np.diff(prompt.trunk.offsets).tolist() == sizes


def test_the_share_of_middle_segments_is_drawn_from_seed_epoch_and_document(
    shards: ShardFolder,
) -> None:
    half = CFG.model_copy(update={"middle_share": 0.5})
    stream = prompt_stream(shards.split("train"), half, 0, "train")
    samples = [stream.at(position) for position in range(400)]
    found = [trunk(document, epoch, half, 0) for epoch, document in samples]
    kinds = []
    for (epoch, document), made in zip(samples, found, strict=True):
        at = made.start + made.cuts[0]
        first = int(made.ids[0])
        follows = document.ids[at + half.horizon_tokens :][: half.after_tokens].tolist()
        is_middle = made.ids[: len(follows)].tolist() == follows
        assert is_middle or (made.start >= 0 and first == document.ids[made.start])
        kinds.append(is_middle)
        assert trunk(document, epoch, half, 0).ids.tolist() == made.ids.tolist()
        # The cut is the one that the whole-middle mix has there: only the arrangement is drawn anew.
        assert trunk(document, epoch, CFG, 0).start + trunk(document, epoch, CFG, 0).cuts[0] == at
    assert abs(np.mean(kinds) - 0.5) < 4 * 0.5 / np.sqrt(len(kinds))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"cuts_per_document": 2}, "cuts_per_document = 2"),
        ({"after_tokens": 19}, "min_context_tokens [+] after_tokens = 25 exceed"),
        ({"segment": "next", "middle_share": 0.5}, "middle_share = 0.5 is of segment = 'middle'"),
    ],
    ids=["cuts", "room", "share"],
)
def test_segments_that_do_not_fit_are_refused(changes: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        PromptConfig(**{**CFG.model_dump(), **changes})
