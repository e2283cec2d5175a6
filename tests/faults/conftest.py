"""Ranks and agents that misbehave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import FAKE_AGENT, FAULTY_WORKER, STUB_WORKER, pack_with, run_stub, run_tiny, stub_job, tiny_job
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.launch.launcher import JobFailed, Result

StubPack = Callable[..., None]
Fail = Callable[..., JobFailed]


@pytest.fixture
def stub_pack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StubPack:
    """Puts a pack whose ranks, without torch, do an action of stub_worker.py in the place of this one."""

    def put(action: str, **fault: Any) -> None:
        monkeypatch.setattr(worker_group, "AGENT", pack_with(STUB_WORKER, tmp_path, action=action, **fault))

    return put


@pytest.fixture
def fails(stub_pack: StubPack, tmp_path: Path) -> Fail:
    """Runs a job on such ranks and returns how it failed. Settings go to the job, callbacks to `run_job`."""

    def run(action: str, callbacks: dict[str, Any] | None = None, /, fault: Any = None, **settings: Any) -> JobFailed:
        stub_pack(action, **(fault or {}))
        with pytest.raises(JobFailed) as caught:
            run_stub(tmp_path, stub_job(**settings), **(callbacks or {}))
        return caught.value

    return run


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_models: Path) -> Fail:
    """The same with real ranks on the tiny model: an action of faulty_worker.py."""

    def run(action: str, **settings: Any) -> JobFailed:
        monkeypatch.setattr(worker_group, "AGENT", pack_with(FAULTY_WORKER, tmp_path, action=action))
        with pytest.raises(JobFailed) as caught:
            run_tiny(tiny_job(tiny_models, **settings), tmp_path)
        return caught.value

    return run


@pytest.fixture
def run_fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Runs a job whose agent does what `mode` says (fake_agent.py)."""
    monkeypatch.setattr(worker_group, "AGENT", FAKE_AGENT)

    def start(mode: str, *, callbacks: dict[str, Any] | None = None, **settings: Any) -> Result:
        return run_stub(tmp_path, stub_job(**settings), lambda path: path.write_text(mode), **(callbacks or {}))

    return start
