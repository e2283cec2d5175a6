"""One ComfyUI with the pack and the tiny model, for all tests that need a real one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import INFERENCE, Comfy
from wan_pack.demo.client import Run
from wan_pack.demo.comfyui import Server
from wan_pack.demo.example import ROOT, node_id
from wan_pack.demo.tiny_model import write_comfyui_files


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    base = tmp_path_factory.mktemp("comfyui")
    model = write_comfyui_files(base / "models")
    with Server(base, pack=ROOT) as server:
        yield Comfy(server, model)


@pytest.fixture(scope="session")
def finished(comfy: Comfy) -> Run:
    """One run of the example that several tests look at."""
    return comfy.run(comfy.example(sample_steps=3, num_frames=9))


@pytest.fixture(autouse=True)
def _nothing_left(comfy: Comfy) -> Iterator[None]:
    """Whatever a test does, no process of a job outlives it."""
    yield
    comfy.wait_until_idle()


@pytest.fixture(scope="session")
def inference_id(comfy: Comfy) -> str:
    return node_id(comfy.example(), INFERENCE)
