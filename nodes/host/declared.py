"""What arrives at a node -> the values that the node declares: the one place where outside values become ours.

ComfyUI converts and checks the widgets that a workflow holds. It does not check what a link brings into a widget, takes
any JSON in the place of a link, and hands on links to inputs that a node does not have.
"""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ...distributed.job.errors import check, check_text, is_unicode, listed
from ...wan.files.headers import brief

MAX_TEXT = 1_000_000
"""Characters of one input: a batch's prompts all together."""

R = TypeVar("R")


def as_declared(function: Callable[..., R]) -> Callable[..., R]:
    """A node's function that raises ValueError for inputs that the node does not declare so."""
    names = list(inspect.signature(function).parameters)[1:]

    @functools.wraps(function)
    def checked(node: Any, /, *values: Any, **inputs: Any) -> R:
        return function(node, **taken(type(node), {**dict(zip(names, values, strict=False)), **inputs}))

    return checked


def taken(node: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a node, each widget's with its type. What sockets bring is checked by who reads it.

    Raises:
        ValueError: naming the input, its value and what is allowed.
    """
    types = node.INPUT_TYPES()
    declared = {**types.get("required", {}), **types.get("optional", {})}
    hidden = types.get("hidden", {})
    found = {}
    for name, value in inputs.items():
        if name in declared:
            found[name] = value_of(name, declared[name], value)
        elif name in hidden:
            _check_hidden(name, hidden[name], value)
            found[name] = value
        else:
            raise ValueError(f"{brief(name)} is no input of this node, and something is connected to it")
    return found


def value_of(name: str, entry: tuple[Any, Mapping[str, Any]], value: Any) -> Any:
    """The value of one input. Raises ValueError if it is not of the declared type, or outside of its bounds.

    Args:
        entry: as INPUT_TYPES declares the input.
    """
    kind, options = entry
    if isinstance(kind, list):
        check(isinstance(value, str) and value in kind, name, value, f"one of: {listed(kind) or '(there is none)'}")
        return value
    if kind == "BOOLEAN":
        check(isinstance(value, bool), name, value, "true or false")
    elif kind == "STRING":
        check(isinstance(value, str), name, value, "text")
        check_text(name, value, MAX_TEXT)
    elif kind in ("INT", "FLOAT"):
        return number(name, value, options["min"], options["max"], whole=kind == "INT")
    return value


def number(name: str, value: Any, least: float, most: float, *, whole: bool = False) -> Any:
    """An int if `whole`, else a float, of any number that is `least` to `most`. Raises ValueError for anything else."""
    kind = numbers.Integral if whole else numbers.Real
    # A switch is a number to Python, not to a user.
    ok = isinstance(value, kind) and not isinstance(value, bool)
    words = "a whole number, " if whole else "a number, "
    check(ok, name, value, f"{words}{least} to {most}")
    # Before it is made a float, which the largest numbers do not fit. NaN is not between anything.
    check(least <= value <= most, name, value, f"{least} to {most}")
    return int(value) if whole else float(value)


def problem_of(name: str, entry: tuple[Any, Mapping[str, Any]], value: Any) -> str | None:
    """What `value_of` says against a value; None if it takes it. For VALIDATE_INPUTS."""
    try:
        value_of(name, entry, value)
    except ValueError as error:
        return str(error)
    return None


def kind_of(value: object) -> str:
    """What a socket brought, for messages: its type, and a tensor's shape; no part of its content."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{type(value).__name__} of shape {list(shape)}"
    return type(value).__name__


def is_set(value: object) -> bool:
    """Whether a key of a dictionary asks for something: not None, False or an empty collection or text.

    Unlike Python's own truth it has an answer for tensors, too.
    """
    empty = isinstance(value, str | bytes | dict | list | tuple | set | frozenset) and not value
    return not (value is None or value is False or empty)


def _check_hidden(name: str, kind: str, value: Any) -> None:
    """What comes with a prompt beside its nodes: it goes into messages to the page and into the video's metadata."""
    if kind == "UNIQUE_ID":
        ok = value is None or (isinstance(value, str) and is_unicode(value))
        check(ok, "the node's id", value, "text of whole characters")
    elif kind == "EXTRA_PNGINFO":
        ok = value is None or (
            isinstance(value, dict)
            and all(isinstance(key, str) and key.isprintable() and is_unicode(key) for key in value)
        )
        check(ok, name, value, "an object whose keys are printable text")
