"""The weight files of what a user picked: one file, or a folder as diffusers and transformers save it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .headers import MAX_PARTS, brief
from .json_text import parse_json
from .regular_files import regular

MAX_JSON_BYTES = 4 << 20
"""Of an index or a config. 14B's index takes 0.1 MB."""
MAX_SHARDS = 256
"""Of one model; in the releases at most 12."""
MAX_FILE_NAME_BYTES = 255
"""Of every file system that models are kept on."""

_FILES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
"""The first that is there, whole or in shards, is taken: safetensors before pickles, full precision before half."""


def folder_files(path: str | Path, expected: str) -> tuple[Path, ...]:
    """Every weight file of one model.

    Args:
        path: a file, or a folder with one model in it (diffusers' vae/, text_encoder/).
        expected: what the caller wants, for messages.
    Raises:
        ValueError: the folder holds no such file, or its index is damaged or names files that are not there.
    """
    path = Path(path)
    if not path.is_dir():
        return (path,)
    for name in _FILES:
        if (path / name).is_file():
            return (path / name,)
        for index in _index_names(name):
            if (path / index).is_file():
                return shard_files(path / index)
    raise ValueError(f"{path} is a folder that holds none of {', '.join(_FILES)}; expected {expected}")


def shard_files(index: Path) -> tuple[Path, ...]:
    """The files that an index names, each once.

    Raises:
        ValueError: the index is damaged, or names something that is not a file beside it.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    values = list(weight_map.values())
    wrong = [name for name in values if not isinstance(name, str)]
    names = sorted(set(values)) if not wrong else []
    if len(names) > MAX_SHARDS:
        raise ValueError(f"{index} names {len(names)} files; at most {MAX_SHARDS} are allowed")
    # What no file can be called is not looked for: the system's own error would say less.
    wrong += [name for name in names if not _is_file_name(name) or not (index.parent / name).is_file()]
    if wrong:
        raise ValueError(f"{index} names {brief(wrong[0])}, which is not a file in {index.parent}")
    return tuple(index.parent / name for name in names)


def read_json_object(path: str | Path) -> dict[str, Any]:
    """A JSON file of bounded size whose value is an object. ValueError, naming the file, if it is anything else."""
    path = Path(path)
    try:
        with open(path, "rb", opener=regular) as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has more than {MAX_JSON_BYTES} bytes")
    try:
        value = parse_json(data, MAX_PARTS)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {brief(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def _index_names(name: str) -> tuple[str, ...]:
    """What the index of a file's shards is called: model.safetensors.index.json, with a variant in either place."""
    stem, _, rest = name.partition(".")
    variant, _, suffix = rest.rpartition(".")
    if not variant:
        return (f"{name}.index.json",)
    return (f"{stem}.{suffix}.index.{variant}.json", f"{name}.index.json")


def _is_file_name(name: str) -> bool:
    return name.isprintable() and Path(name).name == name and len(name.encode()) <= MAX_FILE_NAME_BYTES
