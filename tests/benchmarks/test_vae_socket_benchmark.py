"""The benchmark of a VAE's calls beside the same VAE alone, small."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.multiprocessing
from forks import fork_ranks
from fresh_jobs import run_fresh
from mount import ROOT
from wan_pack.distributed.job.job import VaeJob
from wan_pack.distributed.launch import vae_calls
from wan_pack.distributed.launch.result import Result


def spawned(main: Callable[..., None], values: tuple[Any, ...], nprocs: int, **_: Any) -> Any:
    world, arguments, folder = values
    fork_ranks(functools.partial(main, world=world, arguments=arguments, folder=folder), nprocs)
    return SimpleNamespace(join=lambda: True)


def forked(job: VaeJob, write: Callable[[Path], Any], *, parent: Path, **_: Any) -> Result:
    folder = run_fresh(job, parent, write)
    return Result(folder, folder.read_json(folder.result), "", 0.0)


@pytest.mark.ranks
def test_calls_are_held_against_the_vae_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import vae_socket

    monkeypatch.setattr(vae_socket, "mount_pack", lambda: None)
    monkeypatch.setattr(torch.multiprocessing, "spawn", spawned)
    monkeypatch.setattr(vae_calls, "run_job", forked)
    models, results = tmp_path / "models", tmp_path / "results.jsonl"
    models.mkdir()
    arguments = ["--folder", str(models), "--models", "tiny", "--sizes", "32x32x5", "--repeats", "1"]
    vae_socket.main([*arguments, "--gpus", "1", "2", "--precision", "fp32", "--exact", "--results", str(results)])
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["way"], line["gpus"]) for line in lines] == [
        ("decode", 1), ("encode", 1), ("decode", 2), ("encode", 2)
    ]  # fmt: skip
    for line in lines:
        assert line["error"] < 1e-5 and line["most_apart"] < 1e-5, line
        assert line["error_of_diffusers_fp32"] == 0.0
        assert line["seconds"] > line["on_ranks"] > 0 and line["alone"] > 0
        assert line["more_percent"] == pytest.approx(100 * (line["seconds"] / line["alone"] - 1), abs=5)
    assert lines[0]["estimated_gib"] > lines[2]["estimated_gib"] > 0
    assert "2 GPU tiny decode 32x32x5 fp32: " in capsys.readouterr().out

    assert not [path for path in models.iterdir() if path.name.startswith("tmp")], "what is compared is gone"
