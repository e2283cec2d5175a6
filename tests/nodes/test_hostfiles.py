"""Hostfiles as the config node offers them, and what the status says of the machines."""

from __future__ import annotations

from pathlib import Path

import pytest
from wan_pack.distributed.hosts import hostfile
from wan_pack.distributed.job.job import Parallel
from wan_pack.nodes.host import host
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.settings.hostfiles import hostfile_names, parallel_over
from wan_pack.nodes.settings.spread import DistributedConfig


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host, "hostfiles_folder", lambda: tmp_path / "hostfiles")
    monkeypatch.setattr(hostfile, "list_gpus", list)
    (tmp_path / "hostfiles" / "a folder").mkdir(parents=True)
    for name in ("two", "four", "one"):
        (tmp_path / "hostfiles" / name).write_text("a slots=2\nb slots=2\n")
    return tmp_path / "hostfiles"


def test_files_are_offered_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hostfile_names() == ["four", "one", "two"]

    def outside() -> Path:
        raise ImportError("no ComfyUI")

    monkeypatch.setattr(host, "hostfiles_folder", outside)
    assert hostfile_names() == []


def test_machines_are_said(folder: Path) -> None:
    status = Status()
    chosen = DistributedConfig(hostfile="two", gpu_ids="5,3", cfg_parallel="off")
    parallel = parallel_over(chosen, Parallel(gpu_count=1), guided=True, status=status)
    assert (parallel.hosts, parallel.gpu_ids, parallel.cfg_parallel) == (("a", "b"), ("5", "3"), False)
    assert status.notes == ["runs on 2 machines with 2 processes each: a, b"]
    assert status.warnings[0].startswith("the sequence is split over the network between 2 machines")
    status = Status()
    both = parallel_over(DistributedConfig(hostfile="two"), Parallel(gpu_count=1), guided=True, status=status)
    assert both.cfg_parallel and not any("keep_warm" in line for line in status.warnings)
    on = DistributedConfig(hostfile="two", cfg_parallel="on")
    assert parallel_over(on, Parallel(gpu_count=1), guided=False, status=Status()).cfg_parallel


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (DistributedConfig(hostfile="three"), "hostfile is 'three'; the files in .*hostfiles are: four, one, two"),
        (DistributedConfig(hostfile="a folder"), "hostfile is 'a folder'; the files in"),
        (DistributedConfig(hostfile="two", gpu_ids="1"),
         "gpu_ids is '1'; with this hostfile it must name 2 GPUs of every machine"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused(folder: Path, chosen: DistributedConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parallel_over(chosen, Parallel(gpu_count=1), guided=True, status=Status())
