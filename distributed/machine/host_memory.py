"""Memory of this machine, or of the container that this is."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")
CACHES = ("active_file", "inactive_file")
"""Of a control group's use, what the kernel gives up when something else wants it: files that were read."""


def available_bytes(meminfo: Path = MEMINFO, control_group: Path = CONTROL_GROUP) -> int | None:
    """What a new process can have, in a container what its limit leaves; None if the system does not tell."""
    found = []
    try:
        found += [size for name, size in read_sizes(meminfo).items() if name == "MemAvailable"]
        limit = (control_group / "memory.max").read_text().strip()
        if limit.isdecimal():
            used = int((control_group / "memory.current").read_text())
            caches = read_sizes(control_group / "memory.stat")
            found.append(int(limit) - used + sum(caches.get(name, 0) for name in CACHES))
    except (OSError, ValueError, IndexError):
        pass
    return max(min(found), 0) if found else None


def read_sizes(path: Path = MEMINFO) -> dict[str, int]:
    """Name -> bytes, of a file whose lines are a name and bytes, or KiB where that is said. Raises OSError."""
    entries = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    return {entry[0].rstrip(":"): int(entry[1]) << (10 if entry[2:] == ["kB"] else 0) for entry in entries}
