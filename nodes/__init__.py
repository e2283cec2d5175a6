"""The nodes that ComfyUI sees."""

from __future__ import annotations

from .batch.batch import WanVideoDistributedBatch
from .core.model_loader import LoadDiffusionModelDistributed
from .core.vae_loader import LoadVAEDistributed
from .doctor import WanVideoDistributedDoctor
from .host import host, warm
from .inference.inference import WanVideoDistributedInference
from .models.loaders import LoadWanVideoModel
from .models.loras import WanVideoDistributedLora
from .settings.spread import WanVideoDistributedConfig
from .text import LoadWanVideoT5TextEncoder, WanVideoTextEncode

DISPLAY_NAMES = {
    "WanVideoDistributedConfig": "Wan Video Distributed Config",
    "WanVideoDistributedInference": "Wan Video Distributed Inference",
    "WanVideoDistributedBatch": "Wan Video Distributed Batch",
    "WanVideoDistributedDoctor": "Wan Video Distributed Doctor",
    "LoadWanVideoModel": "Load Wan Video Model",
    "WanVideoDistributedLora": "Wan Video Distributed Lora",
    "LoadDiffusionModelDistributed": "Load Diffusion Model (N GPUs)",
    "LoadVAEDistributed": "Load VAE (N GPUs)",
    "LoadWanVideoT5TextEncoder": "Load WanVideo T5 TextEncoder",
    "WanVideoTextEncode": "WanVideo TextEncode",
}


def node_classes(taken: frozenset[str]) -> dict[str, type]:
    """Node id -> class. `taken` holds the ids that other packs registered before this one.

    The text nodes have the ids and sockets of ComfyUI-WanVideoWrapper's, so that a workflow made with either pack
    loads with the other. They come as a pair or not at all: one pack's encoder does not fit the other's.
    """
    classes: list[type] = [
        WanVideoDistributedConfig,
        WanVideoDistributedInference,
        WanVideoDistributedBatch,
        LoadWanVideoModel,
        WanVideoDistributedLora,
        LoadDiffusionModelDistributed,
        LoadVAEDistributed,
        WanVideoDistributedDoctor,
    ]
    pair = [LoadWanVideoT5TextEncoder, WanVideoTextEncode]
    if not any(kind.__name__ in taken for kind in pair):
        classes += pair
    return {kind.__name__: kind for kind in classes}


__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "warm"]

NODE_CLASS_MAPPINGS = node_classes(host.registered_node_ids())
NODE_DISPLAY_NAME_MAPPINGS = {name: DISPLAY_NAMES[name] for name in NODE_CLASS_MAPPINGS}
