"""The alpha of LoRA files that keep it outside their tensors.

diffusers and finetrainers write PEFT's settings into the safetensors metadata, PEFT itself into adapter_config.json
beside adapter_model.safetensors. A name of its own keeps that file from being taken for another LoRA's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.headers import MAX_PARTS, brief
from ..files.json_text import parse_json
from ..files.regular_files import regular

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_KEY, FINETRAINERS_KEY = "lora_adapter_metadata", "lora_config"
MAX_CONFIG_BYTES = 1 << 20
BASE_KEPT = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""Of PEFT's `init_lora_weights`: those that begin with no change. The others (pissa, olora, corda, lora_ga, loftq) take
the factors out of the base model's weights, or out of their rounding, and fit only what is left of those."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """PEFT's settings of one adapter, as far as they decide how strong it is."""

    source: str
    """Where they were found, for messages."""
    alpha: float | None
    patterns: Mapping[str, tuple[int, float]]
    """End of a module's name -> its place among them, the first of which counts, and its own alpha."""
    rank_stabilised: bool
    """Divide alpha by the root of the rank (Kalajdzievski, 2023, arXiv 2312.03732)."""
    rank: int | None = None
    """Of all modules, for those whose factors do not tell; None: not known, or not of all."""

    def module_alpha(self, module: str) -> float | None:
        """module: as the trainer names it, such as "blocks.0.attn1.to_q"."""
        parts = module.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        found = [self.patterns[end] for end in ends if end in self.patterns]
        return min(found)[1] if found else self.alpha


NO_CONFIG = AdapterConfig("", None, {}, False)


def read_adapter_config(path: Path, metadata: Mapping[str, str], *, second: bool) -> AdapterConfig:
    """The settings that belong to the LoRA file `path`; `NO_CONFIG` where there are none.

    Args:
        metadata: of the safetensors header.
        second: of the second, low-noise transformer in a diffusers file of two.
    Raises:
        ValueError: they are damaged or cannot be honoured.
    """
    source, text, prefix = "", "", ""
    if DIFFUSERS_KEY in metadata:
        source, text = f"the metadata {DIFFUSERS_KEY}", metadata[DIFFUSERS_KEY]
        prefix = "transformer_2." if second else "transformer."
    elif FINETRAINERS_KEY in metadata:
        source, text = f"the metadata {FINETRAINERS_KEY}", metadata[FINETRAINERS_KEY]
    elif path.name == PEFT_WEIGHTS and path.with_name(PEFT_CONFIG).is_file():
        source, text = PEFT_CONFIG, _read(path.with_name(PEFT_CONFIG))
    if not source:
        return NO_CONFIG
    try:
        data = text.encode()
        if len(data) > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {len(data)} bytes; at most {MAX_CONFIG_BYTES} are allowed")
        config = parse_json(data, MAX_PARTS)
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
        return _adapter_config(source, {key.removeprefix(prefix): value for key, value in config.items()})
    except ValueError as error:
        raise ValueError(f"{source} cannot be used: {error}") from error


def _adapter_config(source: str, config: Mapping[str, Any]) -> AdapterConfig:
    start = config.get("init_lora_weights")
    if start not in BASE_KEPT:
        raise ValueError(
            f"init_lora_weights is {brief(start)}: such factors belong to a changed base model, not to the model; "
            "save it as a plain LoRA first (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
        )
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"alpha_pattern is {patterns!r}; it must be an object")
    for pattern in patterns:
        # PEFT takes them for regular expressions; trainers write plain names.
        if not re.fullmatch(r"\^?[\w.]+\$?", pattern):
            raise ValueError(f"alpha_pattern {pattern!r} is not a module's name")
    # PEFT's name in LoHa and LoKr is the plain one.
    alpha = config.get("lora_alpha", config.get("alpha"))
    rank = config.get("r")
    return AdapterConfig(
        source=source,
        alpha=None if alpha is None else _number("lora_alpha", alpha),
        patterns={
            name.strip("^$"): (i, _number(f"alpha_pattern {name}", value))
            for i, (name, value) in enumerate(patterns.items())
        },
        rank_stabilised=config.get("use_rslora") is True,
        rank=rank if type(rank) is int and rank > 0 and not config.get("rank_pattern") else None,
    )


def _number(name: str, value: Any) -> float:
    # Of at most 30 digits (json_text.py), so that none is too large.
    number = float(value) if type(value) in (int, float) else math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r}; it must be a finite number"[:200])
    return number


def _read(path: Path) -> str:
    try:
        with open(path, "rb", opener=regular) as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} is longer than {MAX_CONFIG_BYTES} bytes")
    return data.decode(errors="replace")
