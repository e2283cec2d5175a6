"""The pack as `wan_pack`, whatever its folder is called, without running its __init__."""

from __future__ import annotations

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def mount_pack() -> None:
    """Makes the pack importable."""
    if "wan_pack" not in sys.modules:
        package = types.ModuleType("wan_pack")
        package.__path__ = [str(ROOT)]
        sys.modules["wan_pack"] = package
