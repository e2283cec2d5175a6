"""Names in the folder of a group of processes, and the requests by which it gets its jobs. Standard library only."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import IO

from .jobdir import JobDir
from .json_files import read_json, write_json

GROUP_PREFIX = "wan-group-"


class GroupDir:
    """One group's folder: mode 0700, made fresh, never reused; it lives as long as the group's processes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.owner = self.path / "owner.lock"
        """Locked by the process that will remove the folder, for as long as that lives."""
        self.group = self.path / "group.json"
        """`ranks`: how many."""
        self.failures = self.path / "failures.json"
        """Written by the agent when a rank failed."""
        self.rendezvous = self.path / "rendezvous"
        """The agent's file store."""
        self.process_group = self.path / "process_group"
        """The ranks' file store."""
        self.agent_log = self.path / "agent.log"
        self.lock: IO[bytes] | None = None
        """`owner`, open and locked, in the owning process."""

    @classmethod
    def create(cls, parent: Path, ranks: int) -> GroupDir:
        """A new folder under `parent`."""
        folder = cls(tempfile.mkdtemp(prefix=GROUP_PREFIX, dir=parent))
        write_json(folder.group, {"ranks": ranks})
        return folder

    def request(self, number: int) -> Path:
        """The file that names the folder of job `number` (1, 2, ...); its appearance is the request."""
        return self.path / f"request-{number:06}.json"

    def write_request(self, number: int, job: JobDir) -> None:
        write_json(self.request(number), {"folder": str(job.path)})

    def read_request(self, number: int) -> JobDir | None:
        """The folder of job `number`; None while there is no such job."""
        path = self.request(number)
        # One `stat` is all that an idle rank spends.
        return JobDir(read_json(path)["folder"]) if path.exists() else None

    def remove(self) -> None:
        """Deletes the folder and what it holds. A second call does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.lock is not None:
            self.lock.close()
