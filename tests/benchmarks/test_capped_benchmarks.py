"""The benchmarks of the planner and of every switch, with jobs that nobody runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mount import ROOT
from safetensors.torch import load_file, save_file
from wan_pack.distributed.job.job import Job, JobError
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.job.progress import Progress
from wan_pack.distributed.launch import launcher
from wan_pack.distributed.launch.launcher import Result

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def finished(job: Job, write: Callable[[Path], object], peak: int, change: float, **given: object) -> Result:
    """As `run_job` returns it, of a job that nobody ran: latents a little off those that were given."""
    folder = JobDir.create(Path(str(given["parent"])))
    write(folder.inputs)
    samples = load_file(folder.inputs)["samples"]
    save_file({"samples": (samples + change)[None]}, folder.latents)
    settings = {"attention": "cpu (no GPU)", "kernels": "plain", "device": "1 x CPU"}
    info = {"step_seconds": [2.0, 1.0], "peak_gpu_bytes": [peak], "peak_rss_bytes": [1], "phases": {}}
    return Result(folder, {**info, "settings": settings}, "", 1.0)


def test_estimates_are_held_against_peaks_and_failures_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import memory
    import random_models
    from real_jobs import Shape

    random_models.write_model(tmp_path, "tiny")
    results = tmp_path / "results.jsonl"
    changes = iter([0.5, 0.25])

    def run_job(job: Job, write: Callable[[Path], object], **given: object) -> Result:
        change = next(changes, None)
        if change is None:
            raise JobError("rank 0: OutOfMemoryError\nmore words")
        return finished(job, write, 2 << 30, change, **given)

    monkeypatch.setattr(launcher, "run_job", run_job)
    measurement = memory.Measurement(argparse.Namespace(folder=tmp_path, host_gib=64, results=results))
    for cap in (80, 48, 24, 0.5):
        measurement.run(memory.Case(Shape("tiny", "128x96x9", 2), cap, 1), [])
    first, second, failed, refused = map(json.loads, results.read_text().splitlines())
    assert first["error_percent"] == pytest.approx((first["estimated_gib"] / 2 - 1) * 100, abs=0.1)
    assert first["seconds_per_step"] == 1 and first["free_gib"] == 80
    assert [first["difference"], second["difference"]] == pytest.approx([0, 0.5], abs=1e-3)
    assert failed["error"] == "rank 0: OutOfMemoryError" and "weights whole" in failed["plan"]
    assert refused["plan"].startswith("refused: 128x96 with 9 frames does not fit")
    assert len(memory.table(measurement.lines).splitlines()) == 6


def test_switches_are_compared_with_the_reference_of_their_guidance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import every_switch
    import random_models

    random_models.write_model(tmp_path, "tiny")
    results = tmp_path / "results.jsonl"

    def run_job(job: Job, write: Callable[[Path], object], **given: Any) -> Result:
        assert job.parallel.attention != "sage", "refused before a process starts"
        if job.preview:
            given["on_progress"](Progress(phase="denoise", preview=b"1234"))
        change = (4.0 if job.sampling.guidance_low != 1 else 2.0) + (1.0 if job.parallel.cfg_parallel else 0.0)
        return finished(job, write, 0, change, **given)

    monkeypatch.setattr(launcher, "run_job", run_job)
    measurement = every_switch.Measurement(
        argparse.Namespace(folder=tmp_path, model="tiny", size="128x96x9", steps=2, results=results)
    )
    wanted = (every_switch.PLAIN, every_switch.GUIDED, "preview", "attention sage", "CFG parallel")
    for case in every_switch.cases():
        if case.name in wanted:
            measurement.run(case, [])
    measurement.compare()
    lines = {line["switch"]: line for line in map(json.loads, results.read_text().splitlines())}
    assert "1 pictures of 4 bytes" in lines["preview"]["what"]
    assert lines["attention sage"]["what"].startswith("ValueError: attention is 'sage', which needs a GPU")
    assert [float(lines[name]["difference"]) for name in (every_switch.PLAIN, "preview", every_switch.GUIDED)] == [
        0,
        0,
        0,
    ]
    assert float(lines["CFG parallel"]["difference"]) == pytest.approx(0.25, abs=0.01)
    assert lines["CFG parallel"]["gpus"] == 2
