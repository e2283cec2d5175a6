"""How a run of the inference node ends, and what it hands on."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from node_inputs import BOTH, settings, tiny_files, use_model_folders
from safetensors.torch import save_file
from wan_pack.distributed.job.errors import JobCancelled
from wan_pack.distributed.job.job import JobError, ModelFiles
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch import launcher
from wan_pack.distributed.launch.launcher import JobFailed
from wan_pack.distributed.launch.result import Result
from wan_pack.distributed.machine.prerequisites import MIN_FREE_BYTES
from wan_pack.nodes.host import host
from wan_pack.nodes.inference import inference as inference_module
from wan_pack.nodes.inference import saved_video
from wan_pack.nodes.inference.inference import WanVideoDistributedInference
from wan_pack.nodes.inference.video_node import MadeVideos
from wan_pack.wan.video.frames_file import FramesWriter


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's model folders, in `tmp_path`."""
    use_model_folders(tmp_path, monkeypatch)
    return tmp_path


class Interrupted(Exception):
    """Stands for ComfyUI's."""


class OutOfMemory(Exception):
    """Stands for ComfyUI's."""


@pytest.fixture(scope="module")
def t2v(tiny_models: Path) -> ModelFiles:
    return tiny_files(tiny_models)


@pytest.fixture
def failing_node(t2v: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the node on the tiny model with a launcher that raises the given error; None: with the one that is there."""
    for name, result in {
        "visible_gpus": "",
        "free_memory": None,
        "jobs_folder": tmp_path,
        "failed_folder": tmp_path,
        "interruption": Interrupted(),
        "blocked_output": "blocked",
    }.items():
        monkeypatch.setattr(host, name, lambda *_, result=result: result)
    monkeypatch.setattr(saved_video, "check_prefix", lambda *_: tmp_path)
    monkeypatch.setattr(host, "out_of_memory", OutOfMemory)

    def run(error: Exception | None, **values: Any) -> Any:
        def run_job(job: Any, write_inputs: Any, **_: Any) -> None:
            write_inputs(tmp_path / "inputs.safetensors")
            raise error

        if error is not None:
            monkeypatch.setattr(inference_module, "run_job", run_job)
        given = settings(model=t2v, text_embeds=BOTH, gpu_count=1, **values)
        return WanVideoDistributedInference().run(**given, unique_id="1", workflow_prompt=None, extra_pnginfo=None)

    return run


def failed(out_of_memory: bool = False) -> JobFailed:
    return JobFailed("rank 1: ValueError: no", rank=1, out_of_memory=out_of_memory, folder=None, log="the log")


def test_failure_is_raised_in_the_ranks_own_words(failing_node: Any) -> None:
    with pytest.raises(JobFailed, match=r"^rank 1: ValueError: no$"):
        failing_node(failed())


@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_cancel_is_comfyuis_own_exception(failing_node: Any, on_error: str) -> None:
    with pytest.raises(Interrupted):
        failing_node(JobCancelled("cancelled"), on_error=on_error)


def test_out_of_memory_is_comfyuis_own_exception(failing_node: Any) -> None:
    with pytest.raises(OutOfMemory, match="rank 1"):
        failing_node(failed(out_of_memory=True))


@pytest.mark.parametrize(
    ("error", "log"), [(failed(), "the log"), (failed(out_of_memory=True), "the log"), (JobError("port taken"), "")]
)
def test_failure_can_be_returned_instead(failing_node: Any, error: Exception, log: str) -> None:
    assert failing_node(error, on_error="return") == {"result": ("", log, f"error: {error}", *["blocked"] * 3)}


# Before it starts


def test_the_disk_has_room_for_what_the_job_is_given_and_makes_and_for_its_copy(
    failing_node: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by the launcher, with the job's folder and the output folder on one disk."""
    video, latents = int(64 * 48 * 5 * 0.9), 64 * 48 * 5 // 4
    size = {"width": 64, "height": 48, "num_frames": 5}
    texts = (3 + 4) * 64 * 4
    needed = MIN_FREE_BYTES + texts + latents + 2 * video
    for name in ("check_prerequisites", "check_installation"):
        monkeypatch.setattr(launcher, name, lambda *_, **__: None)
    monkeypatch.setattr(host, "interrupted", lambda: False)
    bar = SimpleNamespace(update_absolute=lambda value: None)
    for name, result in {"interrupted": False, "progress_bar": bar, "send": None}.items():
        monkeypatch.setattr(host, name, lambda *_, result=result: result)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(JobError, match=f" has {(needed - 1) / 2**20:.0f} MiB free; the job needs"):
        failing_node(None, **size)
    started: list[Any] = []

    def create(parent: Path) -> None:
        started.append(parent)
        raise JobError("there was room")

    monkeypatch.setattr(JobDir, "create", create)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    with pytest.raises(JobError, match="there was room"):
        failing_node(None, **size)
    assert started == [tmp_path]


# Without a video


def test_latents_without_a_video_are_handed_on(
    failing_node: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SimpleNamespace(latents=tmp_path / "latents.safetensors")
    save_file({"samples": torch.ones(1, 16, 2, 6, 8)}, folder.latents)
    info: dict[str, Any] = {"video": None, "latents": {"shape": [1, 16, 2, 6, 8]}, "phases": {}, "step_seconds": []}
    info |= {"peak_gpu_bytes": [], "peak_rss_bytes": [], "settings": {}, "warnings": []}
    result = SimpleNamespace(folder=folder, info=info, log="the log", seconds=1.0, remove=folder.latents.unlink)
    monkeypatch.setattr(inference_module, "run_job", lambda job, write, **_: result)
    # Of an earlier run, deleted since: this run has none that could be missed.
    monkeypatch.setattr(WanVideoDistributedInference, "made", MadeVideos())
    WanVideoDistributedInference.made.remember("1", [tmp_path / "older.mp4"])
    made = failing_node(None, decode_video=False)
    path, log, status, video, samples, images = made["result"]
    assert (made["ui"], path, log, video, images) == ({}, "", "the log", "blocked", "blocked")
    assert status.startswith("success\n- latents: [1, 16, 2, 6, 8]")
    assert samples["samples"].shape == (1, 16, 2, 6, 8)
    assert not folder.latents.exists()
    assert WanVideoDistributedInference.made.deletions("1") == 0


# Frames


@pytest.mark.parametrize("linked", [True, False])
def test_frames_are_made_and_handed_on_where_they_are_linked(
    failing_node: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    folder = JobDir.create(tmp_path)
    save_file({"samples": torch.ones(1, 16, 2, 6, 8)}, folder.latents)
    frames = torch.linspace(-1, 1, 3 * 5 * 48 * 64).view(3, 5, 48, 64)
    with FramesWriter(folder.frames) as writer:
        writer.write(frames)
    video = {"width": 64, "height": 48, "frames": 5, "fps": 16.0, "format": "h264 mp4"}
    info: dict[str, Any] = {"video": video, "latents": {"shape": [1, 16, 2, 6, 8]}, "phases": {}, "step_seconds": []}
    info |= {"peak_gpu_bytes": [], "peak_rss_bytes": [], "settings": {}, "warnings": []}
    jobs = []

    def run_job(job: Any, write: Any, **_: Any) -> Result:
        jobs.append(job)
        return Result(folder, info, "the log", 1.0)

    monkeypatch.setattr(inference_module, "run_job", run_job)
    monkeypatch.setattr(host, "blocked_output", lambda why=None: why)
    saved = SimpleNamespace(path=tmp_path / "video.mp4", subfolder="", video=lambda: "VIDEO")
    monkeypatch.setattr(saved_video, "save_video", lambda *_, **__: saved)
    nodes = {"2": {"class_type": "SaveImage", "inputs": {"images": ["1", 5 if linked else 4]}}}
    running = SimpleNamespace(all_node_ids=lambda: set(nodes), get_node=nodes.__getitem__)
    images = failing_node(None, dynprompt=running)["result"][5]
    assert jobs[0].frames is linked
    assert not folder.path.exists()
    if linked:
        assert (images - (frames.permute(1, 2, 3, 0) + 1) / 2).abs().max() < 1e-5
    else:
        # Asked for later by something that was not queued: never None, which would be taken for pictures.
        assert images.startswith("images: this node ran before anything was linked to it")
