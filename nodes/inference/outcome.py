"""What a finished job leaves in ComfyUI: its video in the output folder, its latents, its log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...distributed.group.leftovers import keep_failed
from ...distributed.job.job import Job, JobError
from ...distributed.launch.result import Result
from ..host import host
from . import saved_video


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished job, its folder gone."""

    saved: saved_video.SavedVideo | None
    """None if the job made latents only."""
    samples: Any
    """[1, C, T, h, w] float32, un-normalised."""
    images: Any
    """[frames, H, W, 3] float32 in 0 to 1; None where nobody takes them."""
    info: dict[str, Any]
    """result.json."""
    log: str
    seconds: float
    """As `Result` has them."""

    @property
    def path(self) -> Path | None:
        return None if self.saved is None else self.saved.path

    def video(self) -> Any:
        """For the VIDEO output."""
        return host.blocked_output() if self.saved is None else self.saved.video()


def keep(job: Job, result: Result, filename_prefix: str, workflow: Mapping[str, Any]) -> Outcome:
    """Saves the video, reads the latents, and removes the job's folder.

    Raises:
        JobError: that failed, such as on a full disk; the folder is kept.
    """
    saved = None
    try:
        images = _read_images(result) if job.frames else None
        latents = _read_latents(result.folder.latents)
        # Last: what fails before leaves no video in the output folder that the error does not name.
        if job.decode:
            size = {name: result.info["video"][name] for name in ("width", "height")}
            source = result.folder.video(job.sampling.file_format.suffix)
            saved = saved_video.save_video(source, filename_prefix, **size, workflow=workflow)
        outcome = Outcome(saved, latents, images, result.info, result.log, result.seconds)
    # Whatever it is: the video may have taken hours to make.
    except Exception as error:
        kept = keep_failed(result.folder, host.failed_folder())
        raise JobError(f"the job is done, but its result cannot be saved: {error}; it is kept in {kept}") from error
    result.remove()
    return outcome


def inputs_writer(tensors: dict[str, Any]) -> Callable[[Path], None]:
    """Writes the tensors that travel with a job, for run_job."""

    def write(path: Path) -> None:
        from safetensors.torch import save_file

        save_file(tensors, str(path))

    return write


def _read_images(result: Result) -> Any:
    from ...wan.video.frames_file import read_frames

    size = {name: result.info["video"][name] for name in ("frames", "width", "height")}
    return read_frames(result.folder.frames, **size)


def _read_latents(path: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(str(path))["samples"]
