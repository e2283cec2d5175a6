"""The node that makes the video: inputs -> job -> launcher -> file, log, status."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from ..distributed.job import Job, JobError, ModelFiles, Parallel, Sampling
from ..distributed.launcher import JobCancelled, JobFailed, new_job_id, run_job
from . import catalogue, embeds, host, warm, wrapper_model
from .config import DistributedConfig
from .images import image_tensors
from .inference_inputs import HIDDEN, optional, required
from .latents import latent_tensors
from .loras import distilled_warnings, refreshed
from .presets import with_preset
from .status import Status
from .wrapper_model import AUTO


class WanVideoDistributedInference:
    DESCRIPTION = (
        "Makes a video with Wan2.2, from text, images or latents, on several GPUs: one process per GPU, started by "
        "torchrun, with Ulysses sequence parallelism and FSDP weight sharding. Shows progress while it runs and plays "
        "the video when it is done. Cancel ends all processes at once."
    )
    CATEGORY = "WanVideoDistributed"
    FUNCTION = "run"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING", "STRING", "STRING", "VIDEO", "LATENT")
    RETURN_NAMES = ("video_path", "log_output", "status", "video", "samples")
    OUTPUT_TOOLTIPS = (
        "Path of the mp4 in ComfyUI's output folder; empty if decode_video is off.",
        "The log of the job's first process, its last 64 KiB.",
        "Success, the settings that were in effect, times and warnings, as text.",
        "The video, for Save Video and other video nodes.",
        "The latents (un-normalised, as ComfyUI's own), for VAE Decode or another of these nodes.",
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["wan2.2", "text to video", "image to video", "i2v", "multi gpu", "torchrun"]

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
    def IS_CHANGED(cls, unique_id: str | None = None, vae: str | None = AUTO, **_: Any) -> str:
        """Changes when the node's last video was deleted, whose path a cached run would hand out, or when `vae` was
        replaced; the files of links are looked at by the nodes that they come from."""
        key = str(unique_id)
        video = cls._videos.get(key)
        if video is not None and not video.is_file():
            del cls._videos[key]
            cls._deleted[key] = cls._deleted.get(key, 0) + 1
        files = () if vae in (None, AUTO) else catalogue.vae_files(vae)
        return f"{cls._deleted.get(key, 0)} {host.fingerprint(files)}"

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
        filename_prefix: str = "video/wan",
        unique_id: str | None = None,
        workflow_prompt: dict[str, Any] | None = None,
        extra_pnginfo: dict[str, Any] | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        status = Status()
        job, tensors = _job(settings, status)
        sampling = job.sampling
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
            pool=warm.pool(),
        )
        saved = None
        try:
            if job.decode:
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
        status.note(*result.info["warnings"])
        report.text(status.line(result.info))
        path = None if saved is None else saved.path
        self._remember(unique_id, path)
        video = host.blocked_output() if saved is None else saved.video()
        return {
            "ui": {} if saved is None else saved.ui(),
            "result": (str(path or ""), result.log, status.block(path, result.info), video, {"samples": samples}),
        }

    def _remember(self, unique_id: str | None, video: Path | None) -> None:
        self._videos.pop(str(unique_id), None)
        if video is not None:
            self._videos[str(unique_id)] = video


def _job(settings: dict[str, Any], status: Status) -> tuple[Job, dict[str, Any]]:
    """The job that the inputs ask for, checked, and the tensors that travel with it."""
    from ..distributed.preflight import check_job, check_model

    model = _model(settings, status)
    config = check_model(model)
    settings = with_preset(settings, config.task, status)
    sampling = _sampling(settings, status)
    text, tensors = embeds.text_inputs(settings, model, sampling, status)
    images = image_tensors(settings, sampling, config, status)
    samples = settings.get("samples")
    latents = {} if samples is None else latent_tensors(samples, sampling, config, status)
    if "samples" in images and latents:
        raise ValueError("samples is connected, and image_embeds carries extra_latents; take one of them out")
    tensors = {**tensors, **images, **latents}
    job = Job(
        id=new_job_id(),
        model=model,
        parallel=_parallel(settings, model, sampling, status),
        sampling=sampling,
        text=text,
        decode=settings.get("decode_video", True),
        verbose=host.verbose(),
    )
    status.note(*distilled_warnings(model, sampling))
    status.note(*check_job(job, {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
    return dataclasses.replace(job, warnings=tuple(status.warnings)), tensors


def _model(settings: dict[str, Any], status: Status) -> ModelFiles:
    model, low_noise_model, vae = settings["model"], settings.get("low_noise_model"), settings.get("vae", AUTO)
    if not isinstance(model, ModelFiles):
        return wrapper_model.files_of(model, low_noise_model, vae, status)
    if low_noise_model is not None:
        raise ValueError(
            "low_noise_model is connected, but model is from Load Wan Video Model, which names both experts; "
            "disconnect low_noise_model"
        )
    if vae != AUTO:
        model = dataclasses.replace(model, vae=catalogue.identities(catalogue.vae_files(vae)))
        status.note(f"vae is {vae}, instead of the one that Load Wan Video Model names")
    return refreshed(model)


def _parallel(settings: dict[str, Any], model: ModelFiles, sampling: Sampling, status: Status) -> Parallel:
    from ..distributed.gpus import choose_gpus
    from ..distributed.preflight import always_guided

    chosen: DistributedConfig | None = settings.get("config")
    own = {key: settings[key] for key in ("gpu_count", "use_ulysses", "use_fsdp", "offload_model")}
    if chosen is None:
        chosen = DistributedConfig(**own)
    else:
        differing = [key for key, value in own.items() if value != getattr(chosen, key)]
        if differing:
            status.note(f"config is connected: its {', '.join(differing)} won over this node's own values")
    gpu_count, gpu_ids = choose_gpus(chosen.gpu_count, chosen.gpu_ids, host.visible_gpus())
    names = ("start_timeout", "stall_timeout", "keep_warm_seconds")
    seconds = {name: float(getattr(chosen, name)) for name in names}
    cfg_parallel = chosen.cfg_parallel == "on"
    if chosen.cfg_parallel == "auto":
        # With both ways of sharing work off the user is asked what is meant, not served with a third.
        shares = chosen.use_ulysses or chosen.use_fsdp
        cfg_parallel = shares and gpu_count % 2 == 0 and always_guided(model, sampling)
    own = {"gpu_count": gpu_count, "gpu_ids": gpu_ids, "cfg_parallel": cfg_parallel}
    return Parallel(**{**dataclasses.asdict(chosen), **seconds, **own})


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
        strength=float(settings.get("strength", 1.0)),
        start_step=settings.get("start_step", 0),
        end_step=settings.get("end_step", 0),
        add_noise=settings.get("add_noise", True),
    )


def _write_inputs(path: Path, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, str(path))


def _read_latents(path: Path) -> Any:
    """[1, 16, T, h, w] float32, un-normalised."""
    from safetensors.torch import load_file

    return load_file(str(path))["samples"]
