"""Valid inputs in, inputs that may be anything out: bytes that flip, values of another type, structures that end early.

Every mutation is a function of a `random.Random` and of the valid inputs alone: a seed names an input.
"""

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

Mutate = Callable[[random.Random, Sequence[bytes]], bytes]

_BYTES = (
    *(b"", b"\0", b"\xff", b"\n", b"\r\n", b"\x7f", b"\xc3\x28", b"\xed\xa0\x80", b"\xef\xbb\xbf"),
    *(b'"', b"\\", b"\\ud800", b"{", b"}", b"[", b"]", b",", b":", b"=", b".", b"-", b"null"),
    *(b"NaN", b"1e999", b"-1", b"9" * 30, b"18446744073709551616", b"\xe2\x80\xa8", b"\x1b[31m"),
    *(b"[" * 300, b'{"a":' * 300, b"9" * 5000, b"A" * 3000),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**32, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", "0", "x", "\0", "\ud800", "a\nb", "\u2028"),
    *("../../etc/passwd", "/dev/null", "x" * 3000, [], {}, [None], [[]], {"": None}, [1, "a"]),
)


def flipped(rng: random.Random, samples: Sequence[bytes]) -> bytes:
    """A valid input with one to four of its stretches changed, whatever they mean."""
    data = bytearray(rng.choice(samples))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.choice((0, 1, 1, 2, 4, 16, 256)))
        _CHANGES[rng.randrange(len(_CHANGES))](rng, data, at, to, samples)
    return bytes(data)


def _bit(rng: random.Random, data: bytearray, at: int, to: int, samples: Sequence[bytes]) -> None:
    if at < len(data):
        data[at] ^= 1 << rng.randrange(8)


def _token(rng: random.Random, data: bytearray, at: int, to: int, samples: Sequence[bytes]) -> None:
    data[at:to] = rng.choice(_BYTES)


def _noise(rng: random.Random, data: bytearray, at: int, to: int, samples: Sequence[bytes]) -> None:
    data[at:to] = rng.randbytes(rng.choice((1, 2, 4, 8, 64)))


def _cut(rng: random.Random, data: bytearray, at: int, to: int, samples: Sequence[bytes]) -> None:
    del data[at : to if rng.random() < 0.7 else len(data)]


def _again(rng: random.Random, data: bytearray, at: int, to: int, samples: Sequence[bytes]) -> None:
    data[at:at] = data[at:to] * rng.choice((1, 2, 50))


def _other(rng: random.Random, data: bytearray, at: int, to: int, samples: Sequence[bytes]) -> None:
    """The rest of another valid input."""
    other = rng.choice(samples)
    data[at:] = other[rng.randrange(len(other) + 1) :]


_CHANGES = (_bit, _bit, _token, _token, _noise, _cut, _again, _other)


def changed(rng: random.Random, value: Any) -> Any:
    """A structure of lists and tables with one to three of its places changed."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.randint(1, 3)):
        holder, key = rng.choice(_places(root))
        _change(rng, holder, key)
    return root[0]


def _places(root: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of every value in it; of long lists the first ones."""
    found, todo = [], [root]
    while todo:
        holder = todo.pop()
        keys = list(holder)[:40] if isinstance(holder, dict) else range(min(len(holder), 20))
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], dict | list) and holder[key]:
                todo.append(holder[key])
    return found


def _change(rng: random.Random, holder: Any, key: Any) -> None:
    kind = rng.randrange(8)
    if kind < 5:
        holder[key] = any_value(rng)
    elif kind == 5 and isinstance(holder[key], list):
        holder[key] = holder[key] * 2 if rng.random() < 0.5 else holder[key][:-1]
    elif isinstance(holder, dict):
        value = holder.pop(key)
        if kind == 6:
            holder[rng.choice((f"{key}_", key[:-1], "", "is", "\ud800"))] = value
    else:
        holder[key] = rng.choice(holder)


def any_value(rng: random.Random) -> Any:
    """One that stands for all that a place may hold and should not."""
    if rng.random() < 0.2:
        return nested(rng.choice((3, 60, 190, 400)), rng.random() < 0.5)
    return copy.deepcopy(rng.choice(_VALUES))


def nested(depth: int, tables: bool) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = {"a": value} if tables else [value]
    return value


def json_text(value: Any) -> bytes:
    """As a hostile writer would: NaN, half characters and any depth."""
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 2000


def of_json(rng: random.Random, samples: Sequence[bytes]) -> bytes:
    """One JSON value with places changed."""
    return json_text(changed(rng, json.loads(rng.choice(samples))))


def of_lines(rng: random.Random, samples: Sequence[bytes]) -> bytes:
    """JSON lines: one of them changed, repeated, moved, or flipped."""
    lines = rng.choice(samples).splitlines()
    at = rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind < 3:
        lines[at] = of_json(rng, lines[at : at + 1])
    elif kind == 3:
        lines[at] = json_text(any_value(rng))
    elif kind == 4:
        lines.insert(at, rng.choice(lines))
    else:
        lines[at] = flipped(rng, lines[at : at + 1])
    return b"\n".join(lines) + rng.choice((b"\n", b"\n", b"\n", b"", b"\n\n"))


def either(*kinds: Mutate) -> Mutate:
    """One of several mutations, at even odds."""

    def mutate(rng: random.Random, samples: Sequence[bytes]) -> bytes:
        return rng.choice(kinds)(rng, samples)

    return mutate


def wrapped(
    inner: Mutate, opened: Callable[[bytes], bytes], closed: Callable[[bytes], bytes]
) -> Mutate:
    """Of compressed files: mostly what is inside is mutated, one time in four the file itself."""

    def mutate(rng: random.Random, samples: Sequence[bytes]) -> bytes:
        if rng.random() < 0.25:
            return flipped(rng, samples)
        return closed(inner(rng, [opened(rng.choice(samples))]))

    return mutate
