"""Shard folders elsewhere: the same documents, fetched once, checked, in one line when they cannot be."""

import errno
import functools
import http.server
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rlpt_data import remote
from rlpt_data.inspection import inspect
from rlpt_data.manifest import digest
from rlpt_data.merging import merge
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import SPLITS, ShardFolder
from rlpt_data.stats import stats
from rlpt_data.strict import UserError, parse

TEXT = "The river went home again. Many small houses stood under the light of stones. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    (root / "text").mkdir()
    for number in range(60):
        (root / f"text/{number}.txt").write_text(f"Page {number}. " + TEXT * 3)
    (root / "text/empty.txt").write_text(" ")
    table = {
        "out": str(root / "shards"),
        "without_decontamination": True,
        "source": {"kind": "folder", "path": str(root / "text")},
        "tokenizer": {"kind": "byte"},
        "cuts": {"min_context": 8, "min_continuation": 8},
        "num_shards": 2,
    }
    prepare(parse(PrepareConfig, table, "test"), progress=False)
    return root / "shards"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def url(folder: Path) -> Iterator[str]:
    """The folder in fsspec's memory."""
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/shards", recursive=True)
    yield "memory://shards"
    memory.rm("/shards", recursive=True)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is fetched."""
    seen: list[str] = []
    opened = remote._opened

    def counted(where: str) -> object:
        seen.append(where.split("shards/", 1)[1])
        return opened(where)

    monkeypatch.setattr(remote, "_opened", counted)
    return seen


def rows(opened: ShardFolder) -> dict[str, list[tuple[str, list[int], list[int]]]]:
    return {
        name: [(d.text, d.ids.tolist(), d.cuts.tolist()) for d in opened.split(name)]
        for name in SPLITS
    }


def test_a_folder_elsewhere_holds_the_same_documents(folder: Path, url: str) -> None:
    here, there = ShardFolder.open(folder), ShardFolder.open(url)
    assert there.manifest == here.manifest
    assert rows(there) == rows(here)
    assert there.token_bytes() == here.token_bytes()
    assert there.encode("A river").tolist() == here.encode("A river").tolist()
    assert stats(url)["splits"] == stats(folder)["splits"]


def test_files_are_fetched_when_they_are_asked_for_and_once(
    url: str, fetched: list[str], cache: Path
) -> None:
    opened = ShardFolder.open(url)
    assert fetched == ["manifest.json"]
    opened.split("dev")
    assert sorted(fetched[1:]) == ["dev/00000.arrow", "dev/00001.arrow"]
    opened.split("dev")
    ShardFolder.open(f"{url}/").split("dev")
    assert fetched[3:] == ["manifest.json"]
    # The same shards at another address are not fetched again either.
    names = {path.name for path in cache.iterdir()}
    assert names == {opened.manifest.hash}


@pytest.mark.parametrize("damage", ["short", "other"])
def test_what_is_not_the_file_of_the_manifest_is_refused(
    url: str, cache: Path, damage: str
) -> None:
    memory = fsspec.filesystem("memory")
    data = memory.cat_file("/shards/train/00000.arrow")
    bad = data[:-8] if damage == "short" else data[:-1] + bytes([data[-1] ^ 1])
    memory.pipe_file("/shards/train/00000.arrow", bad)
    opened = ShardFolder.open(url)
    with pytest.raises(UserError, match=r"train/00000.arrow: \d+ bytes with checksum .* upload"):
        opened.split("train")
    assert not list(cache.rglob("*00000.arrow"))
    memory.pipe_file("/shards/train/00000.arrow", data)
    assert len(opened.split("train")) == opened.manifest.counts["train"].documents


def test_no_more_is_fetched_than_the_manifest_says(
    url: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    data = memory.cat_file("/shards/train/00000.arrow")
    memory.pipe_file("/shards/train/00000.arrow", data + bytes(1 << 22))
    with pytest.raises(UserError, match=f"00000.arrow: {len(data) + 1} bytes with checksum"):
        ShardFolder.open(url).split("train")
    monkeypatch.setattr(remote, "_MOST_BYTES", 99)
    with pytest.raises(UserError, match=r"manifest\.json: more than 99 bytes"):
        ShardFolder.open(url)


def test_a_fetch_that_was_cut_off_leaves_no_file(
    url: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    opened = ShardFolder.open(url)
    with monkeypatch.context() as patch:
        patch.setattr(remote, "flush", lambda _: 1 / 0)
        with pytest.raises(UserError, match="cannot be read: division by zero"):
            opened.split("train")
    assert not list(cache.rglob("[0-9]*.arrow"))
    # A file that something shortened afterwards is fetched again.
    opened.split("train")
    path = next(cache.rglob("train/00000.arrow"))
    path.write_bytes(path.read_bytes()[:-8])
    assert digest(opened.local("train/00000.arrow").read_bytes()) in {
        entry.blake2b for entry in opened.manifest.files
    }


def test_a_manifest_that_was_changed_is_refused(url: str) -> None:
    memory = fsspec.filesystem("memory")
    data = memory.cat_file("/shards/manifest.json")
    changes = {b"../00000": "leads out of the folder", b"train/00009": "was changed after it was"}
    for name, what in changes.items():
        memory.pipe_file("/shards/manifest.json", data.replace(b"train/00000", name))
        with pytest.raises(UserError, match=what):
            ShardFolder.open(url)
    memory.pipe_file("/shards/manifest.json", b"{")
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        ShardFolder.open(url)


def test_what_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"memory://nothing/manifest\.json: cannot be read: .+; corr"
    ):
        ShardFolder.open("memory://nothing")
    with pytest.raises(UserError, match=r"no://where/manifest\.json: cannot be read: .*no.*; corr"):
        ShardFolder.open("no://where")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://bucket/web/manifest\.json: .*s3fs.*; install the"):
        ShardFolder.open("s3://bucket/web")


def _count(place: str, log: Path, start: Any) -> None:
    """Slowly enough that the others wait for it."""
    opened = remote._opened

    def slow(where: str) -> Any:
        with log.open("a") as file:
            file.write(f"{where.rpartition('shards/')[2]}\n")
        time.sleep(0.3)
        return opened(where)

    remote._opened = slow
    start.wait()
    with log.open("a") as file:
        file.write(f"{len(ShardFolder.open(place).split('train'))} rows\n")


def test_processes_that_start_together_fetch_every_file_once(
    folder: Path, cache: Path, tmp_path: Path
) -> None:
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    given = (folder.as_uri(), log, context.Barrier(3))
    processes = [context.Process(target=_count, args=given) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    count = ShardFolder.open(folder).manifest.counts["train"].documents
    files = {"train/00000.arrow": 1, "train/00001.arrow": 1}
    assert Counter(log.read_text().splitlines()) == files | {
        "manifest.json": 3,
        f"{count} rows": 3,
    }
    assert not list(cache.rglob("*.partial"))


@pytest.mark.parametrize(
    "place", ["https://me:secret@host/web", "https://host/web?key=secret"], ids=["user", "query"]
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(place: str) -> None:
    with pytest.raises(UserError, match=r"^https://\.\.\.: a password") as caught:
        ShardFolder.open(place)
    assert "secret" not in str(caught.value)


def test_a_disk_that_is_full_is_no_fault_of_the_address(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ShardFolder.open(url)

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "here")

    monkeypatch.setattr(remote, "flush", full)
    with pytest.raises(UserError, match=r"^here: No space left on device; make room"):
        opened.split("train")


def test_merged_and_inspected_from_elsewhere(folder: Path, url: str, tmp_path: Path) -> None:
    merge(tmp_path / "there", [url])
    merge(tmp_path / "here", [folder])
    names = [path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*.*")]
    for name in names:
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert inspect(folder)["drops"]["empty"]["count"] == 1
    shutil.rmtree(tmp_path / "there")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_web_server_will_do(folder: Path) -> None:
    pytest.importorskip("aiohttp")
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        found = rows(ShardFolder.open(address))
        with pytest.raises(UserError, match="cannot be read"):
            ShardFolder.open(f"{address}/absent")
        server.shutdown()
    assert found == rows(ShardFolder.open(folder))
