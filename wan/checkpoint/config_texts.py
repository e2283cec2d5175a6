"""What is said of a transformer beside its tensors: in a config.json, and in the header of its file.

Some models have the tensors of another one and a forward of their own; only such words tell them apart. ComfyUI takes
the header's: metadata "config" is a JSON text, whose "transformer" goes over what the tensors say.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..files.headers import brief
from ..files.json_text import parse_json
from ..files.model_folder import TRANSFORMER_CLASSES, read_json_object
from ..model.config import EPS, TEXT_LEN
from ..model.latent_space import PATCH_SIZE
from ..model.variants import RUNNABLE

MAX_PARTS = 10_000
"""Of a header's config; ComfyUI's own have some dozens."""
TYPES = frozenset({"t2v", "i2v", "ti2v", "flf2v", "vace", "camera", "camera_2.2", "animate"})
"""Words for what runs. Which of them it is, the tensors say."""
OTHERS = {
    "animate2": "a Wan Animate 2 transformer",
    "flow_rvs": "a FlowRVS transformer",
    "wandancer": "a WanDancer transformer",
    "scail": "a Wan SCAIL transformer",
    "scail2": "a Wan SCAIL-2 transformer",
    "humo": "a HuMo transformer",
    "s2v": "a Wan S2V transformer",
}
"""`model_type` -> for people."""
CAUSAL = "causal_ar"
FIXED: dict[str, tuple[Any, ...]] = {
    "patch_size": (list(PATCH_SIZE),),
    "eps": (EPS,),
    "text_len": (TEXT_LEN,),
    "cross_attn_norm": (True,),
    "qk_norm": (True, "rms_norm_across_heads"),
}
"""What all that run have, in official words and diffusers'."""


class Told(NamedTuple):
    """What tensors do not say; None: nor do words."""

    num_heads: int | None = None
    vace_layers: tuple[int, ...] | None = None


def read_config_texts(folder: Path, metadata: Mapping[str, str]) -> Told:
    """By the config.json beside the file, if there is one, and by the file's header.

    Args:
        metadata: of the safetensors header.
    Raises:
        ValueError: they say that it is a model that does not run, or what cannot be.
    """
    header, where = _in_header(metadata.get("config", "")), "its header"
    _check(header, where, allowed=TYPES)
    own_heads = _heads(header, "num_heads", where) if "num_heads" in header else None
    path = folder / "config.json"
    config = read_json_object(path) if path.is_file() else {}
    key = TRANSFORMER_CLASSES.get(str(config.get("_class_name")))
    if key is None:
        # Of another model: ComfyUI's folders hold many.
        return Told(own_heads)
    _check(config, f"{path} beside it (which must lie elsewhere if it is another model's)")
    # The header is surely this file's.
    num_heads, layers = own_heads or _heads(config, key, str(path)), config.get("vace_layers")
    if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        raise ValueError(f"{path}: vace_layers is {brief(layers)}; it must be a list of numbers of blocks")
    return Told(num_heads, None if layers is None else tuple(layers))


def _heads(config: Mapping[str, Any], key: str, where: str) -> int:
    heads = config.get(key)
    if type(heads) is not int or heads < 1:
        raise ValueError(f"{where}: {key} is {heads!r}; it must be a positive number")
    return heads


def _in_header(text: str) -> Mapping[str, Any]:
    try:
        says = parse_json(text.encode(), MAX_PARTS) if text else {}
    except ValueError as error:
        raise ValueError(f"its header has a config that cannot be read: {error}") from error
    transformer = says.get("transformer", {}) if isinstance(says, dict) else {}
    return transformer if isinstance(transformer, dict) else {}


def _check(config: Mapping[str, Any], where: str, *, allowed: frozenset[str] | None = None) -> None:
    """Refuses what says that it is another model.

    Args:
        where: it is said.
        allowed: types; None: all but `OTHERS`.
    """
    kind = config.get("model_type")
    name = OTHERS.get(kind) if isinstance(kind, str) else None
    if config.get(CAUSAL):
        name, kind = "a causal Wan transformer, which makes a video frame by frame", CAUSAL
    if name is not None:
        raise ValueError(f"it is {name}, as {where} says ({kind}); expected {RUNNABLE}")
    if kind is not None and allowed is not None and not (isinstance(kind, str) and kind in allowed):
        raise ValueError(
            f"{where} says that it is of model_type {brief(kind)}, not one of {', '.join(sorted(allowed))}; "
            f"expected {RUNNABLE}"
        )
    for key, values in FIXED.items():
        if key in config and config[key] not in values:
            raise ValueError(
                f"{where} says {key} {brief(config[key])}; expected {' or '.join(map(str, values))}, as {RUNNABLE} has"
            )
