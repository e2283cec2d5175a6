"""What an API client or another pack's node puts into a socket: a value of another type, a path in a value."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from batching import Node
from node_inputs import BOTH, identity, inputs_of, settings, tiny_files, use_model_folders
from wan_pack.demo.example import TinyModel
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.machine import nvidia_smi
from wan_pack.nodes import NODE_CLASS_MAPPINGS
from wan_pack.nodes.batch import run
from wan_pack.nodes.host import host
from wan_pack.nodes.host.declared import kind_of
from wan_pack.nodes.inference import inference as inference_module
from wan_pack.nodes.models.loras import lora_files
from wan_pack.nodes.models.model_paths import listed_file
from wan_pack.wan.files.headers import read_header

NAMES = TinyModel()
WITHOUT_SOCKETS = ("WanVideoDistributedConfig", "LoadWanVideoT5TextEncoder")
WIDGETS = ("INT", "FLOAT", "BOOLEAN", "STRING")
NOISE = torch.ones(1, 16, 2, 6, 8)
JUNK: list[Any] = [
    "x", "/etc/passwd", "\ud800", "x" * 1_000_000, 1, True, False, 10**400, float("nan"), {"a": 1}, {5: 1},
    [1], [[1, 2]], [["x", {}]], [["x", "y"]], [[None, {}]], ["x", "y"], [{}], [{"path": 5}], [{"path": ["x"]}],
    [{"path": "/etc/passwd"}], [{"path": "fox", "strength": "x"}], [{"path": "a\0b", "name": "x" * 999_999}],
    {"samples": "x"}, {"samples": [[1.0]]}, {"samples": torch.ones(3)}, {"samples": NOISE, "noise_mask": "x"},
    {"samples": NOISE.to(torch.complex64)}, {"samples": NOISE.to("meta")}, {"samples": NOISE.to_sparse()},
    {"prompt_embeds": "x"}, {"prompt_embeds": ["x"]}, {"prompt_embeds": 5}, {"prompt_embeds": [[1.0]]},
    {"prompt_embeds": torch.ones(2, 2, 2, 2)}, {"prompt_embeds": [np.ones((2, 2))]},
    [[torch.ones(1, 3, 64), {"strength": torch.ones(2)}]],
    [[torch.ones(1, 3, 64), {5: 1, "y" * 99_999: 2, "control": 3}]],
    [[torch.ones(1, 3, 64), {"concat_latent_image": "x", "concat_mask": "y"}]], {"image_embeds": "x"},
    {"image_embeds": torch.ones(16, 2, 6, 8), "mask": "x"}, {"target_shape": "abcd"}, {"target_shape": [1, 2]},
    {"target_shape": [16, "2", 6, 8]}, {"target_shape": 5}, {"target_shape": [16, 2, 6, 8], "extra_latents": "x"},
    {"target_shape": [16, 2, 6, 8], "extra_latents": [5]}, {"z" * 999_999: 1, 5: 2},
    np.ones((1, 48, 64, 3)), torch.ones(0, 48, 64, 3), torch.ones(1, 48, 64, 3, dtype=torch.complex64),
    SimpleNamespace(model=SimpleNamespace(pipeline="x")), SimpleNamespace(model="x"), object(),
    SimpleNamespace(model=SimpleNamespace(pipeline={"base_path": "/etc/passwd"})),
    SimpleNamespace(model=SimpleNamespace(pipeline={"base_path": b"/etc/passwd", "lora": "x"})), int,
]  # fmt: skip


@pytest.fixture
def folders(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's model folders with the tiny model and a LoRA."""
    models = tmp_path / "models"
    use_model_folders(models, monkeypatch)
    for key in ("diffusion_models", "vae", "text_encoders"):
        shutil.copytree(tiny_models / key, models / key)
    identity(models / "loras" / "fox.safetensors")
    return models


def missing(*_: Any, **__: Any) -> None:
    raise FileNotFoundError("nvidia-smi")


@pytest.fixture
def node(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """What ComfyUI is to the nodes. A job that starts all the same fails the test."""
    node = Node(tiny_files(folders), tmp_path, monkeypatch)

    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("a job was started")

    monkeypatch.setattr(inference_module, "run_job", start)
    monkeypatch.setattr(run, "run_job", start)
    # To look for it two thousand times in vain takes longer than all the rest.
    monkeypatch.setattr(nvidia_smi, "ask_program", missing)
    return node


def valid(node: Node, kind: str) -> dict[str, Any]:
    """Inputs of a node that would do."""
    if kind == "LoadWanVideoModel":
        return {"high_noise": NAMES.high_noise, "low_noise": NAMES.low_noise, "vae": NAMES.vae}
    if kind == "LoadDiffusionModelDistributed":
        return {"unet_name": NAMES.high_noise}
    if kind == "LoadVAEDistributed":
        return {"vae_name": NAMES.vae}
    if kind == "WanVideoDistributedLora":
        return {"lora": "fox.safetensors", "strength": 1.0}
    if kind == "WanVideoTextEncode":
        return {"positive_prompt": "a fox", "negative_prompt": ""}
    if kind == "WanVideoDistributedDoctor":
        return {}
    if kind == "WanVideoDistributedBatch":
        return node.inputs(text_embeds=BOTH, on_error="return")
    small = {"width": 64, "height": 48, "num_frames": 5, "gpu_count": 1, "use_fsdp": False}
    return settings(model=node.model, text_embeds=BOTH, on_error="return", **small)


@pytest.mark.parametrize("kind", [kind for kind in NODE_CLASS_MAPPINGS if kind not in WITHOUT_SOCKETS])
def test_fault_31_a_socket_refuses_what_is_not_its_type(node: Node, kind: str) -> None:
    made = NODE_CLASS_MAPPINGS[kind]
    sockets = [name for name, entry in inputs_of(made).items() if isinstance(entry[0], str) and entry[0] not in WIDGETS]
    assert sockets
    sound = valid(node, kind)
    for name, value in itertools.product(sockets, JUNK):
        given = {**sound, name: value}
        if name == "low_noise_model":
            given["model"] = SimpleNamespace(model=SimpleNamespace(pipeline={"base_path": NAMES.high_noise}))
        if "on_error" in given:
            # Returned, so it is one of the errors that on_error knows.
            results = getattr(made(), made.FUNCTION)(**given)["result"]
            message = next(text for text in results if str(text).startswith("error: "))
        else:
            with pytest.raises(ValueError) as refused:
                outputs = getattr(made(), made.FUNCTION)(**given)
                # A list of LoRAs is handed on; what its entries hold is for the loader to say.
                lora_files(outputs[0], name)
            message = str(refused.value)
        assert name in message and len(message) < 1500, message[:300]


# Paths


@contextmanager
def in_time(seconds: float = 2.0) -> Iterator[None]:
    """Fails instead of waiting for ever, as the opening of a named pipe does."""

    def late(*_: Any) -> None:
        raise AssertionError(f"not done after {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture
def places(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model folders of which ComfyUI lists everything, and beside them a folder with files of the same kinds."""

    def everything(key: str) -> list[str]:
        root = folders / key
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())

    monkeypatch.setattr(host, "model_files", everything)
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(folders / "diffusion_models" / NAMES.high_noise, outside / "there.safetensors")
    for folder in (outside, folders / "loras"):
        os.mkfifo(folder / "pipe.safetensors")
        (folder / "gone.safetensors").symlink_to(tmp_path / "nowhere")
        (folder / "folder.safetensors").mkdir()
    (folders / "loras" / "device.safetensors").symlink_to("/dev/zero")
    return tmp_path


REFUSED = [
    "outside/there.safetensors", "outside/missing.safetensors", "outside/pipe.safetensors", "outside/gone.safetensors",
    "outside/folder.safetensors", "outside", "models/loras/missing.safetensors", "models/loras/pipe.safetensors",
    "models/loras/gone.safetensors", "models/loras/folder.safetensors", "models/loras/device.safetensors",
    "models/loras", "models/loras/../../outside/there.safetensors", f"models/diffusion_models/{NAMES.high_noise}",
    "models/loras/fox.safetensors/x", "models/loras/../loras2/fox.safetensors",
]  # fmt: skip


def refusal(path: str) -> str:
    with in_time(), pytest.raises(ValueError) as refused:
        lora_files([{"path": path, "name": "lora"}], "high_noise_lora")
    return str(refused.value)


def test_fault_31_a_path_outside_the_folders_tells_nothing(places: Path) -> None:
    """One sentence for all: it does not say what is there."""
    for path in [str(places / path) for path in REFUSED] + ["/dev/zero", "/proc/self/mem", "/etc/passwd", "/"]:
        sentence = refusal(path)
        assert sentence.startswith("path of high_noise_lora: lora is '") and path[-20:] in sentence
        assert sentence.endswith("it must be a file that ComfyUI lists in its folders for loras")
    for path in (
        "../fox.safetensors",
        "a\0b",
        f"{places}/a\0b",
        f"{places}/\ud800",
        "\ud800",
        "x" * 100_000,
        ".",
        "~/x",
        "fox.safetensors\0",
        "//",
    ):
        assert refusal(path).endswith("it must be a file that ComfyUI lists in its folders for loras")


def test_fault_31_a_checkpoint_is_of_its_own_folder(places: Path) -> None:
    loras = places / "models" / "loras" / "fox.safetensors"
    for path in (loras, places / "outside" / "there.safetensors", places / "outside" / "pipe.safetensors"):
        with in_time(), pytest.raises(ValueError, match="it must be a file that ComfyUI lists in its folders for diff"):
            listed_file(str(path), "diffusion_models", "unet_gguf", name="the checkpoint of model")


def test_listed_files_are_found_by_path_and_by_name(places: Path) -> None:
    folder = places / "models" / "loras"
    fox = folder / "fox.safetensors"
    # As people do it: one file, or the whole folder, is on another disk.
    (folder / "linked.safetensors").symlink_to(places / "outside" / "there.safetensors")
    (places / "elsewhere").symlink_to(folder)
    for value, expected in {
        str(fox): fox,
        "fox": fox,
        "fox.safetensors": fox,
        f"{folder}/../loras/fox.safetensors": fox,
        f"{places}/elsewhere/fox.safetensors": fox,
        str(folder / "linked.safetensors"): folder / "linked.safetensors",
        "linked": folder / "linked.safetensors",
    }.items():
        assert listed_file(value, "loras", name="path") == expected
    with pytest.raises(ValueError):
        listed_file(str(places / "outside" / "there.safetensors"), "loras", name="path")


def test_a_model_folder_may_be_a_link_or_one_of_several(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, second = places / "disk", places / "second"
    for folder in (real, second):
        identity(folder / "fox.safetensors")
    (places / "link").symlink_to(real)
    monkeypatch.setattr(host, "model_folders", lambda key: [places / "link", second])
    monkeypatch.setattr(host, "model_files", lambda key: ["fox.safetensors"])
    for path, expected in {
        real / "fox.safetensors": places / "link" / "fox.safetensors",
        places / "link" / "fox.safetensors": places / "link" / "fox.safetensors",
        second / "fox.safetensors": second / "fox.safetensors",
    }.items():
        assert listed_file(str(path), "loras", name="path") == expected


def test_fault_31_what_became_a_pipe_is_not_waited_for(places: Path) -> None:
    pipe = places / "outside" / "pipe.safetensors"
    with in_time(), pytest.raises(ValueError, match="cannot be read: it is not a regular file"):
        read_header(pipe)
    file = identity(places / "file.safetensors")
    os.unlink(file.path)
    os.mkfifo(file.path)
    with in_time(), pytest.raises(JobError, match=r"file.safetensors cannot be read: .* must be a regular file"):
        file.check_unchanged()


def test_a_type_is_named_without_its_content() -> None:
    assert kind_of({"secret": 1}) == "dict"
    assert kind_of(torch.ones(2, 3)) == "Tensor of shape [2, 3]"
