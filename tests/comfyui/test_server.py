"""The nodes in a real ComfyUI, over its HTTP API and WebSocket."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
from patience import AT_ONCE
from serving import HEIGHT, INFERENCE, WIDTH, Comfy, at_first_step, saving
from wan_pack.demo.client import Refused, Run
from wan_pack.demo.example import Prompt, node_id, node_of

pytestmark = pytest.mark.usefixtures("stay_warm")
NODES = (
    "LoadWanVideoModel",
    "WanVideoDistributedLora",
    "LoadWanVideoT5TextEncoder",
    "WanVideoTextEncode",
    "WanVideoDistributedConfig",
    "WanVideoDistributedDoctor",
    INFERENCE,
    "WanVideoDistributedBatch",
)


def probe(path: Path) -> tuple[int, tuple[int, int], float]:
    """Frames, (width, height) and frames per second of a video, counted by decoding it."""
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    return sum(1 for _ in reader), meta["size"], meta["fps"]


def saved(comfy: Comfy, run: Run, node: str) -> tuple[Path, dict[str, str]]:
    """The file that a node shows, and its entry in the history."""
    outputs = comfy.outputs(run)[node]
    (entry,) = outputs.get("video") or outputs["images"]
    return comfy.server.base / "output" / entry["subfolder"] / entry["filename"], entry


def failure(run: Run) -> dict[str, Any]:
    kind, data = run.ending
    assert kind == "execution_error", f"{kind}: {data}"
    # ComfyUI names a pack's classes by the path of its folder.
    assert re.fullmatch(r"(wan_distributed\.)?\w+", data["exception_type"]), data["exception_type"]
    return data


@pytest.mark.parametrize("node", NODES)
def test_every_input_and_output_has_a_tooltip(comfy: Comfy, node: str) -> None:
    info = comfy.server.request(f"/object_info/{node}")[node]
    assert info["description"]
    for group in ("required", "optional"):
        for name, (_, options) in info["input"].get(group, {}).items():
            assert options.get("tooltip"), f"{node}.{name}"
    assert len(info["output_tooltips"]) == len(info["output"])
    assert all(info["output_tooltips"])


@pytest.mark.parametrize("node", NODES)
def test_help_page_is_served(comfy: Comfy, node: str) -> None:
    with urllib.request.urlopen(
        f"{comfy.server.url}/extensions/wan-distributed/docs/{node}.md", timeout=AT_ONCE
    ) as page:
        assert page.read().startswith(b"# ")


def test_example_makes_the_video_it_says(comfy: Comfy, finished: Run, inference_id: str) -> None:
    assert finished.ending[0] == "execution_success", finished.ending
    path, entry = saved(comfy, finished, inference_id)
    assert entry["type"] == "output"
    assert re.fullmatch(r"wan_\d{5}_\.mp4", path.name)
    # Else the page would show it as well, beside the node's own player.
    assert set(comfy.outputs(finished)[inference_id]) == {"video"}
    assert probe(path) == (9, (WIDTH, HEIGHT), 16.0)
    assert [name.name for name in path.parent.iterdir() if name.name.startswith(".")] == []


def test_save_video_behind_the_node_works(comfy: Comfy, finished: Run) -> None:
    path, _ = saved(comfy, finished, "save")
    assert probe(path)[:2] == (9, (WIDTH, HEIGHT))


def test_view_serves_whole_video_and_parts_of_it(comfy: Comfy, finished: Run, inference_id: str) -> None:
    path, entry = saved(comfy, finished, inference_id)
    url = f"{comfy.server.url}/view?{urllib.parse.urlencode(entry)}"
    with urllib.request.urlopen(url, timeout=AT_ONCE) as answer:
        assert (answer.status, answer.headers["Content-Type"]) == (200, "video/mp4")
        assert answer.read() == path.read_bytes()
    part = urllib.request.Request(url, headers={"Range": "bytes=10-19"})
    with urllib.request.urlopen(part, timeout=AT_ONCE) as answer:
        assert answer.status == 206
        assert answer.read() == path.read_bytes()[10:20]


def test_mp4_carries_the_workflow(comfy: Comfy, finished: Run, inference_id: str) -> None:
    path, _ = saved(comfy, finished, inference_id)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "ffmetadata", "-"]
    text = subprocess.run(command, capture_output=True, check=True, timeout=30).stdout.decode()
    line = next(line for line in text.splitlines() if line.startswith("prompt="))
    prompt = json.loads(re.sub(r"\\(.)", r"\1", line.removeprefix("prompt=").replace(r"\\", "\0")).replace("\0", "\\"))
    assert prompt[inference_id]["class_type"] == INFERENCE


def test_status_names_settings_and_times(comfy: Comfy, finished: Run) -> None:
    (status,) = comfy.outputs(finished)[node_id(comfy.example(), "PreviewAny")]["text"]
    path, _ = saved(comfy, finished, node_id(comfy.example(), INFERENCE))
    assert status.splitlines()[0] == "success"
    assert str(path) in status
    assert "2 x " in status and "cfg parallel: True" in status and "unipc, 3 steps" in status
    assert "num_frames was raised from 6 to 9" in status
    assert "time: " in status


def test_progress_reaches_the_client(finished: Run, inference_id: str) -> None:
    values = [data["value"] for data in finished.of("progress") if data["node"] == inference_id]
    assert values == sorted(values) and len(set(values)) > 1, values
    lines = [data["text"] for data in finished.of("text") if data["node"] == inference_id]
    assert lines[-1].startswith("done in ")


def test_unchanged_workflow_is_not_run_again_until_its_video_is_deleted(
    comfy: Comfy, finished: Run, finished_prompt: Prompt, inference_id: str
) -> None:
    """The last one of those that look at this run: here its video goes."""
    path, _ = saved(comfy, finished, inference_id)
    again = comfy.run(finished_prompt)
    assert inference_id in again.of("execution_cached")[-1]["nodes"]
    assert not again.of("progress")
    path.unlink()
    for _ in range(2):
        path, _ = saved(comfy, comfy.run(finished_prompt), inference_id)
        assert path.is_file()
    assert len(list(path.parent.glob(f"{path.name}*"))) <= 1


def test_interrupt_ends_run_and_processes_at_once(comfy: Comfy, inference_id: str) -> None:
    pressed: list[float] = []

    def press(run: Run) -> None:
        pressed.append(time.monotonic())
        comfy.server.request("/interrupt", {"prompt_id": run.prompt_id})

    run = comfy.run(comfy.example(sample_steps=1000, num_frames=17), at_first_step(press))
    ended = time.monotonic() - pressed[0]
    assert run.ending[0] == "execution_interrupted", run.ending
    assert ended < AT_ONCE, f"{ended:.2f} s"
    lines = [data["text"] for data in run.of("text") if data["node"] == inference_id]
    assert any(re.match(r"sampling \d+/1000 - [\d.]+ s/it - ETA \d+:\d\d", line) for line in lines), lines
    comfy.wait_until_idle()
    assert comfy.job_folders() == []


def test_interrupt_before_the_first_step(comfy: Comfy) -> None:
    pressed: list[float] = []

    def watch(run: Run, kind: str, data: dict[str, Any]) -> None:
        if not pressed and comfy.job_processes():
            pressed.append(time.monotonic())
            comfy.server.request("/interrupt", {"prompt_id": run.prompt_id})

    run = comfy.run(comfy.example(seed=3), watch)
    assert run.ending[0] == "execution_interrupted", run.ending
    assert time.monotonic() - pressed[0] < AT_ONCE
    comfy.wait_until_idle()


def kill_rank_one(comfy: Comfy) -> None:
    (job,) = comfy.job_folders()
    os.kill(json.loads((job.parent / "rank1.alive").read_text())["pid"], signal.SIGKILL)


def test_rank_that_raises_is_quoted_first(comfy: Comfy) -> None:
    vae = comfy.server.base / "models" / "vae" / comfy.model.vae
    good = vae.read_bytes()

    def cut(*_: object) -> None:
        # After the check of the headers, so that a process meets it.
        if comfy.job_folders():
            os.truncate(vae, len(good) // 2)

    run = comfy.run(comfy.example(sample_steps=8, seed=5), cut)
    try:
        message = failure(run)["exception_message"]
        assert vae.name in message.splitlines()[0], message
        kept = re.search(r"\S*wan_distributed/failed/\S+", message)
        assert kept and Path(kept[0].rstrip(".,:;)")).exists(), message
    finally:
        vae.write_bytes(good)
    comfy.wait_until_idle()


def test_killed_rank_is_named_first_and_on_error_return_hands_that_out(comfy: Comfy) -> None:
    prompt = saving(comfy.example(sample_steps=1000, num_frames=17, on_error="return", seed=9))
    run = comfy.run(prompt, at_first_step(lambda _: kill_rank_one(comfy)))
    assert run.ending[0] == "execution_success", run.ending
    outputs = comfy.outputs(run)
    (status,) = outputs[node_id(prompt, "PreviewAny")]["text"]
    assert re.match(r"error: rank 1 was killed by SIGKILL", status), status
    # The error did not stop the workflow, but there is no video to save.
    assert "save" not in outputs
    comfy.wait_until_idle()


@pytest.mark.parametrize(
    ("kind", "name", "value", "sentence"),
    [
        (INFERENCE, "height", 8, "Value 8 smaller than min of 16"),
        (INFERENCE, "num_frames", 0, "Value 0 smaller than min of 1"),
        (INFERENCE, "sample_steps", 5000, "Value 5000 bigger than max of 1000"),
        (INFERENCE, "scheduler", "ddim", "'ddim' not in ['unipc', 'dpm++', 'euler']"),
        (INFERENCE, "boundary", 2.0, "Value 2.0 bigger than max of 1.0"),
        ("WanVideoDistributedConfig", "gpu_count", 65, "Value 65 bigger than max of 64"),
        ("WanVideoDistributedConfig", "master_port", 80, "master_port is 80; it must be 0 (no port) or 1024 to 65535"),
        ("WanVideoDistributedConfig", "mixed_precision", "fp8", "'fp8' not in ['bf16', 'fp16', 'fp32']"),
        ("LoadWanVideoModel", "high_noise", "../secret.safetensors", "'../secret.safetensors' not in"),
        ("LoadWanVideoT5TextEncoder", "model_name", "none.safetensors", "'none.safetensors' not in"),
    ],
)
def test_bad_value_is_refused_with_a_sentence(comfy: Comfy, kind: str, name: str, value: object, sentence: str) -> None:
    prompt = comfy.example()
    node_of(prompt, kind)["inputs"][name] = value
    with pytest.raises(urllib.error.HTTPError) as refusal:
        comfy.server.request("/prompt", {"prompt": prompt})
    assert refusal.value.code == 400
    answer = json.loads(refusal.value.read())
    errors = answer["node_errors"][node_id(prompt, kind)]["errors"]
    assert any(sentence in f"{error['message']} {error['details']}" for error in errors), errors
    assert {error["extra_info"]["input_name"] for error in errors} == {name}, "the page marks these"


@pytest.mark.parametrize("name", ["width", "height"])
def test_a_size_that_no_model_has_is_refused_before_the_nodes_in_front_run(comfy: Comfy, name: str) -> None:
    prompt = comfy.example(**{name: 250})
    # What is cached does not run anyway.
    node_of(prompt, "WanVideoTextEncode")["inputs"]["positive_prompt"] = f"another {name}"
    run = comfy.run(prompt)
    assert failure(run)["exception_message"].startswith(
        f"{name} is 250; it must be a multiple of 16. The nearest are 240 and 256"
    )
    assert {data["node"] for data in run.of("executing")} == {failure(run)["node_id"]}


def edited(prompt: Prompt, kind: str, **values: Any) -> Prompt:
    node_of(prompt, kind)["inputs"].update(values)
    return prompt


def test_wrong_file_is_named_before_any_process_starts(comfy: Comfy) -> None:
    prompt = edited(comfy.example(), "LoadWanVideoModel", vae=comfy.model.vae)
    models = comfy.server.base / "models"
    wrong = models / "vae" / "not_a_vae.safetensors"
    wrong.write_bytes((models / "text_encoders" / comfy.model.text_encoder).read_bytes())
    try:
        message = failure(comfy.run(edited(prompt, "LoadWanVideoModel", vae=wrong.name)))["exception_message"]
    finally:
        wrong.unlink()
    assert wrong.name in message and "text encoder" in message and "VAE" in message, message


def test_no_parallelism_on_two_processes_is_refused(comfy: Comfy) -> None:
    prompt = edited(comfy.example(), "WanVideoDistributedConfig", use_ulysses=False, use_fsdp=False)
    message = failure(comfy.run(prompt))["exception_message"]
    assert message.startswith("gpu_count is 2 with use_ulysses and use_fsdp both off")


def test_missing_text_is_explained(comfy: Comfy) -> None:
    prompt = comfy.example(prompt="A fox.")
    del node_of(prompt, INFERENCE)["inputs"]["text_embeds"]
    message = failure(comfy.run(prompt))["exception_message"]
    assert "connect WanVideo TextEncode" in message and "text_encoder" in message


def test_refusal_carries_node_errors(comfy: Comfy) -> None:
    with pytest.raises(Refused) as refusal:
        comfy.run(comfy.example(num_frames=0))
    assert "node_errors" in refusal.value.answer
