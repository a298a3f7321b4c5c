"""Several shard folders as one: exact shares, stateless order, nothing held out is trained on."""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rlpt.config import DataConfig, RunConfig
from rlpt.mixture import MixedStream, Mixture, open_shards, schedule, stage_stream
from rlpt.prompts import Stream, window_stream
from rlpt.runlog import read_journal
from rlpt.train import run as train
from rlpt_data.cuts import CutsConfig
from rlpt_data.documents import SourceDocument
from rlpt_data.manifest import digest
from rlpt_data.rows import RowMaker
from rlpt_data.shards import Document, ShardFolder
from rlpt_data.strict import UserError, load, parse
from rlpt_data.tokenizer import PlainTokenizer, train_byte_pairs
from rlpt_data.training import TokenizerBytes, tokenizer_of
from rlpt_data.writing import Facts, write_folder

WORDS = ["river", "stone", "light", "under", "many", "small", "houses", "went", "home", "again"]
TOKENIZER = tokenizer_of(TokenizerBytes(kind="byte"), [])


def text(number: int) -> str:
    draw = random.Random(number)
    return " ".join(" ".join(draw.choices(WORDS, k=6)).capitalize() + "." for _ in range(4))


def row(number: int, domain: str = "") -> Document:
    document = SourceDocument(text(number), domain=domain)
    maker = RowMaker(TOKENIZER, CutsConfig(min_context=8, min_continuation=8), seed=0)
    (made,) = maker.rows([(digest(document.text.encode()), document)])
    assert isinstance(made, Document)
    return made


def folder(
    path: Path,
    train: Sequence[int],
    dev: Sequence[int] = (),
    test: Sequence[int] = (),
    by: str = "document",
    tokenizer: PlainTokenizer = TOKENIZER,
) -> Path:
    """A shard folder of numbered texts; the domain of a text is its number over ten, and none from 350."""
    sides = {"train": train, "dev": dev, "test": test}
    rows = {
        name: [row(n, f"d{n // 10}" if n < 350 else "") for n in numbers]
        for name, numbers in sides.items()
    }
    facts = Facts(vocab_size=tokenizer.vocab_size, split_by=by)  # pyright: ignore[reportArgumentType]
    write_folder(path, rows, tokenizer.json_bytes, facts)
    return path


def mixed(*parts: tuple[str, Path, float]) -> DataConfig:
    rows = [{"name": name, "shards": str(path), "weight": weight} for name, path, weight in parts]
    return parse(DataConfig, {"mixture": rows}, "test")


@pytest.fixture
def web(tmp_path: Path) -> Path:
    return folder(tmp_path / "web", range(40), range(100, 110), range(110, 120))


@pytest.fixture
def books(tmp_path: Path) -> Path:
    return folder(tmp_path / "books", range(200, 212), range(300, 305), [104, 106, 110])


def configured(toml: Path, data: DataConfig) -> RunConfig:
    cfg = load(RunConfig, toml)
    return cfg.model_copy(update={"data": data})


def numbers(documents: list[Document]) -> list[int]:
    known = {text(n): n for n in range(400)}
    return [known[document.text] for document in documents]


@pytest.mark.parametrize(
    "weights",
    [(1.0, 1.0), (0.7, 0.3), (0.5, 0.3, 0.2), (1.0, 7.0, 3.0, 2.0), (0.1, 0.1, 0.799), (5.0,)],
    ids=str,
)
def test_after_any_number_of_samples_each_source_had_its_share_within_one(
    weights: tuple[float, ...],
) -> None:
    turns = schedule(weights)
    own = [0] * len(weights)
    for position in range(2 * len(turns.turns) + 3):
        assert turns.taken(position) == own
        for count, weight in zip(own, weights, strict=True):
            assert abs(count - position * weight / sum(weights)) < 1
        source, index = turns.place(position)
        assert index == own[source]
        own[source] += 1
    # Any position is found without those before it.
    far = 10**15 + 7
    assert sum(turns.taken(far)) == far


def test_weights_count_as_the_decimals_they_are_written_as() -> None:
    assert schedule((0.1, 0.2)).counts == (1, 2)
    assert schedule((35.0, 14.0)).counts == (5, 2)
    with pytest.raises(UserError, match="repeat after 10000001 documents only; give them fewer"):
        schedule((0.0000001, 1.0))


def test_every_folder_goes_through_its_own_epochs(toml: Path, web: Path, books: Path) -> None:
    data = mixed(("web", web, 3), ("books", books, 1))
    cfg = configured(toml, data)
    stream = stage_stream(open_shards(data), cfg, cfg.stage[0])
    assert isinstance(stream, MixedStream)
    seen = [stream.at(position) for position in range(4 * 24)]
    found = numbers([document for _, document in seen])
    assert Counter(n >= 200 for n in found) == {False: 72, True: 24}
    from_books = [n for n in found if n >= 200]
    assert sorted(from_books[:12]) == sorted(from_books[12:]) == list(range(200, 212))
    assert from_books[:12] != from_books[12:]
    assert stream.shares(96) == {"mixture/web": 0.75, "mixture/books": 0.25}


def test_no_two_visits_of_a_document_are_of_one_epoch(toml: Path, tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one", range(12)), folder(tmp_path / "two", range(6))
    data = mixed(("one", one, 1), ("two", two, 1))
    cfg = configured(toml, data)
    samples = stage_stream(open_shards(data), cfg, cfg.stage[0]).take(0, 48, 0, 1)
    visits = Counter((epoch, document.document_id) for epoch, document in samples)
    assert set(visits.values()) == {1}


def test_the_order_depends_on_position_alone(toml: Path, web: Path, books: Path) -> None:
    forward = mixed(("web", web, 0.6), ("books", books, 0.4))
    backward = mixed(("books", books, 0.4), ("web", web, 0.6))
    orders = []
    for data in (forward, backward):
        cfg = configured(toml, data)
        stream = stage_stream(open_shards(data), cfg, cfg.stage[1])
        whole = stream.take(5, 24, 0, 1)
        shared = [stream.take(5, 24, rank, 3) for rank in range(3)]
        dealt = [shared[position % 3][position // 3] for position in range(24)]
        assert numbers([d for _, d in dealt]) == numbers([d for _, d in whole])
        orders.append(numbers([d for _, d in whole]))
    assert orders[0] == orders[1]
    assert open_shards(forward).manifest.hash == open_shards(backward).manifest.hash


def test_a_folder_is_permuted_by_its_own_hash(
    toml: Path, tmp_path: Path, web: Path, books: Path
) -> None:
    other = folder(tmp_path / "other", range(250, 260))
    orders = []
    for neighbour in (books, other):
        data = mixed(("web", web, 1), ("neighbour", neighbour, 1))
        cfg = configured(toml, data)
        found = numbers(
            [d for _, d in stage_stream(open_shards(data), cfg, cfg.stage[0]).take(0, 60, 0, 1)]
        )
        orders.append([n for n in found if n < 200])
    assert orders[0] == orders[1]
    opened = ShardFolder.open(web)
    purpose = f"{cfg.stage[0].name}/{opened.manifest.hash}"
    alone = window_stream(opened.split("train"), cfg.seed, purpose).take(0, 30, 0, 1)
    assert orders[0] == numbers([document for _, document in alone])


def test_a_weight_is_part_of_what_a_run_resumes_with(web: Path, books: Path) -> None:
    hashes = {
        open_shards(mixed(("web", web, weight), ("books", books, 1))).manifest.hash
        for weight in (1, 2, 3)
    }
    assert len(hashes) == 3
    assert open_shards(mixed(("a", web, 2), ("b", books, 2))).manifest.hash in hashes


def test_what_one_folder_holds_out_is_not_trained_on_from_another(
    toml: Path, tmp_path: Path
) -> None:
    one = folder(tmp_path / "one", range(20), range(100, 104), range(104, 106))
    two = folder(tmp_path / "two", range(95, 130), range(0, 5), range(103, 104), by="document")
    data = mixed(("one", one, 1), ("two", two, 1))
    shards, cfg = open_shards(data), configured(toml, data)
    assert isinstance(shards, Mixture)
    held = {n for side in ("dev", "test") for n in numbers(list(shards.split(side)))}
    assert held == {*range(100, 106), *range(5)}
    # 103 is dev of one folder and test of the other: it is of the later side, once.
    assert 103 not in numbers(list(shards.split("dev")))
    assert numbers(list(shards.split("test"))).count(103) == 1
    stream = stage_stream(shards, cfg, cfg.stage[0])
    trained = numbers([document for _, document in stream.take(0, 120, 0, 1)])
    assert set(trained) == {*range(5, 20), *range(95, 100), *range(106, 130)}


def test_whole_domains_stay_held_out(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", range(20), [100, 101, 350], by="domain")
    two = folder(tmp_path / "two", [*range(95, 115), 351], range(300, 302))
    shards = open_shards(mixed(("one", one, 1), ("two", two, 1)))
    assert isinstance(shards, Mixture)
    trained = {n for part in shards.parts("train") for n in numbers(list(part))}
    assert trained == {*range(20), *range(95, 100), *range(110, 115), 351}
    assert shards.manifest.split_by == "domain"


def test_a_joined_split_is_its_documents(web: Path, books: Path) -> None:
    shards = open_shards(mixed(("web", web, 1), ("books", books, 2)))
    joined = shards.split("dev")
    rows = list(joined)
    assert sorted(numbers(rows)) == [*range(100, 104), 105, *range(107, 110), *range(300, 305)]
    assert sorted(numbers(list(shards.split("test")))) == [104, 106, *range(110, 120)]
    assert joined.document_ids == [r.document_id for r in rows]
    assert joined.domains == [r.domain for r in rows]
    assert joined.num_tokens.tolist() == [r.num_tokens for r in rows]
    assert joined.flat_cuts.tolist() == [cut for r in rows for cut in r.cuts.tolist()]
    assert joined.flat_cut_kinds.tolist() == [k for r in rows for k in r.cut_kinds.tolist()]
    assert joined.cut_offsets.tolist() == np.cumsum([0, *(len(r.cuts) for r in rows)]).tolist()
    assert shards.manifest.counts["dev"].documents == 15
    with pytest.raises(IndexError):
        joined[len(rows)]


def test_one_folder_is_what_it_was(toml: Path, shards_dir: Path) -> None:
    cfg = load(RunConfig, toml)
    shards = open_shards(cfg.data)
    assert shards == ShardFolder.open(shards_dir)
    stream = stage_stream(shards, cfg, cfg.stage[0])
    assert isinstance(stream, Stream)
    assert stream.purpose == cfg.stage[0].name
    assert stream.shares(10) == {}


def test_folders_that_cannot_be_mixed_are_refused_in_one_line(tmp_path: Path, web: Path) -> None:
    copy = folder(tmp_path / "copy", range(40), range(100, 110), range(110, 120))
    with pytest.raises(UserError, match="holds the same shards as"):
        open_shards(mixed(("web", web, 1), ("copy", copy, 1)))
    inside = folder(tmp_path / "inside", range(100, 120))
    shards = open_shards(mixed(("web", web, 1), ("inside", inside, 1)))
    with pytest.raises(UserError, match="every document of split train is held out by another"):
        shards.split("train")
    words = [WORDS[n % 10] for n in range(400)]
    other = PlainTokenizer(train_byte_pairs(words, 258), "test")
    foreign = folder(tmp_path / "foreign", range(5), tokenizer=other)
    with pytest.raises(UserError, match="its tokenizer has hash"):
        open_shards(mixed(("web", web, 1), ("foreign", foreign, 1)))


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({}, "exactly one of shards"),
        ({"shards": "a", "mixture": [{"name": "b", "shards": "b", "weight": 1}]}, "exactly one"),
        ({"mixture": [{"name": "b", "shards": "b", "weight": 0}]}, "weight = 0"),
        ({"mixture": [{"name": "b", "shards": "b", "weight": -1.5}]}, "weight = -1.5"),
        (
            {"mixture": [{"name": "b", "shards": c, "weight": 1} for c in "ab"]},
            "must differ; got b, b",
        ),
    ],
    ids=["neither", "both", "nothing", "negative", "names"],
)
def test_a_mixture_that_is_none_is_refused(table: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse(DataConfig, table, "run.toml")


def test_a_url_keeps_its_slashes_and_a_folder_is_a_path() -> None:
    assert parse(DataConfig, {"shards": "s3://bucket/web"}, "x").shards == "s3://bucket/web"
    assert parse(DataConfig, {"shards": "runs/data/web"}, "x").shards == Path("runs/data/web")


def test_a_run_on_a_mixture_says_the_share_of_every_source(
    toml: Path, web: Path, books: Path
) -> None:
    cfg = configured(toml, mixed(("web", web, 3), ("books", books, 1)))
    stages = tuple(
        stage.model_copy(update={"steps": 1, "documents_per_step": 8}) for stage in cfg.stage
    )
    evaluation = cfg.evaluation.model_copy(update={"split": "dev", "prompts": 8})
    train(cfg.model_copy(update={"stage": stages, "evaluation": evaluation}))
    rows = read_journal(cfg.run_dir / "metrics.jsonl")
    assert [(row["mixture/web"], row["mixture/books"]) for row in rows] == [(0.75, 0.25)] * 2
