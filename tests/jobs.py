"""Jobs on the tiny model, and packs whose ranks misbehave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from golden import ROOT
from wan_pack.demo.tiny_model import TinyModel
from wan_pack.distributed.job import FileIdentity, Job, ModelFiles, Parallel, Sampling, Text
from wan_pack.distributed.launcher import Result, new_job_id, run_job

FAULTY_WORKER = Path(__file__).parent / "faulty_worker.py"
FAKE_AGENT = Path(__file__).parent / "fake_agent.py"


def tiny_job(models: Path, *, text: str | None = None, **settings: Any) -> Job:
    """A small fast job. Settings go to Sampling or Parallel by name."""
    names = TinyModel()
    parallel = {"gpu_count": 2, "mixed_precision": "fp32", "start_timeout": 120.0, "stall_timeout": 60.0}
    sampling = {"width": 64, "height": 48, "num_frames": 5, "steps": 4, "seed": 1}
    sampling["solver"] = "dpm++"  # the one solver that does not import diffusers, which takes seconds
    for name, value in settings.items():
        (sampling if name in Sampling.__dataclass_fields__ else parallel)[name] = value
    return Job(
        id=new_job_id(),
        model=ModelFiles(
            high_noise=(FileIdentity.of(models / "diffusion_models" / names.high_noise),),
            low_noise=(FileIdentity.of(models / "diffusion_models" / names.low_noise),),
            vae=(FileIdentity.of(models / "vae" / names.vae),),
            text_encoder=(FileIdentity.of(models / "text_encoders" / names.text_encoder),),
        ),
        parallel=Parallel(**parallel),
        sampling=Sampling(**sampling),
        text=None if text is None else Text(prompt=text),
    )


def write_embeddings(path: Path) -> None:
    """The inputs of a job without a prompt: the same for every test."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(2)
    rows = {"context": torch.randn(7, 64, generator=generator), "context_null": torch.randn(3, 64, generator=generator)}
    save_file(rows, path)


def run_tiny(job: Job, folder: Path, **callbacks: Any) -> Result:
    """Runs a job under `folder`."""
    write = (lambda path: None) if job.text else write_embeddings
    return run_job(job, write, parent=folder / "jobs", failed=folder / "failed", **callbacks)


def faulty_pack(folder: Path, action: str, *, rank: int = 1, step: int = 1) -> Path:
    """A copy of the pack whose rank `rank` does `action` (faulty_worker.py) after step `step`.

    Returns what takes the place of the launcher's AGENT. The pack itself has no switch for tests.
    """
    target = folder / "a pack.with-odd name" / "distributed"
    shutil.copytree(ROOT / "distributed", target, ignore=shutil.ignore_patterns("__pycache__"))
    (target.parent / "wan").symlink_to(ROOT / "wan")
    (target / "worker.py").rename(target / "real_worker.py")
    shutil.copyfile(FAULTY_WORKER, target / "worker.py")
    (target / "fault.json").write_text(json.dumps({"action": action, "rank": rank, "step": step}))
    return target
