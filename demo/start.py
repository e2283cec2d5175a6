"""Mounts the pack under a private name, as the job's processes do, and runs a part of the demo."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

DEMO = Path(__file__).resolve().parent


def run(module: str) -> int:
    """Calls `main` of a module of this folder, such as "train.command_line". Returns its exit code."""
    # This folder was put on the path for this file alone; its names are not meant as top-level modules.
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != DEMO]
    pack = types.ModuleType("_wan_distributed")
    pack.__path__ = [str(DEMO.parent)]
    sys.modules[pack.__name__] = pack
    return importlib.import_module(f"{pack.__name__}.demo.{module}").main()
