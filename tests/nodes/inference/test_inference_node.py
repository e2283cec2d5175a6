"""How the inference node makes a job of its inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from node_inputs import asked_for, model_files, rows, use_model_folders
from wan_pack.distributed.job.job import ModelFiles
from wan_pack.nodes.host import host
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.inference import inference as inference_module
from wan_pack.nodes.inference.inference import WanVideoDistributedInference
from wan_pack.nodes.inference.video_node import MadeVideos
from wan_pack.nodes.settings.spread import DistributedConfig, WanVideoDistributedConfig
from wan_pack.nodes.sockets import embeds


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's model folders, in `tmp_path`."""
    use_model_folders(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def model(tmp_path: Path) -> ModelFiles:
    return model_files(tmp_path)


@pytest.mark.parametrize(("asked", "made"), [(1, 1), (2, 5), (80, 81), (81, 81), (84, 85), (121, 121)])
def test_frames_are_raised_to_the_next_possible_number(asked: int, made: int) -> None:
    status = Status()
    assert inference_module._sampling(asked_for(num_frames=asked).sampling, status).num_frames == made
    assert (bool(status.notes), status.warnings) == (asked != made, [])


def test_config_wins_and_the_status_says_so(model: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "visible_gpus", lambda: "")
    status = Status()
    (config,) = WanVideoDistributedConfig().build(
        gpu_count=2, use_ulysses=True, use_fsdp=False, offload_model=True, mixed_precision="fp32"
    )
    assert isinstance(config, DistributedConfig)
    given = asked_for(gpu_count=1, config=config)
    sampled = inference_module._sampling(given.sampling, Status())
    parallel = inference_module._parallel(given, model, sampled, status)
    given.say_overruled(status)
    assert (parallel.gpu_count, parallel.use_fsdp, parallel.offload_model) == (2, False, True)
    assert parallel.mixed_precision == "fp32"
    assert status.notes == [
        "config is connected: its gpu_count, use_fsdp, offload_model won over this node's own values"
    ]


@pytest.mark.parametrize(
    ("chosen", "guidance", "gpus", "expected"),
    [
        ("auto", 4.0, 2, True),
        ("auto", 4.0, 3, False),
        ("auto", 1.0, 2, False),
        ("off", 4.0, 2, False),
        ("on", 1.0, 2, True),  # refused when the job is checked
    ],
)
def test_two_groups_of_gpus_for_two_prompts(
    model: ModelFiles, monkeypatch: pytest.MonkeyPatch, chosen: str, guidance: float, gpus: int, expected: bool
) -> None:
    monkeypatch.setattr(host, "visible_gpus", lambda: "")
    config = DistributedConfig(
        gpu_count=gpus, use_ulysses=True, use_fsdp=True, offload_model=False, cfg_parallel=chosen
    )
    given = asked_for(config=config, guidance_low=guidance, guidance_high=4.0)
    sampled = inference_module._sampling(given.sampling, Status())
    parallel = inference_module._parallel(given, model, sampled, Status())
    assert parallel.cfg_parallel is expected
    assert parallel.ulysses_size == (gpus // 2 if expected else gpus)


def text_of(model: ModelFiles, status: Status, **values: Any) -> Any:
    given = asked_for(**values)
    return embeds.text_inputs(given, model, inference_module._sampling(given.sampling, Status()), status)


def test_connected_embeddings_win_over_the_prompt(model: ModelFiles) -> None:
    status = Status()
    both = {"prompt_embeds": [rows(3)], "negative_prompt_embeds": [rows(4)]}
    text, tensors = text_of(model, status, text_embeds=both, prompt="a fox")
    assert text is None
    assert {name: len(tensor) for name, tensor in tensors.items()} == {"context": 3, "context_null": 4}
    assert status.warnings == ["text_embeds is connected: prompt of this node had no effect"]
    for texts, names in (
        ({"prompt": " ", "negative_prompt": "\n"}, None), ({"negative_prompt": "x"}, "negative_prompt"),
        ({"prompt": "a fox", "negative_prompt": "x"}, "prompt and negative_prompt"),
    ):  # fmt: skip
        status = Status()
        text_of(model, status, text_embeds=both, **texts)
        said = [f"text_embeds is connected: {names} of this node had no effect"]
        assert status.warnings == (said if names else [])


def test_negative_embeds_win_over_the_ones_that_travel_along(model: ModelFiles) -> None:
    both = {"prompt_embeds": [rows(3)], "negative_prompt_embeds": [rows(4)]}
    _, tensors = text_of(model, Status(), text_embeds=both, negative_embeds=[[rows(6)[None], {}]])
    assert len(tensors["context_null"]) == 6


def test_no_guidance_needs_no_negative(model: ModelFiles) -> None:
    both = {"prompt_embeds": [rows(3)], "negative_prompt_embeds": [rows(4)]}
    _, tensors = text_of(model, Status(), text_embeds=both, guidance_low=1.0, guidance_high=1.0)
    assert list(tensors) == ["context"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "a fox"}, "the model has no text encoder: connect WanVideo TextEncode"),
        ({"prompt": " "}, "prompt is empty and text_embeds is not connected"),
        ({"prompt": "a fox", "negative_embeds": [[rows(3)[None], {}]]}, "connect both or neither"),
    ],
)
def test_text_that_cannot_work_is_explained(model: ModelFiles, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_of(model, Status(), **values)


def test_replaced_vae_makes_the_node_run_once_more(folders: Path) -> None:
    node = WanVideoDistributedInference
    vae = folders / "vae" / "other.safetensors"
    vae.parent.mkdir()
    vae.touch()
    before = node.IS_CHANGED(unique_id="test", vae="other.safetensors")
    assert node.IS_CHANGED(unique_id="test", vae="other.safetensors") == before
    vae.write_bytes(b"new")
    assert node.IS_CHANGED(unique_id="test", vae="other.safetensors") != before
    for nothing_chosen in ("auto", None):
        assert node.IS_CHANGED(unique_id="test", vae=nothing_chosen) == node.IS_CHANGED(unique_id="test")


def test_deleted_video_makes_the_node_run_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = WanVideoDistributedInference
    video = tmp_path / "video.mp4"
    video.touch()
    monkeypatch.setattr(node, "made", MadeVideos())
    node.made.remember("test", [video])
    before = node.IS_CHANGED(unique_id="test")
    assert node.IS_CHANGED(unique_id="test") == before
    video.unlink()
    after = node.IS_CHANGED(unique_id="test")
    assert after != before
    assert node.IS_CHANGED(unique_id="test") == after


def test_status_tells_what_was_done(tmp_path: Path) -> None:
    info = {
        "video": {"width": 832, "height": 480, "frames": 81, "fps": 16.0},
        "phases": {"load": 10.0, "denoise": 40.0},
        "step_seconds": [2.0, 2.0],
        "peak_gpu_bytes": [2**30, 2**31],
        "peak_rss_bytes": [0, 0],
        "settings": {"precision": "bf16"},
    }
    status = Status()
    status.warn("a warning", "a warning")
    for _ in range(2):
        status.note("a fact")
    text = status.block(tmp_path / "v.mp4", info, 62.4)
    assert text.splitlines()[0] == "success"
    assert f"video: {tmp_path / 'v.mp4'}" in text
    assert "time: 62.4 s (processes and files 12.4, load 10.0, denoise 40.0)" in text
    assert "step: 2.00 s, mean of 2" in text
    assert "peak GPU memory per process: 1.00 GiB, 2.00 GiB" in text
    assert "host memory" not in text
    assert "  - precision: bf16" in text
    assert text.splitlines()[-4:] == ["- notes:", "  - a fact", "- warnings:", "  - a warning"]
    assert status.ending(info, 62.4) == "done in 62 s: 81 frames, 16 fps\nwarning: a warning"


def test_status_tells_that_no_video_was_made() -> None:
    info = {
        "video": None,
        "latents": {"shape": [1, 16, 2, 6, 8], "dtype": "float32"},
        "phases": {"load": 10.0, "denoise": 40.0},
        "step_seconds": [],
        "peak_gpu_bytes": [0],
        "peak_rss_bytes": [0],
        "settings": {},
    }
    lines = Status().block(None, info, 62.4).splitlines()
    assert lines[:2] == ["success", "- latents: [1, 16, 2, 6, 8], no video (decode_video is off)"]
    assert Status().ending(info, 62.4) == "done in 62 s: latents, no video"
