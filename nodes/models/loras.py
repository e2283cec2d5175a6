"""LoRAs: the node that chooses one, and the lists (WANVIDLORA) that it and ComfyUI-WanVideoWrapper's nodes hand on."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...distributed.job.errors import listed
from ...distributed.job.job import LoraFile, ModelFiles, Sampling
from ...distributed.job.model_files import MAX_STRENGTH, check_loras
from ...wan.files.identify import noise_side
from ...wan.model.selection import EVERYTHING, Selection
from ..host import host
from ..host.declared import as_declared, is_set, kind_of, number
from . import catalogue
from .model_paths import listed_file

_BLOCK = re.compile(r"blocks\.(\d{1,3})\.", re.ASCII)
DISTILLED = re.compile(
    r"lightning|lightx2v|(?<!\d)4[-_ ]?steps?|distill|causvid|accvid|fusionx|fastwan|self[-_ ]?forcing"
    r"|(?:wan|[ti]2v).*turbo|rapid[-_ ]?(?:mega|aio)|(?:mega|aio)[-_ ]?rapid",
    re.IGNORECASE,
)
"""In the names of models and LoRAs that are made for few steps without guidance."""


class WanVideoDistributedLora:
    DESCRIPTION = (
        "Chooses a LoRA and its strength. Chain several through prev_lora, then connect the last one to "
        "high_noise_lora or low_noise_lora of Load Wan Video Model, or to lora of Load Diffusion Model (N GPUs). They "
        "are merged into the weights as those are loaded."
    )
    CATEGORY = "WanVideoDistributed"
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDLORA",)
    RETURN_NAMES = ("lora",)
    OUTPUT_TOOLTIPS = (
        "The LoRAs so far, for Load Wan Video Model, Load Diffusion Model (N GPUs) or another LoRA node's prev_lora.",
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["wan lora", "lightning lora", "multi gpu"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "lora": (
                    host.model_files("loras"),
                    {
                        "tooltip": "A LoRA in models/loras, for the model and the expert (high or low noise) that it "
                        "is connected to."
                    },
                ),
                "strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": -10.0,
                        "max": 10.0,
                        "step": 0.01,
                        "tooltip": "Factor of the LoRA's change; may be negative. 0 leaves it out.",
                    },
                ),
            },
            "optional": {"prev_lora": ("WANVIDLORA", {"tooltip": "LoRAs to keep in front of this one."})},
        }

    @classmethod
    def IS_CHANGED(cls, lora: str | None, **_: Any) -> str:
        return "" if lora is None else catalogue.fingerprint([host.model_path("loras", lora)])

    @as_declared
    def add(
        self, lora: str, strength: float, prev_lora: list[dict[str, Any]] | None = None
    ) -> tuple[list[dict[str, Any]]]:
        before = _entries(prev_lora, "prev_lora")
        check_loras("prev_lora and this LoRA", len(before) + 1)
        entry = {
            "path": str(host.model_path("loras", lora)),
            "strength": strength,
            "name": Path(lora).with_suffix("").as_posix(),
            "blocks": {},
            "layer_filter": "",
            "low_mem_load": False,
            "merge_loras": True,
        }
        return ([*before, entry],)


def lora_files(value: Any, name: str) -> tuple[LoraFile, ...]:
    """The LoRAs of a WANVIDLORA list; None is an empty one, strength 0 leaves a LoRA out.

    Args:
        name: of the input, for messages.
    Raises:
        ValueError: the list asks for what merging cannot do, or a file is not there.
    """
    files = (_lora_file(entry, name) for entry in _entries(value, name))
    return tuple(file for file in files if file.strength != 0)


def _entries(value: Any, name: str) -> list[dict[str, Any]]:
    """Of a WANVIDLORA: each with a path. What else they hold is still to be checked."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, dict) and is_set(entry.get("path")) for entry in value):
        raise ValueError(f"{name} is {kind_of(value)}; it must be from Wan Video Distributed Lora (WANVIDLORA)")
    check_loras(name, len(value))
    return value


def refreshed(model: ModelFiles) -> ModelFiles:
    """The same model with its LoRA files as they are now.

    A LoRA chosen by another pack's node may be replaced on disk without that node, or the loader behind it, running
    again: the job would be refused for a file that it has not seen yet.
    """
    high, low = (tuple(map(lora_as_it_is, loras)) for loras in (model.high_noise_loras, model.low_noise_loras))
    return dataclasses.replace(model, high_noise_loras=high, low_noise_loras=low)


def lora_as_it_is(lora: LoraFile) -> LoraFile:
    """The same with its file as it is now."""
    return dataclasses.replace(lora, file=catalogue.identity(Path(lora.file.path)))


@dataclass(frozen=True, slots=True)
class Expert:
    """A transformer of a model, and what is merged into it."""

    side: str
    """high or low."""
    path: str
    loras: tuple[LoraFile, ...]


def experts(model: ModelFiles) -> Iterator[Expert]:
    """Those that there are."""
    for side, files, loras in (
        ("high", model.high_noise, model.high_noise_loras),
        ("low", model.low_noise, model.low_noise_loras),
    ):
        if files:
            yield Expert(side, files[0].path, loras)


def distilled(expert: Expert) -> list[str]:
    """Which of its files have names of what is made for few steps without guidance."""
    paths = [Path(expert.path), *(Path(lora.file.path) for lora in expert.loras)]
    # With the folder: Lightning's own files are all called high_noise_model.safetensors or low_noise_model.
    return [path.name for path in paths if DISTILLED.search("/".join(path.parts[-2:]))]


def lora_warnings(model: ModelFiles, sampling: Sampling) -> Iterator[str]:
    """Of each expert that runs with guidance over 1 though its name, or a LoRA's, says that it needs none; of each LoRA
    whose name says that it is for the other expert."""
    both = len(list(experts(model))) == 2
    for expert in experts(model):
        field = f"guidance_{expert.side}"
        guidance = getattr(sampling, field)
        if guidance > 1 and (found := distilled(expert)):
            yield (
                f"{field} is {guidance:g}, but {', '.join(found)} looks distilled: made for few steps and "
                "guidance 1 (preset Lightning 4 steps)"
            )
        # By its name if it has a side: the experts may have been swapped.
        side = noise_side(expert.path) or (expert.side if both else None)
        for lora in expert.loras:
            of = noise_side(lora.file.path)
            if side and of and of != side:
                yield (
                    f"{Path(lora.file.path).name} looks like a LoRA of the {of}-noise expert, and is merged into the "
                    f"{side}-noise one, {Path(expert.path).name}"
                )


def _lora_file(entry: dict[str, Any], name: str) -> LoraFile:
    label = f"{name}: {listed([entry['name'] if is_set(entry.get('name')) else entry['path']])}"
    strength = entry.get("strength", 1.0)
    if isinstance(strength, list | tuple):
        if not strength or any(each != strength[0] for each in strength):
            raise ValueError(f"{label} has a strength for each step, which merging cannot follow; give it one number")
        strength = strength[0]
    factor = number(f"strength of {label}", strength, -MAX_STRENGTH, MAX_STRENGTH)
    selection = _selection(entry, label)
    path = listed_file(entry["path"], "loras", name=f"path of {label}")
    return LoraFile(file=catalogue.identity(path), strength=factor, selection=selection)


def _selection(entry: dict[str, Any], label: str) -> Selection:
    """Of WanVideoLoraBlockEdit: {"blocks.3.": True, ...} and a list of parts of names, or a text with one."""
    blocks, parts = entry.get("blocks"), entry.get("layer_filter")
    parts = [parts] if isinstance(parts, str) else parts or []
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{label} has {kind_of(parts)} for layer_filter; it must be a list of parts of layers' names")
    without = tuple(part for part in parts if part)
    if not is_set(blocks) and not without:
        return EVERYTHING
    if not isinstance(blocks, dict) or not all(isinstance(name, str) and blocks[name] is True for name in blocks):
        raise ValueError(f"{label} has {kind_of(blocks)} for blocks; it must be from WanVideoLoraBlockEdit")
    found = [match for name in blocks if (match := _BLOCK.fullmatch(name))]
    if not found or len(found) < len(blocks):
        raise ValueError(
            f"{label} is limited to {listed(list(blocks)) or 'no blocks'}; it must be to some of blocks.0., blocks.1. "
            "and so on, as WanVideoLoraBlockEdit has them"
        )
    return Selection(tuple(sorted(int(match[1]) for match in found)), without)
