"""JSON objects as files between processes: readers see the old one or the new one, never a part."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from .errors import JobError

MAX_JSON_BYTES = 4 << 20


def write_json(path: Path, value: Any) -> None:
    """Mode 0600."""
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def read_json(path: Path) -> dict[str, Any]:
    """An object. Raises JobError naming the file if it is missing, too large or damaged."""
    try:
        value = json.loads(read_bounded(path, MAX_JSON_BYTES), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise JobError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise JobError(f"{path.name} holds a {type(value).__name__}; expected an object")
    return value


def read_bounded(path: Path, limit: int) -> str:
    """A UTF-8 text of at most `limit` bytes. Raises OSError or ValueError."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is over {limit} bytes")
    return data.decode("utf-8")


def replace_text(path: Path, text: str) -> None:
    """Writes beside `path` and renames. Mode 0600."""
    data = text.encode("utf-8")
    # Its own for each thread.
    draft = path.with_name(f".{path.name}.{threading.get_native_id()}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _refuse(name: str) -> None:
    # NaN and the infinities, which JSON does not have but Python's reader takes.
    raise ValueError(f"it holds {name}")
