"""Damaged versions of a good file, each from its own seed, and the limits under which opening one must end."""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from kept_memory import give_back_freed_memory

MAX_SECONDS = 5.0
"""For one file; the machine that runs the tests may be busy."""
MAX_BYTES = 256 << 20
"""Of memory, more than before."""
MAX_MESSAGE = 4000
"""Characters of an error: a screen, not a dump of the file."""

NUMBERS = (b"0", b"-1", b"1", b"64", b"2147483648", b"9223372036854775807", b"18446744073709551616", b"1e999", b"NaN")
TOKENS = (*(bytes([byte]) for byte in b'{}[],:"\\\0\xff\n'), b'"\\ud800"', b"null", b"true", b"../")
WORDS = tuple(value.to_bytes(8, "little") for value in (0, 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1))

Mutate = Callable[[bytes, random.Random], bytes]
Open = Callable[[], Any]


def mutate_text(text: bytes, rng: random.Random) -> bytes:
    """One to three changes of a JSON text."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        text = rng.choice((*_ANYWHERE, _number, _number, _token, _nest, _twice))(text, rng)
    return text


def mutate_binary(data: bytes, rng: random.Random) -> bytes:
    """One to three changes of bytes in which sizes are little-endian numbers."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice((*_ANYWHERE, _word, _word, _twice))(data, rng)
    return data


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Damages the header, its length or the end of the file, or describes the tensors wrongly in a sound header."""
    end = 8 + int.from_bytes(data[:8], "little")
    how = rng.random()
    if how < 0.1:
        return mutate_binary(data[:16], rng) + data[16:]
    if how < 0.2:
        return data[: rng.randrange(len(data))]
    text = _redescribe(data[8:end], rng) if how < 0.6 else mutate_text(data[8:end], rng)
    return struct.pack("<Q", len(text)) + text + data[end:]


def mutate_head(size: int) -> Mutate:
    """Damages the first `size` bytes, where a binary format keeps its description."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.1:
            return data[: rng.randrange(len(data))]
        return mutate_binary(data[:size], rng) + data[size:]

    return mutate


def mutate_zip(data: bytes, rng: random.Random) -> bytes:
    """Damages the directory at the end of a .pth, anything before it, or the list of tensors in a sound archive."""
    if rng.random() < 0.5:
        return _repack(data, rng)
    directory = data.rindex(b"PK\x05\x06") - int.from_bytes(data[data.rindex(b"PK\x05\x06") + 12 :][:4], "little")
    start, end = rng.choice(((0, 200), (directory, len(data)), (len(data) - 22, len(data)), (0, len(data))))
    return data[:start] + mutate_binary(data[start:end], rng) + data[end:]


def _repack(data: bytes, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()[:3]}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", rng.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))) as archive:
        for name, content in entries.items():
            archive.writestr(name, mutate_binary(content, rng) if name.endswith("/data.pkl") else content)
    return packed.getvalue()


def _redescribe(text: bytes, rng: random.Random) -> bytes:
    """A header that agrees with the file's bytes, but gives some tensors another name, dtype or shape."""
    header = json.loads(text)
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 3))):
        entry = header[name := rng.choice(names)]
        size, shape = entry["data_offsets"][1] - entry["data_offsets"][0], entry["shape"]
        how = rng.randrange(6)
        if how == 0:
            shape.reverse()
        elif how == 1:
            entry["shape"] = rng.choice(([1], [1] * 5, [1] * 70, [2**62] * 20)) + shape
        elif how == 2:
            entry["dtype"], entry["shape"] = rng.choice(("U8", "I8", "F8_E4M3", "BOOL")), [size]
        elif how == 3:
            entry["dtype"], entry["shape"] = "F4", [*shape[:1], *(2 * s for s in shape[1:2]), *shape[2:]]
        elif how == 4:
            # Nothing is stored of a tensor with no elements, however wide it says it is; the bytes go to another.
            end = entry["data_offsets"][1]
            entry["shape"] = rng.choice(([0, 2**62], [2**62, 0], [0], [2**31, 2**31, 0, 1, 1], [0] * 64))
            entry["data_offsets"] = [end, end]
            before = [header[other] for other in names if header[other]["data_offsets"][1] == end - size]
            if before and size:
                before[0]["data_offsets"][1] = end
                before[0]["dtype"], before[0]["shape"] = "U8", [end - before[0]["data_offsets"][0]]
        else:
            other = rng.choice(names)
            header[name], header[other] = header[other], header[name]
            if rng.random() < 0.5:
                header[rng.choice((name + "x", name.upper(), "x" * 3000, name + "\u202e\n"))] = header.pop(name)
                names = [name for name in header if name != "__metadata__"]
    return json.dumps(header).encode()


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8)) if data else 0):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 2, 50, len(data))) :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 3, 40))) + data[at:]


def _number(text: bytes, rng: random.Random) -> bytes:
    """Another number, often one that is elsewhere in the text."""
    numbers = list(re.finditer(rb"\d+", text))
    if not numbers:
        return _insert(text, rng)
    old = rng.choice(numbers)
    new = rng.choice((rng.choice(numbers).group(), rng.choice(NUMBERS), b"9" * rng.choice((25, 6000))))
    return text[: old.start()] + new + text[old.end() :]


def _token(text: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(TOKENS) + text[at + rng.randrange(2) :]


def _nest(text: bytes, rng: random.Random) -> bytes:
    places = [match.end() for match in re.finditer(rb"[:,\[]", text)] or [0]
    at, depth = rng.choice(places), rng.choice((50, 3000))
    closed = rng.random() < 0.5
    return text[:at] + b"[" * depth + (b"]" * depth + b"," if closed else b"") + text[at:]


def _twice(data: bytes, rng: random.Random) -> bytes:
    """The same again: a whole entry of a text where there is one."""
    entries = list(re.finditer(rb'"[^"]{1,100}": ?(\{[^{}]*\}|"[^"]*"|\d+),', data[:100_000]))
    if entries and rng.random() < 0.7:
        start, end = rng.choice(entries).span()
    else:
        start = rng.randrange(len(data) + 1)
        end = start + rng.choice((1, 8, 200))
    return data[:end] + data[start:end] + data[end:]


def _word(data: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(data) + 1), rng.choice((2, 4, 8))
    return data[:at] + rng.choice(WORDS)[:size] + data[at + size :]


_ANYWHERE = (_flip, _cut, _insert)


@dataclass
class Tally:
    """What became of the mutations of one file."""

    refused: int = 0
    accepted: int = 0


def try_mutations(path: Path, mutate: Mutate, open_file: Open, count: int) -> Tally:
    """Opens `count` damaged versions of a file, one after the other.

    Raises:
        AssertionError: one of them ended in another way than being opened or refused with a proper message.
    """
    good, tally = path.read_bytes(), Tally()
    open_file()
    with _limits(), path.open("r+b", buffering=0) as file:
        for seed in range(count):
            data = mutate(good, random.Random(f"{path.name} {seed}"))
            # In place: to empty a file and write it anew takes a file system many times as long.
            os.pwrite(file.fileno(), data, 0)
            file.truncate(len(data))
            signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
            try:
                open_file()
            except ValueError as error:
                tally.refused += 1
                text = str(error)
                # A subclass, such as a UnicodeDecodeError, is one that nobody put into words.
                assert type(error) is ValueError, f"{path.name}, seed {seed}: {error!r}"
                assert str(path.parent) in text, f"{path.name}, seed {seed}: does not name the file: {text}"
                assert len(text) <= MAX_MESSAGE, f"{path.name}, seed {seed}: {len(text)} characters: {text[:200]}"
                assert text.isprintable(), f"{path.name}, seed {seed}: {text!a}"
            except Exception as error:
                raise AssertionError(f"{path.name}, seed {seed}: {error!r}") from error
            else:
                tally.accepted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    return tally


@contextmanager
def _limits() -> Iterator[None]:
    """Within it, memory ends at MAX_BYTES more than now, and an alarm is an error."""

    def too_slow(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took over {MAX_SECONDS} seconds")

    give_back_freed_memory()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, handler)
