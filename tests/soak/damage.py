"""Damage by chance: to bytes, to the values of JSON, and to the text of YAML."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, 10**30, -(10**30), 1e308, float("nan"), float("inf"), "", " ", "\0", "x" * 5000,
    "../../etc/passwd", "/", "\udc80", "\u202e", "1e400", "${seed}", "${x.y}", [], [[]], {}, {"name": 1}, {"": None},
    [None],
)  # fmt: skip
"""Values of a wrong type or size, one of which takes the place of a right one."""


def damaged(data: bytes, rng: Random) -> bytes:
    """Bytes after one to three sorts of damage."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice(DAMAGES)(data, rng)
    return data


def _cut(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _flip(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 4, 40))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _number(data: bytes, rng: Random) -> bytes:
    """A field of four bytes becomes a hostile number; near the start, where headers are, more often."""
    at = rng.randrange(max(1, min(len(data), rng.choice((64, 1024, len(data) or 1)))))
    number = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0"))
    return data[:at] + number + data[at + 4 :]


def _swap(data: bytes, rng: Random) -> bytes:
    a, b, c = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def _double(data: bytes, rng: Random) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:b] + data[a:]


def _noise(data: bytes, rng: Random) -> bytes:
    at, length = rng.randrange(len(data) + 1), rng.choice((1, 16, 512))
    return data[:at] + rng.randbytes(length) + data[at + rng.choice((0, length)) :]


def _zeros(data: bytes, rng: Random) -> bytes:
    at, length = rng.randrange(len(data) + 1), rng.choice((4, 512, 4096))
    return data[:at] + bytes(length) + data[at + length :]


def _other(data: bytes, rng: Random) -> bytes:
    return rng.choice((b"", b"\0", rng.randbytes(100), b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 50_000, b"9" * 6000))


DAMAGES = (_cut, _cut, _flip, _flip, _flip, _number, _number, _swap, _double, _noise, _zeros, _other)


def damaged_json(value: Any, rng: Random) -> bytes:
    """JSON with a hostile value in the place of another, or damaged as bytes."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        value = _replaced(value, rng)
    text = json.dumps(value).encode()
    return damaged(text, rng) if rng.random() < 0.3 else text


def _replaced(value: Any, rng: Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            value[rng.choice(("", "name", "\0", key + "x"))] = value.pop(key)
        elif rng.random() < 0.15:
            del value[key]
        else:
            value[key] = _replaced(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        value[at] = _replaced(value[at], rng)
        return value
    return copy.deepcopy(rng.choice(HOSTILE))  # a second change must not reach into it


def damaged_yaml(value: Any, rng: Random) -> bytes:
    """YAML: hostile values, odd syntax at the end of a line, or damaged as bytes."""
    text = damaged_json(value, rng)
    odd = (
        b"&a [*a]",
        b"!!python/object:os.system x",
        b"{",
        b"\t- a",
        b"? x",
        b": :",
        b"<<: 1",
        b"*x",
        b"!!binary x",
        b"---\na: b",
    )
    if rng.random() < 0.3:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(odd) + text[at:]
    return text
