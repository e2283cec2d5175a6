"""The nodes' side of planning: what the job gets and what the user reads, on machines that this one is not."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import stub_job
from node_inputs import BOTH, asked_for, tiny_files, use_model_folders
from wan_pack.distributed.job.errors import SHOWN_AS
from wan_pack.distributed.job.job import Job, ModelFiles
from wan_pack.distributed.launch import pool
from wan_pack.distributed.launch.pool import Pool
from wan_pack.distributed.machine import gpu_locks, gpus, nvidia_smi
from wan_pack.distributed.machine.gpu_locks import wait_for_gpus
from wan_pack.distributed.machine.gpus import Gpu
from wan_pack.nodes.host import host, warm
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.inference import ground
from wan_pack.nodes.inference import inference as inference_module
from wan_pack.nodes.settings.spread import WanVideoDistributedConfig

Make = Callable[..., tuple[Job, Status]]


def listing(*free_gib: float) -> str:
    """As nvidia-smi prints it: cards of 24 GiB."""
    return "\n".join(f"{i}, GPU-{i}, NVIDIA, 24564, {int(free * 1024)}" for i, free in enumerate(free_gib))


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`printed` is what nvidia-smi prints."""
    fake = SimpleNamespace(printed=listing(23))

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, 0, ("" if "topo" in command else fake.printed).encode(), b"")

    monkeypatch.setattr(nvidia_smi, "ask_program", run)
    return fake


@pytest.fixture
def make(tiny_models: Path, tmp_path: Path, smi: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Builds the job of a video of 64x48 pixels and 5 frames by the tiny model."""
    use_model_folders(tmp_path, monkeypatch)
    freed: list[int] = []
    monkeypatch.setattr(host, "free_memory", lambda: freed.append(1))
    monkeypatch.setattr(host, "visible_gpus", lambda: None)
    monkeypatch.setattr(gpu_locks, "_folder", lambda: tmp_path)
    own = Pool()
    monkeypatch.setattr(warm, "pool", lambda: own)
    ground._fixed_links.cache_clear()
    model: ModelFiles = tiny_files(tiny_models)

    def build(**values: Any) -> tuple[Job, Status]:
        status = Status()
        given = {"width": 64, "height": 48, "num_frames": 5, "gpu_count": 0, "text_embeds": BOTH, **values}
        job, _ = inference_module.build_job(asked_for(model=model, **given), status)
        return job, status

    build.freed = freed  # type: ignore[attr-defined]
    yield build
    ground._fixed_links.cache_clear()


def test_auto_takes_what_is_fastest_and_says_so(make: Make, smi: SimpleNamespace):
    """Weights that fit are not sharded, though use_fsdp is on; ComfyUI's own memory is freed before it is looked at."""
    smi.printed = listing(23, 23)
    job, status = make()
    assert (job.parallel.gpu_ids, job.parallel.cfg_parallel, job.parallel.use_fsdp) == (("0", "1"), True, False)
    assert status.plan.startswith("plan: GPUs 0, 1 (CFG parallel 2); weights whole on each")
    assert make.freed == [1]  # type: ignore[attr-defined]


def test_as_set_takes_the_switches_literally(make: Make, smi: SimpleNamespace):
    smi.printed = listing(23, 23)
    job, status = make(plan="as set", use_fsdp=True, dynamic_resolution=True)
    assert (job.parallel.gpu_ids, job.parallel.use_fsdp) == (("0", "1"), True)
    reason = "plan is 'as set': the switches are taken as they are"
    assert status.plan.endswith(f"because {reason}")
    assert status.warnings == [f"dynamic_resolution had no effect: {reason}"]


@pytest.mark.parametrize(
    ("visible", "words"), [("", "there is no GPU"), ("MIG-1,MIG-2", "does not tell the memory of every GPU")]
)
def test_without_known_memory_the_switches_count(make: Make, monkeypatch: pytest.MonkeyPatch, visible: str, words: str):
    monkeypatch.setattr(host, "visible_gpus", lambda: visible)
    job, status = make(gpu_count=2, use_fsdp=True, offload_model=True)
    assert (job.parallel.gpu_count, job.parallel.use_fsdp, job.parallel.offload_model) == (2, True, True)
    assert words in status.plan


def test_the_configs_switches_reach_the_plan(make: Make):
    (config,) = WanVideoDistributedConfig().build(
        gpu_count=1, use_ulysses=True, use_fsdp=False, offload_model=False, stream_blocks=True, mixed_precision="fp16"
    )
    job, _ = make(config=config)
    assert (job.parallel.stream_blocks, job.parallel.mixed_precision) == (True, "fp16")
    (config,) = WanVideoDistributedConfig().build(
        gpu_count=1, use_ulysses=True, use_fsdp=False, offload_model=False, plan="as set"
    )
    job, status = make(config=config)
    assert "plan is 'as set'" in status.plan
    assert not job.parallel.stream_blocks


def test_a_video_that_does_not_fit_is_refused_or_made_smaller(make: Make, smi: SimpleNamespace):
    """Decoding 1280x720 takes 7 GiB on one GPU, frame by frame."""
    smi.printed = listing(6)
    with pytest.raises(
        ValueError, match=r"1280x720 with 5 frames does not fit: .* 6\.0 GiB are free; what fits is "
    ) as error:
        make(width=1280, height=720)
    assert error.type.__module__ == SHOWN_AS
    job, status = make(width=1280, height=720, dynamic_resolution=True)
    width, height = job.sampling.width, job.sampling.height
    assert width < 1280 and width % 16 == height % 16 == 0 and width / height == pytest.approx(16 / 9, rel=0.03)
    assert status.warnings == [
        f"dynamic_resolution lowered the video from 1280x720 to {width}x{height}, the largest that fits"
    ]
    assert make(width=64, height=48, dynamic_resolution=True)[0].sampling.width == 64


def test_a_gpu_that_another_comfyui_uses_is_waited_for(make: Make, smi: SimpleNamespace, tmp_path: Path):
    """It is the last choice; a video that fits nowhere now is planned for when it is free again."""
    smi.printed = listing(8, 20)
    locks = wait_for_gpus(["0"], cancelled=lambda: True, on_wait=print, folder=tmp_path)
    # By this process itself: a group of its own, which the pool knows.
    assert make(gpu_count=1)[0].parallel.gpu_ids == ("0",)
    (tmp_path / "gpu-0.lock").write_text("process 1")
    assert make(gpu_count=1)[0].parallel.gpu_ids == ("1",)
    smi.printed = listing(0.2)
    job, status = make(gpu_count=1)
    assert job.parallel.gpu_ids == ("0",)
    assert "because GPU 0 is in use by process 1: the job waits for it" in status.plan
    locks.release()
    with pytest.raises(ValueError, match="does not fit"):
        make(gpu_count=1)


def test_given_latents_keep_their_size(make: Make, smi: SimpleNamespace):
    import torch

    smi.printed = listing(6)
    with pytest.raises(ValueError, match="does not fit"):
        make(width=1280, height=720, dynamic_resolution=True, samples={"samples": torch.zeros(1, 16, 2, 90, 160)})


def test_the_plan_is_part_of_the_status():
    status = Status()
    status.plan = "plan: GPU 0\nbecause it is the only one"
    info = {
        "step_seconds": [], "phases": {}, "peak_gpu_bytes": [0], "peak_rss_bytes": [0], "settings": {}, "video": None,
        "latents": {"shape": [1]},
    }  # fmt: skip
    lines = status.block(None, info, 1.0).splitlines()
    place = lines.index("- plan: GPU 0")
    assert lines[place + 1] == "  - because it is the only one"


# What our own warm groups hold


class FakeGroup:
    """A group of no processes."""

    usable, job, ranks = True, None, ()
    folder = SimpleNamespace(path=Path("wan-group-fake"))

    def __init__(self, parallel: object, parent: object) -> None:
        pass

    def end(self) -> list[int]:
        return []

    def remove(self) -> None:
        pass


def test_host_memory_of_a_warm_group_is_there_for_the_next_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The expert that waits in it would otherwise keep the same job from fitting a second time."""
    monkeypatch.setattr(pool, "WorkerGroup", FakeGroup)
    available = iter([60, 20, 20, 70])
    monkeypatch.setattr(pool, "available_bytes", lambda: next(available))
    own, job = Pool(), stub_job(keep_warm_seconds=60.0)
    group = own.take(job, tmp_path, cancelled=lambda: False, on_wait=print)
    assert own.host_bytes() == 20
    own.give_back(group, job)
    assert own.host_bytes() == 60
    own.release()
    assert own.host_bytes() == 70


def test_identical_jobs_get_identical_plans_beside_a_warm_group(
    make: Make, smi: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The warm group fills both GPUs; what it holds counts as free, for its own next job as for another's."""
    monkeypatch.setattr(pool, "WorkerGroup", FakeGroup)
    monkeypatch.setattr(pool, "wait_for_gpus", lambda *_, **__: SimpleNamespace(release=lambda: None))
    smi.printed = listing(20, 20)
    (config,) = WanVideoDistributedConfig().build(
        gpu_count=0, use_ulysses=True, use_fsdp=True, offload_model=False, keep_warm_seconds=60
    )
    first, _ = make(config=config)
    take = {"cancelled": lambda: False, "on_wait": lambda line: None}
    group = warm.pool().take(first, tmp_path, **take)
    smi.printed = listing(0.3, 0.3)
    # At work: what it holds is not to be had.
    with pytest.raises(ValueError, match="does not fit"):
        make(config=config)
    warm.pool().give_back(group, first)
    second, _ = make(config=config)
    assert second.parallel == first.parallel
    assert warm.pool().take(second, tmp_path, **take) is group
    warm.pool().give_back(group, second)
    # A job with a port ends it; the driver has not given its memory back yet when the next group starts.
    other, _ = make(config=config, plan="as set")
    with_port = stub_job(gpu_ids=("0", "1"), master_port=2000, keep_warm_seconds=60.0)
    replaced = warm.pool().take(with_port, tmp_path, **take)
    assert replaced is not group
    warm.pool().give_back(replaced, with_port)
    assert make(config=config)[0].parallel == first.parallel
    assert other.parallel.gpu_count == 2
    assert warm.pool().release() == 1


def test_links_that_the_driver_did_not_tell_in_time_are_asked_for_again(monkeypatch: pytest.MonkeyPatch):
    answers: list[Any] = [subprocess.TimeoutExpired("nvidia-smi", 10), "\tGPU0\tGPU1\nGPU0\t X \tNV4\nGPU1\tNV4\t X \n"]

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, 0, answer.encode(), b"")

    monkeypatch.setattr(nvidia_smi, "ask_program", run)
    ground._fixed_links.cache_clear()
    try:
        # The third time nobody is asked any more.
        assert [ground._links().link("0", "1") for _ in range(3)] == ["unknown", "nvlink", "nvlink"]
    finally:
        ground._fixed_links.cache_clear()


@pytest.mark.parametrize("unknown", [(0,), (1,), (0, 1)])
def test_a_gpu_whose_memory_is_not_told_is_not_planned_with(
    make: Make, monkeypatch: pytest.MonkeyPatch, unknown: tuple[int, ...]
):
    sizes = [0 if index in unknown else 24 << 30 for index in range(2)]
    cards = [Gpu(index=str(i), uuid=f"GPU-{i}", name="", total_bytes=size, free_bytes=size)
             for i, size in enumerate(sizes)]  # fmt: skip
    monkeypatch.setattr(gpus, "list_gpus", lambda: cards)
    _, status = make(gpu_count=2)
    assert "nvidia-smi does not tell the memory of every GPU" in status.plan


def test_two_passes_are_no_way_to_share_work_where_both_others_are_off(make: Make, smi: SimpleNamespace):
    smi.printed = listing(23, 23)
    for settings in ({"plan": "as set"}, {}):
        with pytest.raises(ValueError, match=r"use_ulysses|cfg_parallel"):
            make(gpu_count=2, use_ulysses=False, use_fsdp=False, **settings)
