"""The weight files of what a user picked: one file, or a folder as diffusers and transformers save it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .headers import MAX_PARTS, brief
from .json_text import parse_json
from .regular_files import regular

TRANSFORMER_CLASSES = {
    "WanModel": "num_heads",
    "VaceWanModel": "num_heads",
    "WanAnimateModel": "num_heads",
    "WanTransformer3DModel": "num_attention_heads",
    "WanVACETransformer3DModel": "num_attention_heads",
    "WanAnimateTransformer3DModel": "num_attention_heads",
}
"""`_class_name` in a transformer's config.json, official and of diffusers -> what it calls the number of heads."""
MAX_JSON_BYTES = 4 << 20
"""Of an index or a config. 14B's index takes 0.1 MB."""
MAX_SHARDS = 256
"""Of one model; in the releases at most 12."""
MAX_FILE_NAME_BYTES = 255
"""Of every file system that models are kept on."""

_PART = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})(\.(?:safetensors|gguf))")
_STEMS = (("safetensors", ("diffusion_pytorch_model", "model")), ("bin", ("diffusion_pytorch_model", "pytorch_model")))
"""Suffix, and the names before it: safetensors before pickles."""
_VARIANTS = ("", "fp32", "bf16", "fp16")
"""Between the two, as save_pretrained(variant=...) writes it: full precision before half, then all others."""


def folder_files(path: str | Path, expected: str) -> tuple[Path, ...]:
    """Every weight file of one model.

    Args:
        path: a file, one of a model's parts (x-00001-of-00003), or a folder with one model in it (diffusers' vae/,
            text_encoder/).
        expected: what the caller wants, for messages.
    Raises:
        ValueError: the folder holds no such file, its index is damaged or names files that are not there, or a part is
            missing.
    """
    path = Path(path)
    if not path.is_dir():
        return _parts(path)
    for suffix, stems in _STEMS:
        for stem in stems:
            for variant in _variants(path, stem, suffix):
                whole = f"{stem}.{variant}.{suffix}" if variant else f"{stem}.{suffix}"
                if (path / whole).is_file():
                    return (path / whole,)
                # The index of shards has its variant in either place.
                for index in (f"{whole}.index.json", f"{stem}.{suffix}.index.{variant}.json"):
                    if (path / index).is_file():
                        return shard_files(path / index)
    names = ", ".join(f"{stem}.{suffix}" for suffix, stems in _STEMS for stem in stems)
    raise ValueError(
        f"{path} is a folder that holds none of {names}, whole or in shards, with or without a variant such as fp16; "
        f"expected {expected}"
    )


def _parts(file: Path) -> tuple[Path, ...]:
    """The file itself, or all parts of the model that it is one of."""
    match = _PART.fullmatch(file.name)
    count = int(match[3]) if match else 1
    if match is None or count == 1 or not 1 <= int(match[2]) <= count:
        return (file,)
    if count > MAX_SHARDS:
        raise ValueError(f"{file} is one of {count} files; at most {MAX_SHARDS} are allowed")
    digits = len(match[2])
    parts = [file.with_name(f"{match[1]}-{i:0{digits}}-of-{match[3]}{match[4]}") for i in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ValueError(f"{file} is one of {count} parts of a model; beside it is no {', '.join(missing[:3])}")
    return tuple(parts)


def _variants(folder: Path, stem: str, suffix: str) -> list[str]:
    """Of the files that there are, the preferred one first."""
    name = re.compile(rf"{stem}(?:\.([\w-]+?))?(?:-\d+-of-\d+)?\.{suffix}(?:\.index(?:\.([\w-]+))?\.json)?")
    found = {match[1] or match[2] or "" for path in folder.iterdir() if (match := name.fullmatch(path.name))}
    return sorted(found, key=lambda variant: (variant not in _VARIANTS, [*_VARIANTS, variant].index(variant), variant))


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


def _is_file_name(name: str) -> bool:
    return name.isprintable() and Path(name).name == name and len(name.encode()) <= MAX_FILE_NAME_BYTES
