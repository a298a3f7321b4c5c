"""Each unit is on one side, by hash; an empty side is refused."""

import pytest

from rlpt_data.documents import SourceDocument
from rlpt_data.split import SplitConfig, assign, domain_of
from rlpt_data.strict import UserError


def pages(domains: int, each: int) -> dict[str, SourceDocument]:
    return {
        f"{number}/{page}": SourceDocument("x", url=f"https://www.site{number}.org/{page}")
        for number in range(domains)
        for page in range(each)
    }


def test_the_domain_is_the_sources_own_or_the_host() -> None:
    assert domain_of(SourceDocument("x", url="https://www.Example.org:80/a")) == "example.org"
    assert domain_of(SourceDocument("x", url="https://a.org/", domain="b")) == "b"
    assert domain_of(SourceDocument("x")) == ""
    assert domain_of(SourceDocument("x", url="http://[broken")) == ""


def test_auto_splits_by_domain_from_300_domains_and_by_document_below() -> None:
    assert assign(pages(300, 2), SplitConfig())[1] == "domain"
    assert assign(pages(299, 2), SplitConfig())[1] == "document"


def test_auto_splits_by_document_when_one_domain_holds_more_than_a_twentieth() -> None:
    documents = pages(400, 1)
    for number in range(22):  # 22 of 422 is above 5%, 21 of 421 is not
        documents[f"big/{number}"] = SourceDocument("x", domain="big")
    assert assign(documents, SplitConfig())[1] == "document"
    del documents["big/0"]
    del documents["big/1"]
    assert assign(documents, SplitConfig())[1] == "domain"


def test_no_domain_is_on_two_sides() -> None:
    documents = pages(300, 5)
    sides, _ = assign(documents, SplitConfig())
    for number in range(300):
        assert len({sides[f"{number}/{page}"] for page in range(5)}) == 1


def test_shares_are_held_within_sampling_error() -> None:
    sides, _ = assign(pages(2000, 1), SplitConfig(dev=0.1, test=0.2))
    found = list(sides.values())
    for name, share in (("dev", 0.1), ("test", 0.2), ("train", 0.7)):
        # Four binomial standard errors.
        allowed = 4 * (share * (1 - share) / 2000) ** 0.5
        assert abs(found.count(name) / 2000 - share) < allowed


def test_a_document_keeps_its_side_when_the_corpus_grows() -> None:
    small, _ = assign(pages(100, 1), SplitConfig())
    large, _ = assign(pages(250, 1), SplitConfig())
    assert all(large[key] == side for key, side in small.items())


def test_what_the_source_decided_stands() -> None:
    documents = pages(200, 1) | {f"s{i}": SourceDocument("x", split="test") for i in range(50)}
    sides, unit = assign(documents, SplitConfig())
    assert {sides[f"s{i}"] for i in range(50)} == {"test"}
    assert unit == "document"
    given = {name: SourceDocument("x", split=name) for name in ("train", "dev", "test")}
    assert assign(given, SplitConfig()) == ({name: name for name in given}, "source")


def test_an_empty_side_is_refused_unless_its_share_is_zero() -> None:
    with pytest.raises(UserError, match=r"\[split\] dev: none of 2 documents \(by document\)"):
        assign(pages(2, 1), SplitConfig(dev=0.05, test=0.0))
    sides, _ = assign(pages(2, 1), SplitConfig(dev=0.0, test=0.0))
    assert set(sides.values()) == {"train"}


def test_shares_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing is left to train on"):
        SplitConfig(dev=0.5, test=0.5)
