"""The doctor's node in a real ComfyUI."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from patience import AT_ONCE, COMES_UP
from serving import Comfy
from wan_pack.demo.client import Run
from wan_pack.demo.example import Prompt
from wan_pack.distributed.machine.processes import Process, descendants

DOCTOR = "doctor"


def examination(comfy: Comfy) -> Prompt:
    """The example's loader, its model looked at by the doctor."""
    example = comfy.example()
    loader = next(name for name, node in example.items() if node["class_type"] == "LoadWanVideoModel")
    inputs = {"model": [loader, 0]}
    return {loader: example[loader], DOCTOR: {"class_type": "WanVideoDistributedDoctor", "inputs": inputs}}


def test_the_report_is_shown_and_handed_on(comfy: Comfy) -> None:
    prompt = examination(comfy)
    prompt["text"] = {"class_type": "PreviewAny", "inputs": {"source": [DOCTOR, 0]}}
    run = comfy.run(prompt)
    assert run.ending[0] == "execution_success", run.ending
    (report,) = comfy.outputs(run)[DOCTOR]["text"]
    assert comfy.outputs(run)["text"]["text"] == [report]
    assert report.startswith("ComfyUI ") and "unknown" not in report.splitlines()[0]
    for words in ("heads. GPUs that share one video evenly", "all-reduce at", "encodes H.264", "Ready to make videos"):
        assert words in report, report


def command(process: Process) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/cmdline").read_bytes()
    return b""


def test_cancel_ends_it_at_once(comfy: Comfy) -> None:
    started: list[float] = []

    def cancel(run: Run, kind: str, data: dict[str, Any]) -> None:
        if kind == "executing" and data.get("node") == DOCTOR:
            deadline = time.monotonic() + COMES_UP
            while not any(b"doctor" in command(process) for process in descendants(comfy.server.pid)):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            started.append(time.monotonic())
            comfy.server.request("/interrupt", {})

    run = comfy.run(examination(comfy), on_event=cancel)
    assert run.ending[0] == "execution_interrupted", run.ending
    assert time.monotonic() - started[0] < AT_ONCE
    comfy.wait_until_idle()
