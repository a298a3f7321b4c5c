"""Equal and similar texts: found with the probability of the formula, the same one stays always."""

import itertools
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from rlpt_data.documents import SourceDocument
from rlpt_data.duplicates import NearDuplicatesConfig, survivors
from rlpt_data.minhash import clusters, mixed, ngrams, signature, words
from rlpt_data.split import SplitConfig
from rlpt_data.store import Store, StoreWriter, text_id
from rlpt_data.tally import Tally

NEAR = NearDuplicatesConfig(kind="near-duplicates")
VOCABULARY = [f"w{number}" for number in range(5000)]


def text(seed: int, size: int = 300) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=size))


def stored(folder: Path, *files: list[SourceDocument]) -> list[Store]:
    found = []
    for number, documents in enumerate(files):
        folder.mkdir(exist_ok=True)
        with StoreWriter(folder / str(number), SplitConfig()) as store:
            for document in documents:
                store.add(document, NEAR.signature(document.text))
        found.append(Store(folder / str(number)))
    return found


def kept(stores: list[Store]) -> set[SourceDocument]:
    rows = survivors(stores, NEAR, Tally())
    return {store[int(row)] for store, found in zip(stores, rows, strict=True) for row in found}


def jaccard(one: str, two: str) -> float:
    a, b = set(ngrams(words(one), 5).tolist()), set(ngrams(words(two), 5).tolist())
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("tail", [30, 50, 80, 110])
def test_pairs_meet_with_the_probability_of_their_similarity(tail: int) -> None:
    met, expected = 0, 0.0
    for seed in range(150):
        one = text(seed)
        two = " ".join([*one.split()[:-tail], *text(-1 - seed).split()[:tail]])
        met += bool((NEAR.signature(one) == NEAR.signature(two)).any())
        expected += 1 - (1 - jaccard(one, two) ** 8) ** 14
    # Four binomial standard errors.
    share = expected / 150
    assert abs(met - expected) <= 4 * (150 * share * (1 - share)) ** 0.5 + 1


def test_a_bijection_mixes_and_loses_nothing() -> None:
    values = np.arange(1 << 16, dtype=np.uint64)
    found = mixed(values)
    assert len(np.unique(found)) == len(values)
    ones = np.unpackbits(found.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 0.002


def test_ngrams_tell_order_and_place_apart() -> None:
    assert len(ngrams(["a", "b", "c", "d", "e", "f"], 5)) == 2
    assert ngrams(["a", "b", "c", "d", "e"], 5) != ngrams(["b", "a", "c", "d", "e"], 5)
    assert ngrams(["a", "b"], 5).tolist() == ngrams(["a", "b"], 2).tolist()
    assert len(ngrams([], 5)) == 0
    one, two = (
        ngrams(["x", "a", "b", "c", "d", "e"], 5)[1:],
        ngrams(["a", "b", "c", "d", "e", "y"], 5)[:1],
    )
    assert one.tolist() == two.tolist()


def test_a_signature_is_that_of_minima_taken_one_by_one() -> None:
    grams = ngrams(words(text(1)), 5)
    keys = mixed(np.arange(1, 113, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    least = np.array([min(mixed(grams ^ key).tolist()) for key in keys], np.uint64)
    bands = []
    for band in least.reshape(14, 8):
        value = np.zeros(1, np.uint64)
        for number in band:
            value = mixed(value + number)
        bands.append(int(value[0]))
    assert signature(text(1), 14, 8, 5).tolist() == bands


def test_clusters_are_the_connected_parts() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        bands = [draw.integers(0, 60, 80).astype(np.uint64) for _ in range(3)]
        parent = list(range(80))
        for band in bands:
            places = defaultdict(list)
            for number, value in enumerate(band.tolist()):
                places[value].append(number)
            for group in places.values():
                merged = {parent[number] for number in group}
                parent = [min(merged) if part in merged else part for part in parent]
        assert clusters(bands, 80).tolist() == parent
    chain = [np.array([0, 1, 1, 2, 2, 3, 3, 4]), np.array([0, 0, 5, 5, 6, 6, 7, 7])]
    assert clusters([band.astype(np.uint64) for band in chain], 8).tolist() == [0] * 8


def test_who_stays_does_not_depend_on_files_or_order(tmp_path: Path) -> None:
    near = [" ".join([*text(1).split()[:-2], f"end{number}"]) for number in range(4)]
    group = [SourceDocument(t, url=f"https://a.org/{n}") for n, t in enumerate(near)]
    equal = [SourceDocument(text(2), url=f"https://b.org/{n}") for n in range(3)]
    single = [SourceDocument(text(3))]
    everything = [*group, *equal, *single]
    expected = {min(group, key=lambda d: text_id(d.text)), equal[0], *single}
    for number, order in enumerate(
        itertools.islice(itertools.permutations(everything), 0, 40320, 4001)
    ):
        files = [list(order[:3]), [], list(order[3:])]
        assert kept(stored(tmp_path / str(number), *files)) == expected


def test_drops_are_all_counted_and_name_what_stays(tmp_path: Path) -> None:
    near = [SourceDocument(text(1) + f" end{number}") for number in range(30)]
    tally = Tally()
    survivors(stored(tmp_path, near, near[:4]), NEAR, tally)
    assert tally.reasons == {"duplicate": 4, "near_duplicate": 29}
    survivor = min(text_id(document.text) for document in near).hex()
    samples = tally.samples()["near_duplicate"]
    assert len(samples) == 20
    assert {row["detail"] for row in samples} == {f"of document {survivor}"}
    assert [row["in"] for row in tally.table(("duplicates", "near-duplicates"))] == [34, 30]


def test_stores_give_back_every_field_and_count_bytes(tmp_path: Path) -> None:
    from rlpt_data.documents import SourceThought

    rich = SourceDocument(
        *("é\u2028\x00 text", "https://ü.org", "d", "dev", "el", (3,)),
        *((SourceThought(3, "think", "who"),), ((0, 2), (4, 5))),
    )
    plain = SourceDocument("x", target_spans=())
    (store,) = stored(tmp_path, [rich, plain])
    assert [store[0], store[1]] == [rich, plain]
    assert store.index["text_bytes"].tolist() == [len(rich.text.encode()), 1]
    assert store.index["given"].tolist() == [True, False]
