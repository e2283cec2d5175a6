"""Values of another type, paths in values and endless lists, through ComfyUI's own API: each ends in a sentence."""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from typing import Any

import pytest
from patience import AT_ONCE
from serving import INFERENCE, Comfy
from wan_pack.demo.client import Refused
from wan_pack.demo.example import BATCH, Prompt, node_of, video_node

LOADER = "LoadWanVideoModel"
ENCODER = "WanVideoTextEncode"
BATCH_NODE = "WanVideoDistributedBatch"
DOCTOR = "WanVideoDistributedDoctor"
SENTENCE = "; it must be a file that ComfyUI lists in its folders for loras"
JUNK: list[Any] = [
    "\ud800", True, {"__value__": [["x", {}]]}, {"samples": "x", "prompt_embeds": ["x"], "target_shape": "abcd"},
    {"x" * 100_000: 1},
]  # fmt: skip
SOCKETS = {
    INFERENCE: ("model", "config", "text_embeds", "negative_embeds", "samples", "image_embeds", "start_image"),
    BATCH_NODE: ("config", "text_embeds", "samples"),
    LOADER: ("high_noise_lora",),
    ENCODER: ("t5",),
}


def message(comfy: Comfy, prompt: Prompt) -> str:
    """Of the ValueError with which the workflow ends."""
    kind, data = comfy.run(prompt).ending
    assert kind == "execution_error", (kind, data)
    text = data["exception_message"]
    assert data["exception_type"] == "ValueError" and len(text) < 1500, (data["exception_type"], text[:500])
    return text.strip()


def workflow(comfy: Comfy, kind: str, **inputs: Any) -> Prompt:
    prompt = comfy.example(BATCH if kind == BATCH_NODE else "distributed_inference_workflow", on_error="raise")
    node_of(prompt, kind)["inputs"].update(inputs)
    return prompt


def test_fault_31_a_value_in_the_place_of_a_link_is_refused_by_its_type(comfy: Comfy) -> None:
    for kind, names in SOCKETS.items():
        for name in names:
            for value in JUNK:
                assert name in message(comfy, workflow(comfy, kind, **{name: value})), (kind, name, str(value)[:50])
    doctor = {"1": {"class_type": DOCTOR, "inputs": {"model": "x"}}}
    assert message(comfy, doctor) == "model is str; connect Load Wan Video Model to it"


@pytest.mark.parametrize("kind", [INFERENCE, BATCH_NODE])
def test_fault_31_on_error_catches_a_socket_of_another_type(comfy: Comfy, kind: str) -> None:
    prompt = workflow(comfy, kind, config="x")
    made = video_node(prompt)
    node_of(prompt, made)["inputs"]["on_error"] = "return"
    index = 2 if kind == INFERENCE else 3
    key = next(key for key, node in prompt.items() if node["class_type"] == made)
    prompt["status"] = {"class_type": "PreviewAny", "inputs": {"source": [key, index]}}
    run = comfy.run(prompt)
    assert run.ending[0] == "execution_success", run.ending
    text = comfy.outputs(run)["status"]["text"][0]
    assert text == "error: config is str; connect Wan Video Distributed Config to it"


def test_fault_31_a_path_in_a_value_tells_nothing(comfy: Comfy) -> None:
    outside = comfy.server.base / "outside"
    outside.mkdir()
    loras = comfy.server.base / "models" / "loras"
    (outside / "there.safetensors").write_bytes((loras / comfy.model.high_noise_lora).read_bytes())
    os.mkfifo(outside / "pipe.safetensors")
    (outside / "folder.safetensors").mkdir()

    def refused(path: str) -> str:
        start = time.monotonic()
        # In __value__, as the page sends a list that is no link.
        entries = {"__value__": [{"path": path, "strength": 1.0, "name": "fox"}]}
        text = message(comfy, workflow(comfy, LOADER, high_noise_lora=entries))
        assert time.monotonic() - start < AT_ONCE, path
        return text

    for name in ("there", "pipe", "folder", "missing"):
        path = f"{outside}/{name}.safetensors"
        assert refused(path).partition("path of high_noise_lora: fox is ")[2].endswith(SENTENCE), path
    for path in ("/dev/zero", "/etc/passwd", "/proc/self/environ", "../outside/there.safetensors", f"{loras}/x", "a\0"):
        assert refused(path).endswith(SENTENCE), path
    # The loader takes what ComfyUI lists: the next node's error is the first one.
    entries = {"__value__": [{"path": str(loras / comfy.model.high_noise_lora), "strength": 1.0, "name": "fox"}]}
    prompt = workflow(comfy, LOADER, high_noise_lora=entries)
    node_of(prompt, INFERENCE)["inputs"]["config"] = "x"
    assert message(comfy, prompt).startswith("config is str")


def test_fault_32_three_thousand_loras_are_refused_at_once(comfy: Comfy) -> None:
    entry = {"path": comfy.model.high_noise_lora, "strength": 1.0, "name": "fox"}
    start = time.monotonic()
    text = message(comfy, workflow(comfy, LOADER, high_noise_lora={"__value__": [entry] * 3000}))
    assert text == "high_noise_lora holds 3000 LoRAs; it must hold at most 64 LoRAs per expert"
    assert time.monotonic() - start < AT_ONCE


@pytest.mark.parametrize("width", ["64x", 10**399, "9" * 4000], ids=["unit", "400 digits", "4000 digits"])
def test_fault_32_a_size_of_another_type_is_refused_and_marked(comfy: Comfy, width: Any) -> None:
    with pytest.raises(Refused) as refused:
        comfy.run(workflow(comfy, INFERENCE, width=width))
    (errors,) = (node["errors"] for node in refused.value.answer["node_errors"].values())
    (error,) = errors
    assert error["extra_info"]["input_name"] == "width"
    assert error["type"] in ("invalid_input_type", "value_bigger_than_max") and "width" in error["details"]


def test_fault_32_a_batch_and_an_unknown_input_are_bounded(comfy: Comfy) -> None:
    prompt = workflow(comfy, BATCH_NODE, prompts="\n".join(map(str, range(5000))), batch_count=1)
    node_of(prompt, BATCH_NODE)["inputs"].pop("text_embeds", None)
    assert message(comfy, prompt).endswith("make 5000 videos; a batch makes at most 1000")
    for text in ("\ud800", "x" * 1_000_001):
        prompt = workflow(comfy, BATCH_NODE, prompts=text)
        assert message(comfy, prompt).startswith("prompts ")
    prompt = workflow(comfy, INFERENCE)
    inputs = node_of(prompt, INFERENCE)["inputs"]
    inputs["jobs side by side"] = inputs["model"]
    assert message(comfy, prompt) == "'jobs side by side' is no input of this node, and something is connected to it"


def test_fault_32_our_routes_take_small_objects_only(comfy: Comfy) -> None:
    def answer(path: str, body: bytes) -> int:
        request = urllib.request.Request(
            comfy.server.url + path,
            body,
            {"Content-Type": "application/json; charset=nonsense", "X-Wan-Distributed": "1"},
        )
        try:
            with urllib.request.urlopen(request, timeout=AT_ONCE) as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            return error.code
        except (http.client.HTTPException, OSError) as error:
            raise AssertionError(f"no answer: {error!r}") from error

    release = "/wan_distributed/release"
    assert answer(release, b"[" * 50_000) == 400
    assert answer(release, b'{"group":' * 7_000) == 400
    assert answer(release, b"9" * 5000) == 400
    assert answer(release, b"\xff\xfe\xfd") == 400
    assert answer(release, b'["a"]') == 400
    assert answer(release, b'{"a": "' + b"x" * 2_000_000 + b'"}') == 413
    assert answer(release, b'{"group": {"a": []}}') == 200
    # ComfyUI's own, which this pack listens to.
    for body in (b"[1]", b'"x"', b"[" * 50_000):
        assert answer("/free", body) == 500
    assert answer("/free", b"{}") in (200, 500)
