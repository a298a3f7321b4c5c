"""Shard folders that lie elsewhere: any address that fsspec reads, with a cache on this machine.

The cache holds a folder for each content address, so a folder that moves is not fetched again. A file
is fetched whole when it is first asked for, by one process; it appears under its name after its size
and checksum are those of the manifest.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlpt_data.manifest import NAME, FileEntry, Manifest, digest_file, parse_manifest
from rlpt_data.store import flush, writer_name
from rlpt_data.strict import UserError
from rlpt_data.workers import full_disk

CACHE = "RLPT_CACHE"
"""Environment variable: the folder of the cache."""
_PIECE = 1 << 20
_MOST_BYTES = 1 << 28
"""Of a manifest: more than a million files."""


def cache_folder() -> Path:
    return Path(os.environ.get(CACHE) or "~/.cache/rlpt").expanduser()


def fetch_manifest(url: str) -> tuple[Path, Manifest]:
    """The manifest at ``url``, and the cache's folder for what it lists.

    Raises UserError where it cannot be reached, or is none.
    """
    # What is said of a run (its configuration, its errors) names the address.
    if urlsplit(url).password is not None or "?" in url:
        raise UserError(
            f"{url.split('://')[0]}://...: a password or a key in the address would be written to files; give "
            "it to the driver by its own environment variables"
        )
    where = f"{url.rstrip('/')}/{NAME}"
    with _explained(where), _opened(where) as source:
        data = source.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise UserError(f"{where}: more than {_MOST_BYTES} bytes; correct the address")
    manifest = parse_manifest(data, where)
    # It names a folder of the cache below.
    if manifest.hash != manifest.content_hash():
        raise UserError(f"{where}: was changed after it was written; upload the folder again")
    folder = cache_folder() / manifest.hash
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / NAME).is_file():
        text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False)
        partial = folder / f".{NAME}.{writer_name()}"
        partial.write_text(f"{text}\n", encoding="utf-8")
        partial.rename(folder / NAME)
    return folder, manifest


def fetch(url: str, folder: Path, entry: FileEntry) -> None:
    """Bring a file into the cache unless it is there.

    Other processes wait meanwhile. Raises UserError where it cannot be reached or is not the file
    that the manifest lists.
    """
    target = folder / entry.path
    if _is_whole(target, entry):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        if not _is_whole(target, entry):
            _download(f"{url.rstrip('/')}/{entry.path}", target, entry)


def _is_whole(target: Path, entry: FileEntry) -> bool:
    """Its checksum was compared before it got its name."""
    return target.is_file() and target.stat().st_size == entry.bytes


def _download(where: str, target: Path, entry: FileEntry) -> None:
    partial = target.with_name(f".{target.name}.partial")
    with _explained(where), _opened(where) as source, partial.open("wb") as file:
        # One byte too many is enough to know, and a server may have no end.
        while piece := source.read(min(_PIECE, entry.bytes + 1 - file.tell())):
            file.write(piece)
        flush(file)
    found = partial.stat().st_size, digest_file(partial)
    if found != (entry.bytes, entry.blake2b):
        partial.unlink()
        raise UserError(
            f"{where}: {found[0]} bytes with checksum {found[1]}, the manifest says {entry.bytes} with "
            f"{entry.blake2b}; upload the folder again"
        )
    partial.rename(target)


def _opened(where: str) -> Any:
    """A readable file of bytes."""
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(where)
    return filesystem.open(path, "rb")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn what drivers raise into one line."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{where}: {error}; install the package that it names") from error
    except UserError:
        raise
    # Every driver has errors of its own; a bug of ours is none of these lines.
    except Exception as error:
        if full := full_disk(error):
            raise full from error
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{where}: cannot be read: {cause}; correct the address, or the access to it"
        ) from error
