"""Names in the folder of a group of processes, and the requests by which it gets its jobs."""

from __future__ import annotations

import contextlib
import os
import select
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..job.job_folder import JobDir, remove_folder
from ..job.json_files import read_json, write_json

GROUP_PREFIX = "wan-group-"


class Bell:
    """The end of a named pipe that a rank waits at."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def wait(self, seconds: float) -> None:
        """Sleeps until somebody rings, `seconds` at most."""
        if select.select([self._descriptor], [], [], seconds)[0]:
            os.read(self._descriptor, 4096)


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
        """Asks for this job, and wakes the ranks that wait for it."""
        write_json(self.request(number), {"folder": str(job.path)})
        for bell in self.path.glob("bell-*"):
            # A rank that does not wait yet will look for the file before it does.
            with contextlib.suppress(OSError):
                descriptor = os.open(bell, os.O_WRONLY | os.O_NONBLOCK)
                try:
                    os.write(descriptor, b"!")
                finally:
                    os.close(descriptor)

    def read_request(self, number: int) -> JobDir | None:
        """The folder of job `number`; None while there is no such job."""
        path = self.request(number)
        return JobDir(read_json(path)["folder"]) if path.exists() else None

    @contextlib.contextmanager
    def bell(self, rank: int) -> Iterator[Bell]:
        """Where `rank` sleeps until the next request: a named pipe, so that an idle rank uses no processor."""
        path = self.path / f"bell-{rank}"
        if not path.exists():
            os.mkfifo(path, 0o600)
        # For writing too: a pipe without a writer would be readable all the time.
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        try:
            yield Bell(descriptor)
        finally:
            os.close(descriptor)

    def remove(self) -> None:
        """Deletes the folder and what it holds. A second call does nothing."""
        remove_folder(self.path)
        if self.lock is not None:
            self.lock.close()
