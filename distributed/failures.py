"""Why a job failed: what agent and ranks left in its folder -> one message. Standard library only."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .job import JobError
from .jobdir import JobDir

MAX_LINES = 20
MAX_LOG_BYTES = 8 << 10

_ECHOES = re.compile(
    r"connection (closed|reset|refused)|timed out|timeout|remote process exited|broken pipe|"
    r"network error|socket|watchdog|store\.|peer|unhandled system error",
    re.IGNORECASE,
)
"""What a rank says when another one is gone."""
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|cannot allocate memory|MemoryError", re.IGNORECASE)
_DISK = re.compile(r"no space left|disk quota|file too large", re.IGNORECASE)
_NCCL = re.compile(r"nccl", re.IGNORECASE)
_KILLED_BY_AGENT = ("SIGTERM", "SIGINT")
"""How the agent ends the ranks that are left."""


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
    time_ns: int = 0

    @property
    def out_of_memory(self) -> bool:
        return bool(_OUT_OF_MEMORY.search(f"{self.type} {self.message}"))

    @property
    def headline(self) -> str:
        """The rank's own words, in one line's worth."""
        if self.type:
            return f"rank {self.rank}: {self.type.rpartition('.')[2]}: {self.message}"
        if self.signal == "SIGKILL":
            return f"rank {self.rank} was killed by SIGKILL, often by the system's out-of-memory killer"
        if self.signal:
            return f"rank {self.rank} was killed by {self.signal}"
        return f"rank {self.rank} ended with exit code {self.exitcode} and left no error"

    @property
    def _importance(self) -> tuple[int, int, int]:
        # A rank killed from outside, or with an error of its own, comes before the ranks that lost it; among equals
        # the earliest. torch's own choice goes by whole seconds and can name the victim.
        if self.type:
            echo = bool(_ECHOES.search(self.message)) and not self.out_of_memory
            order = 1 if echo else 0
        else:
            order = 2 if self.signal in _KILLED_BY_AGENT else 0 if self.signal else 1
        return (order, self.time_ns, self.rank)


def root_cause(failures: list[RankFailure]) -> RankFailure | None:
    """The failure that the others follow from."""
    return min(failures, key=lambda failure: failure._importance, default=None)


def read_failures(folder: JobDir, ranks: int) -> list[RankFailure]:
    """Merges the agent's exit codes and the ranks' own exceptions. Damaged files count as missing."""
    found: dict[int, dict[str, Any]] = {}
    with contextlib.suppress(JobError):
        for entry in folder.read_json(folder.failures).get("failures", []):
            found[int(entry["rank"])] = {"signal": entry.get("signal"), "exitcode": entry.get("exitcode")}
    for rank in range(ranks):
        with contextlib.suppress(JobError):
            record = folder.read_json(folder.error(rank))
            own = {key: record[key] for key in ("type", "message", "phase", "step", "time_ns") if key in record}
            found.setdefault(rank, {}).update(own)
        if rank in found and "phase" not in found[rank]:
            with contextlib.suppress(JobError):
                alive = folder.read_json(folder.alive(rank))
                found[rank] |= {"phase": str(alive.get("phase", "")), "step": int(alive.get("step", 0))}
    return [RankFailure(rank=rank, **record) for rank, record in found.items()]


def advice(text: str, *, out_of_memory: bool, killed: bool) -> str:
    """One thing to try."""
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
    if _DISK.search(text):
        return "Free space on the disk of ComfyUI's temp and output folders"
    if _NCCL.search(text):
        return (
            "Start ComfyUI with NCCL_DEBUG=INFO to see more; with NCCL_P2P_DISABLE=1 where GPUs cannot reach each "
            "other; in a container, give it --shm-size=8g or --ipc=host"
        )
    return "The job can be repeated without ComfyUI: python <pack>/distributed run FOLDER"


def log_tail(path: Path, *, lines: int = MAX_LINES, limit: int = MAX_LOG_BYTES) -> str:
    """The last lines of a log; undecodable bytes replaced, progress bars that redraw themselves collapsed."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - limit))
            data = file.read(limit)
    except OSError:
        return ""
    return "\n".join(clean_lines(data)[-lines:])


def clean_lines(data: bytes) -> list[str]:
    """Bytes of a log -> lines. Of what \\r overwrote, only the last state is kept."""
    text = data.decode("utf-8", errors="replace").replace("\r\n", "\n")
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return ["".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in line) for line in lines if line.strip()]
