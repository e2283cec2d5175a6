"""What this machine must have before a job starts: asked once, before any process."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ...wan.video.video_formats import FORMATS, H264, VideoFormat
from ..job.errors import JobError
from ..job.job import Parallel
from ..job.needs import DEEPSPEED_COMMAND, check_needs, deepspeed_there
from .gpus import compute_capabilities
from .programs import ask_program

MINIMUM_TORCH = (2, 7)
"""As ComfyUI itself asks for, and the first whose FSDP2 runs on CPU processes."""
FFMPEG_TIMEOUT = 30.0
"""Seconds for a video of one frame."""
MIN_FREE_BYTES = 64 << 20
"""Beside latents and video: logs, small files."""


def require_platform() -> None:
    """Raises JobError where jobs cannot run."""
    if sys.platform != "linux":
        raise JobError(
            f"this system is {sys.platform}; videos are made on Linux (or WSL2) only: NCCL and the way the processes "
            "are tied to ComfyUI need it"
        )


def check_prerequisites(parallel: Parallel, *, file_format: VideoFormat | None) -> None:
    """Raises JobError with what is missing and the command that installs it.

    Args:
        parallel: whose switches may need what this machine lacks.
        file_format: of the video that the job writes, if it does.
    """
    require_platform()
    _refuse(torch_problem())
    if parallel.hosts:
        # The machines look for the rest themselves.
        _refuse("" if deepspeed_there() else f"several machines are reached with DeepSpeed; run {DEEPSPEED_COMMAND}")
    else:
        try:
            check_switches(parallel)
        except ValueError as error:
            raise JobError(str(error)) from error
    if file_format is not None:
        _refuse(ffmpeg_problem(file_format))


def _refuse(problem: str) -> None:
    if problem:
        raise JobError(problem)


def check_switches(parallel: Parallel) -> None:
    """Raises ValueError with the first switch that cannot run on this machine, on one of the GPUs that were chosen."""
    if not parallel.gpu_ids:
        check_needs(parallel, None)
        return
    known = compute_capabilities()
    for capability in {known[gpu] for gpu in parallel.gpu_ids if gpu in known}:
        check_needs(parallel, capability)


def torch_release() -> tuple[str, tuple[int, ...]]:
    """Of the torch that is installed: its version, and of that the first two numbers. Empty without its metadata, as
    where it was built from source; whether it is there at all is asked with the other packages."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "", ()
    return version, tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def torch_problem() -> str:
    """Why torch's version does not do; empty if it does."""
    version, numbers = torch_release()
    if not numbers or numbers >= MINIMUM_TORCH:
        return ""
    return f"torch is {version}; it must be {'.'.join(map(str, MINIMUM_TORCH))} or newer"


def ffmpeg_problem(file_format: VideoFormat = FORMATS[H264]) -> str:
    """Why no such video can be written; empty if ffmpeg encodes one frame."""
    codec = file_format.codec
    remedy = f"run pip install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE to an ffmpeg with {codec}"
    try:
        import imageio_ffmpeg

        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
        command += ["-s", "64x64", "-r", "1", "-i", "-", *file_format.encoder, "-f", "null", "-"]
        ended = ask_program(command, given=bytes(64 * 64 * 3), timeout=FFMPEG_TIMEOUT)
    # RuntimeError: imageio-ffmpeg found none.
    except (ImportError, RuntimeError, OSError) as error:
        return f"ffmpeg is missing: {error}; {remedy}, or turn decode_video off"
    except subprocess.TimeoutExpired:
        return f"ffmpeg did not write one frame within {FFMPEG_TIMEOUT:g} s; {remedy}"
    if ended.returncode:
        words = ended.stderr.decode(errors="replace").strip()[-500:] or f"exit code {ended.returncode}"
        return f"ffmpeg cannot encode with {codec}: {words}; {remedy}"
    return ""


def writing_problem(folder: Path) -> str:
    """Why no file can be made in a folder; empty if one can. Makes the folder if it is missing, leaves no file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder} cannot be written to: {error.strerror}; correct its permissions, or choose another folder"


def check_space(room: Mapping[Path, int], whose: str = "the job") -> None:
    """Raises JobError if what is made does not fit on the disks of existing folders.

    Args:
        room: folder -> bytes that are needed there. Folders on one disk share what it has.
        whose: who needs them, for the message.
    """
    disks: dict[int, list[Path]] = {}
    for folder in room:
        disks.setdefault(folder.stat().st_dev, []).append(folder)
    for folders in disks.values():
        needed = MIN_FREE_BYTES + sum(room[folder] for folder in folders)
        free = shutil.disk_usage(folders[0]).free
        if free < needed:
            has = "are on one disk, which has" if len(folders) > 1 else "has"
            raise JobError(
                f"{' and '.join(map(str, folders))} {has} {free / 2**20:.0f} MiB free; {whose} needs "
                f"{needed / 2**20:.0f} MiB. Free some space there"
            )
