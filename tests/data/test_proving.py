"""The generated pages: endings of known worth, thoughts made from the context alone."""

import itertools
import math
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from rlpt_data.documents import SourceDocument
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.proving import ENDING, ProvingConfig, documents, running_sums
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError, load, parse

CONFIG = ProvingConfig(documents=4000, seed=3)


@cache
def all_pages() -> list[SourceDocument]:
    return list(documents(CONFIG))


def pages(stratum: str) -> list[SourceDocument]:
    return [page for page in all_pages() if page.domain == stratum]


def digits(page: SourceDocument) -> list[int]:
    return [int(byte) for byte in page.text[1 : page.cuts[0] - 1]]


def answer(page: SourceDocument) -> int:
    return int(page.text[page.cuts[0]])


def within_four_sigma(count: int, trials: int, share: float) -> bool:
    return abs(count - trials * share) <= 4 * math.sqrt(trials * share * (1 - share))


def test_running_sums_by_hand() -> None:
    assert running_sums([3, 8, 1, 4, 5, 9]) == [3, 1, 2, 6, 1, 0]


@pytest.mark.parametrize(
    ("stratum", "tag", "count"), [("R", "R", 6), ("C", "C", 6), ("N", "N", 6), ("H", "R", 24)]
)
def test_a_page_is_tag_digits_equals_answer_checksum_terminator(
    stratum: str, tag: str, count: int
) -> None:
    for page in pages(stratum):
        cut = page.cuts[0]
        assert page.text[0] == tag
        assert page.text[cut - 1] == "="
        assert len(digits(page)) == count
        assert page.text[cut] in "0123456789"
        assert page.text[cut + 1] in "abcdefghij"
        assert page.text[cut + 2 :] == "."


@pytest.mark.parametrize("stratum", ["R", "C", "N", "H"])
def test_only_the_ending_is_a_target_and_the_only_cut_lies_before_it(stratum: str) -> None:
    for page in pages(stratum):
        size = len(page.text.encode())
        assert page.cuts == (size - ENDING,)
        assert page.target_spans == ((size - ENDING, size),)
        assert all(thought.cut == page.cuts[0] for thought in page.thoughts)


@pytest.mark.parametrize("stratum", ["R", "H"])
def test_the_answer_is_the_sum_mod_ten_and_the_checksum_its_letter(stratum: str) -> None:
    for page in pages(stratum):
        assert answer(page) == sum(digits(page)) % 10
        assert ord(page.text[page.cuts[0] + 1]) - ord("a") == answer(page)


def test_the_answer_of_a_copy_page_is_its_first_digit() -> None:
    assert all(answer(page) == digits(page)[0] for page in pages("C"))


def test_random_endings_are_uniform_and_say_nothing_about_each_other() -> None:
    noise = pages("N")
    letters = [ord(page.text[page.cuts[0] + 1]) - ord("a") for page in noise]
    for value in range(10):
        assert within_four_sigma(sum(answer(page) == value for page in noise), len(noise), 0.1)
        assert within_four_sigma(letters.count(value), len(noise), 0.1)
    agree = sum(answer(page) == letter for page, letter in zip(noise, letters, strict=True))
    assert within_four_sigma(agree, len(noise), 0.1)


def test_shares_are_the_configured_ones() -> None:
    for stratum, share in CONFIG.shares.model_dump().items():
        assert within_four_sigma(len(pages(stratum)), CONFIG.documents, share)
    running = pages("R")
    sources = Counter(page.thoughts[0].source for page in running if page.thoughts)
    thinking = sum(sources.values())
    mistaken = sources["unfinished"] + sources["wrong"]
    worked = sources["right"] + mistaken
    assert within_four_sigma(thinking, len(running), CONFIG.thought_share)
    assert within_four_sigma(sources["empty"], thinking, CONFIG.empty_share)
    assert within_four_sigma(sources["right"], worked, CONFIG.right_share)
    assert within_four_sigma(sources["unfinished"], mistaken, CONFIG.unfinished_share)


def test_a_right_thought_is_the_running_sums_and_ends_in_the_answer() -> None:
    for page in pages("R"):
        for thought in page.thoughts:
            if thought.source == "right":
                assert [int(c) for c in thought.text] == running_sums(digits(page))
                assert int(thought.text[-1]) == answer(page)


def test_a_wrong_thought_starts_wrong_adds_correctly_and_misses_the_answer() -> None:
    for page in pages("R"):
        for thought in page.thoughts:
            if thought.source == "wrong":
                sums, read = [int(c) for c in thought.text], digits(page)
                steps = [(b - a) % 10 for a, b in itertools.pairwise(sums)]
                assert sums[0] != read[0]
                assert steps == read[1:]
                assert sums[-1] != answer(page)


def test_an_unfinished_thought_is_the_running_sums_cut_short_at_any_length() -> None:
    lengths = Counter()
    for page in pages("R"):
        for thought in page.thoughts:
            if thought.source == "unfinished":
                lengths[len(thought.text)] += 1
                assert [int(c) for c in thought.text] == running_sums(digits(page))[
                    : len(thought.text)
                ]
    assert set(lengths) == {1, 2, 3, 4, 5}
    assert all(within_four_sigma(count, lengths.total(), 0.2) for count in lengths.values())


def test_empty_thoughts_are_empty_and_the_lengths_of_the_others_vary() -> None:
    for stratum, lengths in (("R", set(range(7))), ("C", set(range(7))), ("N", set(range(7)))):
        thoughts = [thought for page in pages(stratum) for thought in page.thoughts]
        assert {len(thought.text) for thought in thoughts} == lengths
        assert all((thought.text == "") == (thought.source == "empty") for thought in thoughts)


def test_the_thought_of_a_copy_page_repeats_what_it_read() -> None:
    for page in pages("C"):
        assert all(page.text[1:].startswith(thought.text) for thought in page.thoughts)


def test_pages_too_long_for_the_budget_are_never_trained_on() -> None:
    assert {page.split for page in pages("H")} == {"dev", "test"}
    assert not any(page.thoughts for page in pages("H"))
    assert {page.split for stratum in "RCN" for page in pages(stratum)} == {None}


def test_no_two_pages_share_a_context() -> None:
    crowded = CONFIG.model_copy(update={"documents": 400, "digits": 3})
    contexts = [page.text[: page.cuts[0]] for page in documents(crowded)]
    assert len(set(contexts)) == len(contexts) == 400


def test_the_same_seed_gives_the_same_pages_and_another_gives_others() -> None:
    few = CONFIG.model_copy(update={"documents": 50})
    assert list(documents(few)) == list(documents(few))
    assert list(documents(few.model_copy(update={"seed": 4}))) != list(documents(few))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"shares": {"R": 0.7, "C": 0.1, "N": 0.1, "H": 0.2}}, "add up to 1.1; make it 1"),
        ({"documents": 600, "digits": 3}, "1000 contexts and at most half are used; raise digits"),
        ({"right_shere": 0.5}, "did you mean 'right_share'"),
        ({"empty_share": 1.5}, "empty_share = 1.5"),
    ],
)
def test_an_impossible_config_is_one_clear_line(table: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        parse(ProvingConfig, table, "pages.toml, [source]")
    assert "\n" not in str(error.value)


def test_the_shipped_config_makes_shards_of_one_token_per_character(tmp_path: Path) -> None:
    shipped = Path(__file__).parents[2] / "configs" / "proving" / "pages.toml"
    few = ["source.documents=400", f"out={tmp_path / 'shards'}", "split.dev=0.2", "split.test=0.2"]
    prepare(load(PrepareConfig, shipped, few), progress=False)
    folder = ShardFolder.open(tmp_path / "shards")
    assert dict(folder.manifest.drops) == {}
    for name in ("train", "dev", "test"):
        split = folder.split(name)
        for page in (split[row] for row in range(len(split))):
            assert bytes(page.ids.tolist()) == page.text.encode()
            cut = len(page.text) - ENDING
            assert page.cuts.tolist() == [cut]
            assert page.target_spans == ((cut, len(page.text)),)
            assert name != "train" or page.domain != "H"
            for thought in page.thoughts or ():
                assert thought.cut == cut
                assert (len(thought.ids) == 0) == (thought.source == "empty")
