"""What a tokenizer's file may hold, measured before a library takes it in."""

from __future__ import annotations

import os
from pathlib import Path

from ..files.json_text import check_json_size

MAX_JSON_BYTES = 32 << 20
"""Of a tokenizer.json; umT5's has 17 MB."""
MAX_STRING_BYTES = 4 << 20
"""Of all strings of a tokenizer.json, with their quotes; umT5's have some 2.8 MB. The library takes about 300 bytes of
memory for each of them that begins like no other."""
MAX_SPIECE_BYTES = 8 << 20
"""Of a SentencePiece model; umT5's has 4.5 MB."""
MAX_PIECES = 1 << 19
"""umT5's vocabulary has 256,384."""
MAX_PARTS = 4 * MAX_PIECES
"""Commas and opening brackets of a tokenizer.json: three per piece, and what else it holds."""


def read_tokenizer_json(path: str | Path) -> str:
    """Raises OSError, or ValueError naming the bound."""
    data = _read(path, MAX_JSON_BYTES)
    check_json_size(data, MAX_PARTS, MAX_STRING_BYTES)
    return data.decode("utf-8")


def read_sentencepiece(source: str | Path | bytes) -> bytes:
    """Raises OSError, or ValueError naming the bound."""
    data = source if isinstance(source, bytes) else _read(source, MAX_SPIECE_BYTES)
    _check_size(len(data), MAX_SPIECE_BYTES)
    _check_pieces(data)
    return data


def _check_pieces(data: bytes) -> None:
    # The model is a protobuf message, of which each piece is a field.
    position = parts = 0
    while position < len(data):
        key, position = _varint(data, position)
        # Each part is a message of its own: a length, and so many bytes.
        if key & 7 != 2:
            raise ValueError("it is not a SentencePiece model")
        size, position = _varint(data, position)
        position += size
        parts += 1
        if parts > MAX_PIECES:
            raise ValueError(f"it holds over {MAX_PIECES} pieces")


def _read(path: str | Path, limit: int) -> bytes:
    with Path(path).open("rb") as file:
        _check_size(os.fstat(file.fileno()).st_size, limit)
        return file.read(limit)


def _check_size(nbytes: int, limit: int) -> None:
    if nbytes > limit:
        raise ValueError(f"it has {nbytes} bytes; at most {limit} are allowed")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number in sevens of bits, lowest first, and the position behind it."""
    value = 0
    for number, byte in enumerate(data[position : position + 10]):
        value |= (byte & 127) << 7 * number
        if byte < 128:
            return value, position + number + 1
    raise ValueError("it is not a SentencePiece model, or cut")
