"""What a test starts, as marks: `make quick` runs those that start nothing. Hooks of pytest, for conftest.py."""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

MARKS = {
    "processes": "starts processes",
    "ranks": "starts ranks that import torch",
    "comfyui": "runs in a real ComfyUI",
    "browser": "needs Chromium",
    "hosts": "needs machines of its own (network namespaces)",
    "video": "of video files; starts ffmpeg at most",
}
RANKS = {"run_ranks", "fork_ranks", "run_fresh", "run_tiny", "golden"}
"""What starts ranks, by its name where it is called."""
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn")
SECONDS = {"browser": 20, "hosts": 9, "comfyui": 5, "ranks": 3, "processes": 2}
"""What a test of a kind takes, about; of none, next to nothing. The first that fits counts."""
MEASURED = {
    "test_core_sampling": 115, "test_screen": 85, "test_evaluations": 75, "test_golden": 68, "test_browser": 55,
    "test_hosts_jobs": 47, "test_vae_calls": 46, "test_parallel": 46, "test_server": 40, "test_meaning": 40,
    "test_warm_groups": 39, "test_core_variants": 38, "test_evaluation_faults": 35, "test_installation": 16,
    "test_soak": 30, "test_hangs": 30, "test_crashes": 25, "test_core_nodes": 25, "test_batch": 20,
    "test_benchmarks": 20, "test_vae_faults": 20, "test_header_bounds": 17, "test_endings": 16, "test_pool": 16,
    "test_core_animate": 14, "test_evaluation_soak": 14, "test_core_vae": 14, "test_warm": 13, "test_kernels": 12,
    "test_library_imports": 12, "test_lost_ranks": 12, "test_diffusers_animate": 10,
}  # fmt: skip
"""What files take that are far from it: `make test` prints its slowest tests."""
BROWSER = {"test_browser", "test_screen"}
"""Files of the folder comfyui that are most of all in a page: they have a ComfyUI of their own."""
CORE = "nodes/core"
"""Whose files import ComfyUI's own code."""
MAY_BE_ASKED = "nvidia-smi"
"""Looked for in vain on machines without a GPU."""


class Kinds:
    """Marks tests; and where `processes` are deselected, has a test fail that starts one nevertheless."""

    def __init__(self, config: pytest.Config) -> None:
        for name, meaning in MARKS.items():
            config.addinivalue_line("markers", f"{name}: {meaning}")
        self._guards = re.match(r"not \(?.*\bprocesses\b", config.getoption("markexpr") or "") is not None
        self._running = False
        """A test that is to start nothing; not its fixtures, which others may share."""
        self.started = 0
        """Processes, by this one; not those that `multiprocessing` starts."""
        sys.addaudithook(self._look)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for name in _marks(item):
                item.add_marker(name)
        files = dict.fromkeys((item.path for item in items), 0.0)
        for item in items:
            takes = next((seconds for kind, seconds in SECONDS.items() if item.get_closest_marker(kind)), 0.05)
            files[item.path] += takes
        files.update({path: MEASURED[path.stem] for path in files if path.stem in MEASURED})
        groups = Counter[str]()
        for path, seconds in files.items():
            groups[_group(str(path))] += seconds
        # Groups go to the processes of a run whole: those that take long first, or one is left with them at the end.
        items.sort(key=lambda item: (-groups[_group(str(item.path))], -files[item.path]))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        from xdist.scheduler import LoadFileScheduling

        class Scheduling(LoadFileScheduling):
            """Files go to one process or another, those of one ComfyUI together."""

            def _split_scope(self, nodeid: str) -> str:
                return _group(super()._split_scope(nodeid))

        return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self._running = item.get_closest_marker("processes") is None
        yield
        self._running = False

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in STARTS:
            return
        self.started += 1
        if self._guards and self._running and MAY_BE_ASKED not in str(arguments):
            raise AssertionError(f"this test starts a process ({event} {arguments[:2]}): mark it with processes")


def _group(file: str) -> str:
    """Of files that one process runs one after another, as they share what takes long to start."""
    folder, name = os.path.split(file)
    if folder.endswith(CORE):
        return folder
    if os.path.basename(folder) != "comfyui":
        return file
    return f"{folder} browser" if os.path.splitext(name)[0] in BROWSER else folder


def _marks(item: pytest.Item) -> Iterator[str]:
    folder = os.path.basename(os.path.dirname(item.path))
    if folder == "comfyui":
        yield "comfyui"
    if "browser" in item.fixturenames:
        yield "browser"
    if item.path.stem == "test_hosts_jobs":
        yield "hosts"
    if folder == "video":
        yield "video"
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    used = (item.function, *(definition.func for definitions in fixtures for definition in definitions))
    if any(_names(function) & RANKS for function in used):
        yield "ranks"
    if folder == "comfyui" or item.path.stem == "test_hosts_jobs":
        yield "processes"


@functools.cache
def _names(function: Any) -> set[str]:
    """Names that a test or a fixture uses, and the helpers in its module."""
    left, seen, names = [function], set(), set()
    while left:
        function = inspect.unwrap(left.pop())
        if isinstance(function, type):
            left += [method for method in vars(function).values() if inspect.isfunction(method)]
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        used = {name for part in _codes(code) for name in part.co_names}
        names |= used
        others = (function.__globals__.get(name) for name in used)
        left += [other for other in others if getattr(other, "__module__", None) == function.__module__]
    return names


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Of a function, and of those inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
