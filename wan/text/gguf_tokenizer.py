"""The tokenizer that a GGUF text encoder carries in its metadata, as a SentencePiece model.

llama.cpp's converter takes a SentencePiece model apart into metadata values; here they are put together again
(message fields: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..files.headers import brief

if TYPE_CHECKING:
    from ..files.gguf_files import GgufFile

_KEY = "tokenizer.ggml."
_LISTS = {"tokens": str, "scores": float, "token_type": int}
_CHARSMAP = "precompiled_charsmap"
"""The characters that are replaced by others before anything else; a model without the rule has no such value."""
_UNIGRAM = 1
_BYTE = 6
"""Type of a piece that stands for one byte of an unknown character."""

_VARINT, _BYTES, _FLOAT = 0, 2, 5
"""How a protobuf field is encoded."""


def carries_tokenizer(gguf: GgufFile) -> bool:
    """Whether all parts of a Unigram SentencePiece model are there; files from other converters have none."""
    keys = gguf.metadata.keys() | gguf.arrays.keys()
    return gguf.metadata.get(f"{_KEY}model") == "t5" and all(_KEY + name in keys for name in _LISTS)


def sentencepiece_model(gguf: GgufFile) -> bytes:
    """The SentencePiece model that the metadata was made from, but for what only training needs.

    Raises:
        ValueError: the metadata is damaged; the message names the file.
    """
    assert carries_tokenizer(gguf)
    try:
        return _put_together(gguf)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{gguf.path} carries a damaged tokenizer: {brief(error)}") from error


def _put_together(gguf: GgufFile) -> bytes:
    tokens, scores, types = (_list(gguf, name, kind) for name, kind in _LISTS.items())
    if not len(tokens) == len(scores) == len(types):
        raise ValueError(f"it has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types")
    charsmap = b""
    if _KEY + _CHARSMAP in gguf.metadata or _KEY + _CHARSMAP in gguf.arrays:
        # Bytes, which may be stored as signed numbers.
        charsmap = bytes(value & 255 for value in _list(gguf, _CHARSMAP, int))
    pieces = (
        _field(1, _BYTES, _field(1, _BYTES, token.encode()) + _field(2, _FLOAT, score) + _field(3, _VARINT, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    trainer = _field(3, _VARINT, _UNIGRAM) + _field(35, _VARINT, int(_BYTE in types))
    normalizer = (
        _field(2, _BYTES, charsmap)
        + _field(3, _VARINT, int(gguf.metadata.get(f"{_KEY}add_space_prefix", True) is True))
        + _field(4, _VARINT, int(gguf.metadata.get(f"{_KEY}remove_extra_whitespaces", True) is True))
    )
    return b"".join((*pieces, _field(2, _BYTES, trainer), _field(3, _BYTES, normalizer)))


def _list(gguf: GgufFile, name: str, kind: type) -> list:
    values = gguf.read_array(_KEY + name) if isinstance(gguf.metadata.get(_KEY + name, []), list) else None
    if values is None or not all(type(value) is kind for value in values):
        raise ValueError(f"{_KEY}{name} is not a list of {kind.__name__} values")
    return values


def _field(number: int, encoding: int, value: bytes | float) -> bytes:
    """One field of a protobuf message."""
    key = _varint(number << 3 | encoding)
    if isinstance(value, bytes):
        return key + _varint(len(value)) + value
    if encoding == _VARINT and isinstance(value, int):
        return key + _varint(value)
    return key + struct.pack("<f", value)


@functools.lru_cache(maxsize=256)
def _varint(value: int) -> bytes:
    """Seven bits per byte, lowest first; the top bit says that more follow."""
    return bytes(_sevens(value % 2**64))


def _sevens(value: int) -> Iterable[int]:
    while value > 127:
        yield value & 127 | 128
        value >>= 7
    yield value
