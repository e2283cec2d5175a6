"""A finished video in ComfyUI's output folder."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...wan.files.headers import brief
from ...wan.video.video_formats import media_type
from ..host import host
from .draft import Draft

MAX_PREFIX = 1000
"""Characters; paths end at 4096 bytes."""
MAX_NAME_BYTES = 255
"""Of a file, on every usual file system."""


class SavedVideo:
    """A video in ComfyUI's output folder."""

    def __init__(self, folder: Path, subfolder: str, name: str) -> None:
        self.path = folder / name
        self.subfolder = subfolder

    def video(self) -> Any:
        """A VIDEO for other nodes."""
        return host.video_input(self.path)


def shown(videos: Sequence[SavedVideo]) -> list[dict[str, str]]:
    """The videos as outputs of nodes name them, under "video": those under "images" the page would show itself, in each
    version otherwise."""
    return [
        {
            "filename": video.path.name,
            "subfolder": video.subfolder,
            "type": "output",
            "format": media_type(video.path.suffix),
        }
        for video in videos
    ]


def check_prefix(prefix: str, width: int, height: int, suffix: str) -> Path:
    """The folder that `prefix` names, which is there now.

    Raises ValueError if `prefix` is not a place inside the output folder, or no name for a file.
    """
    from ...distributed.machine.prerequisites import writing_problem

    if len(prefix) > MAX_PREFIX or any(ord(character) < 32 for character in prefix):
        raise ValueError(
            f"filename_prefix is {brief(prefix)}; it must have at most {MAX_PREFIX} characters, no control characters"
        )
    folder, name, counter, _ = host.save_path(prefix, width, height)
    # Found out now, not when the video is done.
    if problem := writing_problem(folder):
        raise ValueError(problem)
    size = len(os.fsencode(_video_name(name, counter, suffix)))
    if size > MAX_NAME_BYTES:
        raise ValueError(
            f"filename_prefix is {brief(prefix)}; it makes a file name of {size} bytes; {MAX_NAME_BYTES} fit"
        )
    return folder


def _video_name(name: str, counter: int, suffix: str) -> str:
    return f"{name}_{counter:05}_{suffix}"


def save_video(source: Path, prefix: str, *, width: int, height: int, workflow: Mapping[str, Any]) -> SavedVideo:
    """Copies the video `source` to the output folder under the next free number, with the workflow in its metadata."""
    folder, name, counter, subfolder = host.save_path(prefix, width, height)
    with Draft(folder, scratch=source.parent, suffix=source.suffix) as draft:
        host.copy_video(source, draft.path, workflow)
        # From `counter` on: another ComfyUI may have taken it meanwhile.
        made = draft.publish(_video_name(name, number, source.suffix) for number in itertools.count(counter))
    return SavedVideo(folder, subfolder, made.name)
