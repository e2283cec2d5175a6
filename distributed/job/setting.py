"""A setting, declared once, as a field of the job: its default and what it may hold. What the job checks and what the
nodes show is derived from that."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass
from typing import TYPE_CHECKING, Any

from .errors import check

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_KEY = "setting"
_PART = re.compile(r"\s*([0-9]{1,6})(?:\s*-\s*([0-9]{1,6}))?\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Number:
    """A number in a range."""

    default: float | None
    least: float
    most: float
    _: KW_ONLY
    step: float | None = None
    """Between two values of its widget, which has fractions if this has a type of fractions."""
    open: bool = False
    """`least` itself is not in the range."""
    off: str = ""
    """What 0 means, which is allowed beside the range; empty: it has no such meaning."""
    unit: str = ""
    words: str = ""
    """The range for messages; empty: its numbers."""

    def holds(self, value: Any) -> bool:
        # NaN is not between anything.
        inside = self.least <= value <= self.most and not (self.open and value == self.least)
        return inside or (bool(self.off) and value == 0)

    @property
    def allowed(self) -> str:
        """For messages."""
        between = f"over {self.least:g}, at most {self.most:g}" if self.open else f"{self.least:g} to {self.most:g}"
        return (f"0 ({self.off}) or " if self.off else "") + (self.words or between) + (self.unit and f" {self.unit}")


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some names."""

    default: str
    names: tuple[str, ...]

    def holds(self, value: Any) -> bool:
        return value in self.names

    @property
    def allowed(self) -> str:
        """For messages."""
        return "one of " + ", ".join(self.names)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Some whole numbers, in a text: "0-2, 39"."""

    below: int
    """All of them."""

    def holds(self, value: Any) -> bool:
        parts = value.split(",") if value.strip() else []
        return len(parts) <= self.below and all(
            match is not None and int(match[1]) <= int(match[2] or match[1]) < self.below
            for match in map(_PART.fullmatch, parts)
        )

    @property
    def allowed(self) -> str:
        """For messages."""
        return f"empty, or numbers and ranges of them, such as 0-2, 39, all below {self.below}"


def numbers_in(text: str) -> tuple[int, ...]:
    """Those of a text that `Numbers` holds, in order, each once."""
    found: set[int] = set()
    for match in map(_PART.fullmatch, text.split(",") if text.strip() else []):
        assert match is not None, text
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def text_of(numbers: Sequence[int]) -> str:
    """The shortest text in which `numbers_in` finds these, which are in order."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def number(default: float | None, least: float, most: float, *, required: bool = False, **more: Any) -> Any:
    """A dataclass field for a `Number`.

    Args:
        default: None for none.
        required: a job must say it, whatever a node's widget begins with.
        more: as `Number` has it.
    """
    setting = Number(default, least, most, **more)
    given = MISSING if required or default is None else default
    return dataclasses.field(default=given, metadata={_KEY: setting})


def choice(default: str, names: Collection[str]) -> Any:
    """A dataclass field for a `Choice`."""
    return dataclasses.field(default=default, metadata={_KEY: Choice(default, tuple(names))})


def numbers(below: int) -> Any:
    """A dataclass field for `Numbers`, at first none."""
    return dataclasses.field(default="", metadata={_KEY: Numbers(below)})


Setting = Number | Choice | Numbers


def setting_of(kind: type[DataclassInstance], name: str) -> Setting | None:
    """How a dataclass declares a field; None for a plain one, such as a switch."""
    setting: Setting | None = kind.__dataclass_fields__[name].metadata.get(_KEY)
    return setting


def default_of(kind: type[DataclassInstance], name: str) -> Any:
    """What a field's widget begins with."""
    setting = setting_of(kind, name)
    declared = setting.default if isinstance(setting, Number | Choice) else None
    return kind.__dataclass_fields__[name].default if declared is None else declared


def check_settings(values: Any, *, but: Collection[str] = ()) -> None:
    """Raises ValueError for the first field of a dataclass that holds what it may not.

    Args:
        but: fields whose range depends on others, which their dataclass checks.
    """
    for field in dataclasses.fields(values):
        setting = setting_of(type(values), field.name)
        if setting is not None and field.name not in but:
            value = getattr(values, field.name)
            check(setting.holds(value), field.name, value, setting.allowed)
