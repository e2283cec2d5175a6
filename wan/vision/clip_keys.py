"""Tensor names and sizes of CLIP vision models, and the check of their files' headers.

Wan's image branch was trained with ViT-H/14 of open-clip's xlm-roberta-large: 1280 channels, 32 layers of 16 heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files.headers import check_shape
from ..files.identify import describe_tensors, prefixes
from ..files.stored_model import StoredModel, open_model
from ..model.config import CLIP_PICTURE, PICTURE_ROWS

EXPECTED = (
    "a CLIP vision model (clip_vision_h.safetensors, models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, a folder "
    "image_encoder)"
)
PATCH = (CLIP_PICTURE[0], 14, 14)
"""Channels, rows and columns; 16 x 16 of them make the picture."""
HEADS = 16
"""Which no tensor's shape tells; of every model of this patch size."""
MAX_LAYERS = 100

TRANSFORMERS, OPEN_CLIP, OFFICIAL = "transformers", "open-clip", "official"
"""Who named the tensors; ComfyUI's files have transformers' names or open-clip's, Wan's own .pth has the official."""

_COLUMN = {OPEN_CLIP: 0, OFFICIAL: 1}
_OF_THE_WHOLE = {
    "embeddings.class_embedding": ("class_embedding", "cls_embedding"),
    "embeddings.patch_embedding.weight": ("conv1.weight", "patch_embedding.weight"),
    "embeddings.position_embedding.weight": ("positional_embedding", "pos_embedding"),
    **{f"pre_layrnorm.{part}": (f"ln_pre.{part}", f"pre_norm.{part}") for part in ("weight", "bias")},
}
_OF_A_LAYER = {
    "layer_norm1": ("ln_1", "norm1"),
    "self_attn.out_proj": ("attn.out_proj", "attn.proj"),
    "layer_norm2": ("ln_2", "norm2"),
    "mlp.fc1": ("mlp.c_fc", "mlp.0"),
    "mlp.fc2": ("mlp.c_proj", "mlp.2"),
}
"""As `_OF_THE_WHOLE`: transformers' name -> open-clip's, and the official one."""
_TOGETHER = {"weight": ("attn.in_proj_weight", "attn.to_qkv.weight"), "bias": ("attn.in_proj_bias", "attn.to_qkv.bias")}
"""Queries', keys' and values' rows one after the other, where transformers has a layer for each."""
_LAYERS = {TRANSFORMERS: "encoder.layers", OPEN_CLIP: "transformer.resblocks", OFFICIAL: "transformer"}
_MARKERS = {
    TRANSFORMERS: "embeddings.class_embedding",
    OPEN_CLIP: "class_embedding",
    OFFICIAL: "cls_embedding",
}


@dataclass(frozen=True, slots=True)
class Part:
    """Where a parameter lies in a file: in a tensor, or in some of its rows."""

    tensor: str
    index: int = 0
    """Which of `of` equal parts of its rows it is."""
    of: int = 1


@dataclass(frozen=True, slots=True)
class ClipInfo:
    """One CLIP vision model."""

    dim: int
    """Channels of the features."""
    layers: int
    """All; the last one is not run."""
    ffn_dim: int
    naming: str
    """TRANSFORMERS, OPEN_CLIP or OFFICIAL."""
    prefix: str
    """In front of every tensor name."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter that is run, by transformers' name without a prefix."""
        dim, wide = self.dim, self.ffn_dim
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.class_embedding": (dim,),
            "embeddings.patch_embedding.weight": (dim, *PATCH),
            "embeddings.position_embedding.weight": (PICTURE_ROWS, dim),
            "pre_layrnorm.weight": (dim,), "pre_layrnorm.bias": (dim,),
        }  # fmt: skip
        narrow = {"layer_norm1": (dim,), "layer_norm2": (dim,), "mlp.fc1": (wide, dim), "mlp.fc2": (dim, wide)}
        modules: dict[str, tuple[int, ...]] = {**narrow, **{f"self_attn.{part}": (dim, dim) for part in _ATTENTION}}
        for layer in range(self.layers - 1):
            for module, shape in modules.items():
                shapes[f"encoder.layers.{layer}.{module}.weight"] = shape
                shapes[f"encoder.layers.{layer}.{module}.bias"] = shape[:1]
        return shapes

    @property
    def source(self) -> dict[str, Part]:
        """transformers' name without a prefix -> where the file has it, for each parameter that is run."""
        if self.naming == TRANSFORMERS:
            return {name: Part(self.prefix + name) for name in self.shapes}
        column, source = _COLUMN[self.naming], {}
        for name in self.shapes:
            if name in _OF_THE_WHOLE:
                source[name] = Part(self.prefix + _OF_THE_WHOLE[name][column])
                continue
            _, _, layer, *middle, leaf = name.split(".")
            module, stem = ".".join(middle), f"{self.prefix}{_LAYERS[self.naming]}.{layer}."
            if module in _OF_A_LAYER:
                source[name] = Part(f"{stem}{_OF_A_LAYER[module][column]}.{leaf}")
            else:
                source[name] = Part(stem + _TOGETHER[leaf][column], _ATTENTION.index(module.rpartition(".")[2]), 3)
        return source


_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The first three in the order in which they stand where they are one tensor."""


def clip_info(stored: StoredModel) -> ClipInfo:
    """Recognises a CLIP vision model by its names and reads its sizes off its shapes.

    Raises:
        ValueError: it is none, one of another kind, or one that lacks tensors.
    """
    names, shapes, label = stored.tensors, stored.shapes, stored.label
    found = [
        (prefix, naming)
        for naming, marker in _MARKERS.items()
        for prefix in prefixes(names, (marker,))
        if any(name.startswith(f"{prefix}{_LAYERS[naming]}.") for name in names)
    ]
    if not found:
        raise ValueError(f"{label} is {describe_tensors(names)}; expected {EXPECTED}")
    prefix, naming = found[0]
    stem = f"{prefix}{_LAYERS[naming]}."
    numbers = {name.removeprefix(stem).partition(".")[0] for name in names if name.startswith(stem)}
    layers = len({number for number in numbers if number.isdecimal()})
    if not 2 <= layers <= MAX_LAYERS:
        raise ValueError(f"{label} is a CLIP vision model of {layers} layers; it must have 2 to {MAX_LAYERS}")
    info = ClipInfo(dim=1, layers=layers, ffn_dim=1, naming=naming, prefix=prefix)
    source = info.source
    missing = sorted(part.tensor for part in source.values() if part.tensor not in names)
    if missing:
        raise ValueError(
            f"{label} is {describe_tensors(names)} that lacks {len(missing)} tensors ({', '.join(missing[:3])}); "
            f"expected {EXPECTED}, all of its files"
        )
    patch = shapes[source["embeddings.patch_embedding.weight"].tensor]
    wide = shapes[source["encoder.layers.0.mlp.fc1.weight"].tensor]
    if len(patch) != 4 or patch[1:] != PATCH or len(wide) != 2 or 0 in (*patch, *wide):
        raise ValueError(
            f"{label} is a CLIP vision model whose patches are {list(patch[1:])}; they must be "
            f"{list(PATCH)}, as those of clip_vision_h"
        )
    if patch[0] % HEADS:
        raise ValueError(f"{label} is a CLIP vision model of {patch[0]} channels; they must divide by {HEADS} heads")
    return ClipInfo(dim=patch[0], layers=layers, ffn_dim=wide[0], naming=naming, prefix=prefix)


def stored_shape(name: str, info: ClipInfo) -> tuple[int, ...]:
    """Of the tensor that holds a parameter."""
    part, shape = info.source[name], info.shapes[name]
    if info.naming == OFFICIAL and name in ("embeddings.class_embedding", "embeddings.position_embedding.weight"):
        return (1,) * (3 - len(shape)) + shape
    return (part.of * shape[0], *shape[1:])


def check_clip_files(files: Sequence[str | Path]) -> ClipInfo:
    """Reads headers only: is this a whole CLIP vision model that makes 257 rows of a picture.

    Raises:
        ValueError: naming the file, what it is, and what was expected.
    """
    stored = open_model(files, EXPECTED)
    info = clip_info(stored)
    try:
        weights = stored.weights({part.tensor: part.tensor for part in info.source.values()})
    except ValueError as error:
        raise ValueError(f"{stored.label}: {error}") from error
    for name, part in info.source.items():
        check_shape(part.tensor, weights[part.tensor].shape, stored_shape(name, info), stored.label)
    return info
