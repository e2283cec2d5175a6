"""ComfyUI's own code in this process: no server, and gone from `sys.modules` between the tests that use it."""

from __future__ import annotations

import functools
import gc
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from core_sampling import KINDS, Modules, TwoModels, ksampler, write_expert
from wan_pack.demo.comfyui import comfyui_folder

NODES = ("nodes", *(f"comfy_extras.nodes_{name}" for name in ("custom_sampler", "easycache", "context_windows",
         "model_advanced", "wan", "slg", "cfg", "torch_compile", "hooks",
         "camera_trajectory")))  # fmt: skip


@pytest.fixture(scope="session")
def core_modules() -> dict[str, ModuleType]:
    """ComfyUI's modules by name, on the CPU."""
    before = dict(sys.modules)
    sys.path.insert(0, str(comfyui_folder()))
    try:
        importlib.import_module("comfy.cli_args").args.cpu = True
        for name in ("comfy.sample", "comfy.sd", *NODES):
            importlib.import_module(name)
        # As after the collection (tests/conftest.py): all of this stays.
        gc.collect()
        gc.freeze()
        roots = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfy_config", "nodes", "folder_paths"}
        roots |= {"node_helpers", "latent_preview", "protocol", "server", "comfyui_version", "execution", "utils"}
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in roots}
    finally:
        sys.path.remove(str(comfyui_folder()))
        for name in sys.modules.keys() - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(comfyui_folder())):
                del sys.modules[name]
        sys.modules.update(before)


@pytest.fixture
def core(core_modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    monkeypatch.syspath_prepend(str(comfyui_folder()))
    for name, module in core_modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield {**core_modules, "sampled": functools.partial(ksampler, core_modules["nodes"])}


@pytest.fixture(scope="session")
def expert_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Variant -> a transformer."""
    folder = tmp_path_factory.mktemp("core")
    return {kind: write_expert(folder, kind) for kind in KINDS if kind != "Animate"}


@pytest.fixture(scope="session")
def animate_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Animate's, which is large."""
    return write_expert(tmp_path_factory.mktemp("animate"), "Animate")


@pytest.fixture
def t2v(core: Modules, expert_files: dict[str, Path], tmp_path: Path) -> TwoModels:
    return TwoModels(core, expert_files["T2V"], tmp_path)
