"""`python <pack>/distributed run JOB_FOLDER`; `agent|worker GROUP_FOLDER` are started by the pack itself.

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
ROLES = ("agent", "worker", "run")


def main() -> int:
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry not in ("", here) and Path(entry).resolve() != Path(here)]
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(ROOT)]
    sys.modules[PACKAGE] = package
    if len(sys.argv) < 3 or sys.argv[1] not in ROLES:
        print(__doc__, file=sys.stderr)
        return 2
    if sys.argv[1] == "run":
        return importlib.import_module(f"{PACKAGE}.distributed.standalone").main(sys.argv[2:])
    folder = importlib.import_module(f"{PACKAGE}.distributed.groupdir").GroupDir(sys.argv[2])
    module = "agent" if sys.argv[1] == "agent" else "rank"
    return importlib.import_module(f"{PACKAGE}.distributed.{module}").main(folder)


if __name__ == "__main__":
    raise SystemExit(main())
