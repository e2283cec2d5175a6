"""The example workflow in API form, made small enough for a CPU."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "example_workflows" / "api" / "distributed_inference_workflow.json"
UI_EXAMPLE = ROOT / "example_workflows" / "distributed_inference_workflow.json"

Prompt = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class TinyModel:
    """File names of the tiny model (tiny_model.py), as ComfyUI shows them."""

    high_noise: str = "tiny_wan2.2_t2v_high_noise.safetensors"
    low_noise: str = "tiny_wan2.2_t2v_low_noise.safetensors"
    vae: str = "tiny_wan_2.1_vae.safetensors"
    text_encoder: str = "tiny_umt5.safetensors"


def small_values(model: TinyModel) -> dict[str, dict[str, Any]]:
    """Node type -> input values that differ from the example's."""
    return {
        "LoadWanVideoModel": {"high_noise": model.high_noise, "low_noise": model.low_noise, "vae": model.vae},
        "LoadWanVideoT5TextEncoder": {"model_name": model.text_encoder},
        # CPUs are slow at bf16.
        "WanVideoDistributedConfig": {"gpu_count": 2, "mixed_precision": "fp32"},
        "WanVideoDistributedInference": {"width": 224, "height": 128, "num_frames": 13, "sample_steps": 6},
    }


def small_example(model: TinyModel, **inference: Any) -> Prompt:
    """The example with the tiny model's files and a small video. `inference`: more values of the inference node."""
    prompt: Prompt = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    for kind, values in small_values(model).items():
        node_of(prompt, kind)["inputs"].update(values)
    node_of(prompt, "WanVideoDistributedInference")["inputs"].update(inference)
    return prompt


def node_id(prompt: Prompt, kind: str) -> str:
    """Id of the first node of a type."""
    return next(key for key, node in prompt.items() if node["class_type"] == kind)


def node_of(prompt: Prompt, kind: str) -> dict[str, Any]:
    """The first node of a type."""
    return prompt[node_id(prompt, kind)]
