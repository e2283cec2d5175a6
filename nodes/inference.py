"""The node that makes the video: inputs -> job -> launcher -> file, log, status."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from ..distributed.job import Job, JobError, ModelFiles, Parallel, Sampling, Text
from ..distributed.launcher import JobCancelled, JobFailed, new_job_id, run_job
from . import embeds, host
from .config import DistributedConfig
from .inference_inputs import HIDDEN, optional, required
from .status import Status


class WanVideoDistributedInference:
    DESCRIPTION = (
        "Makes a video with Wan2.2 on several GPUs: one process per GPU, started by torchrun, with Ulysses sequence "
        "parallelism and FSDP weight sharding. Shows progress while it runs and plays the video when it is done. "
        "Cancel ends all processes at once."
    )
    CATEGORY = "WanVideoDistributed"
    FUNCTION = "run"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING", "STRING", "STRING", "VIDEO", "LATENT")
    RETURN_NAMES = ("video_path", "log_output", "status", "video", "samples")
    OUTPUT_TOOLTIPS = (
        "Path of the mp4 in ComfyUI's output folder.",
        "The log of the job's first process, its last 64 KiB.",
        "Success, the settings that were in effect, times and warnings, as text.",
        "The video, for Save Video and other video nodes.",
        "The latents (un-normalised, as ComfyUI's own), for VAE Decode or another sampler.",
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["wan2.2", "text to video", "multi gpu", "torchrun"]

    # ComfyUI asks a class, not an instance, whether a node must run again, hence kept on the class:
    # node id -> the video it made last; and how often such a video was found deleted.
    _videos: ClassVar[dict[str, Path]] = {}
    _deleted: ClassVar[dict[str, int]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {"required": required(), "optional": optional(), "hidden": dict(HIDDEN)}

    @classmethod
    def VALIDATE_INPUTS(cls, width: int | None = None, height: int | None = None) -> bool | str:
        from ..distributed.preflight import check_size

        for name, value in (("width", width), ("height", height)):
            if value is None:
                continue
            # Naming an input here switches ComfyUI's own range check off for it, so that is done here too.
            limits = required()[name][1]
            if not limits["min"] <= value <= limits["max"]:
                return f"{name} is {value}; it must be {limits['min']} to {limits['max']}"
            try:
                check_size(name, value)
            except ValueError as error:
                return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, unique_id: str | None = None, **_: Any) -> int:
        """Changes when the node's last video was deleted: a cached run would hand out a dead path."""
        key = str(unique_id)
        video = cls._videos.get(key)
        if video is not None and not video.is_file():
            del cls._videos[key]
            cls._deleted[key] = cls._deleted.get(key, 0) + 1
        return cls._deleted.get(key, 0)

    def run(self, **inputs: Any) -> dict[str, Any]:
        try:
            return self._run(**inputs)
        except JobCancelled as error:
            raise host.interruption() from error
        except (ValueError, JobError) as error:
            if inputs.get("on_error", "raise") == "return":
                log = error.log if isinstance(error, JobFailed) else ""
                blocked = host.blocked_output()
                return {"result": ("", log, f"error: {error}", blocked, blocked)}
            if isinstance(error, JobFailed) and error.out_of_memory:
                raise host.out_of_memory(str(error)) from error
            raise

    def _run(
        self,
        *,
        model: ModelFiles,
        filename_prefix: str = "video/wan",
        unique_id: str | None = None,
        workflow_prompt: dict[str, Any] | None = None,
        extra_pnginfo: dict[str, Any] | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        from ..distributed.preflight import check_job

        status = Status()
        sampling = _sampling(settings, status)
        text, tensors = _text(settings, model, sampling, status)
        job = Job(id=new_job_id(), model=model, parallel=_parallel(settings, status), sampling=sampling, text=text)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        status.note(*check_job(job, shapes.get("context"), shapes.get("context_null")))
        job = dataclasses.replace(job, warnings=tuple(status.warnings))
        host.check_prefix(filename_prefix, sampling.width, sampling.height)
        host.free_memory()
        report = host.ProgressReport(unique_id)
        result = run_job(
            job,
            lambda path: _write_inputs(path, tensors),
            parent=host.jobs_folder(),
            failed=host.failed_folder(),
            on_progress=report,
            on_log_line=host.log,
            cancelled=host.interrupted,
        )
        try:
            saved = host.save_video(
                result.folder.video,
                filename_prefix,
                width=sampling.width,
                height=sampling.height,
                workflow={"prompt": workflow_prompt, **(extra_pnginfo or {})},
            )
            samples = _read_latents(result.folder.latents)
        finally:
            result.remove()
        self._videos[str(unique_id)] = saved.path
        status.note(*result.info["warnings"])
        report.text(status.line(result.info))
        return {
            "ui": saved.ui(),
            "result": (
                str(saved.path),
                result.log,
                status.block(saved.path, result.info),
                saved.video(),
                {"samples": samples},
            ),
        }


def _parallel(settings: dict[str, Any], status: Status) -> Parallel:
    from ..distributed.gpus import choose_gpus

    chosen: DistributedConfig | None = settings.get("config")
    own = {key: settings[key] for key in ("gpu_count", "use_ulysses", "use_fsdp", "offload_model")}
    if chosen is None:
        chosen = DistributedConfig(**own)
    else:
        differing = [key for key, value in own.items() if value != getattr(chosen, key)]
        if differing:
            status.note(f"config is connected: its {', '.join(differing)} won over this node's own values")
    gpu_count, gpu_ids = choose_gpus(chosen.gpu_count, chosen.gpu_ids, host.visible_gpus())
    timeouts = {name: float(getattr(chosen, name)) for name in ("start_timeout", "stall_timeout")}
    return Parallel(**{**dataclasses.asdict(chosen), **timeouts, "gpu_count": gpu_count, "gpu_ids": gpu_ids})


def _sampling(settings: dict[str, Any], status: Status) -> Sampling:
    frames = settings["num_frames"]
    fitting = frames + (1 - frames) % 4
    if fitting != frames:
        status.note(f"num_frames was raised from {frames} to {fitting}: the model makes 4n + 1 frames")
    return Sampling(
        width=settings["width"],
        height=settings["height"],
        num_frames=fitting,
        steps=settings["sample_steps"],
        seed=settings.get("seed", 0),
        solver=settings.get("scheduler", "unipc"),
        shift=float(settings.get("shift", 12.0)),
        guidance_low=float(settings.get("guidance_low", 3.0)),
        guidance_high=float(settings.get("guidance_high", 4.0)),
        boundary=float(settings.get("boundary", 0.875)),
        fps=float(settings.get("fps", 16.0)),
    )


def _text(
    settings: dict[str, Any], model: ModelFiles, sampling: Sampling, status: Status
) -> tuple[Text | None, dict[str, Any]]:
    """The prompts to encode inside the job; or None and the tensors to send with it: context, context_null."""
    from ..distributed.preflight import needs_negative

    text_embeds, negative_embeds = settings.get("text_embeds"), settings.get("negative_embeds")
    prompt, negative_prompt = settings["prompt"], settings.get("negative_prompt", "")
    if text_embeds is None:
        if negative_embeds is not None:
            raise ValueError("negative_embeds is connected but text_embeds is not; connect both or neither")
        if not prompt.strip():
            raise ValueError("prompt is empty and text_embeds is not connected: there is nothing to make a video of")
        if not model.text_encoder:
            raise ValueError(
                "text_embeds is not connected and the model has no text encoder: connect WanVideo TextEncode "
                "(or CLIP Text Encode) to text_embeds, or choose a text_encoder in Load Wan Video Model"
            )
        return Text(prompt=prompt, negative_prompt=negative_prompt), {}
    unused = [name for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)) if value.strip()]
    if unused:
        status.note(f"text_embeds is connected: {' and '.join(unused)} of this node had no effect")
    found = {"context": embeds.prompt_of(text_embeds, "text_embeds")}
    if needs_negative(sampling):
        if negative_embeds is not None:
            found["context_null"] = embeds.prompt_of(negative_embeds, "negative_embeds")
        elif (null := embeds.negative_of(text_embeds, "text_embeds")) is not None:
            found["context_null"] = null
    for embedding in found.values():
        status.note(*embedding.notes)
    return None, {name: embedding.tokens for name, embedding in found.items()}


def _write_inputs(path: Path, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, str(path))


def _read_latents(path: Path) -> Any:
    """[1, 16, T, h, w] float32, un-normalised."""
    from safetensors.torch import load_file

    return load_file(str(path))["samples"]
