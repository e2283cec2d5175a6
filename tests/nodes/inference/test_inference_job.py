"""The job that the inference node makes of its inputs."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from node_inputs import BOTH, asked_for, rows, settings, tiny_files, use_model_folders
from safetensors.torch import load_file, save_file
from wan_pack.demo.example import TinyModel
from wan_pack.demo.tiny_expert import lora
from wan_pack.distributed.job.job import FileIdentity, Job, LoraFile, ModelFiles, Sampling
from wan_pack.distributed.planning.preflight import check_model
from wan_pack.nodes.host import host
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.inference import inference as inference_module
from wan_pack.nodes.sockets.video_inputs import VideoInputs
from wan_pack.wan.files import stored_model


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's model folders, in `tmp_path`."""
    use_model_folders(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture(scope="module")
def t2v(tiny_models: Path) -> ModelFiles:
    return tiny_files(tiny_models)


@pytest.fixture(scope="module")
def i2v(t2v: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """The tiny model with 36 channels in, in one expert's place."""
    weights = load_file(t2v.low_noise[0].path)
    dim = weights["patch_embedding.weight"].shape[0]
    weights["patch_embedding.weight"] = torch.zeros(dim, 36, 1, 2, 2, dtype=torch.bfloat16)
    path = tmp_path_factory.mktemp("i2v") / "wan2.2_i2v.safetensors"
    save_file(weights, path)
    return dataclasses.replace(t2v, high_noise=(), low_noise=(FileIdentity.of(path),))


def job_of(model: Any, status: Status, monkeypatch: pytest.MonkeyPatch, **values: Any) -> tuple[Job, dict[str, Any]]:
    """Of a video of 64x48 pixels and 5 frames; both prompts are given."""
    monkeypatch.setattr(host, "visible_gpus", lambda: "")
    monkeypatch.setattr(host, "free_memory", lambda: None)
    given = {"width": 64, "height": 48, "num_frames": 5, "gpu_count": 1, "use_fsdp": False, "text_embeds": BOTH}
    return inference_module.build_job(asked_for(model=model, **{**given, **values}), status)


def test_defaults_ask_for_nothing_new(t2v: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    status = Status()
    job, tensors = job_of(t2v, status, monkeypatch)
    assert (job.model, job.decode, list(tensors)) == (t2v, True, ["context", "context_null"])
    plain = Sampling(width=64, height=48, num_frames=5, steps=20, seed=0)
    assert job.sampling == plain
    assert status.warnings == []


@pytest.mark.parametrize("seed", [2**32 + 7, 2**53 + 1, 2**64 - 1])
def test_a_seed_is_handed_on_whole(t2v: ModelFiles, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    assert job_of(t2v, Status(), monkeypatch, seed=seed)[0].sampling.seed == seed


def test_a_queued_job_opens_each_header_once(t2v: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader's check, the node's, the plan and the preflight; the next job opens none again."""
    files = {part.path for part in t2v.all() if not part.path.endswith(".json")}
    opened: list[str] = []
    counting = True

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        # Without a mode: the call that `open` makes in turn.
        if counting and event == "open" and str(arguments[0]) in files and arguments[1] is not None:
            opened.append(str(arguments[0]))

    stored_model._open_file.cache_clear()
    # It stays for good: there is no way to take one out again.
    sys.addaudithook(count)
    check_model(t2v)
    job_of(t2v, Status(), monkeypatch)
    job_of(t2v, Status(), monkeypatch)
    counting = False
    headers = {path for path in files if path.endswith((".safetensors", ".pth", ".gguf"))}
    assert headers and sorted(opened) == sorted(headers)


def test_a_workflow_saved_before_the_newer_inputs_makes_the_same_job(
    t2v: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = {"strength", "start_step", "end_step", "add_noise", "decode_video", "preset", "vae", "plan", "preview"}
    monkeypatch.setattr(host, "visible_gpus", lambda: "")
    monkeypatch.setattr(host, "free_memory", lambda: None)
    given = settings(model=t2v, text_embeds=BOTH, gpu_count=1, use_fsdp=False)
    assert newer < set(given)
    now, _ = inference_module.build_job(VideoInputs.of(given), Status())
    before, _ = inference_module.build_job(VideoInputs.of({name: given[name] for name in set(given) - newer}), Status())
    assert dataclasses.replace(before, id=now.id) == now


def test_inputs_for_a_part_of_the_schedule_reach_the_job(t2v: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    latent = {"samples": torch.ones(1, 16, 2, 6, 8)}
    values = {"start_step": 2, "end_step": 5, "add_noise": False, "decode_video": False}
    job, tensors = job_of(t2v, Status(), monkeypatch, samples=latent, **values)
    assert job.decode is False
    assert (job.sampling.start_step, job.sampling.end_step, job.sampling.add_noise) == (2, 5, False)
    assert torch.equal(tensors["samples"], latent["samples"][0])
    job, _ = job_of(t2v, Status(), monkeypatch, samples=latent, strength=0.5)
    assert job.sampling.strength == 0.5


def test_what_has_no_effect_is_said(t2v: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    status = Status()
    job_of(t2v, status, monkeypatch, vace_strength=0.5, guidance_low=1.0, guidance_high=1.0, negative_embeds=BOTH)
    assert status.notes[:2] == [
        "vace_strength is 0.5, which has no effect: this model (T2V) follows no control",
        "negative_embeds has no effect: guidance is 1",
    ]


def test_what_suits_another_expert_or_model_is_warned_of(
    t2v: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, names = Status(), TinyModel()
    save_file(lora(1), tmp_path / names.low_noise_lora)
    added = LoraFile(file=FileIdentity.of(tmp_path / names.low_noise_lora), strength=1.0)
    model = dataclasses.replace(t2v, high_noise_loras=(added,))
    job_of(model, status, monkeypatch, preset="Lightning 4 steps")
    steps, side = status.warnings
    assert f"few steps; {names.low_noise} has no such name" in steps
    assert f"{names.low_noise_lora} looks like a LoRA of the low-noise expert" in side


def test_preset_wins_and_the_status_says_so(t2v: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    status = Status()
    job, tensors = job_of(t2v, status, monkeypatch, preset="Lightning 4 steps")
    sampling = job.sampling
    assert (sampling.solver, sampling.steps, sampling.shift, sampling.boundary) == ("euler", 4, 5.0, 0.875)
    assert (sampling.guidance_low, sampling.guidance_high) == (1.0, 1.0)
    assert list(tensors) == ["context"], "without guidance there is no negative prompt"
    assert list(job.warnings) == status.warnings
    assert status.notes[0].startswith("preset Lightning 4 steps set scheduler euler, sample_steps 4")


@pytest.mark.parametrize("form", ["image", "conditioning", "embeds"])
def test_every_form_of_image_makes_an_i2v_job(i2v: ModelFiles, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    extras = {"concat_latent_image": torch.ones(1, 16, 2, 6, 8), "concat_mask": torch.ones(1, 1, 2, 6, 8)}
    core = {name: [[rows(3, dim=64)[None], dict(extras)]] for name in ("text_embeds", "negative_embeds")}
    values: dict[str, dict[str, Any]] = {
        "image": {"start_image": torch.rand(1, 48, 64, 3), "end_image": torch.rand(1, 48, 64, 3)},
        "conditioning": core,
        "embeds": {"image_embeds": {"image_embeds": torch.ones(20, 2, 6, 8)}},
    }
    status = Status()
    _, tensors = job_of(i2v, status, monkeypatch, **values[form], preset="official I2V-A14B")
    images = set(tensors) - {"context", "context_null"}
    assert images == ({"start_image", "end_image"} if form == "image" else {"image_conditioning"})
    assert status.warnings == []


def test_model_of_the_wrapper_makes_a_job(t2v: ModelFiles, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vae", "diffusion_models"):
        (folders / name).mkdir()
    (folders / "vae" / "wan.safetensors").symlink_to(t2v.vae[0].path)
    # As the wrapper's loader names it: where ComfyUI lists it, which may be a link.
    listed = [folders / "diffusion_models" / Path(files[0].path).name for files in (t2v.high_noise, t2v.low_noise)]
    for path, files in zip(listed, (t2v.high_noise, t2v.low_noise), strict=True):
        path.symlink_to(files[0].path)
    high, low = (
        SimpleNamespace(
            model=SimpleNamespace(diffusion_model=SimpleNamespace(), pipeline={"base_path": str(path)}),
            patches={},
            model_options={},
        )
        for path in listed
    )
    status = Status()
    job, _ = job_of(high, status, monkeypatch, low_noise_model=low)
    assert [job.model.high_noise, job.model.low_noise] == [(FileIdentity.of(path),) for path in listed]
    assert Path(job.model.vae[0].path).name == "wan.safetensors"
    assert status.warnings == []


def test_chosen_vae_wins_over_the_models(t2v: ModelFiles, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folders / "vae").mkdir()
    shutil.copy(t2v.vae[0].path, folders / "vae" / "mine.safetensors")
    status = Status()
    job, _ = job_of(t2v, status, monkeypatch, vae="mine.safetensors")
    assert Path(job.model.vae[0].path).name == "mine.safetensors"
    assert status.notes == ["vae is mine.safetensors, instead of the one that Load Wan Video Model names"]


def test_inputs_that_do_not_go_together_are_refused(t2v: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    for values, message in (
        ({"low_noise_model": object()}, "names both experts; disconnect low_noise_model"),
        ({"start_image": torch.rand(1, 48, 64, 3)}, "from text only"),
        ({"strength": 0.5}, "connect samples"),
    ):
        with pytest.raises(ValueError, match=message):
            job_of(t2v, Status(), monkeypatch, **values)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"width": 832, "height": 480}, ""),
        ({"width": 830, "height": 480}, "width is 830; it must be a multiple of 16. The nearest are 816 and 832"),
        ({"width": 832, "height": 9000}, "height is 9000; it must be 16 to 8192"),
        ({"width": "64x", "height": 64}, "width is '64x'; it must be a whole number, 16 to 8192"),
    ],
)
def test_sizes_are_checked_before_the_nodes_in_front_run(size: dict[str, Any], message: str) -> None:
    node = inference_module.WanVideoDistributedInference()
    linked = {"model": None, "text_embeds": None, "config": "made already"}
    assert node.check_lazy_status(**size, **linked, extra_pnginfo=None) == ([] if message else ["model", "text_embeds"])
    if message:
        with pytest.raises(ValueError, match=re.escape(message)):
            node.run(**linked, **size)
