"""What the batch node declares: the inference node's inputs, for several videos."""

from __future__ import annotations

from typing import Any

from ...distributed.job.switches import MAX_GPUS
from ..inference import inference_inputs

MAX_COUNT = 100
GPU_COUNT_TOOLTIP = (
    "GPUs of the whole batch, one process each. 0: all suitable GPUs. gpus_per_video says how many share a video. On a "
    "machine without a GPU: that many CPU processes."
)
PROMPTS = (
    "STRING",
    {
        "default": "",
        "multiline": True,
        "placeholder": "one prompt per line",
        "tooltip": "One prompt per line. For prompts of several lines, put a line of --- between them. Encoded inside "
        "the jobs by the model's text encoder; has no effect while text_embeds is connected.",
    },
)


def required() -> dict[str, Any]:
    """The inputs of this node alone come last here: the optional ones grow with the inference node's."""
    inputs: dict[str, Any] = {}
    for name, declared in inference_inputs.required().items():
        if name == "prompt":
            overruled = {"overruled_by": declared[1]["overruled_by"]}
            inputs["prompts"] = PROMPTS[0], {**PROMPTS[1], **overruled}
        else:
            inputs[name] = declared
    inputs["gpu_count"] = ("INT", {**inputs["gpu_count"][1], "tooltip": GPU_COUNT_TOOLTIP})
    inputs["batch_count"] = (
        "INT",
        {
            "default": 1,
            "min": 1,
            "max": MAX_COUNT,
            "tooltip": "Videos of each prompt, with the seeds seed, seed + 1, and so on.",
        },
    )
    inputs["gpus_per_video"] = (
        "INT",
        {
            "default": 0,
            "min": 0,
            "max": MAX_GPUS,
            "tooltip": "GPUs that work on one video; several videos are made at a time. 0: as few as keep all GPUs "
            "busy and hold the weights: 2 videos on 4 GPUs get 2 each.",
        },
    )
    return inputs


def optional() -> dict[str, Any]:
    inputs = inference_inputs.optional()
    # Always on: a switch in its place would move the values of saved workflows.
    inputs.pop("preview")
    inputs["on_error"] = (
        inputs["on_error"][0],
        {
            **inputs["on_error"][1],
            "tooltip": "Other videos are finished in any case. raise: then the workflow stops with an error that names "
            "what failed. return: a failed video's path is empty, its status begins with error: and the nodes behind "
            "it do not run.",
        },
    )
    return inputs
