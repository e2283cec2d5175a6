"""Several machines for one job: hostfiles, and the names in the folder through which their agents meet."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...wan.files.headers import brief
from ..group.group_folder import GROUP_PREFIX, GroupDir
from ..job.errors import JobError, listed
from ..job.job import MAX_GPUS, Job, Parallel
from ..job.json_files import read_bounded, read_json, replace_text, write_json
from ..machine.gpus import list_gpus

MAX_HOSTFILE_BYTES = 64 << 10
_LINE = re.compile(r"(\S+)\s+slots=(\d{1,3})\s*(?:#.*)?", re.ASCII)
_SAFE_PATH = re.compile(r"[\w@+=:,./-]+", re.ASCII)
"""What DeepSpeed's launcher hands to a remote shell as it is, and the shell leaves alone."""


@dataclass(frozen=True, slots=True)
class Hosts:
    """What a hostfile names."""

    names: tuple[str, ...]
    """As ssh takes them, in rank order."""
    slots: int
    """Processes on each of them."""


def read_hostfile(path: Path) -> Hosts:
    """DeepSpeed's format: a line `NAME slots=N` for each machine, # for comments.

    Raises:
        ValueError: naming the file and the line.
    """
    try:
        text = read_bounded(path, MAX_HOSTFILE_BYTES)
    except (OSError, ValueError) as error:
        raise ValueError(f"the hostfile {path} cannot be read: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    found: dict[str, int] = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"the hostfile {path} has the line {line[:80]!r}; it must be NAME slots=N")
        if match[1] in found:
            raise ValueError(f"the hostfile {path} names {brief(match[1])} twice")
        if len(found) == MAX_GPUS:
            raise ValueError(f"the hostfile {path} names more than {MAX_GPUS} machines; it must name 1 to {MAX_GPUS}")
        found[match[1]] = int(match[2])
    if not found:
        raise ValueError(f"the hostfile {path} names no machine; a line is NAME slots=N")
    slots = set(found.values())
    if len(slots) > 1:
        counts = listed(f"{name} {count}" for name, count in found.items())
        raise ValueError(f"the hostfile {path} has different slots ({counts}); they must be the same on every machine")
    return Hosts(tuple(found), slots.pop())


def over_hosts(
    base: Parallel, hosts: Hosts, *, gpu_ids: tuple[str, ...] = (), cfg_parallel: bool | None = None, guided: bool
) -> Parallel:
    """The same settings on other machines. CFG goes over them first: its two groups talk once a step.

    Args:
        gpu_ids: GPUs of every machine; empty for the first ones, or CPU processes where this machine has no GPU.
        cfg_parallel: None for on where it can be.
        guided: whether every step has an unconditional pass.
    """
    count = len(hosts.names) * hosts.slots
    if not 1 <= count <= MAX_GPUS:
        raise ValueError(f"the hostfile has {count} slots in all; it must be 1 to {MAX_GPUS}")
    first = tuple(str(index) for index in range(hosts.slots if list_gpus() else 0))
    return dataclasses.replace(
        base, hosts=hosts.names, gpu_count=count, gpu_ids=gpu_ids or first, keep_warm_seconds=0.0,
        cfg_parallel=count % 2 == 0 and guided if cfg_parallel is None else cfg_parallel,
    )  # fmt: skip


def host_warnings(parallel: Parallel) -> list[str]:
    """What the user should know of a job over several machines."""
    if len(parallel.hosts) < 2:
        return []
    warnings = []
    if parallel.use_ulysses and not (parallel.cfg_parallel and len(parallel.hosts) == 2):
        warnings.append(
            f"the sequence is split over the network between {len(parallel.hosts)} machines, which is slow without "
            "InfiniBand; two machines with guidance over 1 and cfg_parallel exchange one result per step instead"
        )
    if parallel.use_fsdp:
        warnings.append("use_fsdp gathers the weights of every block over the network; turn it off if they fit")
    return warnings


class HostsDir(GroupDir):
    """The folder of a group over several machines, which all of them see at the same path."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.job = self.path / "job.json"
        """The group's only job."""
        self.expected = self.path / "expected.json"
        """What every machine must have (host_check.py)."""
        self.hostfile = self.path / "hostfile"
        self.heartbeat = self.path / "heartbeat"
        """Rewritten every second while the launching machine lives."""
        self.agents_store = self.path / "agents_store.json"
        """Where the agents' store listens."""
        self.stacks = self.path / "stacks"
        """Its appearance asks every agent to have its ranks print their stacks."""

    @classmethod
    def create_for(cls, parent: Path, job: Job, expected: dict[str, object]) -> HostsDir:
        """A new folder under `parent`. Raises JobError if a remote shell would read its path as something else."""
        folder = cls(tempfile.mkdtemp(prefix=GROUP_PREFIX, dir=parent))
        try:
            check_path(folder.path)
            write_json(folder.group, {"ranks": job.parallel.gpu_count})
            replace_text(folder.job, job.to_json())
            write_json(folder.expected, expected)
            # One agent on each machine, whatever its number of GPUs.
            replace_text(folder.hostfile, "".join(f"{name} slots=1\n" for name in job.parallel.hosts))
            folder.heartbeat.touch(mode=0o600)
        except BaseException:
            shutil.rmtree(folder.path, ignore_errors=True)
            raise
        return folder

    def mark(self, node: int) -> Path:
        """What the processes below the agent of machine `node` are known by, also where two agents share a machine."""
        return self.path / f"node-{node}"

    def started(self, node: int) -> Path:
        """Written by the agent of machine `node`, once it has read the folder."""
        return self.path / f"started-{node}.json"

    def waits(self, node: int) -> Path:
        """Written by that agent when another program has a GPU that it needs, with who."""
        return self.path / f"waits-{node}.json"

    def ready(self, node: int) -> Path:
        """Written by that agent once it has its GPUs."""
        return self.path / f"ready-{node}.json"

    def failed(self, node: int) -> Path:
        """Written by that agent when a rank, or a check before any rank, failed."""
        return self.path / f"failed-{node}.json"

    def ended(self, node: int) -> Path:
        """Written by that agent when nothing runs below it any more."""
        return self.path / f"ended-{node}.json"

    def waiting(self, hosts: Sequence[str]) -> str:
        """Which machine waits for what, such as "host b: waiting for GPU 0, in use by process 7"; empty if none does.

        Args:
            hosts: the machines' names, in order.
        """
        for node, name in enumerate(hosts):
            if self.waits(node).exists() and not self.ready(node).exists():
                # On a network file system a file that is being replaced may be unreadable for a moment.
                with contextlib.suppress(JobError):
                    return f"host {name}: {read_json(self.waits(node))['reason']}"
        return ""

    def read_job(self) -> Job:
        """Raises JobError if this machine does not see the folder."""
        try:
            return Job.from_json(read_bounded(self.job, 4 << 20))
        except (OSError, ValueError) as error:
            raise JobError(
                f"the job's folder {self.path} cannot be read ({error}); it must be on a file system that all "
                "machines share, at the same path: start ComfyUI with --temp-directory on one, or set TMPDIR for "
                "a run from the shell"
            ) from error


def check_path(path: Path) -> None:
    """Raises JobError unless the path means the same to every shell."""
    if _SAFE_PATH.fullmatch(str(path)) is None:
        raise JobError(
            f"{path} has characters that a remote shell may take apart; over several machines paths must be of "
            "ASCII letters, digits and . _ - + = : , @ /"
        )
