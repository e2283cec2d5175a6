"""Paths that values give: the one rule for what a node may read because an input says so.

A name that is chosen from ComfyUI's lists is found by catalogue.py. What arrives through a socket (a LoRA's entry, a
checkpoint's base_path) may hold any path, whoever made it, and is taken only as another way of saying such a name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ...distributed.job.errors import is_unicode
from ...wan.files.headers import brief
from ..host import host
from . import catalogue

MAX_PATH_LENGTH = 4096


def listed_file(value: object, *keys: str, name: str) -> Path:
    """The file that ComfyUI lists in one of its model folders and that a value names.

    A link in such a folder was put there by whoever runs ComfyUI, and is followed as it is when its name is chosen; a
    path that leads into a folder through a link elsewhere is that of the file it ends at.

    Args:
        value: an absolute path, or a name as ComfyUI lists it, with or without its suffix.
        keys: model folders, such as "loras".
        name: what the value is, for messages.
    Raises:
        ValueError: in the same words whatever is there: nothing, a file elsewhere, no regular file, one that may not
            be read.
    """
    if isinstance(value, str) and 0 < len(value) <= MAX_PATH_LENGTH and "\0" not in value and is_unicode(value):
        for key in keys:
            listed = catalogue.listed_names(key)
            for path in _places(value, key, listed):
                # Neither a pipe, which would block who opens it, nor what ComfyUI lists no longer.
                if path.is_file() and os.access(path, os.R_OK):
                    return path
    raise ValueError(
        f"{name} is {brief(value)}; it must be a file that ComfyUI lists in its folders for {' or '.join(keys)}"
    )


def _places(value: str, key: str, listed: frozenset[str]) -> Iterator[Path]:
    """Where a listed file of that path or name is, in the order of ComfyUI's folders."""
    if not os.path.isabs(value):
        for name in sorted(listed):
            if value in (name, Path(name).with_suffix("").as_posix()):
                for root in host.model_folders(key):
                    yield root / name
        return
    for root in host.model_folders(key):
        for path, folder in (
            (os.path.normpath(value), os.path.normpath(root)),
            (os.path.realpath(value), os.path.realpath(root)),
        ):
            inside = os.path.relpath(path, folder)
            if inside in listed:
                yield root / inside
