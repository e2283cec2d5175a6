"""What a group is asked for by ComfyUI's VAE nodes: which files and GPUs, and what is refused; and the loader."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_sampling import Modules
from node_inputs import use_model_folders
from plain_vae import PlainVae
from safetensors.torch import save_file
from torch import Tensor
from wan_pack.demo.example import TinyModel
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.job.job import FileIdentity, VaeJob
from wan_pack.distributed.job.progress import Progress
from wan_pack.distributed.launch.launcher import JobFailed
from wan_pack.distributed.launch.pool import Pool
from wan_pack.distributed.machine import gpu_locks, nvidia_smi
from wan_pack.nodes.core.vae_jobs import VaeJobs
from wan_pack.nodes.core.vae_loader import LoadVAEDistributed
from wan_pack.nodes.host import host, warm
from wan_pack.nodes.inference import ground
from wan_pack.nodes.settings.spread import DistributedConfig
from wan_pack.wan.model.latent_space import WAN21

NAMES = TinyModel()
FRAMES_720P = (1, 16, 21, 90, 160)


class Calls:
    """In the place of those that start processes: keeps the jobs, and computes here if it may."""

    def __init__(self, plain: PlainVae | None = None) -> None:
        self.plain, self.jobs = plain, []
        self.idle: tuple[str, ...] | None = None
        """GPUs of a group that waits."""

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        yield

    def moved(self, job: VaeJob) -> VaeJob | None:
        if self.idle is None:
            return None
        there = dataclasses.replace(job.parallel, gpu_count=len(self.idle), gpu_ids=self.idle)
        return dataclasses.replace(job, parallel=there)

    def run(self, job: VaeJob, given: Tensor) -> Tensor:
        self.jobs.append(job)
        if self.plain is None:
            return torch.zeros(1).expand(job.made)
        return (self.plain.encode if job.encode else self.plain.decode)(given)


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What nvidia-smi prints: cards of 24 GiB with so much free."""
    fake = SimpleNamespace(free=[23000, 23000])

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        lines = [f"{i}, GPU-{i}, NVIDIA, 24564, {free}" for i, free in enumerate(fake.free)]
        return subprocess.CompletedProcess(command, 0, ("" if "topo" in command else "\n".join(lines)).encode(), b"")

    monkeypatch.setattr(nvidia_smi, "ask_program", run)
    return fake


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def vae(
    calls: Calls, tiny_models: Path, tmp_path: Path, printed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., VaeJobs]:
    """(the config's settings) -> the Wan2.1 VAE."""
    pool = Pool()
    for name, value in (("free_memory", None), ("visible_gpus", None), ("verbose", False), ("interrupted", False)):
        monkeypatch.setattr(host, name, lambda value=value: value)
    monkeypatch.setattr(host, "out_of_memory", MemoryError)
    monkeypatch.setattr(gpu_locks, "_folder", lambda: tmp_path)
    monkeypatch.setattr(warm, "pool", lambda: pool)
    monkeypatch.setattr(ground, "_fixed_links", ground._fixed_links.__wrapped__)
    file = FileIdentity.of(tiny_models / "vae" / NAMES.vae)
    return lambda **config: VaeJobs((file,), DistributedConfig(**config), WAN21, 1, calls)  # type: ignore[arg-type]


def layout(job: VaeJob) -> tuple[int, tuple[str, ...]]:
    return job.parallel.gpu_count, job.parallel.gpu_ids


def test_shapes_of_what_is_made(vae: Callable[..., VaeJobs], calls: Calls) -> None:
    assert vae().decode(torch.zeros(2, 16, 3, 6, 8)).shape == (2, 3, 9, 48, 64)
    assert vae().encode(torch.zeros(1, 3, 8, 48, 64)).shape == (1, 16, 2, 6, 8)
    decoded, encoded = calls.jobs
    assert (decoded.encode, encoded.encode, encoded.given) == (False, True, (1, 3, 5, 48, 64))
    assert Path(decoded.vae[0].path).name == NAMES.vae


@pytest.mark.parametrize("shape", [(1, 16, 6, 8), (1, 48, 3, 6, 8), (1, 16, 0, 6, 8), (1, 4, 64, 64)])
def test_latents_of_other_models_are_refused(vae: Callable[..., VaeJobs], shape: tuple[int, ...]) -> None:
    words = r"a Wan2.1 VAE decodes videos of 16 channels .*\. Load the VAE that goes with them with Load VAE"
    with pytest.raises(ValueError, match=words):
        vae().decode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 4, 5, 48, 64), (1, 3, 48, 64), (1, 3, 5, 50, 64), (1, 3, 0, 48, 64)])
def test_what_is_no_video_is_not_encoded(vae: Callable[..., VaeJobs], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"videos of 3 channels .* multiples of 8"):
        vae().encode(torch.zeros(shape))


def test_all_suitable_gpus_take_rows_whatever_the_config_says_of_weights(
    vae: Callable[..., VaeJobs], calls: Calls
) -> None:
    config = {"use_fsdp": True, "use_ulysses": False, "offload_model": True, "linear_precision": "int8"}
    vae(**config, keep_warm_seconds=9).decode(torch.zeros(FRAMES_720P))
    vae().decode(torch.zeros(1, 16, 1, 1, 8))
    wide, narrow = calls.jobs
    assert layout(wide) == (2, ("0", "1")) and layout(narrow) == (1, ("0",)), "one row"
    parallel = wide.parallel
    assert (parallel.use_fsdp, parallel.linear_precision, parallel.cfg_parallel) == (False, "full", False)
    assert (parallel.keep_warm_seconds, parallel.more_follow, narrow.parallel.more_follow) == (9.0, False, True)


def test_gpus_without_room_are_left_alone_and_one_may_be_too_small(
    vae: Callable[..., VaeJobs], calls: Calls, printed: SimpleNamespace
) -> None:
    """720p takes about 9 GiB on each of two GPUs, and 16 on one."""
    printed.free = [3000, 20000]
    vae().decode(torch.zeros(FRAMES_720P))
    printed.free = [12000, 12000]
    vae().decode(torch.zeros(FRAMES_720P))
    assert [layout(job) for job in calls.jobs] == [(1, ("1",)), (2, ("0", "1"))]
    printed.free = [3000, 3000]
    with pytest.raises(MemoryError, match=r"decoding 1280x720 needs about .* GiB on each of 2 GPUs, where 2\.9"):
        vae().decode(torch.zeros(FRAMES_720P))
    with pytest.raises(MemoryError, match=r"encoding 1280x720 needs .* on the GPU, where 2\.9 GiB are free; smaller"):
        vae(gpu_count=1).encode(torch.zeros(1, 3, 1, 720, 1280))


def test_processes_that_wait_are_taken(vae: Callable[..., VaeJobs], calls: Calls, printed: SimpleNamespace) -> None:
    """Unless the config wants other GPUs, or they have too little memory."""
    calls.idle = ("1",)
    vae().decode(torch.zeros(1, 16, 1, 6, 8))
    vae(gpu_count=2).decode(torch.zeros(1, 16, 1, 6, 8))
    vae(gpu_ids="0").decode(torch.zeros(1, 16, 1, 6, 8))
    printed.free = [7000, 7000]
    vae().decode(torch.zeros(FRAMES_720P))
    assert [layout(job)[1] for job in calls.jobs] == [("1",), ("0", "1"), ("0",), ("0", "1")]


def test_gpus_that_another_program_holds_are_left_to_it_while_others_are_free(
    vae: Callable[..., VaeJobs], calls: Calls, tmp_path: Path
) -> None:
    with (tmp_path / "gpu-0.lock").open("w") as held:
        held.write("process 1")
        held.flush()
        assert gpu_locks.try_lock(held)
        vae().decode(torch.zeros(FRAMES_720P))
        vae(gpu_count=2).decode(torch.zeros(FRAMES_720P))
    assert [layout(job) for job in calls.jobs] == [(1, ("1",)), (2, ("1", "0"))], "it waits only for what it must"


def test_the_switches_count_where_nothing_is_planned(
    vae: Callable[..., VaeJobs], calls: Calls, printed: SimpleNamespace
) -> None:
    vae(plan="as set", gpu_count=1).decode(torch.zeros(FRAMES_720P))
    printed.free = []
    vae(gpu_count=3, cfg_parallel="on").decode(torch.zeros(FRAMES_720P))
    assert [layout(job) for job in calls.jobs] == [(1, ("0",)), (3, ())]


def test_tiles_of_one_node_are_planned_once(
    vae: Callable[..., VaeJobs], calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[int] = []
    monkeypatch.setattr(host, "free_memory", lambda: freed.append(1))
    one = vae(plan="as set", gpu_count=2)
    with one.together():
        for _ in range(3):
            one.decode(torch.zeros(1, 16, 1, 6, 8))
    assert freed == [1] and {layout(job) for job in calls.jobs} == {(2, ("0", "1"))}
    assert len({job.id for job in calls.jobs}) == 3
    one.decode(torch.zeros(1, 16, 1, 6, 8))
    assert freed == [1, 1]


def test_full_memory_of_a_process_is_told_as_comfyui_tells_it(
    vae: Callable[..., VaeJobs], calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise JobFailed("CUDA out of memory", rank=0, out_of_memory=True, folder=None, log="")

    monkeypatch.setattr(calls, "run", fail)
    with pytest.raises(MemoryError, match="CUDA out of memory"):
        vae().decode(torch.zeros(1, 16, 1, 6, 8))


def test_other_systems_and_several_machines_are_refused(
    vae: Callable[..., VaeJobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="hostfile is two; the VAE nodes of ComfyUI's need the GPUs of this machine"):
        vae(hostfile="two").decode(torch.zeros(1, 16, 1, 6, 8))
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(JobError, match="this system is darwin; videos are made on Linux"):
        vae().decode(torch.zeros(1, 16, 1, 6, 8))


def test_comfyuis_bar_shows_the_frames_and_leaves_a_cancel_to_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, int]] = []
    bar = lambda total, _: SimpleNamespace(update_absolute=lambda done: shown.append((done, total)))  # noqa: E731
    monkeypatch.setattr(host, "progress_bar", bar)
    monkeypatch.setattr(host, "interrupted", lambda: bool(shown))
    frames = warm.Frames()
    for phase, step in (("load", 1), ("decode", 5), ("decode", 9)):
        frames(Progress(phase=phase, step=step, total=9))
    assert shown == [(5, 9)]


@pytest.fixture
def loaded(core: Modules, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    use_model_folders(tmp_path, monkeypatch)
    (tmp_path / "vae").mkdir()
    for name in (NAMES.vae, NAMES.ti2v_vae):
        if (tiny_models / "vae" / name).exists():
            os.link(tiny_models / "vae" / name, tmp_path / "vae" / name)
    monkeypatch.setattr(host, "visible_gpus", lambda: "")
    calls = Calls(PlainVae(tmp_path / "vae" / NAMES.vae))
    monkeypatch.setattr(warm, "vae_calls", lambda: calls)
    return calls


def test_its_vae_is_that_of_core(core: Modules, loaded: Calls, tmp_path: Path) -> None:
    tensors = core["comfy.utils"].load_torch_file(str(tmp_path / "vae" / NAMES.vae))
    theirs = core["comfy.sd"].VAE(sd=tensors, dtype=torch.float32)
    (ours,) = LoadVAEDistributed().load(NAMES.vae, config=DistributedConfig(gpu_count=2, mixed_precision="fp32"))
    latents = torch.randn(1, 16, 3, 6, 8, generator=torch.Generator().manual_seed(1))
    assert (ours.decode(latents) - theirs.decode(latents)).abs().max() < 1e-4
    (job,) = loaded.jobs
    assert (job.parallel.gpu_count, job.parallel.mixed_precision) == (2, "fp32")
    (ours,) = LoadVAEDistributed().load(NAMES.vae)
    ours.decode(latents)
    assert loaded.jobs[1].parallel.keep_warm_seconds == 60


def test_what_is_no_config_or_no_wan_vae_is_refused(loaded: Calls, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config is list; connect Wan Video Distributed Config"):
        LoadVAEDistributed().load(NAMES.vae, config=[])
    taew = {"decoder.1.weight": torch.zeros(64, 16, 3, 3), "decoder.22.bias": torch.zeros(3)}
    save_file(taew, tmp_path / "vae" / "taew2_1.safetensors")
    with pytest.raises(ValueError, match=r"taew2_1\.safetensors is .*; expected a Wan2\.1 VAE"):
        LoadVAEDistributed().load("taew2_1.safetensors")


def test_a_replaced_file_is_loaded_anew(loaded: Calls, tmp_path: Path) -> None:
    before = LoadVAEDistributed.IS_CHANGED(vae_name=NAMES.vae)
    os.utime(tmp_path / "vae" / NAMES.vae, ns=(1, 1))
    assert LoadVAEDistributed.IS_CHANGED(vae_name=NAMES.vae) != before
    assert LoadVAEDistributed.IS_CHANGED() == ""
