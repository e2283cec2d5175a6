"""The pack's own error, and the sentence that refuses a value."""

from __future__ import annotations

from collections.abc import Iterable

from ...wan.files.headers import brief

MAX_LISTED = 20
"""Names that a message lists."""
MAX_LISTED_LENGTH = 120
"""Characters of each."""


SHOWN_AS = "wan_distributed"
"""The module that ComfyUI shows an exception's type with: it loads a pack under the path of its folder."""


class JobError(Exception):
    """A job that cannot be read, cannot run, or failed. The message is written for the user."""

    __module__ = SHOWN_AS

    def __init_subclass__(cls) -> None:
        cls.__module__ = SHOWN_AS


class JobCancelled(JobError):
    """The user cancelled; nothing is left."""


def check(ok: bool, field: str, value: object, allowed: str) -> None:
    """Raises ValueError naming the field, its value, cut to what a message holds, and what is allowed."""
    if not ok:
        raise ValueError(f"{field} is {brief(value)}; it must be {allowed}")


def listed(names: Iterable[object]) -> str:
    """Names for a message, in order: as they are, but cut and printable where they come from outside."""
    every = list(names)
    shown = [
        name if isinstance(name, str) and name.isprintable() and len(name) <= MAX_LISTED_LENGTH else brief(name)
        for name in every[:MAX_LISTED]
    ]
    return ", ".join(shown) + (f" and {len(every) - MAX_LISTED} more" if len(every) > MAX_LISTED else "")


def counted(count: int, one: str, many: str = "") -> str:
    """ "1 process", "2 processes". `many`: where it is not `one` with an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def check_text(name: str, value: str, most: int) -> None:
    """Raises ValueError for more than `most` characters, or half of one."""
    if len(value) > most:
        raise ValueError(f"{name} has {len(value)} characters; it must have at most {most}")
    check(is_unicode(value), name, value, "valid Unicode: it holds half of a character")


def is_unicode(text: str) -> bool:
    """False for half of a surrogate pair: JSON's \\ud800, or a file name in another encoding. No file takes them."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
