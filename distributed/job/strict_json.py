"""JSON values -> frozen dataclasses, with nothing guessed."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any


def build(kind: Any, value: Any, where: str) -> Any:
    """JSON value -> the annotated type, strictly: no unknown keys, no coercion but int -> float.

    Args:
        kind: a dataclass of such types, a tuple of one, that or None, or one of JSON's own.
        where: the value's name, for messages.
    Raises:
        ValueError: naming what is missing, unknown or wrong.
    """
    origin = typing.get_origin(kind)
    if origin is types.UnionType:
        if value is None:
            return None
        return build(typing.get_args(kind)[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {type(value).__name__}; it must be a list")
        item = typing.get_args(kind)[0]
        return tuple(build(item, entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {type(value).__name__}; it must be an object")
        every = typing.get_type_hints(kind)
        hints = {field.name: every[field.name] for field in dataclasses.fields(kind)}
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise ValueError(f"{where} has unknown fields {unknown[:5]}")
        required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
        missing = sorted(required - set(value))
        if missing:
            raise ValueError(f"{where} lacks {missing[:5]}")
        return kind(**{name: build(hints[name], entry, f"{where}.{name}") for name, entry in value.items()})
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} is {type(value).__name__}; it must be {kind.__name__}")
    return value
