"""The fault contract: what each row is, and a table of what its tests did, at the end of a run.

A test belongs to the rows in its name: test_fault_07_10_... is of rows 7 and 10. Hooks of pytest, for conftest.py.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

ROWS = {
    1: "a rank is killed",
    2: "a rank raises: its own words first",
    3: "GPU memory runs out",
    4: "host memory runs out while loading",
    5: "a rank hangs",
    6: "a rank is frozen or deaf to SIGTERM",
    7: "cancel",
    8: "cancel before the agent is up",
    9: "ComfyUI dies",
    10: "the agent dies",
    11: "the start never ends",
    12: "ports taken, jobs at once",
    13: "leftovers of dead jobs",
    14: "listeners on loopback only",
    15: "half-written files",
    16: "full disk",
    17: "success without a whole result",
    18: "floods of log",
    19: "bad job values",
    20: "damaged job.json",
    21: "damaged or wrong weights",
    22: "pickle, eval, shell",
    23: "hostile names and paths",
    24: "argument injection",
    25: "environment leak or hijack",
    26: "other users of the host",
    27: "ranks that disagree",
    28: "a rank returns early",
    29: "leaks after failures",
    30: "other systems, no CUDA",
    31: "a value as a path, a socket with another type",
    32: "values out of all bounds",
    33: "a helper process dies",
    34: "killed while the video gets its name",
    35: "headers beyond all bounds",
    36: "requests of other pages",
    37: "cancel on a busy machine",
}


def rows_of(name: str) -> list[int]:
    """Row numbers in a test's name."""
    found = re.match(r"test_fault_((?:\d\d_)+)", name)
    return [int(number) for number in found[1].split("_") if number] if found else []


class FaultReport:
    """Collects what the tests of each row did."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self.outcomes: dict[int, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for row in rows_of(report.nodeid.rpartition("::")[2]):
            if report.when == "call" or report.outcome != "passed":
                self.seconds[row] = self.seconds.get(row, 0.0) + report.duration
                self.outcomes.setdefault(row, []).append(report.outcome)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.outcomes:
            return
        terminalreporter.section("fault contract")
        for row, what in ROWS.items():
            outcomes = self.outcomes.get(row, [])
            passed = outcomes.count("passed")
            verdict = f"{passed} of {len(outcomes)} passed" if outcomes else "not run"
            terminalreporter.write_line(f"{row:2}  {what:45} {self.seconds.get(row, 0.0):7.1f} s  {verdict}")
        whole = sum(1 for outcomes in self.outcomes.values() if set(outcomes) == {"passed"})
        terminalreporter.write_line(f"{whole} of {len(ROWS)} rows passed, {sum(self.seconds.values()):.0f} s")
