"""What the inference node declares. Saved workflows hold widget values by position: new inputs go at the end."""

from __future__ import annotations

from typing import Any

from ...distributed.job.job import SOLVERS
from ..models import catalogue
from ..settings import spread as config_node
from ..settings.presets import CUSTOM, PRESETS
from ..sockets.wrapper_model import AUTO

MODELS = "WAN_DISTRIBUTED_MODEL,WANVIDEOMODEL"
EMBEDS = "WANVIDEOTEXTEMBEDS,CONDITIONING"
HIDDEN = {"unique_id": "UNIQUE_ID", "workflow_prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}


def required() -> dict[str, Any]:
    from ...distributed.planning.preflight import (
        SIZE_MULTIPLE,  # brings torch, which the import of this pack does without
    )

    return {
        "model": (
            MODELS,
            {
                "tooltip": "From Load Wan Video Model. A WANVIDEOMODEL of WanVideoModelLoader is taken too, by the "
                "path of its file: that node has then read the whole file into memory for nothing."
            },
        ),
        "prompt": (
            "STRING",
            {
                "default": "",
                "multiline": True,
                "tooltip": "What the video shows. Encoded inside the job by the model's text encoder; "
                "has no effect while text_embeds is connected.",
            },
        ),
        "width": _int(832, 16, 8192, "Width in pixels, a multiple of 16 (TI2V-5B: 32).", step=SIZE_MULTIPLE),
        "height": _int(480, 16, 8192, "Height in pixels, a multiple of 16 (TI2V-5B: 32).", step=SIZE_MULTIPLE),
        "num_frames": _int(121, 1, 4097, "Frames: 4n + 1. Another number is raised to the next one.", step=4),
        "sample_steps": _int(20, 1, 1000, "Denoising steps over both experts. A preset sets them."),
        "gpu_count": ("INT", config_node.GPU_COUNT),
        "use_ulysses": ("BOOLEAN", config_node.USE_ULYSSES),
        "use_fsdp": ("BOOLEAN", config_node.USE_FSDP),
        "offload_model": ("BOOLEAN", config_node.OFFLOAD_MODEL),
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
        "negative_prompt": (
            "STRING",
            {
                "default": "",
                "multiline": True,
                "tooltip": "What the video should not show, encoded with prompt. Empty: Wan's own negative prompt.",
            },
        ),
        "seed": _int(
            0,
            0,
            2**64 - 1,
            "Seed of the noise. The same seed gives the same video for any number of GPUs.",
            control_after_generate=True,
        ),
        "scheduler": (
            list(SOLVERS),
            {"default": "unipc", "tooltip": "Solver. unipc is Wan's own default; euler is for distilled models."},
        ),
        "shift": _float(
            12.0, 0.01, 100.0, "Timestep shift: higher spends more steps on noise. T2V: 12, I2V and TI2V-5B: 5."
        ),
        "guidance_low": _float(
            3.0, 0.0, 100.0, "Guidance of the low-noise expert. 1 skips the second pass: twice as fast."
        ),
        "guidance_high": _float(
            4.0, 0.0, 100.0, "Guidance of the high-noise expert. 1 skips the second pass: twice as fast."
        ),
        "boundary": _float(
            0.875,
            0.0,
            1.0,
            "The high-noise expert runs while the noise level is at least this. T2V: 0.875, I2V: 0.9. No effect on a "
            "model of one transformer.",
            step=0.001,
        ),
        "fps": _float(16.0, 1.0, 240.0, "Frames per second of the mp4. Wan2.2 A14B: 16, TI2V-5B: 24.", step=1.0),
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
        "strength": _float(
            1.0,
            0.01,
            1.0,
            "How much of samples is made anew: 1 all of it, less keeps more. Without effect on a video from noise: "
            "leave it at 1.",
        ),
        "start_step": _int(0, 0, 999, "First step to run; samples are taken to be at its noise level."),
        "end_step": _int(0, 0, 1000, "Stop before this step and hand on samples with their noise. 0: run to the end."),
        "add_noise": (
            "BOOLEAN",
            {
                "default": True,
                "tooltip": "Add the seed's noise to samples. Off for samples that still hold theirs, from a run with "
                "end_step.",
            },
        ),
        "decode_video": (
            "BOOLEAN",
            {
                "default": True,
                "tooltip": "Off: make no video, hand on samples only. video_path is empty, and nodes behind video do "
                "not run.",
            },
        ),
        "preset": (
            [CUSTOM, *PRESETS],
            {
                "default": CUSTOM,
                "tooltip": "Sets scheduler, sample_steps, shift, guidance and boundary together, whatever this node's "
                "own say; the status lists them. custom: this node's own.",
            },
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
        "preview": (
            "BOOLEAN",
            {
                "default": True,
                "tooltip": "Show on the node, while it samples, what the video is going to be: its middle, about ten "
                "times. Changes nothing of the video. ComfyUI's own preview setting is about its samplers.",
            },
        ),
        "plan": (["auto", config_node.AS_SET], config_node.PLAN),
        "dynamic_resolution": (
            "BOOLEAN",
            {
                "default": False,
                "tooltip": "A video that does not fit the GPUs' memory is made at the largest size of the same aspect "
                "ratio that does, and the status says so. Off: it is refused before anything starts, with that size. "
                "Needs plan auto.",
            },
        ),
    }


def _int(default: int, low: int, high: int, tooltip: str, **options: Any) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": default, "min": low, "max": high, **options, "tooltip": tooltip}


def _float(default: float, low: float, high: float, tooltip: str, step: float = 0.01) -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip}
