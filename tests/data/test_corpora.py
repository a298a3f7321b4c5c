"""Real web pages and books through the whole path, with real tokenizers."""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlpt_data import sources
from rlpt_data.documents import Drop
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import CUT_KINDS, ShardFolder, verify_folder
from rlpt_data.strict import load
from rlpt_data.tokenizer import PlainTokenizer

Configured = Callable[..., PrepareConfig]
GPT2 = "gpt2-tokenizer/tokenizer.json"
STORIES = "stories260k/hf"


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ShardFolder]:
    """Verified shards of the first documents of a corpus; the same ones are made once."""

    @functools.cache
    def make(source: str, tokenizer: str, count: int, *more: str) -> ShardFolder:
        folder = tmp_path_factory.mktemp("corpora")
        (folder / "prepare.toml").write_text(f"""
            out = "{folder}/shards"
            without_decontamination = true
            max_documents = {count}
            [source]
            kind = "jsonl"
            path = "{corpus}/{source}.jsonl.zst"
            [tokenizer]
            kind = "file"
            path = "{corpus}/{tokenizer}"
        """)
        prepare(load(PrepareConfig, folder / "prepare.toml", more), progress=False)
        verify_folder(folder / "shards")
        return ShardFolder.open(folder / "shards")

    return make


@pytest.mark.parametrize("tokenizer", [GPT2, STORIES])
def test_web_pages_survive_byte_for_byte(
    prepared: Callable[..., ShardFolder], tokenizer: str
) -> None:
    folder = prepared("digitalgov", tokenizer, 200)
    assert "not_lossless" not in folder.manifest.drops
    assert sum(side.documents for side in folder.manifest.counts.values()) >= 195


def test_contexts_encode_to_the_documents_own_prefix(
    prepared: Callable[..., ShardFolder], corpus: Path
) -> None:
    """encode(context) is the prefix of encode(document) for at least 99% of cuts of each kind."""
    folder = prepared("digitalgov", GPT2, 200)
    tokenizer = PlainTokenizer.cached(corpus / GPT2)
    kept = dict.fromkeys(CUT_KINDS, 0)
    total = dict.fromkeys(CUT_KINDS, 0)
    for document in itertools.islice(folder.split("train"), 25):
        data = document.text.encode()
        places = [int(document.offsets[cut]) for cut in document.cuts]
        contexts = tokenizer.encode([data[:place].decode() for place in places])
        for cut, kind, ids in zip(document.cuts, document.cut_kinds, contexts, strict=True):
            total[CUT_KINDS[kind]] += 1
            kept[CUT_KINDS[kind]] += ids.tolist() == document.ids[:cut].tolist()
    for kind in ("sentence", "paragraph", "random"):
        assert total[kind] > 50
        assert kept[kind] >= 0.99 * total[kind], (kind, kept[kind], total[kind])


def test_books_are_one_document_each(prepared: Callable[..., ShardFolder]) -> None:
    sides = ("split.dev=0.0", "split.test=0.0")
    folder = prepared("books", STORIES, 3, "cuts.random_every=512", *sides)
    split = folder.split("train")
    assert len(split) == 3
    assert split.num_tokens.min() > 10_000


@pytest.mark.parametrize(("name", "good"), [("ok", 60), ("hdr", 30), ("trunc", 40)])
def test_damaged_web_archives_keep_what_can_be_read(
    configured: Configured, corpus: Path, name: str, good: int
) -> None:
    path = corpus / f"corrupt-warc/{name}.warc.gz"
    source = configured(f'[source]\nkind = "warc"\npath = "{path}"\nextractor = "html:escape"')
    found = list(sources.documents(source.source))
    documents = [item for item in found if not isinstance(item, Drop)]
    reasons = [item.reason for item in found if isinstance(item, Drop)]
    assert len(documents) + reasons.count("not_html") >= good - 1
    damaged = {"damaged_file", "short_record"}.intersection(reasons)
    assert bool(damaged) == (name != "ok")


def test_malformed_archives_never_crash(configured: Configured, corpus: Path) -> None:
    paths = [p for p in (corpus / "warcio-test").rglob("*.warc*") if p.is_file()]
    assert paths
    for path in paths:
        toml = f'[source]\nkind = "warc"\npath = "{path}"\nextractor = "html:escape"'
        assert all(item is not None for item in sources.documents(configured(toml).source))


def test_corpora_have_the_documents_their_readme_promises(corpus: Path) -> None:
    from rlpt_data.sources import files

    for name, count in (("digitalgov", 2442), ("books", 48)):
        lines = list(files.lines(corpus / f"{name}.jsonl.zst"))
        assert len(lines) == count
        assert all(json.loads(line)["text"] for _, line in lines)  # pyright: ignore
