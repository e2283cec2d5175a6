"""What a test starts, as marks: `make quick` runs those that start nothing. Hooks of pytest, for conftest.py."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

MARKS = {
    "processes": "starts processes",
    "ranks": "starts ranks that import torch",
    "comfyui": "runs in a real ComfyUI",
    "browser": "needs Chromium",
    "hosts": "needs machines of its own (network namespaces)",
}
RANKS = ("run_ranks", "fork_ranks", "run_fresh", "run_tiny", "golden")
"""Names in a test's module: what starts ranks."""
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn")
MAY_BE_ASKED = "nvidia-smi"
"""Looked for in vain on machines without a GPU."""


class Kinds:
    """Marks tests; and where `processes` are deselected, has a test fail that starts one nevertheless."""

    def __init__(self, config: pytest.Config) -> None:
        for name, meaning in MARKS.items():
            config.addinivalue_line("markers", f"{name}: {meaning}")
        self._guards = re.match(r"not \(?.*\bprocesses\b", config.getoption("markexpr") or "") is not None
        self._running = False
        """A test; not its fixtures, which others may share."""
        if self._guards:
            sys.addaudithook(self._look)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for name in _marks(item):
                item.add_marker(name)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self._running = True
        yield
        self._running = False

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._running and event in STARTS and MAY_BE_ASKED not in str(arguments):
            raise AssertionError(f"this test starts a process ({event} {arguments[:2]}): mark it with processes")


def _marks(item: pytest.Item) -> Iterator[str]:
    module = getattr(item, "module", None)
    folder = os.path.basename(os.path.dirname(item.path))
    if folder == "comfyui":
        yield "comfyui"
    if item.path.stem == "test_browser":
        yield "browser"
    if item.path.stem == "test_hosts_jobs":
        yield "hosts"
    if any(hasattr(module, name) for name in RANKS):
        yield "ranks"
    if folder == "comfyui" or item.path.stem == "test_hosts_jobs":
        yield "processes"
