"""Names in a job folder, atomic writes and bounded reads. What processes tell each other is a file here; only why they
fail they also say in memory (last_words.py).

Runs everywhere.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .job import GroupJob, JobError
from .json_files import MAX_JSON_BYTES, read_bounded, read_json, replace_text, write_json

PREFIX = "wan-job-"
BELL = "bell-"
"""Before a rank's number."""
REMOVALS = 20
REMOVAL_SECONDS = 0.05


class OwnedFolder:
    """A folder that is one process's to remove: mode 0700, made fresh, never reused."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.owner = self.path / "owner.lock"
        """Locked by that process for as long as it lives."""
        self.failures = self.path / "failures.json"
        """Written by the agent when a rank failed."""
        self.lock: IO[bytes] | None = None
        """`owner`, open and locked, in the owning process."""

    def bell(self, rank: int) -> Path:
        """Where the rank waits: for a group's next job, for a job's next evaluation."""
        return self.path / f"{BELL}{rank}"

    def bells(self) -> Iterator[Path]:
        """Those of the ranks that have come to wait."""
        yield from self.path.glob(f"{BELL}*")

    def remove(self) -> None:
        """Deletes the folder and what it holds, as far as that can be deleted. A second call does nothing."""
        # A process that ends, or a rank that stays, may write into it meanwhile: then it is not empty when its turn
        # comes.
        for _ in range(REMOVALS):
            shutil.rmtree(self.path, ignore_errors=True)
            if not self.path.exists():
                break
            time.sleep(REMOVAL_SECONDS)
        if self.lock is not None:
            self.lock.close()


class JobDir(OwnedFolder):
    """One job's."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.job = self.path / "job.json"
        self.inputs = self.path / "inputs.safetensors"
        """Text embeddings, where the job does not encode its prompt."""
        self.evaluations = self.path / "evaluations.json"
        """`memory`, `answers`: where evaluations are asked for, and the bell of who waits for their answers."""
        self.pictures = self.path / "pictures.json"
        """`memory`: where a VAE's latents and frames lie."""
        self.progress = self.path / "progress.json"
        self.preview = self.path / "preview.jpg"
        """What the video is going to be, as of the last steps."""
        self.stop = self.path / "stop.json"
        """Its appearance asks the ranks to stop after their step, and to wait for another job."""
        self.result = self.path / "result.json"
        """Written last: with it the job succeeded."""
        self.latents = self.path / "latents.safetensors"
        """`samples` [1, C, T, h, w], float32, un-normalised, as ComfyUI's LATENT."""
        self.frames = self.path / "frames.int16"
        """As wan/video/frames_file.py writes them."""
        self.done_bell = self.path / "done-bell"
        """Where the launcher waits for ranks to be done."""
        self.logs = self.path / "logs"
        self.agent_log = self.logs / "agent.log"

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

    def video(self, suffix: str) -> Path:
        """The video, by its format's suffix."""
        return self.path / f"video{suffix}"

    def log(self, rank: int) -> Path:
        return self.logs / f"rank{rank}.log"

    def write_json(self, path: Path, value: Any) -> None:
        """Readers see the old file or the new one, never a part. Mode 0600."""
        write_json(path, value)

    def read_json(self, path: Path) -> dict[str, Any]:
        """An object. Raises JobError naming the file if it is missing, too large or damaged."""
        return read_json(path)

    def write_job(self, job: GroupJob) -> None:
        replace_text(self.job, job.to_json())

    def read_job(self) -> GroupJob:
        """Raises JobError if job.json is missing, too large, damaged or of another version."""
        try:
            text = read_bounded(self.job, MAX_JSON_BYTES)
        except (OSError, ValueError) as error:
            raise JobError(f"job.json cannot be read: {error}") from error
        return GroupJob.from_json(text)
