"""One LoRA, written the way each trainer writes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import TINY, random_weights
from torch import Tensor

RANK = 4
ALPHA = 2.0
LOW_RANK = (
    *(f"blocks.{i}.{attn}.{part}" for i in (0, 1) for attn in ("self_attn", "cross_attn") for part in "qkvo"),
    *(f"blocks.{i}.ffn.{j}" for i in (0, 1) for j in (0, 2)),
    *("patch_embedding", "text_embedding.0", "time_embedding.2", "time_projection.1", "head.head"),
)
"""Modules whose matrix it changes."""
WEIGHTS = ("blocks.0.norm3", "blocks.1.self_attn.norm_q", "blocks.1.cross_attn.norm_k", "patch_embedding", "head.head")
"""Modules whose weight it changes in full, two of them in addition."""
BIASES = ("blocks.0.self_attn.q", "blocks.0.norm3", "blocks.1.ffn.2", "patch_embedding", "time_projection.1")
MODULATIONS = ("blocks.0", "blocks.1", "head")

Tensors = dict[str, Tensor]
_DIFFUSERS = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
_DIFFUSERS_PARTS = (
    (".self_attn.", ".attn1."),
    (".cross_attn.", ".attn2."),
    *((f".{part}", f".to_{part}") for part in "qkv"),
    (".o", ".to_out.0"),
    (".norm3", ".norm2"),
    (".ffn.0", ".ffn.net.0.proj"),
    (".ffn.2", ".ffn.net.2"),
)


def in_diffusers(module: str) -> str:
    """blocks.0.self_attn.q -> blocks.0.attn1.to_q, ..."""
    if module in _DIFFUSERS:
        return _DIFFUSERS[module]
    for ours, theirs in _DIFFUSERS_PARTS:
        if ours.endswith("."):
            module = module.replace(ours, theirs)
        elif module.endswith(ours):
            return module.removesuffix(ours) + theirs
    return module


def parts(seed: int = 1) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensors]:
    """(module -> up [out, rank], down [rank, in]; parameter -> full difference), as the tiny model's sizes call for."""
    shapes = {name: tensor.shape for name, tensor in random_weights().items()}
    generator = torch.Generator().manual_seed(seed)
    low_rank = {}
    for module in LOW_RANK:
        out, *rest = shapes[f"{module}.weight"]
        up = torch.randn(out, RANK, generator=generator)
        low_rank[module] = (up, torch.randn(RANK, torch.Size(rest).numel(), generator=generator))
    names = [f"{m}.weight" for m in WEIGHTS] + [f"{m}.bias" for m in BIASES] + [f"{m}.modulation" for m in MODULATIONS]
    return low_rank, {name: torch.randn(shapes[name], generator=generator) for name in names}


def merged(strength: float, *, scale: float = ALPHA / RANK, seed: int = 1) -> Tensors:
    """The tiny model's weights with the whole LoRA added at once."""
    weights = random_weights()
    low_rank, differences = parts(seed)
    for module, (up, down) in low_rank.items():
        weight = weights[f"{module}.weight"]
        weight += strength * scale * (up @ down).view_as(weight)
    for name, difference in differences.items():
        weights[name] += strength * difference
    return weights


def write(
    path: Path,
    spell: Callable[[str], str] = lambda module: module,
    *,
    down: str = ".lora_down.weight",
    up: str = ".lora_up.weight",
    alpha: float | None = ALPHA,
    full: bool = True,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
    seed: int = 1,
) -> Path:
    """Writes it with `spell(module)` as the modules' names. Without `full`: its low-rank part only."""
    low_rank, differences = parts(seed)
    tensors: Tensors = {}
    for module, (up_rows, down_rows) in low_rank.items():
        tensors |= {spell(module) + down: down_rows.to(dtype), spell(module) + up: up_rows.to(dtype)}
        if alpha is not None:
            tensors[spell(module) + ".alpha"] = torch.tensor(alpha)
    for name, difference in differences.items() if full else ():
        module, _, kind = name.rpartition(".")
        role = {"weight": ".diff", "bias": ".diff_b", "modulation": ".diff_m"}[kind]
        tensors[spell(module) + role] = difference.to(dtype)
    save_file(tensors, path, metadata=dict(metadata or {}))
    return path


def underscored(prefix: str, spell: Callable[[str], str] = lambda module: module) -> Callable[[str], str]:
    return lambda module: prefix + spell(module).replace(".", "_")


def dotted(prefix: str, spell: Callable[[str], str] = lambda module: module) -> Callable[[str], str]:
    return lambda module: prefix + spell(module)


A, B = ".lora_A.weight", ".lora_B.weight"
A_DEFAULT, B_DEFAULT = ".lora_A.default.weight", ".lora_B.default.weight"

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "lightning": lambda path: write(path),
    "comfyui": lambda path: write(path, dotted("diffusion_model.")),
    "comfyui checkpoint prefix": lambda path: write(path, dotted("model.diffusion_model.")),
    "diffusion-pipe": lambda path: write(path, dotted("diffusion_model."), down=A, up=B),
    "peft": lambda path: write(path, dotted("base_model.model."), down=A, up=B),
    "peft with an adapter name": lambda path: write(path, dotted("base_model.model."), down=A_DEFAULT, up=B_DEFAULT),
    "diffsynth": lambda path: write(path, dotted("pipe.dit."), down=A_DEFAULT, up=B_DEFAULT),
    "diffusers": lambda path: write(path, dotted("transformer.", in_diffusers), down=A, up=B),
    "diffusers, second expert": lambda path: write(path, dotted("transformer_2.", in_diffusers), down=A, up=B),
    "diffusers, older": lambda path: write(path, in_diffusers, down=".lora.down.weight", up=".lora.up.weight"),
    "diffusers, alpha in metadata": lambda path: write(
        path, dotted("transformer.", in_diffusers), down=A, up=B, alpha=None,
        metadata={"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": ALPHA, "transformer.r": RANK})},
    ),
    "kohya": lambda path: write(path, underscored("lora_unet_")),
    "kohya in diffusers names": lambda path: write(path, underscored("lora_transformer_", in_diffusers)),
    "videox-fun": lambda path: write(path, underscored("lora_unet__")),
    "lycoris": lambda path: write(path, underscored("lycoris_")),
    "lycoris in diffusers names": lambda path: write(path, underscored("lycoris_", in_diffusers)),
}  # fmt: skip
"""Family -> writes the LoRA of `parts()` to a file."""

TARGETS = {name: tuple(tensor.shape) for name, tensor in random_weights(TINY).items()}
