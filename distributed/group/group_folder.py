"""Names in the folder of a group of processes, and the requests by which it gets its jobs."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..job.job_folder import JobDir, OwnedFolder
from ..job.json_files import read_json, write_json
from ..machine.bell import ring_all

GROUP_PREFIX = "wan-group-"


class GroupDir(OwnedFolder):
    """One group's; it lives as long as the group's processes."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.group = self.path / "group.json"
        """`ranks`: how many."""
        self.store = self.path / "store.json"
        """Where the ranks' store listens, if it does."""
        self.agent_log = self.path / "agent.log"

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
        ring_all(self.bells())

    def read_request(self, number: int) -> JobDir | None:
        """The folder of job `number`; None while there is no such job."""
        path = self.request(number)
        return JobDir(read_json(path)["folder"]) if path.exists() else None
