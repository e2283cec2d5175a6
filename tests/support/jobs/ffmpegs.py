"""Scripts in the place of ffmpeg."""

from __future__ import annotations

from pathlib import Path

import pytest


def put_ffmpeg(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Has a shell script, written to a folder, run wherever ffmpeg would."""
    ffmpeg = folder / "ffmpeg"
    ffmpeg.write_text(f"#!/bin/sh\n{script}")
    ffmpeg.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
