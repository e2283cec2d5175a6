"""`python <pack>/distributed run JOB_FOLDER` or `doctor`; `agent|hosts|host|worker GROUP_FOLDER`, `imports` and the
doctor's `exchange` and `libraries` are started by the pack itself.

Mounts the pack under one private name, whatever its folder is called, and runs one role. The pack's root never gets on
`sys.path`: it holds a `nodes`, and ComfyUI has a module of that name.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "_wan_distributed_pack"
ROLES = {"agent": "group.agent", "worker": "rank.shell", "hosts": "hosts.launch", "host": "hosts.host_agent"}
"""Role that is given a group's folder -> module of this folder."""
COMMANDS = {
    "run": "launch.standalone",
    "doctor": "doctor.examine",
    "exchange": "doctor.exchange",
    "libraries": "doctor.libraries",
    "imports": "libraries.library_check",
}
"""Role that reads its own arguments -> module."""


def main() -> int:
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry not in ("", here) and Path(entry).resolve() != Path(here)]
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(ROOT)]
    sys.modules[PACKAGE] = package
    importlib.import_module(f"{PACKAGE}.distributed.machine.import_paths").take_on()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS and (name not in ROLES or len(sys.argv) < 3):
        print(__doc__, file=sys.stderr)
        return 2
    role = importlib.import_module(f"{PACKAGE}.distributed.{(COMMANDS | ROLES)[name]}")
    if name in COMMANDS:
        return role.main(sys.argv[2:])
    if sys.argv[1] in ("hosts", "host"):
        return role.main(importlib.import_module(f"{PACKAGE}.distributed.hosts.hostfile").HostsDir(sys.argv[2]))
    return role.main(importlib.import_module(f"{PACKAGE}.distributed.group.group_folder").GroupDir(sys.argv[2]))


if __name__ == "__main__":
    raise SystemExit(main())
