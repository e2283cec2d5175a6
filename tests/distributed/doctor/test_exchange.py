"""The doctor's exchange between two processes: it never hangs, and says what cures one that does."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_machine import SMI, pretend, texts
from wan_pack.distributed.doctor import exchange
from wan_pack.distributed.doctor import gpu_findings as doctor_gpus
from wan_pack.distributed.doctor.exchange import Exchange
from wan_pack.distributed.doctor.findings import NOTE, OK, WRONG
from wan_pack.distributed.machine.gpu_locks import wait_for_gpus

pytestmark = pytest.mark.processes


@pytest.mark.skipif(sys.platform != "linux", reason="jobs run on Linux only")
def test_two_cpu_processes_exchange():
    found = exchange.measure(())
    assert found.problem == ""
    assert found.gigabytes_per_second is not None and found.gigabytes_per_second > 0


def test_what_the_machine_does_meanwhile_is_not_taken_for_the_link(monkeypatch: pytest.MonkeyPatch):
    """A third of the exchanges are held up: the figure is that of the others."""
    clock, taken = [0.0], iter([1.0 if at % 3 == 0 else 0.002 for at in range(exchange.REPEATS)])
    monkeypatch.setattr(exchange.time, "perf_counter", lambda: clock[0])

    def held_up() -> None:
        clock[0] += next(taken)

    assert exchange.median_seconds(held_up) == pytest.approx(0.002)
    assert next(taken, None) is None and exchange.WARM_UP > 1


RESULT = """echo '{"gigabytes_per_second": 12.5}'"""


def test_a_peer_that_never_joins_is_a_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pretend(monkeypatch, tmp_path, "echo ready; exec sleep 600")
    monkeypatch.setattr(exchange, "TIMEOUT", 0.5)
    started = time.monotonic()
    assert exchange.measure(()).problem == "hangs: no exchange within 0.5 s"
    assert time.monotonic() - started < 300


def test_processes_that_never_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pretend(monkeypatch, tmp_path, "exec sleep 60")
    monkeypatch.setattr(exchange, "START_TIMEOUT", 0.3)
    assert exchange.measure(()).problem == "the processes did not start within 0.3 s"


@pytest.mark.parametrize("cure", ["NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"])
def test_the_variable_that_cures_a_hang_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cure: str):
    pretend(monkeypatch, tmp_path, f'echo ready; [ "${cure}" = 1 ] || exec sleep 600; {RESULT}')
    monkeypatch.setattr(exchange, "TIMEOUT", 2.0)
    found = exchange.measure(("0", "1"), {"PATH": os.environ["PATH"]})
    assert (found.cure, found.gigabytes_per_second) == (f"{cure}=1", 12.5)
    finding = doctor_gpus._judge(found, "exchange", "GPU 0 and 1", gpu=True)
    assert finding.level == WRONG
    assert finding.remedy == f"Start ComfyUI with {cure}=1 in its environment"


def test_what_nothing_cures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pretend(
        monkeypatch, tmp_path, 'echo ready; [ "$rank" = 0 ] && exec sleep 60; echo "ncclSystemError: no" >&2; exit 1'
    )
    found = exchange.measure(("0", "1"), {"PATH": os.environ["PATH"]})
    assert (found.problem, found.cure) == ("process 1 failed: ncclSystemError: no", "")
    finding = doctor_gpus._judge(found, "exchange", "GPU 0 and 1", gpu=True)
    assert "nor with NCCL_P2P_DISABLE=1 or NCCL_SHM_DISABLE=1" in finding.text


def test_full_gpus_are_no_fault_of_the_link(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pretend(monkeypatch, tmp_path, "echo ready; echo x >> $4/../tries; echo 'CUDA out of memory.' >&2; exit 1")
    monkeypatch.setattr(exchange.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    found = exchange.measure(("0", "1"), {"PATH": os.environ["PATH"]})
    finding = doctor_gpus._judge(found, "exchange", "GPU 0 and 1", gpu=True)
    assert finding.level == NOTE and "out of memory" in finding.text
    # One try: no variable makes room.
    assert len((tmp_path / "tries").read_text().splitlines()) <= exchange.RANKS


def test_a_slow_exchange_is_a_note():
    slow = doctor_gpus._judge(Exchange(gigabytes_per_second=2.0), "exchange", "GPU 0 and 1", gpu=True)
    fast = doctor_gpus._judge(Exchange(gigabytes_per_second=200.0), "exchange", "GPU 0 and 1", gpu=True)
    assert (slow.level, fast.level) == (NOTE, OK)


def test_gpus_at_work_are_left_alone(smi: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    smi(SMI)
    monkeypatch.setattr(exchange, "measure", lambda ids: pytest.fail("a GPU at work was used"))
    locks = tmp_path / "locks"
    locks.mkdir()
    held = wait_for_gpus(["0"], cancelled=lambda: False, on_wait=print, folder=locks)
    found = doctor_gpus.exchange_findings(locks)
    held.release()
    assert texts(found) == (
        f"note exchange: not tried: GPU 0, in use by process {os.getpid()} / Ask again when the GPUs are free"
    )
    asked: list[list[str]] = []
    monkeypatch.setattr(exchange, "measure", lambda ids: asked.append(ids) or Exchange(gigabytes_per_second=20.0))
    assert texts(doctor_gpus.exchange_findings(locks)) == "ok exchange: GPU 0 and 1: all-reduce at 20.0 GB/s / "
    assert asked == [["0", "1"]]


def test_gpus_that_the_user_hides_are_not_touched(smi: Any, monkeypatch: pytest.MonkeyPatch):
    smi(SMI)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setattr(exchange, "measure", lambda ids: pytest.fail("a hidden GPU was used"))
    assert doctor_gpus.exchange_findings() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    monkeypatch.setattr(exchange, "measure", lambda ids: pytest.fail("NCCL does not work between slices"))
    assert "note exchange: MIG slices cannot share a video" in texts(doctor_gpus.exchange_findings())
