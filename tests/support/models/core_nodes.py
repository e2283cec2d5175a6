"""ComfyUI's nodes that take a MODEL: all of one installation, called with their defaults."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from core_sampling import CFG, Modules, empty_latents, text
from safetensors.torch import save_file
from torch import Tensor
from wan_pack.demo.tiny_expert import lora

NO_MODULES = {"nodes_images"}
"""Imports what is there in a server only."""
NO_NODES = {"DiffControlNetLoader"}
"""Needs a control net as the difference to a model of another family, whose weights it asks the patcher for."""
LORA, HYPERNETWORK = "lora.safetensors", "hypernetwork.pt"
"""Files that `write_files` writes."""
MADE_UP = MagicMock(all_hidden_states=torch.zeros(1, 30, 2, 3), penultimate_hidden_states=torch.zeros(1, 2, 3))
"""In the place of further models."""
MADE_UP.spacial_compression_encode.return_value = 8
MADE_UP.model.additional_in_dim = 0
GIVEN = {
    "KSampler": {"steps": 2},
    "KSamplerAdvanced": {"steps": 2},
    "ContextWindowsManual": {"dim": 2, "context_length": 2, "context_overlap": 1},
    "WanContextWindowsManual": {"context_length": 5, "context_overlap": 4},
    "ScaleROPE": {"scale_t": 0.5},
    "EasyCache": {"reuse_threshold": 1.0, "start_percent": 0.0, "end_percent": 1.0},
    "LazyCache": {"reuse_threshold": 1.0, "start_percent": 0.0, "end_percent": 1.0},
    "ModelComputeDtype": {"dtype": "bf16"},
    "SkipLayerGuidanceDiT": {"double_layers": "1", "single_layers": "1", "start_percent": 0.0, "end_percent": 1.0},
    "SkipLayerGuidanceDiTSimple": {"double_layers": "1", "start_percent": 0.0, "end_percent": 1.0},
    "SkipLayerGuidanceSD3": {"layers": "1", "start_percent": 0.0, "end_percent": 1.0},
    "LoraLoader": {"lora_name": LORA, "clip": None},
    "LoraLoaderModelOnly": {"lora_name": LORA},
    "HypernetworkLoader": {"hypernetwork_name": HYPERNETWORK},
    "SamplerSASolver": {"use_pece": False, "simple_order_2": False},
    "CheckpointSave": {"clip": None, "vae": None},
    "ImageOnlyCheckpointSave": {"clip_vision": None, "vae": None},
    "QwenImageDiffsynthControlnet": {"model_patch": MADE_UP, "vae": MADE_UP, "image": torch.zeros(1, 16, 16, 3)},
    "USOStyleReference": {"model_patch": MADE_UP, "clip_vision_output": MADE_UP},
}
"""Node -> values other than its defaults, neutral or many ones or for what it cannot do without."""


@dataclass(frozen=True, slots=True)
class CoreNode:
    name: str
    kind: Any
    inputs: dict[str, tuple[str, Any]]
    """Name -> type and default."""

    def call(self, core: Modules, model: Any, **other: Any) -> tuple[Any, ...]:
        """Its outputs, with `model` at every MODEL input, and `other` values than its defaults."""
        given = {name: _value(core, model, name, *wanted) for name, wanted in self.inputs.items()}
        given = {name: value for name, value in given.items() if value is not None} | GIVEN.get(self.name, {}) | other
        if getattr(self.kind, "INPUT_IS_LIST", False):
            given = {name: [value] for name, value in given.items()}
        if hasattr(self.kind, "define_schema"):
            made = self.kind.EXECUTE_NORMALIZED(**given)
            return tuple(made.result or ())
        made = getattr(self.kind(), self.kind.FUNCTION)(**given)
        return tuple(made if isinstance(made, tuple) else ())


def model_nodes(core: Modules, comfyui: Path) -> Iterator[CoreNode]:
    kinds = dict(core["nodes"].NODE_CLASS_MAPPINGS)
    # From the end: newer ones have two modules that import each other, of which the later one can be first.
    for path in sorted((comfyui / "comfy_extras").glob("nodes_*.py"), reverse=True):
        if path.stem in NO_MODULES:
            continue
        module = importlib.import_module(f"comfy_extras.{path.stem}")
        kinds |= getattr(module, "NODE_CLASS_MAPPINGS", {})
        if hasattr(module, "comfy_entrypoint"):
            kinds |= {kind.GET_SCHEMA().node_id: kind for kind in asyncio.run(_of_extension(module))}
    for name, kind in kinds.items():
        inputs = _inputs(kind)
        if name not in NO_NODES and any(type_ == "MODEL" for type_, _ in inputs.values()):
            yield CoreNode(name, kind, inputs)


def in_windows(core: Modules, model: Any, length: int, overlap: int, **settings: Any) -> Any:
    """The model, that ComfyUI asks for windows of so many frames.

    Args:
        settings: other values than the node's defaults; what it does not have yet is left out.
    """
    kind = core["comfy_extras.nodes_context_windows"].WanContextWindowsManualNode
    node = CoreNode("WanContextWindowsManual", kind, _inputs(kind))
    standard = {"context_schedule": "standard_static", "freenoise": False}
    given = {"context_length": length, "context_overlap": overlap} | standard | settings
    return node.call(core, model, **{name: value for name, value in given.items() if name in node.inputs})[0]


async def _of_extension(module: Any) -> list[Any]:
    extension = module.comfy_entrypoint()
    return await (await extension if inspect.isawaitable(extension) else extension).get_node_list()


def _inputs(kind: Any) -> dict[str, tuple[str, Any]]:
    found = {}
    declared = kind.INPUT_TYPES()
    for group in ("required", "optional"):
        for name, (type_, *rest) in declared.get(group, {}).items():
            options = rest[0] if rest else {}
            if isinstance(type_, list):
                type_, options = "COMBO", {"options": type_, **options}
            default = options.get("default", next(iter(options.get("options", ())), None))
            found[name] = type_, default if group == "required" or type_ == "MODEL" else options.get("default")
    return found


def write_files(core: Modules, folder: Path) -> None:
    """Where ComfyUI looks for them, and for what it saves."""
    paths = core["folder_paths"]
    paths.set_output_directory(str(folder / "output"))
    for kind in ("loras", "hypernetworks"):
        (folder / kind).mkdir()
        paths.add_model_folder_path(kind, str(folder / kind), is_default=True)
    save_file(lora(1), folder / "loras" / LORA)
    layers = {"linear.0.weight": torch.eye(4), "linear.0.bias": torch.zeros(4)}
    torch.save({"activation_func": "linear", 320: [layers, layers]}, folder / "hypernetworks" / HYPERNETWORK)


def _value(core: Modules, model: Any, name: str, type_: str, default: Any) -> Any:
    """What stands at an input of this type; None: nothing is connected."""
    custom = core["comfy_extras.nodes_custom_sampler"]
    made = {
        "MODEL": lambda: model,
        "CONDITIONING": lambda: text(len(name)),
        "LATENT": empty_latents,
        "SIGMAS": lambda: torch.tensor([1.0, 0.5, 0.0]),
        "SAMPLER": lambda: custom.KSamplerSelect.execute("euler").result[0],
        "NOISE": lambda: custom.RandomNoise.execute(1).result[0],
        "LATENT_OPERATION": lambda: lambda latent, **_: latent * 1.01,
        "LORA_MODEL": dict,
        "FLOAT": lambda: default if default is not None else 1.0,
        "INT": lambda: default if default is not None else 1,
        "STRING": lambda: default or "",
    }
    return made.get(type_, lambda: default)()


def latents_of(core: Modules, output: Any) -> Tensor | None:
    """What an output makes: latents of a MODEL or a GUIDER, the values of the rest; None: nothing to compare."""
    if hasattr(output, "model_patches_to"):
        return core["sampled"](output, steps=2, cfg=CFG)
    if hasattr(output, "model_patcher"):
        custom = core["comfy_extras.nodes_custom_sampler"]
        (sampler,), (noise,) = custom.KSamplerSelect.execute("euler").result, custom.RandomNoise.execute(1).result
        sigmas = torch.tensor([1.0, 0.5, 0.0])
        return custom.SamplerCustomAdvanced.execute(noise, output, sampler, sigmas, empty_latents()).result[0][
            "samples"
        ]
    if isinstance(output, dict) and isinstance(output.get("samples"), Tensor):
        return output["samples"]
    if isinstance(output, int | float):
        return torch.tensor(float(output))
    return output if isinstance(output, Tensor) else None
