"""Input files: which ones a path names, their text stream, their fingerprint."""

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from rlpt_data.documents import MAX_TEXT, Drop
from rlpt_data.manifest import digest, digest_file
from rlpt_data.strict import UserError

BOMB_BYTES, BOMB_RATIO = 64 << 20, 200


def input_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """``path`` itself, or every file below it with one of ``suffixes``, by relative name.

    Raises UserError when that is nothing.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"[source] path = {path}: no such file or folder; correct the path")
    found = [p for p in path.rglob("*") if p.is_file() and p.name.endswith(suffixes)]
    if not found:
        raise UserError(f"[source] path = {path}: no {' '.join(suffixes)} inside; correct the path")
    for file in found:
        _check_name(file)
    return sorted(found, key=lambda p: p.relative_to(path).as_posix())


def _check_name(file: Path) -> None:
    """Names are written down: in the ledger, and beside what was left out."""
    try:
        str(file).encode()
    except UnicodeEncodeError as error:
        shown = str(file).encode(errors="backslashreplace").decode()
        raise UserError(f"{shown}: its name is not UTF-8; rename it") from error


def fingerprint(files: list[Path]) -> str:
    """Of the contents: names, places, times and the order do not count."""
    return digest(" ".join(sorted(digest_file(file) for file in files)).encode())


def open_bytes(path: Path) -> io.BufferedReader:
    """The decompressed bytes; the suffix names the compression (.gz, .zst)."""
    return io.BufferedReader(pa.input_stream(str(path), compression="detect"))  # pyright: ignore


def most_bytes(path: Path) -> int:
    """What a file may inflate to: text seldom to more than 20 times its size, a bomb to any number of times."""
    return BOMB_BYTES + BOMB_RATIO * path.stat().st_size


def lines(path: Path, max_bytes: int = MAX_TEXT) -> Iterator[tuple[int, bytes] | Drop]:
    """Numbered lines of a file, from 1; a file damaged half way ends in a drop.

    A longer line is a drop and is passed over in pieces: memory does not grow with it. A file that inflates
    beyond ``most_bytes`` ends there in a drop: neither does time.
    """
    number, left = 0, most_bytes(path)

    def read(size: int) -> bytes:
        nonlocal left
        found = file.readline(size)
        left -= len(found)
        if left < 0:
            raise OSError(f"inflates to more than {most_bytes(path)} bytes")
        return found

    # A file that cannot be opened is no damaged one: the unit fails, and a later run tries again.
    file = open_bytes(path)
    try:
        with file:
            while line := read(max_bytes + 1):
                number += 1
                if len(line) <= max_bytes:
                    yield number, line
                    continue
                while line and not line.endswith(b"\n"):
                    line = read(1 << 20)
                yield Drop(
                    "too_large", f"{path}:{number}", f"a line of more than {max_bytes} bytes"
                )
    except (OSError, EOFError, pa.ArrowInvalid) as error:
        yield Drop("damaged_file", f"{path}:{number + 1}", str(error))
