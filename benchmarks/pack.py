"""The pack under measurement, and where figures go."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results.jsonl"


def mount_pack(root: Path = ROOT) -> None:
    """Makes the pack in `root` importable as `wan_pack`: this checkout's, or another one to compare with."""
    mounted = sys.modules.get("wan_pack")
    if mounted is not None and list(mounted.__path__) == [str(root)]:
        # What is imported of it already hangs on that module.
        return
    package = types.ModuleType("wan_pack")
    package.__path__ = [str(root)]
    sys.modules["wan_pack"] = package


def append_results(line: dict[str, Any], path: Path = RESULTS) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
