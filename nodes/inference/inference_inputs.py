"""What the inference node declares. Saved workflows hold widget values by position: new inputs go at the end."""

from __future__ import annotations

from typing import Any

from ...distributed.job.sampling import SamplingSettings
from ..models import catalogue
from ..settings import spread as config_node
from ..settings.presets import SET_BY_PRESETS
from ..settings.widgets import INPUT_NAMES, widget
from ..sockets.video_inputs import LAYOUT, VideoInputs
from ..sockets.wrapper_model import AUTO

MODELS = "WAN_DISTRIBUTED_MODEL,WANVIDEOMODEL"
EMBEDS = "WANVIDEOTEXTEMBEDS,CONDITIONING"
HIDDEN = {"unique_id": "UNIQUE_ID", "workflow_prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
SOCKETS = {
    "model": MODELS,
    "text_embeds": EMBEDS,
    "config": "WAN_DISTRIBUTED_CONFIG",
    "negative_embeds": EMBEDS,
    "start_image": "IMAGE",
    "end_image": "IMAGE",
    "image_embeds": "WANVIDIMAGE_EMBEDS",
    "samples": "LATENT",
    "low_noise_model": "WANVIDEOMODEL",
    "clip_vision_start_image": "CLIP_VISION_OUTPUT",
    "clip_vision_end_image": "CLIP_VISION_OUTPUT",
    "control_video": "IMAGE",
    "control_mask": "MASK",
    "reference_images": "IMAGE",
    "camera_conditions": "WAN_CAMERA_EMBEDDING",
}
"""Inputs without a widget."""
_SETTINGS = {INPUT_NAMES.get(name, name): name for name in SamplingSettings.__dataclass_fields__}
REQUIRED = {
    "model": "From Load Wan Video Model. A WANVIDEOMODEL of WanVideoModelLoader is taken too, by the path of its "
    "file: that node has then read the whole file into memory for nothing.",
    "prompt": "What the video shows. Encoded inside the job by the model's text encoder; has no effect while "
    "text_embeds is connected.",
    "width": "Width in pixels, a multiple of 16 (TI2V-5B: 32).",
    "height": "Height in pixels, a multiple of 16 (TI2V-5B: 32).",
    "num_frames": "Frames: 4n + 1. Another number is raised to the next one.",
    "sample_steps": "Denoising steps over both experts. A preset sets them.",
    "gpu_count": config_node.REQUIRED["gpu_count"],
    "use_ulysses": config_node.REQUIRED["use_ulysses"],
    "use_fsdp": config_node.REQUIRED["use_fsdp"],
    "offload_model": config_node.REQUIRED["offload_model"],
}
"""Inputs with their tooltips, in order."""
OPTIONAL = {
    "text_embeds": "The prompt as embeddings: from WanVideo TextEncode, or from CLIP Text Encode with a CLIP of type "
    "wan, also through nodes such as WanAnimateToVideo, with what they add. Wins over prompt.",
    "config": "From Wan Video Distributed Config. Wins over this node.",
    "negative_embeds": "The negative prompt as embeddings. Wins over the one that text_embeds carries.",
    "negative_prompt": "What the video should not show, encoded with prompt. Empty: Wan's own negative prompt.",
    "seed": "Seed of the noise. The same seed gives the same video for any number of GPUs.",
    "scheduler": "Solver. unipc is Wan's own default; euler is for distilled models.",
    "shift": "Timestep shift: higher spends more steps on noise. T2V: 12, I2V and TI2V-5B: 5.",
    "guidance_low": "Guidance of the low-noise expert. 1 skips the second pass: twice as fast.",
    "guidance_high": "Guidance of the high-noise expert. 1 skips the second pass: twice as fast.",
    "boundary": "The high-noise expert runs while the noise level is at least this. T2V: 0.875, I2V: 0.9. No effect "
    "on a model of one transformer.",
    "fps": "Frames per second of the video. Wan2.2 A14B: 16, TI2V-5B: 24.",
    "filename_prefix": "Folder and name in ComfyUI's output folder; a number is added.",
    "on_error": "raise: a failed run stops the workflow with an error. return: video_path is empty, status begins "
    "with error: and the nodes behind video and samples do not run.",
    "start_image": "First frame, for I2V, FLF2V, TI2V-5B and Fun models. Scaled to cover width x height, the rest is "
    "cut off.",
    "end_image": "Last frame, for I2V, FLF2V and Fun InP models; with or without start_image.",
    "image_embeds": "An image encoded by WanVideoImageToVideoEncode, instead of start_image and end_image.",
    "samples": "Latents to start from, at this node's size: a video to change (strength), one to go on with "
    "(start_step), or an empty one, which changes nothing.",
    "strength": "How much of samples is made anew: 1 all of it, less keeps more. Without effect on a video from "
    "noise: leave it at 1.",
    "start_step": "First step to run; samples are taken to be at its noise level.",
    "end_step": "Stop before this step and hand on samples with their noise. 0: run to the end.",
    "add_noise": "Add the seed's noise to samples. Off for samples that still hold theirs, from a run with end_step.",
    "decode_video": "Off: make no video, hand on samples only. video_path is empty, and nodes behind video do not run.",
    "preset": "Sets scheduler, sample_steps, shift, guidance and boundary together, whatever this node's own say; the "
    "status lists them. custom: this node's own.",
    "low_noise_model": "The low-noise expert, where model is a WANVIDEOMODEL with the high-noise one.",
    "vae": "auto: the VAE of Load Wan Video Model; for a WANVIDEOMODEL the only VAE in models/vae that fits. Another "
    "choice wins over the model's.",
    "preview": "Show on the node, while it samples, what the video is going to be: its middle, about ten times. "
    "Changes nothing of the video. ComfyUI's own preview setting is about its samplers.",
    "plan": config_node.OPTIONAL["plan"],
    "dynamic_resolution": "A video that does not fit the GPUs' memory is made at the largest size of the same aspect "
    "ratio that does, and the status says so. Off: it is refused before anything starts, with that size. Needs plan "
    "auto.",
    "reuse_threshold": "EasyCache: steps whose result can be told from the ones before are not computed. The larger, "
    "the faster, and the further the video is from the one without; 0.2 is common, for 20 steps and more. 0: off.",
    "clip_vision_start_image": "What CLIP sees in start_image, for Wan2.1 I2V, FLF2V and Fun: from CLIP Vision Encode "
    "(crop none) with clip_vision_h. Not needed where Load Wan Video Model names a clip_vision.",
    "clip_vision_end_image": "What CLIP sees in end_image, for FLF2V.",
    "control_video": "What a VACE or Fun-Control model follows: depth, pose, edges; for VACE also a video of which "
    "control_mask says what to make anew. Scaled to cover width x height; frames beyond it are made without one.",
    "control_mask": "Where a VACE model makes control_video anew (white) and where it keeps it (black). Without one, "
    "control_video is followed everywhere.",
    "reference_images": "Pictures of who or what a VACE model shows; each takes a latent frame in front of the video, "
    "which samples keeps and the decoded video does not. For Fun-Control one picture, which neither keeps.",
    "vace_strength": "How strongly a VACE model follows its control. 1: as it was trained.",
    "crf": "Quality of h264 and h265, each on its own scale: lower is better, and larger. 16 of h264 cannot be told "
    "from the frames by eye; its 0 loses nothing but that colours have half the size, and some players refuse it.",
    "video_format": "h264 mp4 plays everywhere. h265 mp4: ten bits, smaller; many browsers do not play it. prores mov: "
    "for editors; Save Video needs codec h264 for it. ffv1 mp4: the frames in 8 bits without any loss. No browser "
    "plays these two. Only an mp4 that is dropped on the page brings its workflow back.",
    "camera_conditions": "How the camera moves, for Fun-Camera: from WanCameraEmbedding, of this node's width, height "
    "and num_frames.",
}


COMMON = {
    "prompt", "width", "height", "num_frames", "sample_steps", "gpu_count", "negative_prompt", "seed", "scheduler",
    "shift", "guidance_low", "guidance_high", "fps", "filename_prefix", "preset", "plan",
}  # fmt: skip
"""The other widgets are folded away by pages that can."""
OVERRULED = {
    **dict.fromkeys(("prompt", "negative_prompt"), "text_embeds"),
    **dict.fromkeys(LAYOUT, "config"),
    **dict.fromkeys(SET_BY_PRESETS, "preset"),
}
"""Input -> the one that decides in its place, where that is connected or not at its default; overruled.js hides it."""


def required() -> dict[str, Any]:
    return {name: _input(name, tooltip) for name, tooltip in REQUIRED.items()}


def optional() -> dict[str, Any]:
    return {name: _input(name, tooltip) for name, tooltip in OPTIONAL.items()}


def _input(name: str, tooltip: str) -> tuple[Any, dict[str, Any]]:
    kind, options = _declared(name, tooltip)
    rare = {} if name in COMMON or name in SOCKETS else {"advanced": True}
    overruled = {"overruled_by": OVERRULED[name]} if name in OVERRULED else {}
    return kind, {**options, **rare, **overruled}


def _declared(name: str, tooltip: str) -> tuple[Any, dict[str, Any]]:
    if name in SOCKETS:
        # See check_lazy_status of the nodes that make videos.
        return SOCKETS[name], {"tooltip": tooltip, "lazy": True}
    if name in LAYOUT:
        return widget(config_node.DistributedConfig, name, tooltip)
    if name in _SETTINGS:
        more = {"control_after_generate": True} if name == "seed" else {}
        return widget(SamplingSettings, _SETTINGS[name], tooltip, **more)
    match name:
        case "filename_prefix":
            return "STRING", {"default": "video/wan", "tooltip": tooltip}
        case "on_error":
            return ["raise", "return"], {"default": "raise", "tooltip": tooltip}
        case "vae":
            return [AUTO, *catalogue.vae_names()], {"default": AUTO, "tooltip": tooltip}
    more = {"multiline": True} if name.endswith("prompt") else {}
    return widget(VideoInputs, name, tooltip, **more)
