"""JSON that others wrote, measured before it is parsed: few bytes can ask for much memory."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 16
"""Levels of lists and objects. Headers have 3, configs 4, a tokenizer.json 7."""
MAX_DIGITS = 30
"""Of a whole number; a size has at most 19."""

_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


def parse_json(text: bytes, max_parts: int) -> Any:
    """What a JSON text says, which must name nothing twice.

    Args:
        max_parts: commas and opening brackets it may have; its values are at most one more.
    Raises:
        ValueError: it is no JSON or beyond a bound, which the message names.
    """
    check_json_size(text, max_parts)
    return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique_keys, parse_int=_integer)


def check_json_size(text: bytes, max_parts: int, max_string_bytes: int | None = None) -> None:
    """Counts the parts of a JSON text and measures how deep they nest, in time linear in its length.

    Args:
        max_parts: as in `parse_json`.
        max_string_bytes: of all strings together, without their escapes; None: as many as the text has.
    Raises:
        ValueError: naming the bound.
    """
    # Without escapes, each quote begins or ends a string.
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    # A part has a key and a value at most.
    if plain.count(b'"') > 4 * (max_parts + 1):
        raise ValueError(f"it holds over {2 * (max_parts + 1)} strings")
    structure = b"".join(plain.split(b'"')[::2])
    string_bytes = len(plain) - len(structure)
    if max_string_bytes is not None and string_bytes > max_string_bytes:
        raise ValueError(f"its strings have {string_bytes} bytes; at most {max_string_bytes} are allowed")
    if structure.count(b",") + structure.count(b"[") + structure.count(b"{") > max_parts:
        raise ValueError(f"it holds over {max_parts} values")
    brackets = structure.translate(None, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        # One level, the innermost. Marked first: a pair that holds a pair is not innermost.
        brackets = brackets.replace(b"[]", b" ").replace(b"{}", b" ").replace(b" ", b"")
    if brackets:
        raise ValueError(f"its brackets nest over {MAX_DEPTH} levels deep, or do not pair")


def _integer(digits: str) -> int:
    # Digits without end would take time that grows with their square.
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits; at most {MAX_DIGITS} are allowed")
    return int(digits)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("it names something twice")
    return unique
