"""Which model files there are: ComfyUI's model folders and checkpoints in the official folder layout.

An official checkpoint is a folder (Wan2.2-T2V-A14B) that holds one folder per expert (high_noise_model,
low_noise_model), the VAE and the text encoder. ComfyUI lists files only, so folders are found here, under the
model folders "wan", "diffusers" and "diffusion_models".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from ..wan.tokenizer_files import find_tokenizer_files
from . import host

FOLDER_KEYS = ("wan", "diffusers", "diffusion_models")
EXPERT_FILE = "diffusion_pytorch_model*.safetensors"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
VAE_FILE = "Wan2*_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5*.pth"


def expert_names() -> list[str]:
    """Single files and official expert folders, as the loader shows them."""
    folders = _expert_folders()
    files = [
        name
        for name in host.model_files("diffusion_models")
        if name.endswith(".safetensors") and not SHARD.search(name) and Path(name).parent.as_posix() not in folders
    ]
    return files + sorted(folders)


def expert_files(name: str) -> tuple[Path, ...]:
    """The safetensors files of one expert, every shard of it. Raises ValueError if one is missing."""
    from ..wan.checkpoint import checkpoint_files

    folder = _expert_folders().get(name)
    return checkpoint_files(folder if folder is not None else host.model_path("diffusion_models", name))


def vae_names() -> list[str]:
    """Files of the VAE folder and of official checkpoint folders."""
    return host.model_files("vae") + sorted(_files_beside_experts(VAE_FILE))


def vae_files(name: str) -> tuple[Path, ...]:
    """The file behind one of `vae_names()`."""
    beside = _files_beside_experts(VAE_FILE)
    return (beside[name] if name in beside else host.model_path("vae", name),)


def text_encoder_names() -> list[str]:
    """Files of the text encoder folder and of official checkpoint folders."""
    return host.model_files("text_encoders") + sorted(_files_beside_experts(TEXT_ENCODER_FILE))


def text_encoder_files(name: str) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The text encoder's file and, if there are any, the tokenizer files beside it."""
    beside = _files_beside_experts(TEXT_ENCODER_FILE)
    path = beside[name] if name in beside else host.model_path("text_encoders", name)
    return (path,), find_tokenizer_files(path)


def _expert_folders() -> dict[str, Path]:
    """Shown name -> folder, for each folder that holds one official expert."""
    found: dict[str, Path] = {}
    for key in FOLDER_KEYS:
        for root in host.model_folders(key):
            for folder in _subfolders(root, depth=2):
                if any(folder.glob(EXPERT_FILE)) and _is_official(folder):
                    found.setdefault(folder.relative_to(root).as_posix(), folder)
    return found


def _subfolders(root: Path, depth: int) -> Iterator[Path]:
    if depth == 0 or not root.is_dir():
        return
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        yield folder
        yield from _subfolders(folder, depth - 1)


def _is_official(folder: Path) -> bool:
    """Whether config.json is the official one; a diffusers folder has files of the same name in it."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("_class_name") == "WanModel"


def _files_beside_experts(pattern: str) -> dict[str, Path]:
    """Shown name -> file, for the files that official checkpoints keep beside their expert folders."""
    found: dict[str, Path] = {}
    for name, folder in _expert_folders().items():
        for path in sorted(folder.parent.glob(pattern)):
            found.setdefault((Path(name).parent / path.name).as_posix(), path)
    return found
