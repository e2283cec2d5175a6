"""What a job that went well has made, and whether it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...wan.files.headers import read_header
from ..job.job import VERSION, GroupJob, Job, JobError
from ..job.job_folder import JobDir


@dataclass(frozen=True, slots=True)
class Result:
    """A finished job. Its folder is the caller's to remove."""

    folder: JobDir
    info: dict[str, Any]
    """result.json."""
    log: str
    """Rank 0's log, its last 64 KiB."""
    seconds: float
    """From its checks to its end, with the start of its processes."""

    def remove(self) -> None:
        self.folder.remove()


def checked_result(folder: JobDir, job: GroupJob) -> dict[str, Any]:
    """result.json. Raises JobError or ValueError where it, or a file that it promises, is not what the job makes."""
    info = folder.read_json(folder.result)
    if info.get("id") != job.id or info.get("version") != VERSION:
        raise JobError(f"result.json is of job {info.get('id')!r}, not of {job.id!r}")
    if isinstance(job, Job):
        _check_video(folder, job, info)
    return info


def _check_video(folder: JobDir, job: Job, info: dict[str, Any]) -> None:
    samples = read_header(folder.latents).tensors.get("samples")
    if samples is None or samples.dtype != "F32" or list(samples.shape) != info.get("latents", {}).get("shape"):
        raise JobError("latents.safetensors is not what result.json promises")
    if job.file_format is None:
        return
    for path in (folder.video(job.file_format.suffix), *((folder.frames,) if job.frames else ())):
        if not path.is_file() or path.stat().st_size == 0:
            raise JobError(f"{path.name} is missing or empty")
