"""GGUF files written byte by byte, also such as no library would write."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

STRING, ARRAY = 8, 9
F32, F16, Q8_0, Q8_1, Q8_K = 0, 1, 8, 9, 15
NUMBERS = {
    0: ("B", 255), 1: ("b", -2), 2: ("H", 65_535), 3: ("h", -300), 4: ("I", 2**32 - 1), 5: ("i", -70_000),
    6: ("f", 0.5), 7: ("?", True), 10: ("Q", 2**64 - 1), 11: ("q", -(2**40)), 12: ("d", 1e300),
}  # fmt: skip
"""Type in the file -> struct's format, and a value that no smaller type has."""


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def packed(type_id: int, *values: object) -> bytes:
    if type_id == STRING:
        return b"".join(text(str(value)) for value in values)
    return struct.pack(f"<{len(values)}{NUMBERS[type_id][0]}", *values)


def value(key: str, type_id: int, *values: object) -> bytes:
    """One number or string; a list where there are several."""
    items = packed(type_id, *values)
    listed = struct.pack("<IIQ", ARRAY, type_id, len(values)) if len(values) > 1 else struct.pack("<I", type_id)
    return text(key) + listed + items


def tensor(name: str, type_id: int, shape: Sequence[int], offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + sizes + struct.pack("<IQ", type_id, offset)


def file(
    path: Path, values: Sequence[bytes] = (), tensors: Sequence[bytes] = (), data: bytes = b"", *, version: int = 3,
    alignment: int = 32,
) -> Path:  # fmt: skip
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values)) + b"".join((*values, *tensors))
    path.write_bytes(head + bytes(-len(head) % alignment) + data)
    return path


def floats(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)
