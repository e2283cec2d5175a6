"""The pack's own error, and the sentence that refuses a value. Standard library only."""

from __future__ import annotations


class JobError(Exception):
    """A job that cannot be read, cannot run, or failed. The message is written for the user."""


class JobCancelled(JobError):
    """The user cancelled; nothing is left."""


def check(ok: bool, field: str, value: object, allowed: str) -> None:
    """Raises ValueError naming the field, its value and what is allowed."""
    if not ok:
        raise ValueError(f"{field} is {value!r}; it must be {allowed}")


def is_unicode(text: str) -> bool:
    """False for half of a surrogate pair: JSON's \\ud800, or a file name in another encoding. No file takes them."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
