"""What the node tests feed in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from wan_pack.demo.example import TinyModel
from wan_pack.distributed.job.job import FileIdentity, ModelFiles, Sampling
from wan_pack.nodes.host import host
from wan_pack.nodes.inference.inference import WanVideoDistributedInference
from wan_pack.nodes.sockets.video_inputs import VideoInputs


def rows(n: int, padding: int = 0, dim: int = 8) -> torch.Tensor:
    return torch.cat([torch.ones(n, dim), torch.zeros(padding, dim)])


BOTH = {"prompt_embeds": [rows(3, dim=64)], "negative_prompt_embeds": [rows(4, dim=64)]}
"""A text_embeds for the tiny model."""


def sampling(**values: Any) -> Sampling:
    """A video of 64x48 pixels, 5 frames: latents of 2 frames, 6 rows and 8 columns (TI2V-5B: 3 and 4)."""
    return Sampling(**{"width": 64, "height": 48, "num_frames": 5, "steps": 4, "seed": 1, **values})


def identity(path: Path) -> FileIdentity:
    """Of a file that is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return FileIdentity.of(path)


def model_files(folder: Path) -> ModelFiles:
    """Both experts and a VAE, files without content in `folder`."""
    high, low, vae = ((identity(folder / name),) for name in ("high.safetensors", "low.safetensors", "vae.safetensors"))
    return ModelFiles(high_noise=high, low_noise=low, vae=vae)


def tiny_files(models: Path) -> ModelFiles:
    """The tiny model in ComfyUI's model folders."""
    names = TinyModel()
    return ModelFiles(
        high_noise=(FileIdentity.of(models / "diffusion_models" / names.high_noise),),
        low_noise=(FileIdentity.of(models / "diffusion_models" / names.low_noise),),
        vae=(FileIdentity.of(models / "vae" / names.vae),),
    )


def use_model_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts ComfyUI's model folders into `folder`, one for each kind of model."""

    def files(key: str) -> list[str]:
        root = folder / key
        paths = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".gguf")
        return sorted(path.relative_to(root).as_posix() for path in paths)

    monkeypatch.setattr(host, "model_folders", lambda key: [folder / key])
    monkeypatch.setattr(host, "model_files", files)
    monkeypatch.setattr(host, "model_path", lambda key, name: folder / key / name)


def inputs_of(node: type) -> dict[str, tuple[Any, dict[str, Any]]]:
    types = node.INPUT_TYPES()
    return {**types["required"], **types.get("optional", {})}


def settings(**values: Any) -> dict[str, Any]:
    """The node's inputs as ComfyUI passes them: defaults, then `values`. Needs `use_model_folders`."""
    defaults = {name: options["default"] for name, (_, options) in widgets().items()}
    return {**defaults, **values}


def asked_for(**values: Any) -> VideoInputs:
    """The same as the node takes them: typed. `model` is none unless given."""
    return VideoInputs.of({"model": None, **settings(**values)})


def widgets() -> dict[str, tuple[Any, dict[str, Any]]]:
    """The inference node's inputs that have a default. Needs `use_model_folders`."""
    inputs = {name: (entry[0], entry[1]) for name, entry in inputs_of(WanVideoDistributedInference).items()}
    return {name: entry for name, entry in inputs.items() if "default" in entry[1]}
