"""Files that do not belong together, refused in the user's words by what their headers say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jobs import tiny_job
from mount import GOLDEN
from safetensors.torch import save_file
from tiny import TINY, random_weights
from wan_pack.distributed.job.job import FileIdentity, ModelFiles
from wan_pack.distributed.planning import preflight
from wan_pack.distributed.planning.preflight import check_job, check_model
from wan_pack.wan.model.config import WanConfig

SHAPES = {"context": (3, 64), "context_null": (3, 64)}
ONE_HEAD = replace(TINY, dim=128, num_heads=1)
WAN21_VAE, WAN22_VAE = (GOLDEN / case / "vae" / "model.safetensors" for case in ("vae_wan21", "vae_wan22"))


def transformer(path: Path, **changes: object) -> Path:
    config: WanConfig = replace(ONE_HEAD, **changes)
    save_file(random_weights(config), path)
    return path


def check(high: Path, low: Path | None = None, vae: Path = WAN21_VAE) -> WanConfig:
    files = {"high_noise": high, "low_noise": low, "vae": vae}
    return check_model(ModelFiles(**{name: (FileIdentity.of(path),) if path else () for name, path in files.items()}))


def test_mixed_experts_are_named_as_people_name_them(tmp_path: Path):
    t2v = transformer(tmp_path / "t2v_high.safetensors")
    i2v = transformer(tmp_path / "i2v_low.safetensors", in_dim=36)
    with pytest.raises(ValueError, match="belong together") as refusal:
        check(t2v, i2v)
    assert str(refusal.value) == (
        "the experts do not belong together: T2V of 2 layers and 128 channels high-noise with I2V of 2 layers and 128 "
        f"channels low-noise. high_noise is {t2v}, low_noise is {i2v}; choose both from one release"
    )
    wider = transformer(tmp_path / "wider.safetensors", ffn_dim=96)
    with pytest.raises(ValueError, match=r"low-noise \(ffn_dim 80 and 96\)\. high_noise is "):
        check(t2v, wider)
    assert check(t2v, t2v).variant.name == "T2V"


def test_the_vae_of_another_model_is_named_with_the_right_one(tmp_path: Path):
    t2v = transformer(tmp_path / "t2v.safetensors")
    ti2v = transformer(tmp_path / "ti2v.safetensors", in_dim=48, out_dim=48)
    with pytest.raises(ValueError, match=re.escape(
        f"{WAN22_VAE} is a Wan2.2 VAE; a T2V of 2 layers and 128 channels model goes with the Wan2.1 VAE (wan_2.1_vae"
    )):  # fmt: skip
        check(t2v, vae=WAN22_VAE)
    with pytest.raises(ValueError, match=r"is a Wan2\.1 VAE; a TI2V-5B of .* goes with the Wan2\.2 VAE \(wan2\.2_vae"):
        check(ti2v, vae=WAN21_VAE)
    assert check(ti2v, vae=WAN22_VAE).variant.name == "TI2V-5B"


def test_frames_that_do_not_fit_the_memory_are_refused_before_anything_starts(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
):
    job = replace(tiny_job(tiny_models), frames=True)
    needed = job.sampling.width * job.sampling.height * job.sampling.num_frames * 12
    monkeypatch.setattr(preflight, "available_bytes", lambda: needed)
    check_job(job, SHAPES)
    monkeypatch.setattr(preflight, "available_bytes", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"^images is linked: 5 frames of 64x48 take 0\.0 GiB of this "):
        check_job(job, SHAPES)
    check_job(replace(job, frames=False), SHAPES)
    # 81 frames of 1280x720 in float32.
    monkeypatch.setattr(preflight, "available_bytes", lambda: 1 << 29)
    large = replace(job, sampling=replace(job.sampling, width=1280, height=720, num_frames=81))
    with pytest.raises(ValueError, match=r"take 0\.8 GiB of this machine's memory, of which 0\.5 GiB are free"):
        check_job(large, SHAPES)
    monkeypatch.setattr(preflight, "available_bytes", lambda: None)
    check_job(job, SHAPES)
    with pytest.raises(ValueError, match="frames is True; it must be False for a job that makes latents only"):
        replace(job, decode=False)


def test_a_crf_that_has_no_effect_is_said(tiny_models: Path):
    job = tiny_job(tiny_models)
    for values, said in (
        ({"crf": 20, "video_format": "ffv1 mp4"}, ["crf has no effect: ffv1 mp4 takes none"]),
        ({"crf": 20}, []), ({"video_format": "prores mov"}, []),
    ):  # fmt: skip
        notes: list[str] = []
        check_job(replace(job, sampling=replace(job.sampling, **values)), SHAPES, notes.append)
        assert [note for note in notes if "crf" in note] == said


def test_exact_steps_and_blocks_are_looked_at_before_anything_starts(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(preflight, "check_switches", lambda parallel: None)

    def notes(**settings: Any) -> list[str]:
        told: list[str] = []
        job = tiny_job(tiny_models, gpu_count=1, **settings)
        preflight.check_job(job, SHAPES, told.append)
        for_sampler: list[str] = []
        preflight.check_forwards(job.model.high_noise, (), None, job.parallel, for_sampler.append)
        # A sampler's steps are its own.
        assert for_sampler == [note for note in told if "none of the" not in note]
        return told

    assert notes(exact_steps=1, exact_blocks="1") == [
        f"{name} has no effect: nothing is rounded to 8 bits" for name in ("exact_steps", "exact_blocks")
    ]
    assert notes(exact_blocks="0-1", linear_precision="int8") == []
    assert notes(exact_steps=50, attention="fa3-fp8")[0].startswith("exact_steps is 50: none of the ")
    with pytest.raises(ValueError, match="exact_blocks is '0, 2', which names block 2; this model's are 0 to 1"):
        notes(exact_blocks="0, 2")


@pytest.mark.parametrize(
    ("high", "low", "words"),
    [
        ("x_high_noise", "x_low_noise", None),
        ("x_low_noise", "x_high_noise", "the experts look swapped: high_noise is .*x_low_noise"),
        ("a_high_noise", "b_high_noise", "both experts look like the high-noise one"),
        ("a_low_noise", "b_low_noise", "both experts look like the low-noise one"),
        ("a_low_noise", "b", None),
        ("a", "a", "both experts are the same file"),
        ("a_high_noise", None, "only one expert is given, which looks like the high-noise one, and it runs every step"),
        (None, "a_low_noise", "only one expert is given, which looks like the low-noise one"),
        ("a", None, None),
    ],
)
def test_experts_that_may_be_the_wrong_ones_are_a_warning(
    tiny_models: Path, tmp_path: Path, high: str | None, low: str | None, words: str | None
):
    job = tiny_job(tiny_models, gpu_count=1)
    for name in {high, low} - {None}:
        transformer(tmp_path / f"{name}.safetensors", text_dim=64)
    files = {
        f"{side}_noise": (FileIdentity.of(tmp_path / f"{name}.safetensors"),) if name else ()
        for side, name in (("high", high), ("low", low))
    }
    job = replace(job, model=replace(job.model, **files, high_noise_loras=(), low_noise_loras=()))
    warnings = check_job(job, SHAPES)
    if words is None:
        assert warnings == ()
    else:
        (warning,) = warnings
        assert re.match(words, warning)
    if None in (high, low) and words:
        # Of a part of the schedule one expert is all that is needed.
        part = replace(job, sampling=replace(job.sampling, end_step=1))
        assert check_job(part, SHAPES) == ()


@pytest.mark.parametrize("gpu_count", [1, 2, 3])
def test_what_needs_several_gpus_has_no_effect_on_one(tiny_models: Path, gpu_count: int):
    """And of several, those of a sequence are told whose heads do not divide."""

    def told(**settings: Any) -> tuple[list[str], tuple[str, ...]]:
        job, notes = tiny_job(tiny_models, gpu_count=gpu_count, master_port=29500, **settings), []
        found = preflight.check_forwards(job.model.high_noise, (), None, job.parallel, notes.append)
        assert check_job(job, SHAPES)[-1:] == found[-1:]
        return notes, found

    notes, warnings = told(use_fsdp=True)
    assert notes == [f"{name} has no effect on one GPU" for name in ("use_fsdp", "master_port") if gpu_count == 1]
    uneven = "2 heads do not divide by 3 GPUs: some compute 1, some 0; attention runs at the pace of the fullest"
    assert warnings == ((uneven,) if gpu_count == 3 else ())
    assert told(use_fsdp=True, use_ulysses=False)[1] == ()
    assert told(use_fsdp=False)[0] == (["master_port has no effect on one GPU"] if gpu_count == 1 else [])
