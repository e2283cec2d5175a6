"""How the batch node makes jobs of its inputs, and what it makes of their results."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batching import Interrupted, Node, OutOfMemory
from mount import ROOT
from node_inputs import BOTH, asked_for, inputs_of, tiny_files, use_model_folders
from wan_pack.distributed.job.job import Job
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch.launcher import MAX_LOG, JobFailed
from wan_pack.distributed.machine.prerequisites import MIN_FREE_BYTES
from wan_pack.nodes.batch.batch import WanVideoDistributedBatch
from wan_pack.nodes.host import host
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.inference import inference as inference_module
from wan_pack.nodes.inference import saved_video
from wan_pack.nodes.inference.inference import WanVideoDistributedInference


@pytest.fixture
def node(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    use_model_folders(tmp_path / "models", monkeypatch)
    return Node(tiny_files(tiny_models), tmp_path, monkeypatch)


def with_text_encoder(node: Node, tiny_models: Path) -> None:
    from wan_pack.demo.example import TinyModel
    from wan_pack.distributed.job.job import FileIdentity

    encoder = FileIdentity.of(tiny_models / "text_encoders" / TinyModel().text_encoder)
    node.model = dataclasses.replace(node.model, text_encoder=(encoder,))


def test_the_disks_have_room_for_what_is_made_side_by_side(node: Node, tmp_path: Path) -> None:
    node.run(text_embeds=BOTH, batch_count=3, gpu_count=2, gpus_per_video=1)
    video = int(64 * 48 * 5 * 0.9)
    given = sum(tensor.nbytes for tensor in node.tensors[0].values())
    assert given and len(node.rooms) == 3
    for room in node.rooms:
        made = given + 64 * 48 * 5 // 4 + video
        assert room == {tmp_path / "jobs": 2 * made, tmp_path / "output": 2 * video}


def test_disks_without_room_for_all_videos_are_told_first(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100, two are made at a time, and all stay in the output folder; real ones are far smaller than is counted."""
    node.run(text_embeds=BOTH)
    given = sum(tensor.nbytes for tensor in node.tensors.pop().values())
    needed = MIN_FREE_BYTES + 2 * (given + 64 * 48 * 5 // 4) + 102 * int(64 * 48 * 5 * 0.9)
    asked = {"text_embeds": BOTH, "batch_count": 100, "gpu_count": 2, "gpus_per_video": 1}
    free = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    told = (
        r"one disk, .*; at the most the batch of 100 videos needs .* Free some space there, or the last videos may fail"
    )
    for warned in (True, False):
        made = node.run(**asked)
        assert len(made["result"][0]) == 100
        assert (re.search(told, made["result"][3]) is not None) == warned
        free.free += 1


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
    assert [entry["filename"] for entry in made["ui"]["video"]] == [Path(path).name for path in paths]
    blocks = status.split("\n\n")
    assert blocks[0] == "success\n- 4 videos, 2 at a time, each on 1 CPU process"
    titles = ["video 1 of 4 (seed 7, a fox)", "video 2 of 4 (seed 8, a fox)"]
    titles += ["video 3 of 4 (seed 7, a cat)", "video 4 of 4 (seed 8, a cat)"]
    for block, title, path in zip(blocks[1:], titles, paths, strict=True):
        assert block.startswith(f"{title}\nsuccess\n- video: {path}\n")
    assert log == "\n".join(f"{title}\nthe log" for title in titles)
    last = node.said[-1]
    assert (last["text"], last["ended"], last["videos"]) == ("4 of 4 done in 0 s", True, made["ui"]["video"])
    assert {picture for pictures in node.pictures for picture in pictures} == {b"7", b"8"} and all(node.pictures)


def test_every_job_is_the_one_of_the_inference_node(node: Node) -> None:
    """Which is why the videos are."""
    values = {"text_embeds": BOTH, "scheduler": "euler", "shift": 5.0, "start_step": 1, "num_frames": 6}
    values["samples"] = {"samples": torch.ones(1, 16, 3, 6, 8)}
    node.run(**values, batch_count=3, gpu_count=1)
    one = {"model": node.model, "width": 64, "height": 48, "gpu_count": 1, "use_fsdp": False, **values}
    for job, tensors in zip(node.jobs, node.tensors, strict=True):
        alone, its_tensors = inference_module.build_job(
            asked_for(**one, seed=job.sampling.seed, preview=True), Status()
        )
        assert job.parallel.more_follow, "the group makes more videos"
        same = dataclasses.replace(job.parallel, more_follow=False)
        assert dataclasses.replace(job, id=alone.id, parallel=same) == alone
        assert tensors.keys() == its_tensors.keys()
        assert all(torch.equal(tensors[name], its_tensors[name]) for name in tensors)
    assert [job.sampling.seed for job in node.jobs] == [7, 8, 9]


def test_connected_embeddings_win_over_the_prompts(node: Node) -> None:
    node.warnings = ("a rank's",)
    status = node.run(text_embeds=BOTH, prompts="a fox\na cat", batch_count=2)["result"][3]
    assert len(node.jobs) == 2
    warning = "text_embeds is connected: prompts of this node had no effect"
    assert f"  - {warning}" in status.splitlines()
    _, *told = node.said[-1]["text"].splitlines()
    assert told == [f"warning: {warning}", "warning: a rank's"], "where no status is linked"
    assert "had no effect" not in node.run(text_embeds=BOTH, prompts=" \n")["result"][3]


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
    assert len(made["ui"]["video"]) == 2
    assert status.startswith("error: 1 of 3 videos failed\n")
    assert "\n\nvideo 2 of 3 (seed 8)\nerror: rank 0: ValueError: no\n" in status
    assert "video 2 of 3 (seed 8)\nits log" in log


def test_what_failed_and_what_is_done_are_told_in_order(node: Node) -> None:
    """Each failure in a line, the first in full; one that ran out of memory is enough for ComfyUI's own exception."""

    def act(job: Job) -> None:
        for seed in (10, 8):
            fail_on(seed, out_of_memory=seed == 10)(job)

    node.act = act
    with pytest.raises(OutOfMemory) as raised:
        node.run(text_embeds=BOTH, batch_count=4)
    lines = str(raised.value).splitlines()
    assert lines[:3] == [
        "video 2 of 4 (seed 8) failed: rank 0: ValueError: no", "last lines of its log",
        "video 4 of 4 (seed 10) failed: rank 0: ValueError: no",
    ]  # fmt: skip
    assert [line.partition(" is done: ")[0] for line in lines[3:]] == ["video 1 of 4 (seed 7)", "video 3 of 4 (seed 9)"]
    _, _, log, status, _ = node.run(text_embeds=BOTH, batch_count=4, on_error="return")["result"]
    own = {1: "the log", 2: "its log", 3: "the log", 4: "its log"}
    assert log.splitlines() == [line for n, said in own.items() for line in (f"video {n} of 4 (seed {n + 6})", said)]
    assert status.startswith("error: 2 of 4 videos failed\n")
    with pytest.raises(OutOfMemory, match=r"is done: latents only, which on_error return hands on"):
        node.run(text_embeds=BOTH, batch_count=4, decode_video=False)


def test_where_the_videos_go_is_looked_at_first(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(saved_video, "check_prefix", lambda *given: seen.append(given) or tmp_path / "output")
    monkeypatch.setattr(host, "free_memory", lambda: seen.append("free"))
    save = saved_video.save_video
    monkeypatch.setattr(saved_video, "save_video", lambda *given, **more: seen.append(more) or save(*given, **more))
    monkeypatch.setattr(host, "log", lambda line: None)
    more = {"workflow_prompt": {"1": {}}, "extra_pnginfo": {"workflow": {"nodes": []}}}
    node.run(text_embeds=BOTH, filename_prefix="fox", plan="as set", **more)
    assert seen == [
        ("fox", 64, 48, ".mp4"), "free",
        {"width": 64, "height": 48, "workflow": {"prompt": {"1": {}}, "workflow": {"nodes": []}}},
    ]  # fmt: skip


def test_out_of_memory_is_comfyuis_own_exception(node: Node) -> None:
    node.act = fail_on(7, out_of_memory=True)
    with pytest.raises(OutOfMemory, match=r"^video 1 of 2 \(seed 7\) failed: rank 0"):
        node.run(text_embeds=BOTH, batch_count=2)


@pytest.mark.parametrize(("plan", "videos", "said"), [("as set", 2, 1), ("as set", 1, 0), ("auto", 2, 0)])
def test_out_of_memory_where_nobody_planned_for_a_model_that_stays(
    node: Node, plan: str, videos: int, said: int
) -> None:
    node.act = fail_on(7, out_of_memory=True)
    words = "plan auto sees to it that both fit"
    with pytest.raises(OutOfMemory) as raised:
        node.run(text_embeds=BOTH, batch_count=videos, plan=plan)
    assert str(raised.value).count(words) == said
    made = node.run(text_embeds=BOTH, batch_count=videos, plan=plan, on_error="return")
    assert made["result"][3].split("\n\n")[0].count(words) == said


def test_a_video_that_cannot_be_saved_is_a_failed_one(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, *_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(saved_video, "save_video", full)
    made = node.run(text_embeds=BOTH, on_error="return")
    assert made["result"][3].startswith("error: 1 of 1 video failed\n")
    assert "its result cannot be saved: no space left; it is kept in " in made["result"][3]
    assert made["ui"] == {}
    (kept,) = (node._folder / "failed").iterdir()
    assert JobDir(kept).video(".mp4").read_text() == "7"


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


def test_latents_without_videos_are_handed_on(node: Node) -> None:
    made = node.run(text_embeds=BOTH, batch_count=2, decode_video=False)
    videos, paths, _, status, samples = made["result"]
    assert (made["ui"], videos, paths) == ({}, ["blocked", "blocked"], ["", ""])
    assert [float(one["samples"].mean()) for one in samples] == [7, 8]
    assert status.count("- latents: ") == 2


def test_logs_of_many_videos_are_no_longer_than_one(node: Node) -> None:
    node.log = "x" * MAX_LOG + "the end"
    log = node.run(text_embeds=BOTH, batch_count=4)["result"][2]
    assert MAX_LOG * 0.9 < len(log) < MAX_LOG + 4 * 100 and log.count("the end") == 4


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
