"""Cancel in a real ComfyUI beside four busy processes per core."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
from mount import ROOT
from patience import AT_ONCE, COMES_UP
from serving import Comfy, at_first_step
from wan_pack.demo.client import Run
from wan_pack.distributed.machine.processes import Process


def test_fault_37_cancel_ends_the_processes_of_a_busy_machine(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and in four times what the machine then takes for one process that does nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from busy import busy

    times: list[float] = []
    measured = threading.Event()
    with busy(4) as load:

        def press(run: Run) -> None:
            processes = [process for pid in comfy.job_processes() if (process := Process.of(pid)) is not None]
            load.on()
            time.sleep(0.3)
            started = time.monotonic()
            subprocess.run([sys.executable, "-S", "-c", ""], check=True)
            pressed = time.monotonic()
            comfy.server.request("/interrupt", {"prompt_id": run.prompt_id})
            while any(process.alive() for process in processes):
                time.sleep(0.005)
            times.extend([pressed - started, time.monotonic() - pressed])
            load.off()
            measured.set()

        run = comfy.run(comfy.example(sample_steps=1000, num_frames=17, seed=37), at_first_step(press))
        assert measured.wait(COMES_UP)
    assert run.ending[0] == "execution_interrupted", run.ending
    nothing, gone = times
    assert gone < AT_ONCE + 4 * nothing, f"{gone:.2f} s; a process that does nothing takes {nothing:.2f} s"
    assert comfy.job_folders() == []
