"""The node that says whether this machine can make videos."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, ClassVar

from ..distributed.doctor.library_process import run_doctor
from ..distributed.job.errors import JobCancelled
from ..distributed.job.job import ModelFiles
from .host import host
from .host.declared import as_declared, kind_of
from .host.node_report import NodeReport
from .host.own_folder import pack_folder


class WanVideoDistributedDoctor:
    DESCRIPTION = (
        "Examines this machine: GPUs, who uses them and how they are connected, a timed exchange between two of them, "
        "torch, attention kernels, packages, ffmpeg, memory and disks. Ends with a verdict in plain sentences. Takes "
        "up to a minute, some more where GPUs do not answer, in a process of its own, and never hangs: what does not "
        "answer is a line of the report."
    )
    CATEGORY = "WanVideoDistributed"
    FUNCTION = "examine"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("The report as text, for Preview as Text.",)
    SEARCH_ALIASES: ClassVar[list[str]] = ["diagnose", "nccl", "multi gpu test", "topology"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {
            "required": {},
            "optional": {
                "model": (
                    "WAN_DISTRIBUTED_MODEL",
                    {"tooltip": "From Load Wan Video Model: the report then says how many GPUs suit it."},
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        # Not equal to itself, so that ComfyUI asks again each time: the machine changes, the inputs do not.
        return float("nan")

    @as_declared
    def examine(self, model: ModelFiles | None = None, unique_id: str | None = None) -> dict[str, Any]:
        if model is not None and not isinstance(model, ModelFiles):
            raise ValueError(f"model is {kind_of(model)}; connect Load Wan Video Model to it")
        output, temp = host.output_folder(), host.jobs_folder().parent
        for folder in (output, temp):
            # ComfyUI makes them when it first needs them; where it cannot, the report says so.
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
        report = NodeReport(unique_id)
        report.text("examining this machine")
        environment = dict(os.environ)
        if host.visible_gpus() is None:
            # ComfyUI's own choice of a GPU for itself, not the user's for jobs.
            environment.pop("CUDA_VISIBLE_DEVICES", None)
        try:
            found = run_doctor(
                model=[file.path for file in model.transformer] if model is not None else [],
                output=output,
                temp=temp,
                folder=pack_folder(),
                cancelled=host.interrupted,
                environment=environment,
            )
        except JobCancelled as error:
            report.end("cancelled")
            raise host.interruption() from error
        versions = f"ComfyUI {host.comfyui_version()}, its Python {sys.version.split()[0]}"
        text = f"{versions}\n\n{found['text']}"
        report.end("\n".join(found["verdict"]))
        for line in found["verdict"]:
            host.log(line)
        return {"ui": {"text": (text,)}, "result": (text,)}
