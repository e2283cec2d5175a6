"""Which model files there are: ComfyUI's model folders, all-in-one checkpoints, official and diffusers folders.

An official checkpoint is a folder (Wan2.2-T2V-A14B) that holds one folder per expert (high_noise_model,
low_noise_model), the VAE and the text encoder; that of TI2V-5B holds its one transformer itself. A diffusers checkpoint
is a folder of folders (transformer, transformer_2, vae, text_encoder). ComfyUI lists files only, so folders are found
here, under the model folders "wan", "diffusers" and "diffusion_models".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...distributed.job.job import FileIdentity
from ...wan.files.model_folder import TRANSFORMER_CLASSES, folder_files, read_json_object
from ...wan.text.tokenizer_files import find_tokenizer_files
from ..host import host

FOLDER_KEYS = ("wan", "diffusers", "diffusion_models")
CHECKPOINTS = "checkpoints"
"""Shown in front of the names of all-in-one files, which hold transformer, VAE and text encoder."""
EXPERT_FILE = "diffusion_pytorch_model*.safetensors"
LATER_PART = re.compile(r"-(?!0*1-of-)\d+-of-\d+\.(?:safetensors|gguf)$")
"""Of a model in several files, the first of which stands for all."""
VAE_FILE = "Wan2*_VAE.pth"
VAE_FOLDER = "vae"
TEXT_ENCODER_FILE = "models_t5_umt5*.pth"
TEXT_ENCODER_FOLDER = "text_encoder"
CLIP_FILE = "models_clip*.pth"
CLIP_FOLDER = "image_encoder"
PARTS = (VAE_FOLDER, TEXT_ENCODER_FOLDER, CLIP_FOLDER)
"""Folders of a diffusers checkpoint beside its transformers."""


def expert_names() -> list[str]:
    """Transformers as the loader shows them: single files, folders, all-in-one checkpoints."""
    folders = _expert_folders()
    # ComfyUI lists a folder's files one by one, those of the VAE and the text encoder too.
    parts = {(Path(name).parent / part).as_posix() for name in folders for part in PARTS}
    files = [
        name
        for name in host.model_files("diffusion_models")
        if name.endswith(".safetensors")
        and not LATER_PART.search(name)
        and Path(name).parent.as_posix() not in parts.union(folders)
    ]
    gguf = [name for name in _gguf_files("diffusion_models") if not LATER_PART.search(name)]
    return _unique(files, gguf, sorted(folders), _checkpoint_names())


def expert_files(name: str) -> tuple[Path, ...]:
    """The files of one of `expert_names()`, every shard of it. Raises ValueError if one is missing."""
    from ...wan.checkpoint.checkpoint import checkpoint_files

    folder = _expert_folders().get(name)
    return checkpoint_files(folder if folder is not None else _file("diffusion_models", name))


def vae_names() -> list[str]:
    """Files of the VAE folder, VAEs of official and diffusers folders, all-in-one checkpoints."""
    return _unique(
        host.model_files("vae"), _gguf_files("vae"), sorted(_beside_experts(VAE_FILE, VAE_FOLDER)), _checkpoint_names()
    )


def vae_files(name: str) -> tuple[Path, ...]:
    """The files of one of `vae_names()`."""
    found = _beside_experts(VAE_FILE, VAE_FOLDER).get(name)
    return folder_files(found if found is not None else _file("vae", name), "a Wan VAE")


def text_encoder_names() -> list[str]:
    """Files of the text encoder folder, encoders of official and diffusers folders, all-in-one checkpoints."""
    return _unique(
        host.model_files("text_encoders"),
        _gguf_files("text_encoders"),
        sorted(_beside_experts(TEXT_ENCODER_FILE, TEXT_ENCODER_FOLDER)),
        _checkpoint_names(),
    )


def text_encoder_files(name: str) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The files of one of `text_encoder_names()` and, if there are any, the tokenizer files beside it."""
    found = _beside_experts(TEXT_ENCODER_FILE, TEXT_ENCODER_FOLDER).get(name)
    files = folder_files(found if found is not None else _file("text_encoders", name), "a umT5 text encoder")
    return files, find_tokenizer_files(files[0])


def clip_vision_names() -> list[str]:
    """Files of the CLIP vision folder, and what official and diffusers folders hold of it."""
    return _unique(host.model_files("clip_vision"), sorted(_beside_experts(CLIP_FILE, CLIP_FOLDER)))


def clip_vision_files(name: str) -> tuple[Path, ...]:
    """The files of one of `clip_vision_names()`."""
    found = _beside_experts(CLIP_FILE, CLIP_FOLDER).get(name)
    return folder_files(found if found is not None else _file("clip_vision", name), "a CLIP vision model")


def identities(paths: Iterable[Path]) -> tuple[FileIdentity, ...]:
    """The files as they are now, as a job names them. Raises ValueError if one is gone."""
    return tuple(identity(path) for path in paths)


def identity(path: Path) -> FileIdentity:
    """Of one file."""
    try:
        return FileIdentity.of(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def fingerprint(paths: Iterable[Path]) -> str:
    """Changes when one of the files does."""
    lines = []
    for path in paths:
        stat = path.stat()
        lines.append(f"{path} {stat.st_size} {stat.st_mtime_ns}")
    return "\n".join(lines)


def _unique(*lists: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for names in lists for name in names))


def _file(key: str, name: str) -> Path:
    """Where a file that the lists above name is."""
    gguf = _gguf_files(key)
    if name in gguf:
        return gguf[name]
    if name in _checkpoint_names() and name not in host.model_files(key):
        return host.model_path(CHECKPOINTS, name.removeprefix(f"{CHECKPOINTS}/"))
    return host.model_path(key, name)


def _checkpoint_names() -> list[str]:
    return [f"{CHECKPOINTS}/{name}" for name in host.model_files(CHECKPOINTS) if name.endswith(".safetensors")]


def listed_names(key: str) -> frozenset[str]:
    """Names of all files in a model folder that a workflow may choose."""
    return frozenset(host.model_files(key)).union(_gguf_files(key))


def _gguf_files(key: str) -> dict[str, Path]:
    """Shown name -> file. ComfyUI itself leaves .gguf files out of its lists."""
    found: dict[str, Path] = {}
    for root in host.model_folders(key):
        # Through links, as ComfyUI walks its model folders.
        for folder, _, names in os.walk(root, followlinks=True):
            for path in (Path(folder, name) for name in names if name.endswith(".gguf")):
                found.setdefault(path.relative_to(root).as_posix(), path)
    return dict(sorted(found.items()))


def _expert_folders() -> dict[str, Path]:
    """Shown name -> folder, for each folder that holds one transformer."""
    found: dict[str, Path] = {}
    for key in FOLDER_KEYS:
        for root in host.model_folders(key):
            for folder in _subfolders(root, depth=2):
                if any(folder.glob(EXPERT_FILE)) and _is_transformer(folder):
                    found.setdefault(folder.relative_to(root).as_posix(), folder)
    return found


def _subfolders(root: Path, depth: int) -> Iterator[Path]:
    if depth == 0 or not root.is_dir():
        return
    for folder in (path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        yield folder
        yield from _subfolders(folder, depth - 1)


def _is_transformer(folder: Path) -> bool:
    """Whether config.json is a Wan transformer's; diffusers keeps a VAE in files of the same names."""
    try:
        return read_json_object(folder / "config.json").get("_class_name") in TRANSFORMER_CLASSES
    except ValueError:
        return False


def _beside_experts(file: str, folder: str) -> dict[str, Path]:
    """Shown name -> what a checkpoint folder holds beside its transformers: official files, or a diffusers folder."""
    found: dict[str, Path] = {}
    for name, expert in _expert_folders().items():
        # TI2V-5B's official folder is its transformer's folder.
        for home, shown in ((expert.parent, Path(name).parent), (expert, Path(name))):
            for path in home.glob(file):
                found.setdefault((shown / path.name).as_posix(), path)
        if any((expert.parent / folder).glob("*.safetensors")):
            found.setdefault((Path(name).parent / folder).as_posix(), expert.parent / folder)
    return found
