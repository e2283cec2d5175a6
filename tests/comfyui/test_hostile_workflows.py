"""Hostile text in every text input, through ComfyUI's own API: refused with a sentence, or only text."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest
from serving import INFERENCE, Comfy
from wan_pack.demo.client import Refused
from wan_pack.demo.example import node_of

PAYLOADS = (
    "../x", "/etc/passwd", "a\0b", "-rf", "--nproc-per-node=9", "$(id)", "${local_rank}", "; rm -rf / #", "\n",
    "\u202egnp.exe", "x" * 100_000,
)  # fmt: skip
LISTS = [
    ("LoadWanVideoModel", "high_noise"), ("LoadWanVideoModel", "low_noise"), ("LoadWanVideoModel", "vae"),
    ("LoadWanVideoModel", "text_encoder"), ("LoadWanVideoT5TextEncoder", "model_name"), (INFERENCE, "vae"),
    (INFERENCE, "scheduler"), (INFERENCE, "preset"), (INFERENCE, "on_error"),
    ("WanVideoDistributedConfig", "mixed_precision"), ("WanVideoDistributedConfig", "ulysses_engine"),
]  # fmt: skip


def files(folder: Path) -> set[Path]:
    return set(folder.parent.rglob("*"))


def outcome(comfy: Comfy, kind: str, name: str, payload: str) -> tuple[str, Any]:
    prompt = comfy.example(on_error="raise")
    node_of(prompt, kind)["inputs"][name] = payload
    try:
        return comfy.run(prompt).ending
    except Refused as refusal:
        return "refused", refusal.answer
    except urllib.error.HTTPError as error:
        return "refused", error.read()


@pytest.mark.parametrize(("kind", "name"), LISTS)
def test_fault_23_what_is_in_no_list_is_refused(comfy: Comfy, kind: str, name: str) -> None:
    for payload in PAYLOADS:
        assert outcome(comfy, kind, name, payload)[0] == "refused", payload[:20]


@pytest.mark.parametrize(("kind", "name"), [("WanVideoDistributedConfig", "gpu_ids")])
def test_fault_23_gpus_that_are_not_there_are_refused(comfy: Comfy, kind: str, name: str) -> None:
    before = files(comfy.server.base)
    for payload in (text for text in PAYLOADS if text.strip()):
        ending, data = outcome(comfy, kind, name, payload)
        assert ending == "execution_error" and data["exception_message"].startswith("gpu_ids is "), payload[:20]
    assert files(comfy.server.base) == before


@pytest.mark.parametrize("payload", ["../x", "../../x/y", "/etc/x", "a\0b", "a/../../x", "x" * 100_000])
def test_fault_23_a_video_stays_in_the_output_folder(comfy: Comfy, payload: str) -> None:
    (comfy.server.base / "output").mkdir(exist_ok=True)  # which ComfyUI makes for the first video
    before = files(comfy.server.base)
    ending, data = outcome(comfy, INFERENCE, "filename_prefix", payload)
    assert ending == "execution_error", data
    assert data["exception_message"].startswith("filename_prefix is ")
    assert files(comfy.server.base) == before


def test_fault_24_a_hostile_prompt_is_only_a_prompt(comfy: Comfy) -> None:
    """Encoded inside the job, so that it goes through job.json to every process."""
    # The folder of all jobs, which the first of a server's makes.
    ours = {comfy.server.base / "temp" / "wan_distributed"}
    before = {path for path in files(comfy.server.base) if "output" not in path.parts} | ours
    prompt = comfy.example(prompt=" ".join(PAYLOADS[:-1]), negative_prompt="\n".join(PAYLOADS[:-1]), gpu_count=1)
    inputs = node_of(prompt, INFERENCE)["inputs"]
    del inputs["text_embeds"], inputs["config"]
    node_of(prompt, "LoadWanVideoModel")["inputs"]["text_encoder"] = comfy.model.text_encoder
    run = comfy.run(prompt)
    assert run.ending[0] == "execution_success", run.ending
    comfy.wait_until_idle()
    assert {path for path in files(comfy.server.base) if "output" not in path.parts} == before
