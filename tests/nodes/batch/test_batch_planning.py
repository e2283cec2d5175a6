"""How the batch node plans its groups."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
from batching import Node
from node_inputs import BOTH, tiny_files, use_model_folders
from patience import COMES_UP
from wan_pack.distributed.launch import pool
from wan_pack.distributed.machine import gpu_locks, gpus
from wan_pack.distributed.machine.gpus import Gpu
from wan_pack.distributed.machine.topology import Topology
from wan_pack.distributed.planning.plan import DoesNotFit
from wan_pack.nodes.batch import batch
from wan_pack.nodes.batch.requests import Request
from wan_pack.nodes.host import host
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.inference import ground
from wan_pack.nodes.inference import inference as inference_module
from wan_pack.nodes.sockets.video_inputs import VideoInputs


@pytest.fixture
def node(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    use_model_folders(tmp_path / "models", monkeypatch)
    return Node(tiny_files(tiny_models), tmp_path, monkeypatch)


def test_groups_share_the_hosts_memory(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def plan(*_: Any, host_bytes: int, **__: Any) -> Any:
        seen.append(host_bytes)
        raise DoesNotFit("does not fit", None)

    listing = [Gpu(index=str(i), uuid=str(i), name="any", total_bytes=2**35, free_bytes=2**35) for i in range(2)]
    monkeypatch.setattr(gpus, "list_gpus", lambda: listing)
    monkeypatch.setattr(gpu_locks, "_folder", lambda: node._folder)
    monkeypatch.setattr(host, "visible_gpus", lambda: None)
    monkeypatch.setattr(pool, "available_bytes", lambda: 60)
    monkeypatch.setattr("wan_pack.distributed.planning.plan.make_plan", plan)
    with pytest.raises(DoesNotFit):
        node.run(text_embeds=BOTH, batch_count=2, gpu_count=2)
    assert seen == [30, 60]


@pytest.mark.parametrize(("videos", "more_follow"), [(2, True), (1, False)])
def test_groups_that_stay_are_planned_as_such(
    node: Node, monkeypatch: pytest.MonkeyPatch, videos: int, more_follow: bool
) -> None:
    """They decode with the weights still on the GPU. How long they stay after the batch is the user's matter."""
    made = batch._Batch([Request("", seed) for seed in range(videos)], VideoInputs.of(node.inputs(text_embeds=BOTH)), 0)
    assert [(group.more_follow, group.keep_warm_seconds) for group in made.groups] == [(more_follow, 0)]


def test_groups_grow_until_the_video_fits(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(asked: VideoInputs, status: Status) -> Any:
        if asked.config.gpu_count == 1:
            raise DoesNotFit("it needs more than one", None)
        return inference_module.build_job(asked, status)

    monkeypatch.setattr(batch, "build_job", build)
    status = node.run(text_embeds=BOTH, batch_count=2, gpu_count=2)["result"][3]
    assert status.startswith("success\n- 2 videos, 1 at a time, each on 2 CPU processes\n")
    with pytest.raises(DoesNotFit, match="it needs more than one"):
        node.run(text_embeds=BOTH, batch_count=2, gpu_count=1)
    with pytest.raises(DoesNotFit):
        node.run(text_embeds=BOTH, batch_count=2, gpu_count=2, gpus_per_video=1)


def test_each_group_is_planned_for_its_own_gpus(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = [
        Gpu(index=str(i), uuid=f"GPU-{i}", name="any", total_bytes=80 << 30, free_bytes=79 << 30) for i in range(4)
    ]
    monkeypatch.setattr(gpus, "list_gpus", lambda: listing)
    monkeypatch.setattr(host, "visible_gpus", lambda: None)
    monkeypatch.setattr(host, "log", lambda line: None)
    monkeypatch.setattr(ground, "_links", lambda: Topology({}))
    both = threading.Barrier(2)
    node.act = lambda job: both.wait(COMES_UP)
    status = node.run(text_embeds=BOTH, batch_count=2, gpu_count=0)["result"][3]
    assert {job.parallel.gpu_ids for job in node.jobs} == {("0", "1"), ("2", "3")}
    assert status.startswith("success\n- 2 videos, 2 at a time, on GPUs 0, 1; GPUs 2, 3\n")


def test_all_videos_have_the_size_that_fits_every_group(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []

    def build(asked: VideoInputs, status: Status) -> Any:
        """The second group's GPUs are the smaller ones: dynamic_resolution lowers its video."""
        built.append(asked.sampling.width)
        small = {"width": 80, "height": 16} if len(built) == 2 else {}
        sampling = dataclasses.replace(asked.sampling, **small)
        return inference_module.build_job(dataclasses.replace(asked, sampling=sampling), status)

    monkeypatch.setattr(batch, "build_job", build)
    status = node.run(text_embeds=BOTH, batch_count=2, gpu_count=2)["result"][3]
    assert built == [64, 64, 80, 80]
    assert {(job.sampling.width, job.sampling.height) for job in node.jobs} == {(80, 16)}
    assert "  - batch: all videos are 80x16, which fits every group of GPUs" in status.splitlines()
