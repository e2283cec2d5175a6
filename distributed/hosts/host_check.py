"""What a machine must have before it joins a job: the same pack, Python and torch, the files and the GPUs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..job.errors import JobError
from ..job.job import Job
from ..job.model_files import FileIdentity
from ..machine.gpus import list_gpus
from ..machine.prerequisites import check_switches

IMPORT_PATHS = "import paths"
"""Beside the versions: the folders in which the machine that starts the job finds its packages."""
PACK = Path(__file__).parent.parent.parent


def versions() -> dict[str, str]:
    """Of what must be equal on all machines."""
    return {"this pack": _digest(), "Python": platform.python_version(), "torch": importlib.metadata.version("torch")}


def check_host(job: Job, expected: Mapping[str, Any]) -> None:
    """Raises JobError with the first thing that this machine lacks.

    Args:
        expected: `versions()` of the machine that starts the job.
    """
    for name, value in versions().items():
        if value != expected.get(name):
            raise JobError(f"{name} is {value}, but {expected.get(name)} on the machine that starts the job")
    for file in job.model.all():
        _check_file(file)
    _check_gpus(job)
    try:
        check_switches(job.parallel)
    except ValueError as error:
        raise JobError(str(error)) from error


def _check_file(file: FileIdentity) -> None:
    try:
        here = FileIdentity.of(file.path)
    except OSError as error:
        raise JobError(f"{file.path} cannot be read: {error.strerror}") from error
    if here.size != file.size:
        raise JobError(f"{file.path} has {here.size} bytes, but {file.size} on the machine that starts the job")
    if here.mtime_ns != file.mtime_ns:
        raise JobError(
            f"{file.path} was changed at another time than on the machine that starts the job; share the folder, or "
            "copy it with rsync -a"
        )


def _check_gpus(job: Job) -> None:
    present = list_gpus()
    known = {name for gpu in present for name in (gpu.index, gpu.uuid)}
    missing = [gpu for gpu in job.parallel.gpu_ids if gpu not in known]
    if missing:
        there = "; ".join(map(str, present)) or "none"
        raise JobError(f"GPU {missing[0]} is missing; the GPUs are: {there}")
    if present and not job.parallel.gpu_ids:
        raise JobError(
            f"there are {len(present)} GPUs, but the machine that starts the job has none, so that it would run on "
            "CPU processes; name them in gpu_ids, such as 0,1"
        )


def _digest() -> str:
    """Of the pack's code: two copies of a version may differ by an edit."""
    digest = hashlib.sha256()
    for path in sorted((*(PACK / "distributed").rglob("*.py"), *(PACK / "wan").rglob("*.py"))):
        digest.update(str(path.relative_to(PACK)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
