"""One ComfyUI with the pack and the tiny models, for all tests that need a real one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import OLDEST_PAGE, Browser, page_folder, start_browser
from serving import INFERENCE, Comfy, kept, saving
from wan_pack.demo.client import Run
from wan_pack.demo.comfyui import CHOSEN, Server
from wan_pack.demo.example import ROOT, Prompt, node_id
from wan_pack.demo.tiny_model import write_comfyui_files, write_other_comfyui_files


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    base = tmp_path_factory.mktemp("comfyui")
    model = write_comfyui_files(base / "models")
    write_other_comfyui_files(base / "models")
    (base / "custom_nodes").mkdir()
    shutil.copy(Path(__file__).with_name("core_conditioning_node.py"), base / "custom_nodes")
    # Another ComfyUI brings another page along.
    page = ["--front-end-root", str(page_folder(OLDEST_PAGE))] if os.environ.get(CHOSEN) else []
    with Server(base, pack=ROOT, arguments=page) as server:
        comfy = Comfy(server, model)
        # The examples begin with the picture that ComfyUI brings along.
        comfy.picture(320, 200, "example.png")
        yield comfy


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Not for longer: its pages are drawn over and over, whether anybody looks or not."""
    with start_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def finished_prompt(comfy: Comfy) -> Prompt:
    return saving(kept(comfy.example(sample_steps=3, num_frames=6)))


@pytest.fixture(scope="session")
def finished(comfy: Comfy, finished_prompt: Prompt) -> Run:
    """One run of the example that several tests look at."""
    return comfy.run(finished_prompt)


@pytest.fixture(scope="module")
def stay_warm(comfy: Comfy) -> Iterator[None]:
    """For modules whose tests go on with the processes of the test before: to start some takes longest."""
    yield
    comfy.server.request("/wan_distributed/release", {})
    comfy.wait_until_idle()


@pytest.fixture(autouse=True)
def _nothing_left(comfy: Comfy, request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does, no process and no folder of a job outlives it, but those that `stay_warm`."""
    yield
    if "stay_warm" in request.fixturenames:
        comfy.wait_until_at_rest()
    else:
        comfy.wait_until_idle()


@pytest.fixture(scope="session")
def inference_id(comfy: Comfy) -> str:
    return node_id(comfy.example(), INFERENCE)
