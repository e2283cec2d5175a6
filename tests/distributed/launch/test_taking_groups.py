"""Which group of processes a job gets, and which GPUs and memory others find: groups without processes."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import FILE, stub_job
from patience import COMES_UP
from wan_pack.distributed.job.job import FileIdentity, ForwardsJob, GroupJob, Parallel, VaeJob
from wan_pack.distributed.launch import group_kind
from wan_pack.distributed.launch import pool as module
from wan_pack.distributed.launch.launcher import new_job_id
from wan_pack.distributed.launch.pool import Pool
from wan_pack.distributed.machine.gpu_locks import holder, wait_for_gpus
from wan_pack.distributed.machine.gpus import Gpu

numbers = itertools.count()
VAE = FileIdentity(path="/models/vae.safetensors", size=1, mtime_ns=1)


class Group:
    """In the place of a WorkerGroup."""

    def __init__(self, parallel: Parallel, parent: Path) -> None:
        self.folder, self.job = SimpleNamespace(path=parent / f"group-{next(numbers)}"), None
        self.ranks: list[Any] = []
        self.usable, self.ended, self.removed = True, False, False

    def end(self) -> list[int]:
        self.ended = True
        return []

    def remove(self) -> None:
        assert self.ended, "its processes first"
        self.removed = True


def gpus(*free: int) -> list[Gpu]:
    return [
        Gpu(index=str(i), uuid=f"GPU-{i}", name="NVIDIA", total_bytes=100, free_bytes=size)
        for i, size in enumerate(free)
    ]


@pytest.fixture
def groups(gpu_locks_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`take(**settings)` and `give_back(group)`; `free` is what the GPUs have now."""
    pool, groups = Pool(), SimpleNamespace(free=(90, 90), host=50)
    monkeypatch.setattr(module, "WorkerGroup", Group)
    monkeypatch.setattr(module, "list_gpus", lambda: gpus(*groups.free))
    monkeypatch.setattr(module, "available_bytes", lambda: groups.host)
    jobs: dict[int, Any] = {}

    def take(**settings: Any) -> Group:
        job = stub_job(**{"keep_warm_seconds": 600.0, **settings})
        group = pool.take(job, tmp_path, cancelled=lambda: True, on_wait=lambda text: None)
        jobs[id(group)] = job
        return group  # type: ignore[return-value]

    def give_back(group: Any) -> Group:
        pool.give_back(group, jobs[id(group)])
        return group

    groups.take, groups.give_back, groups.pool = take, give_back, pool
    yield groups
    pool.release()


def test_a_group_that_cannot_start_leaves_its_gpus_to_others(
    groups: Any, gpu_locks_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space left") as error:
        patched.setattr(module, "WorkerGroup", full)
        groups.take(gpu_count=2, gpu_ids=("0", "1"))
    # The error, with all that it remembers, is still there.
    assert error.value is not None and groups.pool.view() == []
    wait_for_gpus(["0", "1"], cancelled=lambda: True, on_wait=print, folder=gpu_locks_folder).release()


PROCESSES, WEIGHTS, WORK = "other processes", "weights read again", "other work"
CHANGES: dict[str, tuple[object, str]] = {
    "gpu_count": (4, PROCESSES), "gpu_ids": (("0", "1"), PROCESSES), "master_port": (2000, PROCESSES),
    "mixed_precision": ("fp32", WEIGHTS), "linear_precision": ("int8", WEIGHTS), "quantised_loras": ("merged", WEIGHTS),
    "use_fsdp": (True, WEIGHTS), "stream_blocks": (True, WEIGHTS),
    "exact_steps": (1, WORK), "exact_blocks": ("0", WORK),
    "use_ulysses": (False, WORK), "cfg_parallel": (True, WORK), "ulysses_engine": ("packed", WORK),
    "gather": ("expert", WORK), "offload_model": (True, WORK), "memory_optimization": (True, WORK),
    "torch_compile": (True, WORK), "attention": ("flash", WORK), "sparse_tau": (2.0, WORK), "kernels": ("plain", WORK),
    "start_timeout": (99.0, WORK), "stall_timeout": (98.0, WORK), "keep_warm_seconds": (97.0, WORK),
    "more_follow": (True, WORK),
}  # fmt: skip
"""Each field of `Parallel`: another value, and what a job with it needs that a group waits for."""


def test_what_each_change_of_a_plan_needs(groups: Any):
    """Processes and what they have loaded stay where only work is moved; without the weights where these are others."""
    fields = {field.name: field for field in dataclasses.fields(Parallel)}
    # Processes over several machines do not stay.
    assert CHANGES.keys() == fields.keys() - {"hosts"} and "hosts" in group_kind.OF_PROCESSES
    for name, (value, needs) in CHANGES.items():
        # One of them must share the work.
        before = {"use_fsdp": True} if name == "use_ulysses" else {}
        first = stub_job(**before).parallel
        other = dataclasses.replace(first, **{name: value})  # type: ignore[arg-type]
        assert other != first
        group = groups.give_back(groups.take(**before))
        assert (groups.give_back(groups.take(**before, **{name: value})) is group) is (needs != PROCESSES), name
        assert group.ended is (needs == PROCESSES), name
        if needs != PROCESSES:
            assert (other.weights_lie == first.weights_lie) is (needs == WORK), name
        groups.pool.release()
    # Blocks that keep the file's weights, where others' are rounded.
    rounded = stub_job(linear_precision="int8").parallel
    assert dataclasses.replace(rounded, exact_blocks="0").weights_lie != rounded.weights_lie
    # Of one GPU there is nothing to shard over.
    alone = stub_job(gpu_count=1).parallel
    assert dataclasses.replace(alone, use_fsdp=True).weights_lie == alone.weights_lie


def test_a_job_without_a_transformer_says_nothing_of_how_one_lies():
    said = {
        "attention", "cfg_parallel", "gpu_count", "gpu_ids", "hosts", "keep_warm_seconds", "kernels", "master_port",
        "mixed_precision", "more_follow", "sparse_tau", "stall_timeout", "start_timeout", "torch_compile",
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(Parallel)} - group_kind.OF_TRANSFORMER == said
    sharded = stub_job(use_fsdp=True, gather="expert", exact_steps=2, mixed_precision="fp32", master_port=2000).parallel
    plain = group_kind.without_weights(sharded)
    assert plain == Parallel(
        gpu_count=2, mixed_precision="fp32", master_port=2000, start_timeout=60.0, stall_timeout=60.0
    )


def test_what_a_video_is_made_of_needs_no_other_processes(groups: Any, tmp_path: Path):
    """Another size, length, schedule, prompt or seed, a picture while it is made: all on what is loaded."""
    first, how = stub_job(keep_warm_seconds=600.0), {"cancelled": lambda: True, "on_wait": lambda text: None}
    group = groups.pool.take(first, tmp_path, **how)
    groups.pool.give_back(group, first)
    sampling = [
        {"width": 96}, {"height": 64}, {"num_frames": 9}, {"steps": 8}, {"seed": 9}, {"solver": "euler"},
        {"guidance_low": 1.0, "guidance_high": 1.0}, {"reuse_threshold": 0.5}, {"video_format": "ffv1 mp4"},
    ]  # fmt: skip
    jobs = [dataclasses.replace(first, sampling=dataclasses.replace(first.sampling, **change)) for change in sampling]
    jobs += [dataclasses.replace(first, **{name: value}) for name, value in
             (("preview", True), ("decode", False), ("frames", True), ("verbose", True))]  # fmt: skip
    for job in jobs:
        assert groups.pool.take(job, tmp_path, **how) is group
        groups.pool.give_back(group, job)


def forwards(**settings: Any) -> ForwardsJob:
    return ForwardsJob(id=new_job_id(), model=(FILE,), parallel=stub_job(**settings).parallel)


def vae(**settings: Any) -> VaeJob:
    parallel = group_kind.without_weights(stub_job(keep_warm_seconds=600.0, **settings).parallel)
    shapes: dict[str, Any] = {"given": (1, 16, 1, 2, 2), "made": (1, 3, 1, 16, 16)}
    return VaeJob(id=new_job_id(), vae=(VAE,), encode=False, parallel=parallel, **shapes)


def test_a_vae_has_the_processes_of_a_model_however_that_lies_and_the_model_has_the_vaes(groups: Any, tmp_path: Path):
    """And both are known by the model, as soon as there is one."""
    pool, how = groups.pool, {"cancelled": lambda: True, "on_wait": lambda text: None}

    def taken(job: GroupJob) -> Group:
        group = pool.take(job, tmp_path, **how)
        pool.give_back(group, job)
        return group

    first = taken(vae())
    (view,) = pool.view()
    assert view.transformer == (VAE,)
    sharded = forwards(keep_warm_seconds=600.0, use_fsdp=True)
    assert taken(sharded) is first and taken(vae()) is first and taken(sharded) is first
    (view,) = pool.view()
    assert view.transformer == (FILE,)
    assert taken(forwards(keep_warm_seconds=600.0)) is first
    for name, value in (("mixed_precision", "fp32"), ("attention", "flash"), ("kernels", "plain")):
        assert taken(vae(**{name: value})) is first, name
    assert taken(stub_job(keep_warm_seconds=600.0)) is not first, "a video has its own"


def test_a_job_moves_to_the_gpus_of_processes_that_could_do_it(groups: Any, tmp_path: Path):
    pool, how = groups.pool, {"cancelled": lambda: True, "on_wait": lambda text: None}
    assert pool.moved(vae(gpu_count=1)) is None
    job = forwards(keep_warm_seconds=600.0, use_fsdp=True, gpu_count=3)
    group = pool.take(job, tmp_path, **how)
    assert pool.moved(vae(gpu_count=1)) is None, "it is at work"
    pool.give_back(group, job)
    moved = pool.moved(vae(gpu_count=1))
    assert moved is not None and moved.parallel.gpu_count == 3
    assert pool.take(moved, tmp_path, **how) is group
    pool.give_back(group, moved)
    assert pool.moved(stub_job(gpu_count=1)) is None, "a video has its own"


def test_of_two_groups_a_job_moves_to_the_last_one(groups: Any, tmp_path: Path):
    for gpu in ("1", "0"):
        job = forwards(keep_warm_seconds=600.0, gpu_count=1, gpu_ids=(gpu,))
        group = groups.pool.take(job, tmp_path, cancelled=lambda: True, on_wait=lambda text: None)
        groups.pool.give_back(group, job)
    moved = groups.pool.moved(vae(gpu_count=1))
    assert moved is not None and moved.parallel.gpu_ids == ("0",)


def test_nothing_waits_for_the_time_of_a_group_that_has_ended(groups: Any):
    """As long as it would have stayed, with all that it holds."""
    groups.give_back(groups.take())
    (member,) = groups.pool._members
    assert member.timer.is_alive()
    groups.pool.release()
    member.timer.join(COMES_UP)
    assert not member.timer.is_alive()


def test_another_model_takes_the_same_processes_and_is_what_they_are_known_by(groups: Any, tmp_path: Path):
    job = stub_job(keep_warm_seconds=600.0)
    file = FileIdentity(path="/models/other.safetensors", size=1, mtime_ns=1)
    pool, how = groups.pool, {"cancelled": lambda: True, "on_wait": lambda text: None}
    first = pool.take(job, tmp_path, **how)
    pool.give_back(first, job)
    assert pool.take(dataclasses.replace(job, preview=True), tmp_path, **how) is first
    pool.give_back(first, job)
    other = dataclasses.replace(job, model=dataclasses.replace(job.model, high_noise=(file,), vae=(file,)))
    assert pool.take(other, tmp_path, **how) is first
    pool.give_back(first, other)
    (view,) = pool.view()
    assert view.transformer == (file,)


def test_an_idle_group_makes_room_where_the_next_job_computes_and_only_there(groups: Any, gpu_locks_folder: Path):
    first = groups.give_back(groups.take(gpu_count=1, gpu_ids=("0",)))
    second = groups.give_back(groups.take(gpu_count=1, gpu_ids=("1",)))
    assert not first.ended and len(groups.pool.view()) == 2
    assert all(0 < view.seconds_left <= 600 for view in groups.pool.view())
    third = groups.take(gpu_count=2, gpu_ids=("1", "2"))
    assert not first.ended and second.removed
    # A busy one stays, whatever is asked for: the job waits for its GPUs, which is cancelled here.
    with pytest.raises(Exception, match="cancelled while waiting for a GPU"):
        groups.take(gpu_count=1, gpu_ids=("2",), use_fsdp=True)
    assert not third.ended and holder("0", gpu_locks_folder) == ""
    groups.give_back(third)
    assert [view.idle for view in groups.pool.view()] == [True, True]


def test_a_group_that_is_of_no_use_any_more_gives_way(groups: Any):
    group = groups.give_back(groups.take())
    group.usable = False
    assert groups.take() is not group and group.removed


@pytest.mark.parametrize("meant", ["all", "this one", "another one"])
def test_a_busy_group_that_is_released_ends_with_its_job(groups: Any, meant: str):
    group = groups.take()
    name = {"all": None, "this one": group.folder.path.name, "another one": "group-of-another"}[meant]
    assert groups.pool.release(name) == 0 and not group.ended
    (view,) = groups.pool.view()
    assert view.released is (meant != "another one") and view.seconds_left is None
    groups.give_back(group)
    assert group.removed is view.released
    assert groups.pool.release(name) == 0


def test_without_a_time_to_stay_a_group_ends_with_its_job(groups: Any):
    group = groups.give_back(groups.take(keep_warm_seconds=0.0))
    assert group.removed and groups.pool.view() == []


def test_what_idle_groups_hold_counts_as_free(groups: Any):
    """The GPUs' memory and the host's, as before they started; of a busy one nothing."""
    group = groups.take(gpu_count=1, gpu_ids=("0",))
    groups.free, groups.host = (20, 95), 10
    assert [gpu.free_bytes for gpu in groups.pool.without_idle(gpus(*groups.free))] == [20, 95]
    assert groups.pool.host_bytes() == 10
    groups.give_back(group)
    assert [gpu.free_bytes for gpu in groups.pool.without_idle(gpus(*groups.free))] == [90, 95]
    # What others have given back since is free as well.
    assert [gpu.free_bytes for gpu in groups.pool.without_idle(gpus(99, 95))] == [99, 95]
    assert groups.pool.host_bytes() == 50
    # The group that takes its place knows so too, though the driver may not have given all back yet.
    groups.give_back(groups.take(gpu_count=1, gpu_ids=("0",), use_fsdp=True))
    assert [gpu.free_bytes for gpu in groups.pool.without_idle(gpus(5, 5))] == [90, 5]
    groups.host = None
    assert groups.pool.host_bytes() == 50
