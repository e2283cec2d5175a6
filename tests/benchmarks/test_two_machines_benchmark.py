"""The benchmark of two machines, with jobs that nobody runs."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mount import ROOT
from patience import COMES_UP
from safetensors.torch import load_file, save_file
from wan_pack.distributed.job.job import Job
from wan_pack.distributed.launch import launcher
from wan_pack.distributed.launch.launcher import JobFailed


def test_a_cut_link_is_timed_from_the_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import two_machines

    cut = threading.Event()
    did: list[str] = []

    def run(self: Any, name: str, *, on_progress: Callable[[Any], None], **settings: Any) -> None:
        assert (name, settings["hosts"], settings["stall_timeout"]) == ("cut", ("a", "b"), 15.0)
        for step in (1, 1):
            assert not cut.is_set()
            on_progress(SimpleNamespace(phase="denoise", step=step))
        # Progress is told more often than a step ends.
        for _ in range(2):
            on_progress(SimpleNamespace(phase="denoise", step=2))
        assert cut.wait(COMES_UP)
        raise JobFailed("rank 0 on a made no progress\nits stack", rank=0, out_of_memory=False, folder=None, log="")

    machines: Any = SimpleNamespace(
        hosts=("a", "b"), cut=cut.set, join=lambda: did.append("joined"), empty_within=lambda seconds: 1.5
    )
    monkeypatch.setattr(two_machines.Measurement, "run", run)
    results = tmp_path / "results.jsonl"
    arguments = argparse.Namespace(model="tiny", size="64x48x5", results=results, cut_after=0.0)
    two_machines.Measurement(arguments, gpus=0).cut(machines)
    line = json.loads(results.read_text())
    assert line["said"] == "rank 0 on a made no progress" and line["empty_after"] == 1.5
    assert 0 <= line["seconds"] < COMES_UP and did == ["joined"]


def test_each_job_is_compared_with_the_first_of_its_guidance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import random_models
    import two_machines

    asked: list[Job] = []

    def run_job(job: Job, write: Callable[[Path], Any], **_: Any) -> Any:
        """Moves the given latents by the number of hosts."""
        asked.append(job)
        write(tmp_path / "inputs")
        moved = load_file(tmp_path / "inputs")["samples"] + len(job.parallel.hosts or "x")
        save_file({"samples": moved[None]}, tmp_path / "latents")
        return SimpleNamespace(
            folder=SimpleNamespace(latents=tmp_path / "latents"), remove=lambda: None,
            info={"step_seconds": [0.5], "settings": {"device": "CPU"}},
        )  # fmt: skip

    monkeypatch.setattr(launcher, "run_job", run_job)
    random_models.write_model(tmp_path, "tiny")
    results = tmp_path / "results.jsonl"
    arguments = argparse.Namespace(folder=tmp_path, model="tiny", size="64x48x5", results=results)
    measurement = two_machines.Measurement(arguments, gpus=0)
    for guided in (False, True):
        measurement.run("one", guided=guided)
        measurement.run("two", guided=guided, hosts=("a", "b"))
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["name"] for line in lines] == ["one", "two"] * 2
    assert [round(line["difference"], 3) for line in lines] == [0, 1] * 2
    assert [job.parallel.gpu_ids for job in asked] == [()] * 4
    # Over several machines the ids are those of each: its GPU is number 0 on both.
    two_machines.Measurement(arguments, gpus=2).run("two", guided=False, hosts=("a", "b"))
    assert asked[-1].parallel.gpu_ids == ("0",)
