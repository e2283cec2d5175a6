"""Where Python finds packages, handed on from ComfyUI to the processes of its jobs: as data, and checked.

They start without PYTHONPATH, as without every variable that is not listed. ComfyUI's own packages may be there, or in
a folder that a start script put on `sys.path`: without those a job would lack what ComfyUI has.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

VARIABLE = "WAN_IMPORT_PATHS"
"""Set for every process of a job, whatever ComfyUI's environment has under that name."""
PACK = Path(__file__).resolve().parent.parent.parent


def handed_on(source: Mapping[str, str]) -> str:
    """The value of `VARIABLE`: {"first": folders of PYTHONPATH, "last": the other ones of this process's `sys.path`}.

    Python itself looks into PYTHONPATH first. The others come last, as a folder that some custom node put in front may
    hold modules that are named like others; here they can hide nothing.

    Args:
        source: ComfyUI's environment.
    """
    first = usable(source.get("PYTHONPATH", "").split(os.pathsep))
    return json.dumps({"first": first, "last": [entry for entry in usable(sys.path) if entry not in first]})


def usable(entries: Iterable[str]) -> list[str]:
    """Those that are absolute paths of folders, each once: others mean something else in another working directory.

    Not those of a running script and of this pack, which hold modules of general names and no packages.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    own = {PACK, PACK / "distributed"} | ({Path(script).resolve().parent} if script else set())
    folders = [entry for entry in entries if os.path.isabs(entry) and os.path.isdir(entry)]
    return list(dict.fromkeys(entry for entry in folders if Path(entry).resolve() not in own))


def take_on(given: str | None = None) -> None:
    """Puts what was handed on into this process's `sys.path`.

    Args:
        given: what `handed_on` returned; None for the environment's.
    """
    value = json.loads(os.environ.get(VARIABLE, "{}") if given is None else given)
    first, last = (usable(value.get(name, ())) for name in ("first", "last"))
    sys.path[:] = [*first, *(entry for entry in sys.path if entry not in first)]
    sys.path.extend(entry for entry in last if entry not in sys.path)
