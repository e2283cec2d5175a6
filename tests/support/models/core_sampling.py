"""One transformer as ComfyUI's own MODEL and as ours, and ComfyUI's nodes to sample both with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from plain_evaluator import PlainEvaluator
from safetensors.torch import save_file
from torch import Tensor
from wan_pack.demo.tiny_expert import expert
from wan_pack.nodes.core.group_model import GroupModel
from wan_pack.nodes.core.patch_files import PatchFiles
from wan_pack.nodes.host.core_model import CoreSampling, model_without_weights
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.model.latent_space import TEMPORAL_STRIDE, WAN21, LatentSpace

TEXT_DIM = 4096
STEPS, SEED, CFG = 2, 7, 3.0
KINDS = {
    "T2V": (16, 16), "I2V": (36, 16), "TI2V-5B": (48, 48), "FLF2V": (36, 16), "VACE": (16, 16), "Fun": (52, 16),
    "Fun V1.1": (48, 16), "Camera": (36, 16), "Camera V1.1": (32, 16), "Fun 5B": (148, 48), "InP 5B": (100, 48),
    "Animate": (36, 16),
}  # fmt: skip
"""Variant -> channels in and out."""
PARTS = {
    "FLF2V": ("img_emb", "emb_pos"),
    "VACE": ("vace_blocks",),
    "Fun": ("ref_conv",),
    "Fun V1.1": ("img_emb", "ref_conv"),
    "Camera": ("control_adapter",),
    "Camera V1.1": ("img_emb", "control_adapter"),
    "Fun 5B": ("ref_conv",),
    "Animate": ("img_emb", "face_adapter"),
}
Modules = Mapping[str, Any]
"""ComfyUI's, by name; and "sampled", `ksampler` of them."""
Conditioning = list[list[Any]]


class TwoModels:
    """The same file behind both sockets."""

    def __init__(self, core: Modules, file: Path, folder: Path) -> None:
        self.core = core
        self.theirs = core["comfy.sd"].load_diffusion_model(str(file))
        patch_files = PatchFiles(lambda: folder)
        self.evaluators: list[PlainEvaluator] = []
        """One for each sampling with ours, in order."""

        def prepare(sampling: CoreSampling) -> Any:
            loras = patch_files.files(sampling.added)

            def start() -> PlainEvaluator:
                self.evaluators.append(PlainEvaluator(file, loras))
                return self.evaluators[-1]

            return start

        self.ours = model_without_weights(Checkpoint([file]).shapes, GroupModel(prepare))

    def same(self, graph: Callable[[Modules, Any], Tensor], *, limit: float) -> Tensor:
        """What `graph` makes of ours, which must be what it makes of theirs."""
        ours, theirs = graph(self.core, self.ours), graph(self.core, self.theirs)
        assert ours.shape == theirs.shape and theirs.std() > 0.1, (ours.shape, theirs.std())
        assert (ours - theirs).abs().max() < limit
        return ours


class PixelVae:
    """In the place of a VAE: a latent is a pixel from its place, at another strength in each channel."""

    def __init__(self, space: LatentSpace = WAN21) -> None:
        self.latent_channels, self._stride = space.channels, space.stride

    def spacial_compression_encode(self) -> int:
        return self._stride

    def encode(self, pixels: Tensor) -> Tensor:
        """[F, H, W, 3] -> [1, C, T, h, w]."""
        rows = pixels[::TEMPORAL_STRIDE, :: self._stride, :: self._stride, :1]
        strengths = torch.linspace(-1, 1, self.latent_channels)
        return rows.permute(3, 0, 1, 2)[None] * strengths.view(1, -1, 1, 1, 1)


def ksampler(nodes: ModuleType, model: Any, sampler: str = "euler", **inputs: Any) -> Tensor:
    """The latents of ComfyUI's KSampler."""
    given = {"cfg": CFG, "positive": text(1), "negative": text(2), "latent_image": empty_latents(), "denoise": 1.0}
    given |= {"seed": SEED, "steps": STEPS, "scheduler": "simple", "sampler_name": sampler, **inputs}
    (latent,) = nodes.KSampler().sample(model, **given)
    return latent["samples"]


def write_expert(folder: Path, kind: str, seed: int = 0) -> Path:
    """A transformer in float32 that ComfyUI's own loader takes too."""
    channels_in, channels_out = KINDS[kind]
    parts = PARTS.get(kind, ())
    path = folder / f"{kind}-{seed}.safetensors"
    save_file(expert(seed, channels_in, channels_out, text_dim=TEXT_DIM, parts=parts), path)
    return path


def text(seed: int, tokens: int = 9) -> Conditioning:
    """A CONDITIONING as CLIP Text Encode makes it, of fewer rows."""
    return [[torch.randn(1, tokens, TEXT_DIM, generator=torch.Generator().manual_seed(seed)), {"pooled_output": None}]]


def empty_latents(channels: int = 16, frames: int = 3, rows: int = 6, columns: int = 8, batch: int = 1) -> Any:
    """A LATENT."""
    return {"samples": torch.zeros(batch, channels, frames, rows, columns)}
