"""A group of processes over several machines, seen from ComfyUI."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ..group import worker_group
from ..group.logs import log_tail
from ..group.worker_group import WorkerGroup
from ..job.errors import JobError
from ..job.job import Job
from ..job.json_files import read_json, write_json
from ..machine.import_paths import handed_on
from .host_check import IMPORT_PATHS, versions
from .hostfile import HostsDir, check_path

CONNECT_SECONDS = 120.0
"""In which every machine's agent must have come up: ssh, and Python importing DeepSpeed from a cold disk."""
ECHO_SECONDS = 5.0
"""The machine whose rank failed first may be the last to say so: the others' ranks fail at once, it ends its own."""
CONFIRM_SECONDS = 5.0
_LOST = re.compile(r"^pdsh@\S+: (\S+): ssh exited with exit code", re.MULTILINE)


class HostsGroup(WorkerGroup):
    """torchrun's agents on every machine, and DeepSpeed's launcher here, to which they are tied."""

    ROLE = "hosts"
    folder: HostsDir

    def __init__(self, job: Job, parent: Path) -> None:
        self._job, self._deadline = job, time.monotonic() + min(CONNECT_SECONDS, job.parallel.start_timeout)
        self._came_up: list[int] = []
        """Places of the machines whose agents were there when the group was ended."""
        self._unconfirmed: list[str] = []
        self._problem: str | None = None
        check_path(worker_group.AGENT)
        super().__init__(job.parallel, parent)

    def _create_folder(self, parent: Path) -> HostsDir:
        return HostsDir.create_for(parent, self._job, {**versions(), IMPORT_PATHS: handed_on(os.environ)})

    def _environment(self) -> dict[str, str]:
        environment = super()._environment()
        # ssh finds its keys by it.
        return environment | {name: os.environ[name] for name in ("SSH_AUTH_SOCK",) if name in os.environ}

    @property
    def exit_code(self) -> int | None:
        code = super().exit_code
        if code is None and (self._seen(self.folder.failed) or self._late() or self._lost()):
            return 1
        return code

    def waits(self) -> str:
        return self.folder.waiting(self._hosts)

    def _find_problem(self) -> str | None:
        """Of a machine that failed before it had ranks."""
        for node, name in enumerate(self._hosts):
            message = self._message(node)
            if message:
                return f"host {name}: {message}"
        missing = [node for node in range(len(self._hosts)) if node not in self._came_up]
        if not missing:
            lost = [] if self._seen(self.folder.failed) else self._lost()
            return f"host {lost[0]}: its agent was killed, or the ssh connection broke" if lost else None
        said = log_tail(self.folder.agent_log, lines=200).splitlines()
        texts = []
        for node in missing:
            name = self._hosts[node]
            # pdsh puts the machine's name before each of its lines.
            own = [line.partition(": ")[2] for line in said if line.startswith(f"{name}: ")]
            reasons = [line for line in own if not line.startswith("[20")]
            texts.append(f"host {name} did not start: {reasons[-1]}" if reasons else f"host {name} did not answer")
        return "; ".join(sorted(texts, key=lambda text: "did not answer" in text))

    def end(self) -> list[int]:
        """Ends every process here and, by closing their connections, on the other machines."""
        if self._seen(self.folder.failed) and not any(map(self._message, range(len(self._hosts)))):
            self._wait_for(self.folder.failed, ECHO_SECONDS)
        self._came_up = self._seen(self.folder.started)
        self._problem = self._find_problem()
        left = super().end()
        self._wait_for(self.folder.ended, CONFIRM_SECONDS, self._came_up)
        ended = self._seen(self.folder.ended)
        self._unconfirmed = [self._hosts[node] for node in self._came_up if node not in ended]
        self._merge_failures()
        return left

    def notes(self) -> str:
        if not self._unconfirmed:
            return ""
        return (
            f"{', '.join(self._unconfirmed)} did not confirm that nothing runs there any more; what does ends by "
            "itself when this machine has been silent for half a minute"
        )

    def end_text(self) -> str:
        return self._problem or super().end_text()

    def host_of(self, rank: int) -> str:
        return f" on {self._hosts[rank // self._job.parallel.gpus_per_host]}"

    def request_stacks(self) -> None:
        """Has every rank print where it is, into its log."""
        write_json(self.folder.stacks, {})

    @property
    def _hosts(self) -> tuple[str, ...]:
        return self._job.parallel.hosts

    def _late(self) -> bool:
        late = time.monotonic() > self._deadline
        return late and len(self._seen(self.folder.started)) < len(self._hosts)

    def _lost(self) -> list[str]:
        """Machines of which pdsh says that ssh failed; it then still waits for the others."""
        said = _LOST.findall(log_tail(self.folder.agent_log, lines=1000, limit=64 << 10))
        return [name for name in self._hosts if name in said]

    def _message(self, node: int) -> str:
        try:
            return str(read_json(self.folder.failed(node)).get("message", ""))
        except JobError:
            return ""

    def _seen(self, name: Callable[[int], Path]) -> list[int]:
        return [node for node in range(len(self._hosts)) if name(node).exists()]

    def _wait_for(self, name: Callable[[int], Path], seconds: float, nodes: Iterable[int] | None = None) -> None:
        wanted = set(range(len(self._hosts)) if nodes is None else nodes)
        deadline = time.monotonic() + seconds
        while not wanted <= set(self._seen(name)) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _merge_failures(self) -> None:
        failures = []
        for node in self._seen(self.folder.failed):
            try:
                entries = read_json(self.folder.failed(node)).get("failures")
            except JobError:
                continue
            failures += entries if isinstance(entries, list) else []
        # Neither a folder that is gone nor a full disk may keep a group that has ended among those that have not.
        with contextlib.suppress(OSError):
            write_json(self.folder.failures, {"failures": failures})
