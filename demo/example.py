"""The example workflows in API form, made small enough for a CPU."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = ROOT / "example_workflows"
TEXT_TO_VIDEO = "distributed_inference_workflow"
IMAGE_TO_VIDEO = "image_to_video_workflow"
TI2V_5B = "text_or_image_to_video_5B_workflow"
VACE = "vace_workflow"
FUN_CONTROL = "fun_control_workflow"
FUN_CAMERA = "fun_camera_workflow"
LIGHTNING = "lightning_4_steps_workflow"
BATCH = "batch_workflow"

Prompt = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class TinyModel:
    """File names of the tiny models (tiny_model.py), as ComfyUI shows them."""

    high_noise: str = "tiny_wan2.2_t2v_high_noise.safetensors"
    low_noise: str = "tiny_wan2.2_t2v_low_noise.safetensors"
    vae: str = "tiny_wan_2.1_vae.safetensors"
    text_encoder: str = "tiny_umt5.safetensors"
    i2v_high_noise: str = "tiny_wan2.2_i2v_high_noise.safetensors"
    i2v_low_noise: str = "tiny_wan2.2_i2v_low_noise.safetensors"
    ti2v: str = "tiny_wan2.2_ti2v.safetensors"
    ti2v_vae: str = "tiny_wan2.2_vae.safetensors"
    vace: str = "tiny_wan2.1_vace.safetensors"
    fun_control: str = "tiny_wan2.2_fun_control.safetensors"
    fun_camera: str = "tiny_wan2.2_fun_camera.safetensors"
    animate: str = "tiny_wan2.2_animate.safetensors"
    high_noise_lora: str = "tiny_wan2.2_t2v_lightx2v_4steps_lora_high_noise.safetensors"
    low_noise_lora: str = "tiny_wan2.2_t2v_lightx2v_4steps_lora_low_noise.safetensors"

    def in_place_of(self) -> dict[str, str]:
        """File name in the example workflows -> the tiny file for it."""
        return {
            "wan2.2_t2v_high_noise_14B_fp16.safetensors": self.high_noise,
            "wan2.2_t2v_low_noise_14B_fp16.safetensors": self.low_noise,
            "wan2.2_i2v_high_noise_14B_fp16.safetensors": self.i2v_high_noise,
            "wan2.2_i2v_low_noise_14B_fp16.safetensors": self.i2v_low_noise,
            "wan2.2_ti2v_5B_fp16.safetensors": self.ti2v,
            "wan2.1_vace_14B_fp16.safetensors": self.vace,
            "wan2.2_fun_inpaint_high_noise_14B_fp8_scaled.safetensors": self.i2v_high_noise,
            "wan2.2_fun_inpaint_low_noise_14B_fp8_scaled.safetensors": self.i2v_low_noise,
            "wan2.2_fun_control_high_noise_14B_fp8_scaled.safetensors": self.fun_control,
            "wan2.2_fun_control_low_noise_14B_fp8_scaled.safetensors": self.fun_control,
            "wan2.2_fun_camera_high_noise_14B_fp8_scaled.safetensors": self.fun_camera,
            "wan2.2_fun_camera_low_noise_14B_fp8_scaled.safetensors": self.fun_camera,
            "wan2.2_animate_14B_bf16.safetensors": self.animate,
            "wan_2.1_vae.safetensors": self.vae,
            "wan2.2_vae.safetensors": self.ti2v_vae,
            "umt5_xxl_fp16.safetensors": self.text_encoder,
            "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors": self.high_noise_lora,
            "wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors": self.low_noise_lora,
        }


SMALL_VIDEO = {"width": 224, "height": 128, "num_frames": 13, "sample_steps": 6}
# Node type -> values for a machine without a GPU. CPUs are slow at bf16.
SMALL: dict[str, dict[str, Any]] = {
    "WanVideoDistributedConfig": {"gpu_count": 2, "mixed_precision": "fp32"},
    "WanVideoDistributedInference": SMALL_VIDEO,
    "WanVideoDistributedBatch": SMALL_VIDEO,
    "WanCameraEmbedding": {"width": 224, "height": 128, "length": 13},
}


def example(name: str) -> Prompt:
    """An example workflow as it is shipped."""
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def small_example(model: TinyModel, name: str = TEXT_TO_VIDEO, **values: Any) -> Prompt:
    """An example with the tiny models' files and a small video. `values`: more of the node's that makes it."""
    prompt = example(name)
    tiny = model.in_place_of()
    for node in prompt.values():
        inputs = node["inputs"]
        inputs.update({key: tiny[value] for key, value in inputs.items() if isinstance(value, str) and value in tiny})
        inputs.update(SMALL.get(node["class_type"], {}))
    node_of(prompt, video_node(prompt))["inputs"].update(values)
    return prompt


def video_node(prompt: Prompt) -> str:
    """Type of the node that makes the video, or several."""
    kinds = {node["class_type"] for node in prompt.values()}
    return next(kind for kind in ("WanVideoDistributedInference", "WanVideoDistributedBatch") if kind in kinds)


def node_id(prompt: Prompt, kind: str) -> str:
    """Id of the first node of a type."""
    return next(key for key, node in prompt.items() if node["class_type"] == kind)


def node_of(prompt: Prompt, kind: str) -> dict[str, Any]:
    """The first node of a type."""
    return prompt[node_id(prompt, kind)]
