"""Corpora are read as they are published: column names, nesting and compression as their owners chose."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlpt_data import sources
from rlpt_data.documents import SourceDocument
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import SPLITS, ShardFolder

BYTES = '[tokenizer]\nkind = "byte"\n[split]\nby = "document"\n'
Configured = Callable[..., PrepareConfig]
PROSE = "The committee met twice and agreed on very little. It will meet again in the spring. " * 4
FRENCH = (
    "Le conseil s'est réuni deux fois et n'a presque rien décidé. Il se réunira au printemps. " * 4
)


def fineweb(number: int, text: str, language: str, edu: bool) -> dict:
    """A row with the columns of FineWeb, or of FineWeb-Edu."""
    row = {
        "text": text,
        "id": f"<urn:uuid:0000-{number}>",
        "dump": "CC-MAIN-2024-10",
        "url": f"https://www.site{number}.example/page?q={number}",
        "date": "2024-02-21T01:02:03Z",
        "file_path": "s3://commoncrawl/crawl-data/CC-MAIN-2024-10/segments/1/warc/2.warc.gz",
        "language": language,
        "language_score": 0.97,
        "token_count": 85,
    }
    return row | ({"score": 3.4, "int_score": 3} if edu else {})


def dclm(number: int) -> dict:
    """A line with the fields of DCLM-Baseline."""
    url = f"http://site{number}.example/{number}"
    return {
        "bff_contained_ngram_count_before_dedupe": number,
        "language_id_whole_page_fasttext": {"en": 0.95},
        "metadata": {"Content-Type": "text/html", "WARC-Target-URI": url, "WARC-Type": "response"},
        "previous_word_count": 70,
        "text": f"{number}. {PROSE}",
        "url": url,
        "warcinfo": "robots: classic\r\nformat: WARC File Format 1.0",
        "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": 0.25,
    }


@pytest.mark.parametrize("edu", [False, True], ids=["fineweb", "fineweb-edu"])
def test_fineweb_is_read_as_it_is_published(
    configured: Configured, tmp_path: Path, edu: bool
) -> None:
    folder = tmp_path / "sample/10BT"
    folder.mkdir(parents=True)
    table = [fineweb(n, f"{n}. {PROSE}", "en", edu) for n in range(40)]
    for part in range(2):
        rows = pa.Table.from_pylist(table[20 * part : 20 * part + 20])
        pq.write_table(rows, folder / f"{part:03d}_00000.parquet", row_group_size=7)
    toml = f'[source]\nkind = "parquet"\npath = "{folder}"\n{BYTES}'
    manifest = prepare(configured(toml), progress=False)
    assert manifest.drops == {}
    opened = ShardFolder.open(tmp_path / "shards")
    found = {d.url: d for name in SPLITS for d in opened.split(name)}
    assert {url: (d.text, d.domain) for url, d in found.items()} == {
        row["url"]: (row["text"], f"site{n}.example") for n, row in enumerate(table)
    }


def test_dclm_is_read_as_it_is_published(configured: Configured, tmp_path: Path) -> None:
    folder = tmp_path / "global-shard_01_of_10/local-shard_0_of_10"
    folder.mkdir(parents=True)
    rows = [dclm(n) for n in range(3)]
    path = folder / "shard_00000000_processed.jsonl.zst"
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    config = configured(f'[source]\nkind = "jsonl"\npath = "{tmp_path}"')
    assert list(sources.documents(config.source)) == [
        SourceDocument(row["text"], url=row["url"]) for row in rows
    ]


def test_the_language_that_a_source_names_decides(configured: Configured, tmp_path: Path) -> None:
    """The texts say the opposite of the column, and the column is believed."""
    table = [fineweb(n, f"{n}. {FRENCH}", "en", False) for n in range(10)]
    table += [fineweb(n, f"{n}. {PROSE}", "fr", False) for n in range(10, 14)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "in.parquet")
    toml = f"""
        [source]
        kind = "parquet"
        path = "{tmp_path}/in.parquet"
        {BYTES}
        dev = 0.0
        test = 0.0
        [[stages]]
        kind = "language"
        languages = ["en"]
    """
    named = prepare(configured(toml, "source.fields.language=language"), progress=False)
    assert named.drops == {"language": 4}
    assert sum(counts.documents for counts in named.counts.values()) == 10
    detected = prepare(configured(toml), overwrite=True, progress=False)
    assert detected.drops == {"language": 10}
    # A configuration without the field is what it was before there was one.
    assert set(detected.config["source"]["fields"]) == {"text", "url", "domain", "split"}
