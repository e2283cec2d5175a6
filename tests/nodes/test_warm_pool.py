"""The groups that a ComfyUI keeps warm are in one place, whoever looks for them first."""

from __future__ import annotations

import importlib.util
import threading

import pytest
from patience import COMES_UP
from wan_pack.distributed.launch import pool as module
from wan_pack.distributed.launch.pool import Pool
from wan_pack.nodes.host import warm


def test_page_and_nodes_that_ask_at_the_same_moment_get_one_pool(monkeypatch: pytest.MonkeyPatch):
    """A group in a second one would hold its GPUs, seen and released by nobody."""
    spec = importlib.util.spec_from_file_location("wan_pack.nodes.host.new_warm", warm.__file__)
    assert spec is not None and spec.loader is not None
    new = importlib.util.module_from_spec(spec)
    found: list[Pool] = []

    class Made(Pool):
        def __init__(self) -> None:
            super().__init__()
            # The page asks while a node has it made.
            if hasattr(new, "pool") and not threads:
                threads.append(threading.Thread(target=lambda: found.append(new.pool())))
                threads[0].start()
                threads[0].join(COMES_UP)

    threads: list[threading.Thread] = []
    monkeypatch.setattr(module, "Pool", Made)
    spec.loader.exec_module(new)
    found += [new.pool(), new.pool()]
    assert len(set(map(id, found))) == 1
