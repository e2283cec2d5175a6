"""A VAE for ComfyUI's nodes: what a group decodes and encodes is what the VAE in this process gives."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluating import Known, Warm, difference, inputs
from fresh_jobs import run_fresh
from mount import GOLDEN
from patience import COMES_UP
from plain_vae import PlainVae
from torch import Tensor
from wan_pack.distributed.group.group_folder import GroupDir
from wan_pack.distributed.job.errors import JobCancelled, JobError
from wan_pack.distributed.job.job import FileIdentity, Parallel, VaeJob
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.job.progress import Progress
from wan_pack.distributed.launch import stopping, vae_calls
from wan_pack.distributed.launch.launcher import JobFailed, new_job_id
from wan_pack.distributed.launch.pool import Pool
from wan_pack.distributed.launch.result import Result
from wan_pack.distributed.launch.served_job import ServedJob
from wan_pack.distributed.launch.vae_calls import VaeCalls
from wan_pack.distributed.machine.processes import Process
from wan_pack.distributed.rank import experts
from wan_pack.distributed.rank.session import Session
from wan_pack.distributed.rank.signs import RankFiles
from wan_pack.distributed.rank.worker import main as run_rank
from wan_pack.wan.model.latent_space import WAN21, WAN22, LatentSpace

FILES = {WAN21: GOLDEN / "vae_wan21/vae/model.safetensors", WAN22: GOLDEN / "vae_wan22/vae/model.safetensors"}
SPACES = pytest.mark.parametrize("space", [WAN21, WAN22], ids=lambda space: space.vae)
LIMIT = 1e-5


def vae_job(given: Tensor, *, space: LatentSpace = WAN21, encode: bool = False, **changes: Any) -> VaeJob:
    """In fp32. `changes`: of the job or of its layout."""
    batch, _, frames, *sides = given.shape
    stride = space.stride
    made = (batch, 3, 4 * frames - 3, *(side * stride for side in sides))
    if encode:
        made = (batch, space.channels, (frames + 3) // 4, *(side // stride for side in sides))
    fields = {"vae": (FileIdentity.of(FILES[space]),), "encode": encode, "given": tuple(given.shape), "made": made}
    own = {name: changes.pop(name) for name in list(changes) if name in fields}
    layout = {"gpu_count": 2, "mixed_precision": "fp32", "start_timeout": 120.0, "stall_timeout": 60.0, **changes}
    return VaeJob(id=new_job_id(), parallel=Parallel(**layout), **{**fields, **own})


def latents(space: LatentSpace = WAN21, shape: tuple[int, ...] = (2, 3, 5, 6)) -> Tensor:
    """[B, C, T, h, w]; `shape` without C."""
    batch, *rest = shape
    return 3 * torch.randn(batch, space.channels, *rest, generator=torch.Generator().manual_seed(batch))


def frames(space: LatentSpace = WAN21, batch: int = 2, count: int = 9, rows: int = 5) -> Tensor:
    size = (batch, 3, count, rows * space.stride, 4 * space.stride)
    return 2 * torch.rand(size, generator=torch.Generator().manual_seed(count)) - 1


def on_forked_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> VaeCalls:
    """On real ranks, without the seconds of their start."""
    monkeypatch.setattr(
        vae_calls, "run_job", lambda job, write, **_: Result(run_fresh(job, folder, write), {}, "", 0.0)
    )
    return VaeCalls(Pool(), lambda: None, parent=folder, failed=folder)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@SPACES
def test_a_group_gives_what_the_vae_gives(
    space: LatentSpace, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Batches and single ones, one frame, rows that divide by nothing; for four ranks too few rows, too."""
    calls, plain = on_forked_ranks(tmp_path, monkeypatch), PlainVae(FILES[space])
    shapes = [(2, 3, 5, 6), (1, 1, 3, 4)]
    with calls.together():
        for given in [latents(space, shape) for shape in shapes[: 2 if ranks in (1, 4) else 1]]:
            made = calls.run(vae_job(given, space=space, gpu_count=ranks), given)
            assert made.abs().max() > 1.1 and (made - plain.decode(given)).abs().max() < LIMIT
        given = frames(space)
        made = calls.run(vae_job(given, space=space, encode=True, gpu_count=ranks), given)
    assert made.std() > 0.01 and (made - plain.encode(given)).abs().max() < LIMIT


def test_what_the_vae_does_not_make_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By a job that was written for another VAE."""
    calls, given = on_forked_ranks(tmp_path, monkeypatch), latents(WAN21, (1, 1, 4, 4))
    wrong = vae_job(given, gpu_count=1, made=(1, 3, 1, 64, 64))
    with calls.together(), pytest.raises(AssertionError, match=r"the VAE made \[3, 1, 32, 32\]; ComfyUI expects"):
        calls.run(wrong, given)
    wrong = vae_job(given, gpu_count=1, made=(1, 3, 2, 32, 32))
    with calls.together(), pytest.raises(AssertionError, match="the VAE made 1 frames; ComfyUI expects 2"):
        calls.run(wrong, given)
    for folder in tmp_path.glob("wan-job-*"):
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"given": (1, 16, 2, 4)}, "given is"),
        ({"given": (1, 16, 0, 4, 4)}, "given is"),
        ({"made": (2, 3, 1, 32, 32)}, "of 1 videos"),
        ({"made": (1, 3, 1 << 20, 1 << 12, 1 << 12)}, "at most"),
        ({"vae": ()}, "vae is"),
        ({"hosts": ("a", "b")}, "hosts is"),
    ],
)
def test_fault_19_32_jobs_out_of_bounds_are_refused(changes: dict[str, Any], words: str):
    job = vae_job(latents(WAN21, (1, 1, 4, 4)))
    if "hosts" in changes:
        changes = {"parallel": dataclasses.replace(job.parallel, **changes)}
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(job, **changes)


def test_a_job_is_read_back_as_it_was_written():
    job = vae_job(latents())
    assert VaeJob.from_json(job.to_json()) == job


def test_fault_04_too_little_memory_for_the_frames_is_said_before_a_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls, given = on_forked_ranks(tmp_path, monkeypatch), latents(WAN21, (1, 1, 4, 4))
    monkeypatch.setattr(vae_calls, "available_bytes", lambda: 1000)
    with calls.together(), pytest.raises(JobError, match=r"take 0\.0 GiB of memory, where 0\.0 GiB are available"):
        calls.run(vae_job(given), given)

    def full(memory: Any, size: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(vae_calls, "available_bytes", lambda: None)
    monkeypatch.setattr(vae_calls.MemoryFile, "map", full)
    with calls.together(), pytest.raises(JobError, match=r"there is no memory for .*Cannot allocate memory"):
        calls.run(vae_job(given), given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("free", [1 << 40, 0])
def test_models_and_the_vae_make_room_for_each_other(free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On one rank in this process, whose device has as much memory as is said."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(experts, "free_bytes", lambda device, ranks: free)
    model, given = Known.make(tmp_path / "model"), latents(WAN21, (1, 1, 4, 4))
    sessions: list[Session | None] = [None]

    def run(job: Any, write: Callable[[Path], None], **_: Any) -> Result:
        folder = JobDir.create(tmp_path)
        folder.write_job(job)
        write(folder.inputs)
        sessions[0] = run_rank(GroupDir(tmp_path), folder, RankFiles(folder, 0), sessions[0])
        return Result(folder, folder.read_json(folder.result), "", 0.0)

    monkeypatch.setattr(vae_calls, "run_job", run)
    calls, plain = VaeCalls(Pool(), lambda: None, parent=tmp_path, failed=tmp_path), PlainVae(FILES[WAN21])
    held = []
    for _ in range(2):
        job = model.job()
        served = ServedJob(lambda write, cancelled, job=job: run(job, write))
        asked = inputs(model.config, 1)
        assert difference(served.evaluate(*asked), model.evaluate(*asked)) < LIMIT
        served.close()
        (session,) = sessions
        assert session is not None
        held.append((len(session.experts.models), session.holds_vae(vae_job(given))))
        with calls.together():
            made = calls.run(vae_job(given, gpu_count=1), given)
        assert (made - plain.decode(given)).abs().max() < LIMIT
        held.append((len(session.experts.models), session.holds_vae(vae_job(given))))
    roomy = [(1, False), (1, True), (1, True), (1, True)]
    assert held == (roomy if free else [(1, False), (0, True), (1, False), (0, True)])


@dataclasses.dataclass
class WarmVae:
    """Beside the samplings of `Warm`, on its processes."""

    warm: Warm
    calls: VaeCalls
    plain: PlainVae

    def run(self, given: Tensor, *, encode: bool = False, **changes: Any) -> list[Process]:
        """Which must be right. Returns the ranks."""
        with self.calls.together():
            made = self.calls.run(vae_job(given, encode=encode, **{"keep_warm_seconds": 300.0, **changes}), given)
            views = self.warm.pool.view()
        assert (made - (self.plain.encode if encode else self.plain.decode)(given)).abs().max() < LIMIT
        (view,) = views
        return list(view.ranks)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmVae]:
    folder = tmp_path_factory.mktemp("warm")
    warm = Warm(folder, {"T2V": Known.make(folder / "model")})
    calls = VaeCalls(
        warm.pool, warm.source.rest, parent=folder / "jobs", failed=folder / "failed",
        cancelled=lambda: warm.cancelled,
    )  # fmt: skip
    yield WarmVae(warm, calls, PlainVae(FILES[WAN21]))
    warm.pool.release()
    assert not list((folder / "jobs").iterdir())


@pytest.mark.ranks
@pytest.mark.processes
def test_samplers_and_vae_share_their_processes_however_models_lie(warm: WarmVae):
    """It begins with the VAE, as a picture does; the model keeps its place, also where it is sharded."""
    warm.warm.pool.release()
    ranks = warm.run(frames(batch=1), encode=True)
    (view,) = warm.warm.pool.view()
    assert Path(view.transformer[0].path) == FILES[WAN21]
    assert warm.warm.sample("T2V", use_fsdp=True, cfg_parallel=True) == ranks
    assert warm.run(latents()) == ranks
    (view,) = warm.warm.pool.view()
    assert Path(view.transformer[0].path).parent.name == "model"
    assert warm.warm.sample("T2V", use_fsdp=True) == ranks and warm.warm.kept
    assert warm.warm.sample("T2V") == ranks and warm.warm.kept, "moved, not read again"


@pytest.mark.ranks
@pytest.mark.processes
def test_a_vae_in_a_samplers_step_has_its_processes_meanwhile(warm: WarmVae):
    ranks, evaluator = warm.warm.sample(), warm.warm.open()
    given = inputs(warm.warm.models["T2V"].config, 1)
    evaluator.evaluate(*given)
    assert warm.run(latents()) == ranks
    evaluator.evaluate(*given)
    evaluator.close()


@pytest.mark.ranks
@pytest.mark.processes
def test_calls_together_have_one_group_where_none_stays(warm: WarmVae):
    warm.warm.pool.release()
    given = latents(WAN21, (1, 1, 4, 4))
    with warm.calls.together():
        first = warm.run(given, keep_warm_seconds=0.0, more_follow=True)
        assert warm.run(given, keep_warm_seconds=0.0, more_follow=True) == first
    assert warm.warm.pool.view() == [] and not any(rank.alive() for rank in first)


@pytest.mark.ranks
@pytest.mark.processes
@pytest.mark.parametrize("rows", [16, 1], ids=["split", "too few rows to split"])
def test_fault_07_a_cancelled_decode_leaves_the_processes_for_the_next(
    warm: WarmVae, rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stopping, "SECONDS", COMES_UP)
    ranks = warm.run(latents())
    given = latents(WAN21, (8, 9, rows, 16))

    def press(progress: Progress) -> None:
        if progress.phase == "decode" and progress.step:
            warm.warm.cancelled = True

    calls = VaeCalls(
        warm.warm.pool, warm.warm.source.rest, parent=warm.warm.folder / "jobs", failed=warm.warm.folder / "failed",
        on_progress=press, cancelled=lambda: warm.warm.cancelled,
    )  # fmt: skip
    with pytest.raises(JobCancelled), calls.together():
        calls.run(vae_job(given, keep_warm_seconds=300.0), given)
    warm.warm.cancelled = False
    assert warm.run(latents()) == ranks


@pytest.mark.ranks
@pytest.mark.processes
def test_fault_21_a_file_that_changed_is_said_and_another_one_is_loaded(warm: WarmVae, tmp_path: Path):
    file = tmp_path / "vae.safetensors"
    file.write_bytes(FILES[WAN21].read_bytes())
    identity = FileIdentity.of(file)
    assert warm.run(latents(), vae=(identity,))
    file.write_bytes(FILES[WAN21].read_bytes() + b"\0")
    with pytest.raises(JobFailed, match="changed since the job was written"):
        warm.run(latents(), vae=(identity,))
