"""Real ranks that stay for the next video: it starts at once, and is the one that a fresh start would make."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_jobs import run_fresh
from jobs import read_latents, tiny_job, write_embeddings
from PIL import Image
from safetensors.torch import save_file
from wan_pack.demo.tiny_model import TinyModel
from wan_pack.distributed.job.job import FileIdentity, Job, LoraFile
from wan_pack.distributed.job.progress import Progress
from wan_pack.distributed.launch.launcher import run_job
from wan_pack.distributed.launch.pool import Pool
from wan_pack.distributed.machine.processes import Process, descendants
from wan_pack.wan.vae.autoencoder import load_vae
from wan_pack.wan.vae.latents import normalise
from wan_pack.wan.vae.preview import preview_of_vae

WARM = {"keep_warm_seconds": 300.0}


@dataclass
class Made:
    """What one job did."""

    latents: Any
    ranks: list[Process]
    seconds_to_first_step: float
    weights_read: list[Progress]
    previews: list[bytes]
    reused: list[int]


@dataclass
class Warm:
    """One pool for all tests of this file: the start is paid once."""

    folder: Path
    models: Path
    lora: Path
    pool: Pool = field(default_factory=Pool)

    def job(self, loras: tuple[float, ...] = (), **settings: Any) -> Job:
        """Latents only. `loras`: strengths of the LoRA on both experts."""
        job = tiny_job(self.models, **WARM, **settings)
        files = tuple(LoraFile(file=FileIdentity.of(self.lora), strength=strength) for strength in loras)
        model = dataclasses.replace(job.model, high_noise_loras=files, low_noise_loras=files)
        return dataclasses.replace(job, model=model, decode=False)

    def run(self, job: Job, prompt: int = 2) -> Made:
        started, first, weights, previews = time.monotonic(), [], [], []

        def watch(progress: Progress) -> None:
            if progress.phase == "denoise" and progress.step >= 1:
                first.append(time.monotonic() - started)
            if progress.phase == "load" and progress.total:
                weights.append(progress)
            if progress.preview is not None:
                previews.append(progress.preview)

        result = run_job(
            job, lambda path: write_prompt(path, prompt), parent=self.folder / "jobs", failed=self.folder / "failed",
            on_progress=watch, pool=self.pool,
        )  # fmt: skip
        # A job can be over before anybody has seen its first step.
        first.append(time.monotonic() - started)
        try:
            alive = [result.folder.read_json(result.folder.alive(rank)) for rank in range(job.parallel.gpu_count)]
            ranks = [Process(entry["pid"], entry["started"]) for entry in alive]
            reused = result.info["reused_steps"]
            return Made(read_latents(result.folder), ranks, first[0], weights, previews, reused)
        finally:
            result.remove()

    def fresh(self, *jobs: tuple[Job, int]) -> list[Any]:
        """The latents that these jobs, each with its prompt, make on processes of their own."""
        latents = []
        for job, prompt in jobs:
            folder = run_fresh(job, self.folder / "fresh", functools.partial(write_prompt, prompt=prompt))
            latents.append(read_latents(folder))
            folder.remove()
        return latents


def write_prompt(path: Path, prompt: int) -> None:
    """Embeddings of another prompt for each number."""
    if prompt == 2:
        write_embeddings(path)
        return
    generator = torch.Generator().manual_seed(prompt)
    rows = {"context": torch.randn(9, 64, generator=generator), "context_null": torch.randn(3, 64, generator=generator)}
    save_file(rows, path)


@pytest.fixture(scope="module")
def warm(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    folder = tmp_path_factory.mktemp("warm")
    generator = torch.Generator().manual_seed(3)
    lora = {}
    for layer in ("blocks.0.self_attn.v", "blocks.1.cross_attn.k", "head.head"):
        rows = 64 if layer == "head.head" else 256
        lora[f"diffusion_model.{layer}.lora_down.weight"] = torch.randn(4, 256, generator=generator) / 16
        lora[f"diffusion_model.{layer}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 2
    save_file(lora, folder / "lora.safetensors")
    warm = Warm(folder, tiny_models, folder / "lora.safetensors")
    yield warm
    warm.pool.release()
    assert not list((folder / "jobs").iterdir())


def test_the_second_video_starts_at_once_on_the_same_processes(warm: Warm):
    warm.pool.release()
    first = warm.run(warm.job())
    later = [warm.run(warm.job(seed=seed)) for seed in (5, 6, 7)]
    assert all(made.ranks == first.ranks for made in later)
    assert all(made.weights_read == [] for made in later)
    # The best of three: the machine may be busy.
    assert min(made.seconds_to_first_step for made in later) < first.seconds_to_first_step / 2


def test_a_preview_changes_nothing_and_two_ranks_show_what_one_would(warm: Warm):
    job = warm.job()
    plain, shown = warm.run(job), warm.run(dataclasses.replace(job, preview=True))
    assert shown.ranks == plain.ranks
    assert torch.equal(shown.latents, plain.latents)
    assert plain.previews == []
    latents = normalise(shown.latents[0], 16)
    preview = preview_of_vae(load_vae([file.path for file in job.model.vae]))
    expected = preview.picture(latents[:, latents.shape[1] // 2])
    # The last estimate of this solver is the video.
    with Image.open(io.BytesIO(shown.previews[-1])) as picture:
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(expected.shape)
    assert expected.float().std() > 5, "there is something to see"
    # JPEG, and the way over ComfyUI's scale of latents.
    assert (pixels.float() - expected.float()).abs().mean() < 8


def test_every_change_makes_what_a_fresh_start_makes(warm: Warm):
    """On the same processes, one after another, and the first again at the end."""
    changes: list[tuple[dict[str, Any], int]] = [
        ({}, 2), ({"loras": (0.5,)}, 2), ({"loras": (-1.25,), "seed": 2}, 2), ({"loras": (0.5, 0.25)}, 2), ({}, 8),
        ({"width": 96, "height": 64}, 2), ({"num_frames": 9, "steps": 3}, 2), ({"end_step": 2}, 2), ({}, 2),
    ]  # fmt: skip
    jobs = [(warm.job(**settings), prompt) for settings, prompt in changes]
    expected = warm.fresh(*jobs)
    before = warm.run(warm.job()).ranks
    for (job, prompt), latents, change in zip(jobs, expected, changes, strict=True):
        made = warm.run(job, prompt)
        assert made.ranks == before
        assert torch.equal(made.latents, latents), change
    assert torch.equal(expected[0], expected[-1])
    different = [tuple(latents.flatten()[:8].tolist()) for latents in expected[:-1]]
    assert len(set(different)) == len(different), "each change changes the video"


@pytest.mark.parametrize(("gpu_count", "use_fsdp"), [(4, False), (2, True)])
def test_prompts_move_to_other_ranks_on_the_same_processes(warm: Warm, gpu_count: int, use_fsdp: bool):
    """Guidance on and off again changes how ranks share the work: no weight is read for it."""

    def job(cfg_parallel: bool, **settings: Any) -> Job:
        return warm.job(gpu_count=gpu_count, use_fsdp=use_fsdp, cfg_parallel=cfg_parallel, **settings)

    together = [warm.run(job(False)), warm.run(job(False, seed=3))]
    # One of the experts alone: the other one moves too.
    warm.run(job(True, end_step=1))
    apart = [warm.run(job(True)), warm.run(job(True, seed=3))]
    again = warm.run(job(False))
    assert all(made.ranks == together[0].ranks for made in (*apart, again))
    assert all(made.weights_read == [] for made in (*apart, again))
    (expected,) = warm.fresh((job(True), 2))
    assert torch.equal(apart[0].latents, expected)
    for plain, split in zip(together, apart, strict=True):
        assert (plain.latents - split.latents).norm() < 1e-5 * plain.latents.norm()
    assert torch.equal(again.latents, together[0].latents)
    # What may be taken from the step before is decided alike, whoever holds which tokens of which prompt.
    cached = {"steps": 10, "boundary": 0.0, "reuse_threshold": 0.5}
    both = [warm.run(job(cfg, **cached)) for cfg in (False, True)]
    assert both[0].reused == both[1].reused and 0 < len(both[0].reused) < 7
    assert (both[0].latents - both[1].latents).norm() < 1e-5 * both[0].latents.norm()
    every = warm.run(job(True, **cached | {"reuse_threshold": 0.0}))
    assert every.reused == [] and (every.latents - both[0].latents).norm() > 1e-3 * every.latents.norm()


WORK: list[dict[str, Any]] = [
    {"memory_optimization": True},
    {"ulysses_engine": "symmetric"},
    {"offload_model": True},
    {"width": 96, "height": 64, "offload_model": True, "memory_optimization": True, "ulysses_engine": "symmetric"},
    {"attention": "cpu", "kernels": "plain"},
]
"""Settings of a plan that a larger or smaller video may change: nothing is read for them."""


def test_a_plan_that_moves_only_work_keeps_the_weights(warm: Warm):
    """And gives what fresh processes do, as does the plan of before, again and again."""
    plain = warm.run(warm.job())
    (expected, *others) = warm.fresh((warm.job(), 2), *((warm.job(**settings), 2) for settings in WORK))
    assert torch.equal(plain.latents, expected)
    for settings, latents in zip(WORK, others, strict=True):
        for job, wanted in ((warm.job(**settings), latents), (warm.job(), expected)):
            made = warm.run(job)
            assert made.ranks == plain.ranks and made.weights_read == [], settings
            assert torch.equal(made.latents, wanted), settings


def test_a_plan_whose_weights_lie_otherwise_keeps_the_processes(warm: Warm):
    """What was loaded is let go or, to and from shards, moved: what takes its place is what a fresh start makes; so is
    what then moves work."""
    changes: list[dict[str, Any]] = [
        {"use_fsdp": True}, {"use_fsdp": True, "gather": "expert"}, {"use_fsdp": True, "use_ulysses": False},
        {"stream_blocks": True}, {"linear_precision": "int8"}, {"mixed_precision": "bf16"}, {},
    ]  # fmt: skip
    expected = warm.fresh(*((warm.job(**settings), 2) for settings in changes))
    assert all(not torch.equal(latents, expected[-1]) for latents in expected[4:6]), "other values of the weights"
    ranks = warm.run(warm.job()).ranks
    for settings, latents in zip(changes, expected, strict=True):
        for _ in range(2):
            made = warm.run(warm.job(**settings))
            assert made.ranks == ranks and torch.equal(made.latents, latents), settings
        assert made.weights_read == []
    sharded = [warm.run(warm.job(use_fsdp=True, gather=gather)) for gather in ("block", "expert", "block")]
    assert all(torch.equal(made.latents, expected[0]) for made in sharded)
    whole = warm.run(warm.job())
    assert torch.equal(whole.latents, expected[-1])
    assert all(made.weights_read == [] for made in (*sharded, whole))


def cpu_seconds(process: Process) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_waiting_costs_less_than_a_percent_of_a_core(warm: Warm):
    ranks = warm.run(warm.job()).ranks
    (agent,) = {parent for parent in descendants(os.getpid()) if set(ranks) <= set(descendants(parent.pid))}
    seconds = 3.0
    limits = {agent: 0.02 * seconds, **dict.fromkeys(ranks, 0.01 * seconds)}
    # On a busy machine they may still be tidying up after the job; then they are looked at again.
    for _ in range(3):
        time.sleep(0.5)
        before = {process: cpu_seconds(process) for process in limits}
        time.sleep(seconds)
        used = {process: cpu_seconds(process) - before[process] for process in limits}
        # Counted in hundredths of a second.
        if all(used[process] <= limit for process, limit in limits.items()):
            return
    pytest.fail(f"still at work: {used}")


def test_the_experts_swapped_are_not_taken_for_one_another(warm: Warm):
    job = warm.job()
    model = dataclasses.replace(job.model, high_noise=job.model.low_noise, low_noise=job.model.high_noise)
    swapped = dataclasses.replace(job, model=model)
    names = TinyModel()
    assert Path(swapped.model.high_noise[0].path).name == names.low_noise
    straight, (expected,) = warm.run(job), warm.fresh((swapped, 2))
    made = warm.run(swapped)
    assert torch.equal(made.latents, expected)
    assert not torch.equal(made.latents, straight.latents)
    again = warm.run(job)
    assert straight.ranks == made.ranks == again.ranks and torch.equal(again.latents, straight.latents)
