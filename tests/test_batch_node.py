"""How the batch node makes jobs of its inputs, and what it makes of their results."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from node_inputs import BOTH, inputs_of, settings, tiny_files, use_model_folders
from safetensors.torch import load_file, save_file
from wan_pack.distributed import gpu_locks, gpus, pool
from wan_pack.distributed.gpus import Gpu
from wan_pack.distributed.job import Job, ModelFiles
from wan_pack.distributed.jobdir import JobDir
from wan_pack.distributed.launcher import MAX_LOG, JobFailed, Result
from wan_pack.distributed.planning.plan import DoesNotFit
from wan_pack.distributed.planning.topology import Topology
from wan_pack.nodes import batch, batch_run, host, planning, saved_video
from wan_pack.nodes import inference as inference_module
from wan_pack.nodes.batch import WanVideoDistributedBatch
from wan_pack.nodes.batch_requests import Request
from wan_pack.nodes.inference import WanVideoDistributedInference
from wan_pack.nodes.status import Status

ROOT = Path(__file__).resolve().parent.parent


class Interrupted(Exception):
    """Stands for ComfyUI's."""


class OutOfMemory(Exception):
    """Stands for ComfyUI's."""


class Node:
    """Runs the node on the tiny model with a stand-in for the launcher: its jobs' latents are full of their seed."""

    def __init__(self, model: ModelFiles, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self._folder = model, folder
        self.jobs: list[Job] = []
        self.tensors: list[dict[str, Any]] = []
        self.act: Callable[[Job], Any] = lambda job: None
        self.shown: list[str] = []
        self.log = "the log"
        self.cancelled = threading.Event()
        for name, result in {
            "visible_gpus": "",
            "free_memory": None,
            "jobs_folder": folder / "jobs",
            "failed_folder": folder / "failed",
            "interruption": Interrupted(),
            "blocked_output": "blocked",
            "ProgressReport": SimpleNamespace(show=lambda fraction, text: None, text=self.shown.append),
        }.items():
            monkeypatch.setattr(host, name, lambda *_, result=result: result)
        monkeypatch.setattr(host, "out_of_memory", OutOfMemory)
        monkeypatch.setattr(host, "interrupted", self.cancelled.is_set)
        monkeypatch.setattr(saved_video, "check_prefix", lambda *_: None)
        monkeypatch.setattr(saved_video, "save_video", self._save)
        monkeypatch.setattr(batch_run, "run_job", self._run_job)
        (folder / "jobs").mkdir()
        (folder / "output").mkdir()

    def _run_job(self, job: Job, write: Any, **_: Any) -> Result:
        folder = JobDir.create(self._folder / "jobs")
        try:
            write(folder.inputs)
            self.tensors.append(load_file(folder.inputs) if folder.inputs.exists() else {})
            self.jobs.append(job)
            self.act(job)
        except BaseException:
            folder.remove()
            raise
        save_file({"samples": torch.full((1, 16, 2, 6, 8), float(job.sampling.seed))}, folder.latents)
        folder.video.write_text(str(job.sampling.seed))
        info: dict[str, Any] = {"phases": {"denoise": 1.0}, "step_seconds": [], "peak_gpu_bytes": [], "settings": {}}
        info |= {"peak_rss_bytes": [], "warnings": list(job.warnings), "latents": {"shape": [1, 16, 2, 6, 8]}}
        info["video"] = {"width": 64, "height": 48, "frames": 5, "fps": 16.0} if job.decode else None
        return Result(folder, info, self.log)

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


@pytest.fixture
def node(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    use_model_folders(tmp_path / "models", monkeypatch)
    return Node(tiny_files(tiny_models), tmp_path, monkeypatch)


def with_text_encoder(node: Node, tiny_models: Path) -> None:
    from wan_pack.demo.example import TinyModel
    from wan_pack.distributed.job import FileIdentity

    encoder = FileIdentity.of(tiny_models / "text_encoders" / TinyModel().text_encoder)
    node.model = dataclasses.replace(node.model, text_encoder=(encoder,))


def test_results_come_in_the_order_of_the_prompts(node: Node, tiny_models: Path) -> None:
    with_text_encoder(node, tiny_models)
    made = node.run(prompts="a fox\na cat", batch_count=2, gpu_count=2)
    asked = sorted((job.text.prompt, job.sampling.seed) for job in node.jobs if job.text)
    assert asked == [("a cat", 7), ("a cat", 8), ("a fox", 7), ("a fox", 8)]
    videos, paths, log, status, samples = made["result"]
    assert [seed for _, seed in videos] == ["7", "8", "7", "8"]
    assert [Path(path).read_text() for path in paths] == ["7", "8", "7", "8"]
    assert len(set(paths)) == 4, "no two videos have one name"
    assert [float(one["samples"].mean()) for one in samples] == [7, 8, 7, 8]
    assert [entry["filename"] for entry in made["ui"]["images"]] == [Path(path).name for path in paths]
    assert made["ui"]["animated"] == (True,) * 4
    blocks = status.split("\n\n")
    assert blocks[0] == "success\n- 4 videos, 2 at a time, on: 1 processes; 1 processes"
    titles = ["video 1 of 4 (seed 7, a fox)", "video 2 of 4 (seed 8, a fox)"]
    titles += ["video 3 of 4 (seed 7, a cat)", "video 4 of 4 (seed 8, a cat)"]
    for block, title, path in zip(blocks[1:], titles, paths, strict=True):
        assert block.startswith(f"{title}\nsuccess\n- video: {path}\n")
    assert log == "\n".join(f"{title}\nthe log" for title in titles)
    assert node.shown == ["4 of 4 done"]


def test_every_job_is_the_one_of_the_inference_node(node: Node) -> None:
    """Which is why the videos are."""
    values = {"text_embeds": BOTH, "scheduler": "euler", "shift": 5.0, "start_step": 1, "num_frames": 6}
    values["samples"] = {"samples": torch.ones(1, 16, 3, 6, 8)}
    node.run(**values, batch_count=3, gpu_count=1)
    one = {"model": node.model, "width": 64, "height": 48, "gpu_count": 1, "use_fsdp": False, **values}
    for job, tensors in zip(node.jobs, node.tensors, strict=True):
        alone, its_tensors = inference_module.build_job(
            settings(**one, seed=job.sampling.seed, preview=False), Status()
        )
        assert job.parallel.keep_warm_seconds > 0, "the group makes more videos"
        same = dataclasses.replace(job.parallel, keep_warm_seconds=0.0)
        assert dataclasses.replace(job, id=alone.id, parallel=same) == alone
        assert tensors.keys() == its_tensors.keys()
        assert all(torch.equal(tensors[name], its_tensors[name]) for name in tensors)
    assert [job.sampling.seed for job in node.jobs] == [7, 8, 9]


def test_groups_share_the_hosts_memory(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def plan(*_: Any, host_bytes: int, **__: Any) -> Any:
        seen.append(host_bytes)
        raise DoesNotFit("does not fit", None)

    listing = [Gpu(index=str(i), uuid=str(i), name="any", total_bytes=2**35, free_bytes=2**35) for i in range(2)]
    monkeypatch.setattr(gpus, "list_gpus", lambda: listing)
    monkeypatch.setattr(gpu_locks, "_folder", lambda: node._folder)
    monkeypatch.setattr(host, "visible_gpus", lambda: None)
    monkeypatch.setattr(pool, "available_bytes", lambda: 60)
    monkeypatch.setattr("wan_pack.distributed.planning.plan.make_plan", plan)
    with pytest.raises(DoesNotFit):
        node.run(text_embeds=BOTH, batch_count=2, gpu_count=2)
    assert seen == [30, 60]


@pytest.mark.parametrize(("videos", "planned"), [(2, 1), (1, 0)])
def test_groups_that_stay_are_planned_as_such(
    node: Node, monkeypatch: pytest.MonkeyPatch, videos: int, planned: int
) -> None:
    """They decode with the weights still on the GPU. How long they stay after the batch is the user's matter."""
    seen: list[int] = []

    def build(inputs: dict[str, Any], status: Status) -> Any:
        seen.append(inputs["config"].keep_warm_seconds)
        return inference_module.build_job(inputs, status)

    monkeypatch.setattr(batch, "build_job", build)
    made = batch._Batch([Request("", seed) for seed in range(videos)], node.inputs(text_embeds=BOTH), 0)
    assert seen == [planned]
    assert [group.keep_warm_seconds for group in made.groups] == [0]


def test_connected_embeddings_win_over_the_prompts(node: Node) -> None:
    status = node.run(text_embeds=BOTH, prompts="a fox\na cat", batch_count=2)["result"][3]
    assert len(node.jobs) == 2
    assert "  - text_embeds is connected: prompts of this node had no effect" in status.splitlines()


def fail_on(seed: int, out_of_memory: bool = False) -> Callable[[Job], None]:
    def act(job: Job) -> None:
        if job.sampling.seed == seed:
            words = "rank 0: ValueError: no\nlast lines of its log"
            raise JobFailed(words, rank=0, out_of_memory=out_of_memory, folder=None, log="its log")

    return act


def test_a_failure_is_raised_once_the_others_are_done(node: Node) -> None:
    node.act = fail_on(8)
    with pytest.raises(JobFailed) as raised:
        node.run(text_embeds=BOTH, batch_count=3)
    lines = str(raised.value).splitlines()
    assert lines[0] == "video 2 of 3 (seed 8) failed: rank 0: ValueError: no"
    assert [line.partition(" is done: ")[0] for line in lines[2:]] == ["video 1 of 3 (seed 7)", "video 3 of 3 (seed 9)"]
    assert [Path(line.partition(" is done: ")[2]).read_text() for line in lines[2:]] == ["7", "9"]


def test_a_failure_can_be_returned_instead(node: Node) -> None:
    node.act = fail_on(8)
    made = node.run(text_embeds=BOTH, batch_count=3, on_error="return")
    videos, paths, log, status, samples = made["result"]
    assert videos == [("VIDEO", "7"), "blocked", ("VIDEO", "9")]
    assert [bool(path) for path in paths] == [True, False, True]
    assert samples[1] == "blocked"
    assert len(made["ui"]["images"]) == 2
    assert status.startswith("error: 1 of 3 videos failed\n")
    assert "\n\nvideo 2 of 3 (seed 8)\nerror: rank 0: ValueError: no\n" in status
    assert "video 2 of 3 (seed 8)\nits log" in log


def test_out_of_memory_is_comfyuis_own_exception(node: Node) -> None:
    node.act = fail_on(7, out_of_memory=True)
    with pytest.raises(OutOfMemory, match=r"^video 1 of 2 \(seed 7\) failed: rank 0"):
        node.run(text_embeds=BOTH, batch_count=2)


def test_a_video_that_cannot_be_saved_is_a_failed_one(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, *_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(saved_video, "save_video", full)
    made = node.run(text_embeds=BOTH, on_error="return")
    assert made["result"][3].startswith("error: 1 of 1 videos failed\n")
    assert "its result cannot be saved: no space left; it is kept in " in made["result"][3]
    assert made["ui"] == {}
    (kept,) = (node._folder / "failed").iterdir()
    assert JobDir(kept).video.read_text() == "7"


@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_cancel_is_comfyuis_own_exception(node: Node, on_error: str) -> None:
    node.act = lambda job: node.cancelled.set()
    with pytest.raises(Interrupted):
        node.run(text_embeds=BOTH, batch_count=2, on_error=on_error)
    assert list((node._folder / "jobs").iterdir()) == []


def test_wrong_inputs_are_found_before_anything_runs(node: Node) -> None:
    with pytest.raises(ValueError, match="the model has no text encoder"):
        node.run(prompts="a fox")
    with pytest.raises(ValueError, match="prompts is empty"):
        node.run()
    assert node.run(on_error="return")["result"] == (
        ["blocked"],
        [""],
        "",
        "error: prompts is empty and text_embeds is not connected: there is nothing to make videos of",
        ["blocked"],
    )
    assert node.jobs == []


def test_groups_grow_until_the_video_fits(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(inputs: dict[str, Any], status: Status) -> Any:
        if inputs["config"].gpu_count == 1:
            raise DoesNotFit("it needs more than one", None)
        return inference_module.build_job(inputs, status)

    monkeypatch.setattr(batch, "build_job", build)
    status = node.run(text_embeds=BOTH, batch_count=2, gpu_count=2)["result"][3]
    assert status.startswith("success\n- 2 videos, 1 at a time, on: 2 processes\n")
    with pytest.raises(DoesNotFit, match="it needs more than one"):
        node.run(text_embeds=BOTH, batch_count=2, gpu_count=1)
    with pytest.raises(DoesNotFit):
        node.run(text_embeds=BOTH, batch_count=2, gpu_count=2, gpus_per_video=1)


def test_each_group_is_planned_for_its_own_gpus(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = [
        Gpu(index=str(i), uuid=f"GPU-{i}", name="any", total_bytes=80 << 30, free_bytes=79 << 30) for i in range(4)
    ]
    monkeypatch.setattr(gpus, "list_gpus", lambda: listing)
    monkeypatch.setattr(host, "visible_gpus", lambda: None)
    monkeypatch.setattr(host, "log", lambda line: None)
    monkeypatch.setattr(planning, "_links", lambda: Topology({}))
    both = threading.Barrier(2)
    node.act = lambda job: both.wait(10)
    status = node.run(text_embeds=BOTH, batch_count=2, gpu_count=0)["result"][3]
    assert {job.parallel.gpu_ids for job in node.jobs} == {("0", "1"), ("2", "3")}
    assert status.startswith("success\n- 2 videos, 2 at a time, on: 0,1; 2,3\n")


def test_all_videos_have_the_size_that_fits_every_group(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []

    def build(inputs: dict[str, Any], status: Status) -> Any:
        """The second group's GPUs are the smaller ones: dynamic_resolution lowers its video."""
        built.append(inputs["width"])
        small = {"width": 32} if len(built) == 2 else {}
        return inference_module.build_job({**inputs, **small}, status)

    monkeypatch.setattr(batch, "build_job", build)
    status = node.run(text_embeds=BOTH, batch_count=2, gpu_count=2)["result"][3]
    assert built == [64, 64, 32, 32]
    assert {job.sampling.width for job in node.jobs} == {32}
    assert "  - batch: all videos are 32x48, which fits every group of GPUs" in status.splitlines()


def test_latents_without_videos_are_handed_on(node: Node) -> None:
    made = node.run(text_embeds=BOTH, batch_count=2, decode_video=False)
    videos, paths, _, status, samples = made["result"]
    assert (made["ui"], videos, paths) == ({}, ["blocked", "blocked"], ["", ""])
    assert [float(one["samples"].mean()) for one in samples] == [7, 8]
    assert status.count("- latents: ") == 2


def test_logs_of_many_videos_are_no_longer_than_one(node: Node) -> None:
    node.log = "x" * MAX_LOG
    log = node.run(text_embeds=BOTH, batch_count=4)["result"][2]
    assert MAX_LOG * 0.9 < len(log) < MAX_LOG + 4 * 100


def test_a_deleted_video_makes_the_node_run_once_more(node: Node) -> None:
    paths = node.run(text_embeds=BOTH, batch_count=2)["result"][1]
    before = WanVideoDistributedBatch.IS_CHANGED(unique_id="batch")
    assert WanVideoDistributedBatch.IS_CHANGED(unique_id="batch") == before
    Path(paths[1]).unlink()
    assert WanVideoDistributedBatch.IS_CHANGED(unique_id="batch") != before


def test_inputs_are_those_of_the_inference_node(node: Node) -> None:
    """Its optional ones come last, so that one more there does not move a value of a saved batch."""
    own, other = list(inputs_of(WanVideoDistributedBatch)), list(inputs_of(WanVideoDistributedInference))
    required = list(WanVideoDistributedInference.INPUT_TYPES()["required"])
    optional = [name for name in other[len(required) :] if name != "preview"]
    assert own == ["model", "prompts", *required[2:], "batch_count", "gpus_per_video", *optional]


@pytest.mark.parametrize("form", ["batch_workflow", "api/batch_workflow"])
def test_example_holds_a_value_for_every_widget(node: Node, form: str) -> None:
    content = json.loads((ROOT / "example_workflows" / f"{form}.json").read_text())
    inputs = {name: entry[1] for name, entry in inputs_of(WanVideoDistributedBatch).items() if "default" in entry[1]}
    if form.startswith("api"):
        (example,) = (one for one in content.values() if one["class_type"] == "WanVideoDistributedBatch")
        assert set(example["inputs"]) == {*inputs, "model", "config"}
        return
    (example,) = (one for one in content["nodes"] if one["type"] == "WanVideoDistributedBatch")
    names = []
    for name, options in inputs.items():
        names += [name, "control"] if options.get("control_after_generate") else [name]
    values = dict(zip(names, example["widgets_values"], strict=True))
    own = {"prompts", "num_frames", "gpu_count", "seed", "filename_prefix", "control"}
    assert {name: values[name] for name in names if name not in own} == {
        name: options["default"] for name, options in inputs.items() if name not in own
    }
    assert len(values["prompts"].splitlines()) == 2
    sockets = [name for name, entry in inputs_of(WanVideoDistributedBatch).items() if "default" not in entry[1]]
    assert [socket["name"] for socket in example["inputs"]] == sockets
