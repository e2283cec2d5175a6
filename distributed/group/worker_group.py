"""A group of processes, one per GPU, seen from ComfyUI: started, given jobs one after another, ended."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..job.job import Parallel
from ..job.job_folder import JobDir
from ..machine.loopback import listen
from ..machine.memory_file import STORE_VARIABLE, MemoryFile
from ..machine.processes import Process, descendants, kill_all, members, signal_name
from .environment import child_environment
from .group_folder import GroupDir
from .last_words import WORDS_VARIABLE, LastWords
from .leftovers import claim

AGENT = Path(__file__).resolve().parent.parent
END_TIMEOUT = 5.0
"""Seconds that killed processes get to disappear."""


class WorkerGroup:
    """torchrun's agent and its ranks, on this machine.

    Raises:
        JobError: the master port is taken.
    """

    ROLE = "agent"
    request_stacks: Callable[[], None] | None = None
    """Asks ranks on other machines for their stacks; None where all are here."""

    def __init__(self, parallel: Parallel, parent: Path) -> None:
        self._parallel = parallel
        self.folder = self._create_folder(parent)
        self._jobs = 0
        self.job: JobDir | None = None
        """The last one that it was given."""
        self.ranks: list[Process] = []
        """Set when the first job is done."""
        self.ended = False
        self.said: list[dict[str, Any]] = []
        """Last words of its agent and ranks, when it has ended."""
        self._words = LastWords()
        self._store = MemoryFile("wan-store")
        try:
            claim(self.folder)
            with open(self.folder.agent_log, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
                self._agent = subprocess.Popen(
                    [sys.executable, "-u", str(AGENT), self.ROLE, str(self.folder.path)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.folder.path,
                    env=self._environment(),
                    start_new_session=True,
                    umask=0o077,
                )
            agent = Process.of(self._agent.pid)
            # Of the first of its processes. 0: it has ended already.
            self._since = 0 if agent is None else agent.started
        except BaseException:
            self.remove()
            raise

    def _create_folder(self, parent: Path) -> GroupDir:
        if self._parallel.master_port:
            listen(self._parallel.master_port).close()
        return GroupDir.create(parent, self._parallel.gpu_count)

    def _environment(self) -> dict[str, str]:
        memory = {STORE_VARIABLE: str(self._store.path), WORDS_VARIABLE: str(self._words.path)}
        return child_environment(self._parallel, self.folder.path) | memory

    def submit(self, job: JobDir) -> None:
        """Has the ranks run the job in this folder. The one before it must be done."""
        self._jobs += 1
        self.job = job
        self.folder.write_request(self._jobs, job)

    @property
    def exit_code(self) -> int | None:
        """The agent's, as subprocess gives it; None while it runs."""
        return self._agent.poll()

    @property
    def agent_lives(self) -> bool:
        """False from before the first of its ranks can die of its end, when it may have no exit code yet."""
        # A rank is killed as the agent's main thread ends; its other threads may take longer.
        return self.exit_code is None and Process.of(self._agent.pid) is not None

    @property
    def agent_failed(self) -> bool:
        """Whether it has ended of something else than its ranks."""
        code = self.exit_code
        return code is not None and (code < 0 or bool(self._own_words()))

    @property
    def usable(self) -> bool:
        """Whether a group that waits can take a job. Its agent needs a second to notice that a rank has died; and its
        folder goes where another ComfyUI starts with the same temporary folder, which each of them empties."""
        return self.agent_lives and self.folder.path.is_dir() and all(rank.alive() for rank in self.ranks)

    def waits(self) -> str:
        """What has yet to become free for it on other machines; empty if nothing has."""
        return ""

    def hand_over(self, job: JobDir) -> None:
        """Moves what the agent and NCCL left of a failure into the job's folder."""
        for path in (self.folder.failures, *self.folder.path.glob("nccl_trace_rank_*")):
            if path.exists():
                shutil.move(path, job.path / path.name)
        if self.folder.agent_log.exists():
            shutil.copy(self.folder.agent_log, job.agent_log)

    def host_of(self, rank: int) -> str:
        """ " on NAME", where there are several machines."""
        return ""

    def notes(self) -> str:
        """For the end of an error's text."""
        return ""

    def end_text(self) -> str:
        """How the agent ended, where no rank failed."""
        if said := self._own_words():
            return f"the agent failed: {said[0]}"
        code = self.exit_code
        name = None if code is None else signal_name(code)
        return f"the agent was killed by {name}" if name else f"the agent ended with exit code {code}"

    def _own_words(self) -> list[str]:
        return [record["message"] for record in self.said if {"message", "failures"} <= record.keys()]

    def end(self) -> list[int]:
        """Ends every process and removes the folder. Returns the pids that could not be killed."""
        # Listed before the agent ends: afterwards orphans have another parent, and only their environment tells.
        self.ended = True
        below = descendants(self._agent.pid) if self._agent.poll() is None else []
        agent = Process.of(self._agent.pid)
        assert self._agent.stdin is not None
        self._agent.stdin.close()
        if agent is not None and self._agent.poll() is None:
            agent.kill()
        left = kill_all(lambda: {*below, *members(self.folder.path, self._since)}, END_TIMEOUT)
        self.said = self._words.records()
        if not left:
            self._agent.wait(END_TIMEOUT)
        return sorted(process.pid for process in left)

    def remove(self) -> None:
        """Deletes the folder of a group that has ended."""
        self.folder.remove()
        self._words.close()
        self._store.close()
