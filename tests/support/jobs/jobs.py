"""Jobs on the tiny model or on no model at all, and packs whose ranks misbehave."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mount import ROOT, SUPPORT
from wan_pack.distributed.job.job import FileIdentity, Job, ModelFiles, Parallel, Sampling, Text
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.job.progress import Progress
from wan_pack.distributed.launch.launcher import Result, new_job_id, run_job
from wan_pack.distributed.machine.processes import Process

HELPERS = SUPPORT / "jobs"
FAULTY_WORKER = HELPERS / "faulty_worker.py"
STUB_WORKER = HELPERS / "stub_worker.py"
STUB_FORWARDS = HELPERS / "stub_forwards.py"
STUB_VAE = HELPERS / "stub_vae.py"
FAKE_AGENT = HELPERS / "fake_agent.py"
FILE = FileIdentity(path="/models/none.safetensors", size=1, mtime_ns=1)
ODD_NAME = "pack $$ ${local_rank}.v-1 \u00e9"
"""Shells, torchrun's templates and Python's import take it apart."""


def tiny_job(models: Path, *, text: str | None = None, **settings: Any) -> Job:
    """A small fast job on the tiny model. Settings go to Sampling or Parallel by name."""
    # It imports torch, which most of those that start a job of stubs do without.
    from wan_pack.demo.tiny_model import TinyModel

    names = TinyModel()
    # The one solver that does not import diffusers, which takes seconds.
    parallel, sampling = _parts({"mixed_precision": "fp32", "solver": "dpm++", "start_timeout": 120.0, **settings})
    return Job(
        id=new_job_id(),
        model=ModelFiles(
            high_noise=(FileIdentity.of(models / "diffusion_models" / names.high_noise),),
            low_noise=(FileIdentity.of(models / "diffusion_models" / names.low_noise),),
            vae=(FileIdentity.of(models / "vae" / names.vae),),
            text_encoder=(FileIdentity.of(models / "text_encoders" / names.text_encoder),),
        ),
        parallel=parallel,
        sampling=sampling,
        text=None if text is None else Text(prompt=text),
    )


def stub_job(**settings: Any) -> Job:
    """A job for ranks that read no file."""
    parallel, sampling = _parts(settings)
    model = ModelFiles(high_noise=(FILE,), low_noise=(FILE,), vae=(FILE,))
    return Job(id=new_job_id(), model=model, parallel=parallel, sampling=sampling)


def _parts(settings: dict[str, Any]) -> tuple[Parallel, Sampling]:
    parallel = {"gpu_count": 2, "start_timeout": 60.0, "stall_timeout": 60.0}
    sampling = {"width": 64, "height": 48, "num_frames": 5, "steps": 4, "seed": 1}
    for name, value in settings.items():
        (sampling if name in Sampling.__dataclass_fields__ else parallel)[name] = value
    return Parallel(**parallel), Sampling(**sampling)


def write_embeddings(path: Path) -> None:
    """The inputs of a job without a prompt: the same for every test."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(2)
    rows = {"context": torch.randn(7, 64, generator=generator), "context_null": torch.randn(3, 64, generator=generator)}
    save_file(rows, path)


def run_tiny(job: Job, folder: Path, **callbacks: Any) -> Result:
    """Runs a job on the tiny model under `folder`."""
    write = (lambda path: None) if job.text else write_embeddings
    return run_job(job, write, parent=folder / "jobs", failed=folder / "failed", **callbacks)


def run_stub(
    folder: Path, job: Job | None = None, write: Callable[[Path], Any] = lambda path: None, **callbacks: Any
) -> Result:
    """Runs a job of ranks without torch under `folder`."""
    job = stub_job() if job is None else job
    return run_job(job, write, parent=folder / "jobs", failed=folder / "failed", **callbacks)


def pack_with(worker: Path, folder: Path, **fault: Any) -> Path:
    """A copy of the pack with `worker` in the place of worker.py, and in fault.json what goes wrong.

    Returns what takes the place of the group's AGENT. The pack itself has no switch for tests.
    """
    target = folder / ODD_NAME / "distributed"
    if not target.exists():
        shutil.copytree(ROOT / "distributed", target, ignore=shutil.ignore_patterns("__pycache__"))
        (target.parent / "wan").symlink_to(ROOT / "wan")
        (target / "rank" / "worker.py").rename(target / "rank" / "real_worker.py")
        shutil.copyfile(FAKE_AGENT, target / "rank" / "fake_agent.py")
    shutil.copyfile(worker, target / "rank" / "worker.py")
    (target / "rank" / "fault.json").write_text(json.dumps(fault))
    return target


class Watch:
    """Sees a job's progress; acts once, when the denoising is at a step."""

    def __init__(self, folder: Path, act: Callable[[JobDir], Any] = lambda folder: None, *, step: int = 2) -> None:
        self.parent, self.act, self.step, self.at = folder / "jobs", act, step, 0.0

    def __call__(self, progress: Progress) -> None:
        if progress.phase == "denoise" and progress.step >= self.step and not self.at:
            self.at = time.monotonic()
            (path,) = self.parent.glob("wan-job-*")
            self.act(JobDir(path))

    @property
    def seconds_ago(self) -> float:
        assert self.at, "the job never got there"
        return time.monotonic() - self.at


def rank_of(folder: JobDir, rank: int) -> Process:
    """The process of a running rank."""
    process = Process.of(int(folder.read_json(folder.alive(rank))["pid"]))
    assert process is not None
    return process


def agent_of(folder: JobDir) -> Process:
    """The agent of the only group beside the job's folder."""
    (group_folder,) = folder.path.parent.glob("wan-group-*")
    (pid,) = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal() and _words(entry)[-2:] == ["agent", str(group_folder)]
    ]
    process = Process.of(pid)
    assert process is not None
    return process


def _words(process: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return (process / "cmdline").read_bytes().decode().rstrip("\0").split("\0")
    return []


def gone_within(seconds: float, *processes: Process) -> bool:
    """Whether all of them end in this time."""
    deadline = time.monotonic() + seconds
    while any(process.alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(process.alive() for process in processes)


def read_latents(folder: JobDir) -> Any:
    from safetensors.torch import load_file

    return load_file(folder.latents)["samples"]
