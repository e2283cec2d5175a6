"""How long tests wait, on a machine that may be busy with others: limits that only tell right from wrong.

How soon things happen is measured in `benchmarks/` (endings.py).
"""

from __future__ import annotations

AT_ONCE = 20.0
"""Seconds in which what happens at once has happened. What does not takes longer: torchrun takes 30 for deaf ranks,
time-outs of 60, ranks that stand still for 600."""
COMES_UP = 120.0
"""Seconds for a process or a thread to come as far as it is meant to."""
