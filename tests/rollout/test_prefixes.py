"""What a prefix cache could have saved, counted by hand: blocks of 32 tokens, the last token never."""

import pytest

from rlpt.rollout.prefixes import BLOCK, PrefixCount
from rlpt.rollout.wire import Job

TEXT = tuple(range(1000))


def job(length: int, count: int = 1, first: int = 0) -> Job:
    return Job(ticket="t", ids=TEXT[first : first + length], count=count, seed=0, budget=4)


def counted(*jobs: Job) -> tuple[int, int]:
    count = PrefixCount()
    count.add("engine", jobs)
    return count.take()


def test_a_block_is_32_tokens() -> None:
    assert BLOCK == 32


@pytest.mark.parametrize(
    ("length", "whole"), [(70, 64), (64, 32), (65, 64), (33, 32), (32, 0), (31, 0), (1, 0)]
)
def test_the_siblings_of_a_rollout_find_all_whole_blocks_before_the_last_token(
    length, whole
) -> None:
    assert counted(job(length, count=5)) == (5 * length, 4 * whole)
    assert counted(job(length)) == (length, 0)


def test_a_later_cut_finds_the_blocks_of_an_earlier_one() -> None:
    # The first cut computes 100 tokens (3 blocks and 4); the second finds its 96, and its siblings 128 of 140.
    asked, possible = counted(job(100, count=2), job(140, count=3))
    assert (asked, possible) == (2 * 100 + 3 * 140, 96 + (96 + 2 * 128))


def test_the_longer_cut_first_leaves_the_shorter_nothing_to_compute() -> None:
    assert counted(job(140, count=3), job(100, count=2)) == (620, 2 * 128 + (96 + 96))


def test_a_block_that_ends_with_a_prompt_is_found_by_a_longer_one() -> None:
    assert counted(job(64), job(65)) == (129, 64)


def test_another_text_finds_nothing_even_where_it_agrees_later() -> None:
    # Shifted by one block: the same blocks at other places are other blocks.
    assert counted(job(96), job(96, first=32)) == (192, 0)


def test_engines_have_caches_of_their_own() -> None:
    count = PrefixCount()
    count.add("one", [job(70)])
    count.add("other", [job(70)])
    assert count.take() == (140, 0)
    count.add("one", [job(70)])
    assert count.take() == (70, 64)


def test_new_weights_empty_the_cache_and_keep_the_count() -> None:
    count = PrefixCount()
    count.add("engine", [job(70), job(70)])
    count.forget()
    count.add("engine", [job(70)])
    assert count.take() == (210, 64)
    assert count.take() == (0, 0)
