"""The pack as `wan_pack`, whatever its folder is called, without running its __init__."""

from __future__ import annotations

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "tests"
SUPPORT = TESTS / "support"
GOLDEN = TESTS / "data" / "golden"
SUPPORT_ROOMS = [str(SUPPORT / room) for room in ("jobs", "models", "ranks")]


def mount_pack() -> None:
    """Makes the pack importable, and the helpers of the tests."""
    sys.path[:0] = [room for room in SUPPORT_ROOMS if room not in sys.path]
    if "wan_pack" not in sys.modules:
        package = types.ModuleType("wan_pack")
        package.__path__ = [str(ROOT)]
        sys.modules["wan_pack"] = package
