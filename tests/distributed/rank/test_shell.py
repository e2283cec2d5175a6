"""The shell around a rank, as far as it goes without a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from wan_pack.distributed.machine.processes import AGENT_VARIABLE
from wan_pack.distributed.rank import shell


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


def test_threads_get_python_soon_while_the_main_one_imports(monkeypatch: pytest.MonkeyPatch):
    """A piece of weights takes a few milliseconds to read: to wait five for the next one would double that."""

    class Waiting(Exception):
        pass

    def wait(*_: Any) -> None:
        raise Waiting

    monkeypatch.setenv(AGENT_VARIABLE, "1")
    monkeypatch.setattr(shell, "die_with_parent", lambda agent: None)
    monkeypatch.setattr(shell, "_wait_for_job", wait)
    with pytest.raises(Waiting):
        shell.main(None)  # type: ignore[arg-type]
    assert sys.getswitchinterval() < 0.001
