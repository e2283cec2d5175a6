"""How long tests wait, on a machine that may be busy with others: limits that only tell right from wrong.

How soon things happen is measured in `benchmarks/` (endings.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable

AT_ONCE = 25.0
"""Seconds in which what happens at once has happened. What does not takes longer: torchrun takes 30 for deaf ranks,
time-outs of 60, ranks that stand still for 600."""
COMES_UP = 120.0
"""Seconds for a process or a thread to come as far as it is meant to."""


def until(holds: Callable[[], object]) -> bool:
    """Whether it comes to hold."""
    deadline = time.monotonic() + COMES_UP
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(holds())
