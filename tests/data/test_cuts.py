"""Cuts lie before whitespace, on token boundaries, and depend on the document alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpt_data.cuts import CutsConfig, candidates, token_positions
from rlpt_data.shards import CUT_KINDS

LOOSE = CutsConfig(min_context=1, min_continuation=1, random_every=4)


def cut(text: str, config: CutsConfig = LOOSE, seed: int = 0) -> dict[int, str]:
    """Cuts of a text whose tokens are its bytes: position -> kind."""
    data = text.encode()
    offsets = np.arange(len(data) + 1, dtype=np.uint32)
    cuts, kinds = candidates(data, offsets, "id", config, seed)
    assert cuts.tolist() == sorted(set(cuts.tolist()))
    return {int(at): CUT_KINDS[kind] for at, kind in zip(cuts, kinds, strict=True)}


def kinds_only(*kinds: str) -> CutsConfig:
    return CutsConfig.model_validate_json(
        f'{{"kinds": {list(kinds)}, "min_context": 1, "min_continuation": 1}}'.replace("'", '"')
    )


def test_sentences_end_after_the_mark_and_its_closing_quotes() -> None:
    text = 'He left. "Why?" She asked (twice!) No one e.g. the dog knew. J. Smith saw U.S. men.'
    found = cut(text, kinds_only("sentence"))
    assert [text[:at].rsplit(" ", 1)[-1] for at in found] == [
        "left.",
        '"Why?"',
        "(twice!)",
        "knew.",
    ]


def test_sentence_ends_before_letters_outside_ascii() -> None:
    text = "Ende. Über uns\u2026 Noch \u201eja.\u201d Gut"
    ends = [text.encode()[:at].decode() for at in cut(text, kinds_only("sentence"))]
    assert ends == ["Ende.", "Ende. Über uns\u2026", "Ende. Über uns\u2026 Noch \u201eja.\u201d"]


def test_paragraphs_end_before_the_empty_line_whatever_the_newline() -> None:
    for gap in ("\n\n", "\r\n\r\n", " \n\t\n\n"):
        text = f"one{gap}two\nthree{gap}four"
        stops = [3, len(f"one{gap}two\nthree")]
        assert cut(text, kinds_only("paragraph")) == dict.fromkeys(stops, "paragraph")


def test_the_most_telling_kind_names_a_cut() -> None:
    text = "One. Two three.\n\nFour"
    everything = CutsConfig(min_context=1, min_continuation=1, random_every=1)
    assert cut(text, everything) == {4: "sentence", 8: "random", 15: "paragraph"}


@given(st.text(alphabet=' \n\r\tab.!é\u00a0A0"', max_size=60), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_every_cut_is_followed_by_whitespace_and_preceded_by_none(text: str, seed: int) -> None:
    data = text.encode()
    for at in cut(text, seed=seed):
        assert data[at : at + 1].isspace()
        assert not data[at - 1 : at].isspace()
        assert 1 <= at <= len(data) - 1


def test_context_and_continuation_keep_their_minimum_in_tokens() -> None:
    text = "a b c d e f g h i j"  # ten words, 19 bytes
    config = CutsConfig(min_context=5, min_continuation=7, random_every=1)
    assert list(cut(text, config)) == [5, 7, 9, 11]


def test_a_cut_never_splits_a_token() -> None:
    data = b"one. Two. Three"
    # The tokenizer glued "one. T" together: its sentence end is gone, the next one stays.
    offsets = np.array([0, 6, 9, 15], np.uint32)
    cuts, kinds = candidates(data, offsets, "id", LOOSE, 0)
    assert cuts.tolist() == [2]
    assert [CUT_KINDS[kind] for kind in kinds] == ["sentence"]


def test_random_cuts_are_counted_by_length_and_follow_seed_and_document() -> None:
    text = "word " * 400
    config = CutsConfig(kinds=("random",), min_context=1, min_continuation=1, random_every=100)
    assert len(cut(text, config)) == 1 + 2000 // 100
    assert cut(text, config, seed=1) == cut(text, config, seed=1)
    assert cut(text, config, seed=1) != cut(text, config, seed=2)
    offsets = np.arange(2001, dtype=np.uint32)
    one = candidates(text.encode(), offsets, "one", config, 0)[0]
    other = candidates(text.encode(), offsets, "other", config, 0)[0]
    assert one.tolist() != other.tolist()


def test_random_cuts_spread_over_the_document() -> None:
    """Uniform over word ends: the mean of 40 documents' cuts lies within 4 standard errors."""
    text = "word " * 400
    config = CutsConfig(kinds=("random",), min_context=1, min_continuation=1, random_every=100)
    offsets = np.arange(2001, dtype=np.uint32)
    drawn = [candidates(text.encode(), offsets, str(i), config, 0)[0] for i in range(40)]
    every = np.concatenate(drawn).astype(float)
    ends = 5 * np.arange(400) + 4.0
    assert abs(every.mean() - ends.mean()) < 4 * ends.std() / np.sqrt(len(every))


def test_byte_offsets_inside_a_token_or_past_the_end_have_no_position() -> None:
    offsets = np.array([0, 3, 5, 9], np.uint32)
    assert token_positions([0, 3, 9], offsets) == [0, 1, 3]
    assert token_positions([4], offsets) is None
    assert token_positions([3, 10], offsets) is None


def test_long_runs_of_whitespace_take_linear_time() -> None:
    """A quadratic scan of this text would take minutes."""
    text = "a" + " " * 300_000 + "b." + "*" * 300_000 + "\n" * 200_000 + "C"
    assert cut(text, kinds_only("paragraph")) == {600_003: "paragraph"}


def test_regular_cuts_are_the_first_place_from_each_multiple_on() -> None:
    text = "aaa bbb ccc ddd eee fff ggg " + "h" * 30 + " end"
    config = CutsConfig(kinds=("every",), min_context=1, min_continuation=1, every=10)
    # Places before spaces: 3 7 11 15 19 23 27 58; the one after 30 lies beyond 40.
    assert cut(text, config) == {11: "every", 23: "every", 58: "every"}


def test_no_cut_lies_in_fenced_code_where_that_is_asked_for() -> None:
    text = "Some words. Here:\n\n```python\nx = 1\ny = [a, b]\n```\n\nMore words follow here. End"
    inside = range(text.index("```"), text.rindex("```"))
    config = LOOSE.model_copy(update={"random_every": 1})
    assert set(cut(text, config)) & set(inside)
    found = set(cut(text, config.model_copy(update={"code_fences": False})))
    assert found
    assert not found & set(inside)
    unclosed = "One two.\n\n~~~\ncode code code"
    assert max(cut(unclosed, config.model_copy(update={"code_fences": False}))) == 8


def test_enough_bytes_and_sentences_follow_a_cut() -> None:
    text = "One here. Two here. Three here. Four here."
    ends = {"min_continuation_sentences": 2, "random_every": 1}
    # The end of the text closes its last sentence.
    assert max(cut(text, LOOSE.model_copy(update=ends))) == text.index(" Three")
    assert cut("One here", LOOSE.model_copy(update=ends)) == {}
    bytes_ = {"min_continuation_bytes": 20, "random_every": 1}
    assert max(cut(text, LOOSE.model_copy(update=bytes_))) == text.index(" Three")


def test_a_cap_keeps_some_of_the_same_cuts() -> None:
    text = "Many words stand here. " * 30
    everything = cut(text, LOOSE)
    few = cut(text, LOOSE.model_copy(update={"per_document": 5}))
    assert len(few) == 5
    assert few.items() <= everything.items()
    assert few == cut(text, LOOSE.model_copy(update={"per_document": 5}))


def test_a_domain_has_as_many_cuts_as_it_may() -> None:
    from rlpt_data.order import domain_limits
    from rlpt_data.rows import NO_LIMIT

    domains = np.array([7, 7, 7, 9, 0, 7], np.uint64)
    ranks = np.array(["d", "b", "a", "x", "y", "c"], "S32")
    assert domain_limits(domains, ranks, 10).tolist() == [2, 3, 3, 10, NO_LIMIT, 2]
    assert domain_limits(domains, ranks, 2).tolist() == [0, 1, 1, 2, NO_LIMIT, 0]
    assert (domain_limits(domains, ranks, None) == NO_LIMIT).all()


@given(st.text(alphabet="ab \u0301\u200d\U0001f469\U0001f52c.\r\n\t:/@é", max_size=80))
@settings(max_examples=200, deadline=None)
def test_no_cut_divides_a_grapheme_an_address_or_a_link(noise: str) -> None:
    regex = pytest.importorskip("regex")
    text = f"See https://a.org/x?y=1#z now, mail me.too@a.org or {noise} 10.0.0.1 then 👩‍🔬 end"
    data = text.encode()
    units = r"\X|https?://\S+|\S+@\S+\.\w+|\d+(?:\.\d+){3}"
    for at in cut(text, LOOSE.model_copy(update={"random_every": 1})):
        place = len(data[:at].decode())
        for match in regex.finditer(units, text, overlapped=True):
            assert not match.start() < place < match.end(), (place, match)
