"""Words on stderr are never worth the work that they are about."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
from rlpt_data.stderr import tell
for n in range(3):
    tell(f"line {n}")
print("went on")
"""


def said(stderr: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        check=True,
    )
    return done.stdout


def test_a_reader_who_has_left_ends_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert said(writer) == "went on\n"
    os.close(writer)


def test_a_reader_who_is_there_has_every_line() -> None:
    reader, writer = os.pipe()
    assert said(writer) == "went on\n"
    os.close(writer)
    assert os.read(reader, 100) == b"line 0\nline 1\nline 2\n"
    os.close(reader)


def test_a_full_disk_is_no_reader_who_has_left() -> None:
    with open("/dev/full", "w") as full, pytest.raises(subprocess.CalledProcessError):
        said(full.fileno())
