"""The benchmarks of whole jobs, of the planner and of every switch, as far as they go without starting a job."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mount import ROOT
from patience import COMES_UP
from wan_pack.distributed.job.switches import ULYSSES_ENGINES
from wan_pack.distributed.machine.gpus import Gpu
from wan_pack.wan.checkpoint.checkpoint import Checkpoint, checkpoint_files
from wan_pack.wan.model.attention_kernels import KERNELS
from wan_pack.wan.text.text_encoder import load_text_encoder
from wan_pack.wan.vae.autoencoder import decode_frames, load_vae

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_random_models_share_what_is_equal_and_load(tmp_path: Path):
    """Both experts, and T2V and I2V but for what takes the latents in, are the same files on the disk."""
    import random_models

    for name in ("tiny", "tiny-i2v"):
        random_models.write_model(tmp_path, name)
    inodes = {
        (model, expert): {file.stat().st_ino for file in (tmp_path / model / expert).glob("*.safetensors")}
        for model in ("tiny", "tiny-i2v")
        for expert in random_models.EXPERTS
    }
    t2v, i2v = inodes["tiny", "high_noise_model"], inodes["tiny-i2v", "high_noise_model"]
    assert inodes["tiny", "low_noise_model"] == t2v
    assert len(t2v) == len(i2v) == 3
    assert len(t2v & i2v) == 2
    for name, variant in (("tiny", "T2V"), ("tiny-i2v", "I2V")):
        checkpoint = Checkpoint(checkpoint_files(tmp_path / name / "high_noise_model"))
        assert checkpoint.config == random_models.model_config(name)
        assert checkpoint.config.variant.name == variant
    with pytest.raises(ValueError, match="model is 'huge'; it must be one of t2v-A14B"):
        random_models.write_model(tmp_path, "huge")
    path = random_models.write_text_encoder(tmp_path, 64)
    (rows,) = load_text_encoder([path], [], dtype=torch.float32, device="cpu").encode(["a red fox"])
    assert rows.shape[1] == 64 and rows.isfinite().all()


@pytest.mark.parametrize("name", ["tiny", "tiny-5B"])
def test_smooth_latents_give_a_smooth_video(tmp_path: Path, name: str):
    """Neighbouring pixels and frames are nearly alike, while the picture as a whole is not flat."""
    import random_models
    from real_jobs import moving_picture
    from wan_pack.wan.model.latent_space import LATENT_SPACES

    vae = load_vae([random_models.write_model(tmp_path, name) / "vae.safetensors"])
    shape = LATENT_SPACES[vae.config.z_dim].shape(128, 96, 9)
    generator = torch.Generator().manual_seed(0)
    latents = moving_picture(shape, generator)
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    video = torch.cat(list(decode_frames(vae, latents[None])), 1)
    noise = torch.cat(list(decode_frames(vae, torch.randn(shape, generator=generator)[None])), 1)

    def roughness(frames: torch.Tensor) -> float:
        steps = [frames.diff(dim=axis).abs().mean() for axis in (1, 2, 3)]
        return (max(steps) / frames.std()).item()

    assert video.std() > 0.02
    assert roughness(video) < 0.25
    assert roughness(video) < roughness(noise)


def test_jobs_are_checked_and_their_inputs_fit(tmp_path: Path):
    """Also with both pictures; a model that needs a picture is refused without one."""
    import random_models
    from real_jobs import Shape, make_inputs, make_job

    random_models.write_model(tmp_path, "tiny-i2v")
    shape = Shape("tiny-i2v", "96x64x9", pictures="start+end", guided=True)
    inputs = make_inputs(shape)
    assert {name: tuple(tensor.shape) for name, tensor in inputs.items()} == {
        "samples": (16, 3, 8, 12), "start_image": (3, 64, 96), "end_image": (3, 64, 96), "context": (64, 64),
        "context_null": (32, 64),
    }  # fmt: skip
    assert inputs["start_image"].abs().max() <= 1
    job = make_job(tmp_path, shape, (), 2, cfg_parallel=True, preview=True)
    assert job.preview and job.parallel.cfg_parallel and job.sampling.guidance_low == 4
    with pytest.raises(ValueError, match="makes videos from an image"):
        make_job(tmp_path, Shape("tiny-i2v", "96x64x9"), (), 1)
    assert Shape("ti2v-5B", "720p").pixels == (1280, 704, 121)
    assert Shape("t2v-A14B", "720p").pixels == (1280, 720, 81)


def test_combinations_leave_out_what_makes_no_job():
    import whole_job

    arguments = argparse.Namespace(
        models=["tiny", "tiny-i2v"], sizes=["480p"], steps=[4], pictures=["none", "start", "start+end"],
        guidance=["off", "cfg"], text="given",
    )  # fmt: skip
    two = [(shape.model, shape.pictures, guidance) for shape, guidance in whole_job.combinations(arguments, 2)]
    assert two == [
        ("tiny", "none", "off"), ("tiny", "none", "cfg"), ("tiny-i2v", "start", "off"), ("tiny-i2v", "start", "cfg"),
        ("tiny-i2v", "start+end", "off"), ("tiny-i2v", "start+end", "cfg"),
    ]  # fmt: skip
    assert {guidance for _, guidance in whole_job.combinations(arguments, 1)} == {"off"}
    assert whole_job.settings_of(["use_fsdp=true", "attention=sage"]) == {"use_fsdp": True, "attention": "sage"}
    with pytest.raises(ValueError, match="'use_fsdp': it must be NAME=VALUE"):
        whole_job.settings_of(["use_fsdp"])


def test_changes_of_a_plan_follow_the_last_combination_each_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import whole_job

    asked: list[tuple[int, str, str]] = []

    def run(self: Any, shape: Any, guidance: str, change: str) -> tuple[dict[str, Any], torch.Tensor]:
        asked.append((shape.seed, change, self.start_of(shape, guidance, change, kept=True)))
        self.last = shape, guidance, change
        return {"gpus": 1, "model": "", "size": "", "pictures": "", "seconds": {}, "start": ""}, torch.ones(1)

    monkeypatch.setattr(whole_job.Runner, "run", run)
    monkeypatch.setattr(whole_job, "write_model", lambda *_: tmp_path)
    monkeypatch.setattr(whole_job, "read_rate", lambda *_: 1.0)
    fast, apart, other = "ulysses_engine=packed,memory_optimization=true", "use_fsdp=true", "size=720p,guidance=ulysses"
    arguments = ["--folder", str(tmp_path), "--results", str(tmp_path / "lines"), "--models", "tiny", "--gpus", "1"]
    monkeypatch.setattr(sys, "argv", ["whole_job.py", *arguments, "--changes", fast, apart, other])
    whole_job.main()
    assert asked == [
        (0, "", "cold"), (1, "", "warm"), (1, fast, fast), (1, "", f"{fast} taken back"),
        (1, apart, apart), (1, "", f"{apart} taken back"),
        (1, "", "480p -> 720p, guidance off -> ulysses"), (1, "", "720p -> 480p, guidance ulysses -> off"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["whole_job.py", *arguments, "--guidance", "cfg"])
    whole_job.main()
    assert len(asked) == 8, "one GPU has no two halves"


def test_a_change_of_the_job_is_told_from_one_of_its_plan():
    import whole_job
    from real_jobs import Shape

    shape, guidance, left = whole_job.changed(Shape("tiny", seed=1), "off", "steps=40,use_fsdp=true,guidance=cfg")
    assert (shape, guidance, left) == (Shape("tiny", steps=40, guided=True, seed=1), "cfg", "use_fsdp=true")
    assert whole_job.changed(shape, guidance, "pictures=start")[0] == replace(shape, pictures="start")


@pytest.mark.parametrize("missed", ["encode", "load"])
def test_phases_are_timed_by_the_files_and_add_up(tmp_path: Path, missed: str):
    """One that was over before anybody looked is taken from what the rank reports."""
    from phases import Phases

    (tmp_path / "wan-job-old").mkdir()
    with Phases(tmp_path) as phases:
        folder = tmp_path / "wan-job-new"
        folder.mkdir()
        seen = [("start", 0), ("encode", 0), ("load", 0), ("denoise", 0), ("denoise", 1), ("denoise", 2), ("decode", 0)]
        for phase, step in seen:
            if phase == missed:
                continue
            time.sleep(0.05)
            (folder / "draft").write_text(json.dumps({"phase": phase, "step": step}))
            (folder / "draft").replace(folder / "progress.json")
            deadline = time.monotonic() + COMES_UP
            while (phase if not step else f"step {step}") not in phases.seen:
                assert time.monotonic() < deadline
                time.sleep(0.005)
        time.sleep(0.05)
    for folder in tmp_path.glob("wan-job-*"):
        shutil.rmtree(folder)
    spans = phases.spans({"encode": 0.02, "load": 0.03, "denoise": 0.1})
    assert list(spans) == ["processes", "imports", "encode", "load", "first_step", "steps", "end", "total"]
    assert spans["encode"] == pytest.approx(0.02, abs=1e-3)
    assert spans["load"] > 0.02
    assert sum(spans.values()) == pytest.approx(2 * spans["total"], abs=0.01)


def test_the_parts_of_a_start_stand_in_its_order(tmp_path: Path):
    """With when each began and ended, counted from when the job was asked for."""
    import whole_job
    from phases import Phases

    before = time.time()
    with Phases(tmp_path) as phases:
        pass
    spans = phases.start_spans([("weights read", before + 2, 3.5), ("process", before - 60, 61.25)])
    assert [(name, seconds) for name, _, seconds in spans] == [("process", 61.25), ("weights read", 3.5)]
    assert spans[1][1] - spans[0][1] == pytest.approx(62, abs=0.01) and spans[1][1] <= 2
    line = {"start_spans": [("process", 0.5, 0.25), ("weights read", 2, 3.5)], "first_step_done": 7}
    assert [row.split() for row in whole_job.start_table(line).splitlines()] == [
        ["0.50", "0.75", "0.25", "s", "process"],
        ["2.00", "5.50", "3.50", "s", "weights", "read"],
        ["7.00", "first", "step", "done"],
    ]


def test_cases_side_by_side_never_share_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    import side_by_side
    from wan_pack.distributed.machine import gpus

    four = [Gpu(index=str(i), uuid=str(i), name="GPU", total_bytes=1, free_bytes=1) for i in range(4)]
    monkeypatch.setattr(gpus, "list_gpus", lambda: four)
    busy: set[str] = set()
    lock, ran, most = threading.Lock(), [], [0]

    def run(case: tuple[str, int], ids: list[str]) -> None:
        with lock:
            assert len(ids) == case[1] and not busy & set(ids)
            busy.update(ids)
            most[0] = max(most[0], len(busy))
        # The first ones stay until all GPUs are busy.
        deadline = time.monotonic() + COMES_UP
        while most[0] < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        with lock:
            busy.difference_update(ids)
            ran.append(case[0])

    cases = [(f"{count} GPUs, {number}", count) for number in range(12) for count in (1, 2)]
    side_by_side.run_side_by_side([*cases, ("too many", 8)], lambda case: case[1], run)
    assert sorted(ran) == sorted(name for name, _ in cases)
    assert most[0] == 4
    assert "left out, 8 GPUs are needed: ('too many', 8)" in capsys.readouterr().out


def test_the_cap_decides_the_plan(tmp_path: Path):
    import memory
    import random_models
    from real_jobs import Shape, make_job

    random_models.write_model(tmp_path, "tiny")
    job = make_job(tmp_path, Shape("tiny", "128x96x9", 2), (), 1, mixed_precision="bf16")

    def plan(cap: float) -> str:
        gpus = memory.gpus_of([], memory.Case(Shape("tiny"), cap, 1))
        return memory.plan_of(job, gpus, 64).block()

    assert "weights whole" in plan(80)
    with pytest.raises(ValueError, match="does not fit"):
        plan(0.5)


def test_every_kernel_and_engine_has_its_case():
    import every_switch

    settings = [case.settings for case in every_switch.cases()]
    assert {s["attention"] for s in settings if "attention" in s} == set(KERNELS)
    assert {s.get("ulysses_engine", "packed") for s in settings} == set(ULYSSES_ENGINES)
    names = [case.name for case in every_switch.cases()]
    assert len(set(names)) == len(names) and names[:2] == [every_switch.PLAIN, every_switch.GUIDED]


def test_tables_show_the_last_of_each_kind(tmp_path: Path):
    """A job that failed, and a line without what only a GPU gives, have a row too."""
    import every_switch
    import memory
    import tables

    job = {
        "benchmark": "whole_job", "label": "", "model": "t2v-A14B", "size": "832x480x81", "steps": 4,
        "pictures": "none",
        "guidance": "cfg", "text": "given", "gpus": 4, "start": "cold", "seconds": {"processes": 3.7, "total": 9.0},
        "seconds_per_step": 0.7, "load_gb_per_s": 2.0, "plain_read_gb_per_s": {"1": 5.0, "8": 20.0}, "mp4_mb": 3.1,
        "peak_gpu_gib": [60.0, 61.5], "latents_difference": 0.0, "python": "3.12", "command": "x",
        "settings": {"device": "4 x NVIDIA H200", "torch": "2.11"},
    }  # fmt: skip
    warm = {**job, "start": "warm", "load_gb_per_s": None}
    peak = {
        "benchmark": "memory",
        "model": "t2v-A14B",
        "cap": 16.0,
        "plan": "streamed",
        "error": "OutOfMemory",
        "command": "x",
    }
    switch = {"benchmark": "switches", "switch": "preview", "what": "ran", "command": "x"}
    lines = [{**job, "seconds": {"total": 1.0}}, job, warm, peak, switch, {"benchmark": "real_size"}]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    first, second = tables.read_lines(path, "whole_job", tables.WHOLE_JOB)
    assert (first["seconds"]["total"], second["start"]) == (9.0, "warm")
    text = tables.whole_jobs([first, second])
    assert "NVIDIA H200, torch 2.11, Python 3.12" in text
    row = next(line for line in text.splitlines() if "| cold |" in line)
    assert "832x480x81, 4 steps, guided, CFG parallel" in row and "2.0 of 20.0 GB/s" in row and "| 61.5 |" in row
    assert len({line.count("|") for line in text.splitlines()[2:]}) == 1
    assert "| 2.0 GB/s |" in tables.whole_jobs([{**first, "plain_read_gb_per_s": {}}]), "nothing was read beside it"
    assert "streamed; failed: OutOfMemory" in memory.table(tables.read_lines(path, "memory", tables.MEMORY))
    assert "| preview |" in every_switch.table(tables.read_lines(path, "switches", tables.SWITCHES))
