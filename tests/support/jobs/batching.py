"""The batch node, with ComfyUI and the launcher replaced."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from node_inputs import inputs_of
from safetensors.torch import load_file, save_file
from wan_pack.distributed.job.job import Job, ModelFiles
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.job.progress import Progress
from wan_pack.distributed.launch.launcher import Result
from wan_pack.nodes.batch import run
from wan_pack.nodes.batch.batch import WanVideoDistributedBatch
from wan_pack.nodes.host import host
from wan_pack.nodes.host.node_report import NodeReport
from wan_pack.nodes.inference import saved_video


class Interrupted(Exception):
    """Stands for ComfyUI's."""


class OutOfMemory(Exception):
    """Stands for ComfyUI's."""


class Node:
    """Runs the node on the tiny model with a stand-in for the launcher: its jobs' latents are full of their seed."""

    def __init__(self, model: ModelFiles, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self._folder = model, folder
        self.jobs: list[Job] = []
        self.rooms: list[dict[Path, int]] = []
        self.tensors: list[dict[str, Any]] = []
        self.act: Callable[[Job], Any] = lambda job: None
        self.said: list[dict[str, Any]] = []
        self.pictures: list[tuple[bytes, ...]] = []
        self.log = "the log"
        self.warnings: tuple[str, ...] = ()
        self.cancelled = threading.Event()
        for name, result in {
            "visible_gpus": "",
            "free_memory": None,
            "jobs_folder": folder / "jobs",
            "failed_folder": folder / "failed",
            "interruption": Interrupted(),
            "blocked_output": "blocked",
            "progress_bar": SimpleNamespace(update_absolute=lambda value: None),
        }.items():
            monkeypatch.setattr(host, name, lambda *_, result=result: result)
        monkeypatch.setattr(host, "send", lambda event, content: self.said.append(content))
        monkeypatch.setattr(NodeReport, "pictures", lambda report, jpegs: self.pictures.append(jpegs))
        monkeypatch.setattr(host, "out_of_memory", OutOfMemory)
        monkeypatch.setattr(host, "interrupted", self.cancelled.is_set)
        monkeypatch.setattr(saved_video, "check_prefix", lambda *_: folder / "output")
        monkeypatch.setattr(saved_video, "save_video", self._save)
        monkeypatch.setattr(run, "run_job", self._run_job)
        (folder / "jobs").mkdir()
        (folder / "output").mkdir()

    def _run_job(self, job: Job, write: Any, *, on_progress: Callable[[Progress], None], **more: Any) -> Result:
        folder = JobDir.create(self._folder / "jobs")
        try:
            write(folder.inputs)
            self.tensors.append(load_file(folder.inputs) if folder.inputs.exists() else {})
            self.jobs.append(job)
            self.rooms.append(more["room"])
            on_progress(Progress(phase="denoise", preview=b"%d" % job.sampling.seed if job.preview else None))
            self.act(job)
        except BaseException:
            folder.remove()
            raise
        save_file({"samples": torch.full((1, 16, 2, 6, 8), float(job.sampling.seed))}, folder.latents)
        folder.video(".mp4").write_text(str(job.sampling.seed))
        info: dict[str, Any] = {"phases": {"denoise": 1.0}, "step_seconds": [], "peak_gpu_bytes": [], "settings": {}}
        info |= {
            "peak_rss_bytes": [],
            "warnings": [*job.warnings, *self.warnings],
            "latents": {"shape": [1, 16, 2, 6, 8]},
        }
        info["video"] = {"width": 64, "height": 48, "frames": 5, "fps": 16.0} if job.decode else None
        return Result(folder, info, self.log, 1.0)

    def _save(self, source: Path, prefix: str, **_: Any) -> saved_video.SavedVideo:
        # By number, as ComfyUI does it: whoever saves at the same time as another would take the same one.
        name = f"{prefix}_{len(list((self._folder / 'output').iterdir())):05}_.mp4"
        (self._folder / "output" / name).write_bytes(source.read_bytes())
        saved = saved_video.SavedVideo(self._folder / "output", "", name)
        saved.video = lambda: ("VIDEO", saved.path.read_text())  # type: ignore[method-assign]
        return saved

    def run(self, **values: Any) -> dict[str, Any]:
        return WanVideoDistributedBatch().run(**self.inputs(**values))

    def inputs(self, **values: Any) -> dict[str, Any]:
        defaults = {name: entry[1] for name, entry in inputs_of(WanVideoDistributedBatch).items()}
        given = {name: options["default"] for name, options in defaults.items() if "default" in options}
        small = {"width": 64, "height": 48, "num_frames": 5, "gpu_count": 1, "use_fsdp": False, "seed": 7}
        hidden = {"unique_id": "batch", "workflow_prompt": None, "extra_pnginfo": None, "filename_prefix": "wan"}
        return {**given, **small, **hidden, "model": self.model, **values}
