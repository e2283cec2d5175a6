"""Names in a job folder, atomic writes and bounded reads. Everything processes tell each other is a file here.

Runs everywhere. Standard library only.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any

from .job import Job, JobError

PREFIX = "wan-job-"
MAX_JSON_BYTES = 4 << 20


class JobDir:
    """One job's folder: mode 0700, made fresh, never reused."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.job = self.path / "job.json"
        self.inputs = self.path / "inputs.safetensors"
        """Text embeddings, where the job does not encode its prompt."""
        self.owner = self.path / "owner.lock"
        """Locked by the process that will remove the folder, for as long as that lives."""
        self.progress = self.path / "progress.json"
        self.failures = self.path / "failures.json"
        self.result = self.path / "result.json"
        """Written last: with it the job succeeded."""
        self.latents = self.path / "latents.safetensors"
        """`samples` [1, C, T, h, w], float32, un-normalised, as ComfyUI's LATENT."""
        self.video = self.path / "video.mp4"
        self.rendezvous = self.path / "rendezvous"
        """The agent's file store."""
        self.process_group = self.path / "process_group"
        """The ranks' file store."""
        self.logs = self.path / "logs"
        self.agent_log = self.logs / "agent.log"
        self.lock: IO[bytes] | None = None
        """`owner`, open and locked, in the owning process."""

    @classmethod
    def create(cls, parent: Path) -> JobDir:
        """A new folder under `parent`, which is made if needed."""
        parent.mkdir(parents=True, exist_ok=True)
        folder = cls(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        folder.logs.mkdir(mode=0o700)
        return folder

    def alive(self, rank: int) -> Path:
        """Rewritten by the rank at every phase and step; its age is the sign of life."""
        return self.path / f"rank{rank}.alive"

    def error(self, rank: int) -> Path:
        """The rank's own exception."""
        return self.path / f"rank{rank}.error.json"

    def log(self, rank: int) -> Path:
        return self.logs / f"rank{rank}.log"

    def write_json(self, path: Path, value: Any) -> None:
        """Readers see the old file or the new one, never a part. Mode 0600."""
        _replace_text(path, json.dumps(value, indent=1, ensure_ascii=False))

    def read_json(self, path: Path) -> dict[str, Any]:
        """An object. Raises JobError naming the file if it is missing, too large or damaged."""
        try:
            value = json.loads(read_bounded(path, MAX_JSON_BYTES), parse_constant=_refuse)
        except (OSError, ValueError, RecursionError) as error:
            raise JobError(f"{path.name} cannot be read: {error}") from error
        if not isinstance(value, dict):
            raise JobError(f"{path.name} holds a {type(value).__name__}; expected an object")
        return value

    def write_job(self, job: Job) -> None:
        _replace_text(self.job, job.to_json())

    def read_job(self) -> Job:
        """Raises JobError if job.json is missing, too large, damaged or of another version."""
        try:
            text = read_bounded(self.job, MAX_JSON_BYTES)
        except (OSError, ValueError) as error:
            raise JobError(f"job.json cannot be read: {error}") from error
        return Job.from_json(text)

    def remove(self) -> None:
        """Deletes the folder and what it holds. A second call does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.lock is not None:
            self.lock.close()


def read_bounded(path: Path, limit: int) -> str:
    """A UTF-8 text of at most `limit` bytes. Raises OSError or ValueError."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is over {limit} bytes")
    return data.decode("utf-8")


def _replace_text(path: Path, text: str) -> None:
    data = text.encode("utf-8")
    draft = path.with_name(f".{path.name}.{os.getpid()}")
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
