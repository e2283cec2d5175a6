"""Why a job failed: what agent and ranks left in its folder -> one message."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..job.job import JobError
from ..job.job_folder import JobDir
from ..job.progress import place

_ECHOES = re.compile(
    r"connection (closed|reset|refused)|timed out|timeout|remote process exited|broken pipe|"
    r"network error|socket|watchdog|peer\b|unhandled system error",
    re.IGNORECASE,
)
"""What a rank says when another one is gone."""
_ECHO_TYPES = ("RuntimeError", "torch.distributed.", "torch._C._Dist")
"""What torch raises then. A ValueError about a timeout is the rank's own."""
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|cannot allocate memory|MemoryError", re.IGNORECASE)
_DISK = re.compile(r"no space left|disk quota|file too large", re.IGNORECASE)
_NCCL = re.compile(r"nccl", re.IGNORECASE)
_KILLED_BY_AGENT = ("SIGTERM", "SIGINT")
"""How the agent ends the ranks that are left."""
_LATE_SECONDS = 2
"""A rank that ended this much after the first was ended by the agent, at the end of its patience."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFailure:
    """One rank's end."""

    rank: int
    signal: str | None = None
    exitcode: int | None = None
    type: str = ""
    message: str = ""
    phase: str = ""
    step: int = 0
    seconds: float | None = None
    """When the agent saw it end, in whole seconds."""
    time_ns: int = 0
    """When the rank wrote its exception down."""

    @property
    def out_of_memory(self) -> bool:
        return bool(_OUT_OF_MEMORY.search(f"{self.type} {self.message}"))

    @property
    def echo(self) -> bool:
        """Whether all that it tells is that another process is gone."""
        speaks_of_another = self.type.startswith(_ECHO_TYPES) and bool(_ECHOES.search(self.message))
        return speaks_of_another and not self.out_of_memory

    @property
    def headline(self) -> str:
        """The rank's own words, in one line's worth."""
        if self.type:
            return f"rank {self.rank}: {self.type.rpartition('.')[2]}: {self.message}"
        if self.signal == "SIGKILL":
            return f"rank {self.rank} was killed by SIGKILL, often by the system's out-of-memory killer"
        if self.signal:
            return f"rank {self.rank} was killed by {self.signal}"
        code = "" if self.exitcode is None else f" with exit code {self.exitcode}"
        return f"rank {self.rank} ended{code} and left no error"

    @property
    def where(self) -> str:
        """For a line behind the headline."""
        return f"\nin {place(self.phase, self.step)}" if self.phase else ""

    def importance(self, first_end: float) -> int:
        """0 for the likeliest origin. torch's own choice goes by whole seconds and can name the victim.

        Args:
            first_end: when the first rank ended.
        """
        if self.type:
            return 3 if self.echo else 1
        late = self.seconds is not None and self.seconds - first_end >= _LATE_SECONDS
        if self.signal in _KILLED_BY_AGENT or late:
            return 4
        # A rank whose group broke may abort without an exception of its own.
        return 2 if self.signal in (None, "SIGABRT") else 0


def root_cause(failures: Sequence[RankFailure], *, agent_failed: bool = False) -> RankFailure | None:
    """The failure that the others follow from: killed or crashed ranks, then errors of a rank's own, then the rest.

    Among equals it is the earliest.

    Args:
        agent_failed: by itself, so that ranks were killed, and the others may have told of that.
    """
    if agent_failed:
        failures = [failure for failure in failures if not failure.echo]
    first_end = min((f.seconds for f in failures if f.seconds is not None), default=0.0)
    return min(failures, key=lambda f: (f.importance(first_end), f.time_ns, f.rank), default=None)


def read_failures(
    folder: JobDir, ranks: int, words: Sequence[dict[str, Any]] = (), lost: Sequence[RankFailure] = ()
) -> list[RankFailure]:
    """Merges the agent's exit codes and the ranks' own exceptions. Damaged files count as missing.

    Args:
        words: what agent and ranks have said in memory, in the form of their files.
        lost: what the launcher itself has seen, for ranks of which nothing else is known.
    """
    ended = [entry for record in (*words, _read(folder, folder.failures)) for entry in _list(record.get("failures"))]
    found: dict[int, dict[str, Any]] = {
        entry["rank"]: _fields(entry, signal=str, exitcode=int, seconds=(int, float))
        # The first that was said of a rank counts: what was said later is of ranks that the agent ended.
        for entry in reversed(ended)
        if isinstance(entry, dict) and entry.get("rank") in range(ranks)
    }
    for rank in range(ranks):
        for record in (_read(folder, folder.error(rank)), *(word for word in words if word.get("rank") == rank)):
            own = _fields(record, type=str, message=str, phase=str, step=int, time_ns=int)
            if own.get("type"):
                found.setdefault(rank, {}).update(own)
                break
        if rank in found and "phase" not in found[rank]:
            found[rank] |= _fields(_read(folder, folder.alive(rank)), phase=str, step=int)
    known = [RankFailure(rank=rank, **record) for rank, record in found.items()]
    return known + [failure for failure in lost if failure.rank not in found]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _read(folder: JobDir, path: Path) -> dict[str, Any]:
    try:
        return folder.read_json(path)
    except JobError:
        return {}


def _fields(record: dict[str, Any], **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    return {name: record[name] for name, kind in kinds.items() if isinstance(record.get(name), kind)}


def advice(text: str, log: str, *, out_of_memory: bool, killed: bool) -> str:
    """One thing to try; empty if nothing suggests itself.

    Args:
        text: of the error.
        log: its last lines, in which a full disk may be all that is told of it.
    """
    if out_of_memory:
        return (
            "Try fewer frames or a smaller size; use_fsdp on (a 14B expert in bf16 then takes 28.6 GB divided by the "
            "number of GPUs, each); offload_model on (one expert at a time on the GPU); memory_optimization on"
        )
    if killed:
        return (
            "Look at the system's log (dmesg) for 'Out of memory'. If it was, turn offload_model off, or use_fsdp on, "
            "so that host memory holds less"
        )
    if _DISK.search(text) or _DISK.search(log):
        return "Free space on the disk of ComfyUI's temp and output folders"
    if _NCCL.search(text):
        return (
            "Start ComfyUI with NCCL_DEBUG=INFO to see more; with NCCL_P2P_DISABLE=1 where GPUs cannot reach each "
            "other; in a container, give it --shm-size=8g or --ipc=host"
        )
    return ""
