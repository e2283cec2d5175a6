"""What the inference node declares. Saved workflows hold widget values by position: new inputs go at the end."""

from __future__ import annotations

from typing import Any

from ...distributed.job.sampling import SamplingSettings
from ..models import catalogue
from ..settings.spread import config_input
from ..settings.widgets import widget
from ..sockets.video_inputs import VideoInputs
from ..sockets.wrapper_model import AUTO

MODELS = "WAN_DISTRIBUTED_MODEL,WANVIDEOMODEL"
EMBEDS = "WANVIDEOTEXTEMBEDS,CONDITIONING"
HIDDEN = {"unique_id": "UNIQUE_ID", "workflow_prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}


def required() -> dict[str, Any]:
    return {
        "model": (
            MODELS,
            {
                "tooltip": "From Load Wan Video Model. A WANVIDEOMODEL of WanVideoModelLoader is taken too, by the "
                "path of its file: that node has then read the whole file into memory for nothing."
            },
        ),
        "prompt": widget(
            VideoInputs,
            "prompt",
            "What the video shows. Encoded inside the job by the model's text encoder; "
            "has no effect while text_embeds is connected.",
            multiline=True,
        ),
        "width": _sampling("width", "Width in pixels, a multiple of 16 (TI2V-5B: 32)."),
        "height": _sampling("height", "Height in pixels, a multiple of 16 (TI2V-5B: 32)."),
        "num_frames": _sampling("num_frames", "Frames: 4n + 1. Another number is raised to the next one."),
        "sample_steps": _sampling("steps", "Denoising steps over both experts. A preset sets them."),
        "gpu_count": config_input("gpu_count"),
        "use_ulysses": config_input("use_ulysses"),
        "use_fsdp": config_input("use_fsdp"),
        "offload_model": config_input("offload_model"),
    }


def optional() -> dict[str, Any]:
    return {
        "text_embeds": (
            EMBEDS,
            {
                "tooltip": "The prompt as embeddings: from WanVideo TextEncode, or from CLIP Text Encode with a "
                "CLIP of type wan. Wins over prompt."
            },
        ),
        "config": ("WAN_DISTRIBUTED_CONFIG", {"tooltip": "From Wan Video Distributed Config. Wins over this node."}),
        "negative_embeds": (
            EMBEDS,
            {"tooltip": "The negative prompt as embeddings. Wins over the one that text_embeds carries."},
        ),
        "negative_prompt": widget(
            VideoInputs,
            "negative_prompt",
            "What the video should not show, encoded with prompt. Empty: Wan's own negative prompt.",
            multiline=True,
        ),
        "seed": _sampling(
            "seed",
            "Seed of the noise. The same seed gives the same video for any number of GPUs.",
            control_after_generate=True,
        ),
        "scheduler": _sampling("solver", "Solver. unipc is Wan's own default; euler is for distilled models."),
        "shift": _sampling("shift", "Timestep shift: higher spends more steps on noise. T2V: 12, I2V and TI2V-5B: 5."),
        "guidance_low": _sampling(
            "guidance_low", "Guidance of the low-noise expert. 1 skips the second pass: twice as fast."
        ),
        "guidance_high": _sampling(
            "guidance_high", "Guidance of the high-noise expert. 1 skips the second pass: twice as fast."
        ),
        "boundary": _sampling(
            "boundary",
            "The high-noise expert runs while the noise level is at least this. T2V: 0.875, I2V: 0.9. No effect on a "
            "model of one transformer.",
        ),
        "fps": _sampling("fps", "Frames per second of the mp4. Wan2.2 A14B: 16, TI2V-5B: 24."),
        "filename_prefix": (
            "STRING",
            {"default": "video/wan", "tooltip": "Folder and name in ComfyUI's output folder; a number is added."},
        ),
        "on_error": (
            ["raise", "return"],
            {
                "default": "raise",
                "tooltip": "raise: a failed run stops the workflow with an error. return: video_path is empty, "
                "status begins with error: and the nodes behind video and samples do not run.",
            },
        ),
        **_appended(),
    }


def _appended() -> dict[str, Any]:
    """Optional inputs of later versions."""
    return {
        "start_image": (
            "IMAGE",
            {"tooltip": "First frame, for I2V-A14B and TI2V-5B. Scaled to cover width x height, the rest is cut off."},
        ),
        "end_image": ("IMAGE", {"tooltip": "Last frame, for I2V-A14B; with or without start_image."}),
        "image_embeds": (
            "WANVIDIMAGE_EMBEDS",
            {"tooltip": "An image encoded by WanVideoImageToVideoEncode, instead of start_image and end_image."},
        ),
        "samples": (
            "LATENT",
            {
                "tooltip": "Latents to start from, at this node's size: a video to change (strength), one to go on "
                "with (start_step), or an empty one, which changes nothing."
            },
        ),
        "strength": _sampling(
            "strength",
            "How much of samples is made anew: 1 all of it, less keeps more. Without effect on a video from noise: "
            "leave it at 1.",
        ),
        "start_step": _sampling("start_step", "First step to run; samples are taken to be at its noise level."),
        "end_step": _sampling(
            "end_step", "Stop before this step and hand on samples with their noise. 0: run to the end."
        ),
        "add_noise": _sampling(
            "add_noise",
            "Add the seed's noise to samples. Off for samples that still hold theirs, from a run with end_step.",
        ),
        "decode_video": widget(
            VideoInputs,
            "decode_video",
            "Off: make no video, hand on samples only. video_path is empty, and nodes behind video do not run.",
        ),
        "preset": widget(
            VideoInputs,
            "preset",
            "Sets scheduler, sample_steps, shift, guidance and boundary together, whatever this node's "
            "own say; the status lists them. custom: this node's own.",
        ),
        "low_noise_model": (
            "WANVIDEOMODEL",
            {"tooltip": "The low-noise expert, where model is a WANVIDEOMODEL with the high-noise one."},
        ),
        "vae": (
            [AUTO, *catalogue.vae_names()],
            {
                "default": AUTO,
                "tooltip": "auto: the VAE of Load Wan Video Model; for a WANVIDEOMODEL the only VAE in models/vae that "
                "fits. Another choice wins over the model's.",
            },
        ),
        "preview": widget(
            VideoInputs,
            "preview",
            "Show on the node, while it samples, what the video is going to be: its middle, about ten "
            "times. Changes nothing of the video. ComfyUI's own preview setting is about its samplers.",
        ),
        "plan": config_input("plan"),
        "dynamic_resolution": widget(
            VideoInputs,
            "dynamic_resolution",
            "A video that does not fit the GPUs' memory is made at the largest size of the same aspect "
            "ratio that does, and the status says so. Off: it is refused before anything starts, with that size. "
            "Needs plan auto.",
        ),
    }


def _sampling(name: str, tooltip: str, **more: Any) -> tuple[Any, dict[str, Any]]:
    return widget(SamplingSettings, name, tooltip, **more)
