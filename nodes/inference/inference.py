"""The node that makes the video: inputs -> job -> launcher -> file, log, status."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ...distributed.job.job import Job, ModelFiles, Parallel, Sampling
from ...distributed.job.sampling import SamplingSettings
from ...distributed.launch.launcher import new_job_id, run_job
from ..host import host, warm
from ..host.node_report import NodeReport
from ..host.status import Status
from ..models import catalogue
from ..models.loras import lora_warnings, refreshed
from ..settings.hostfiles import parallel_over
from ..settings.presets import with_preset
from ..sockets import embeds, wrapper_model
from ..sockets.animate_inputs import animate_tensors
from ..sockets.clip_vision import clip_tensors, picture_tensors, shown
from ..sockets.fun_inputs import camera_tensors, reference_tensors
from ..sockets.images import image_tensors
from ..sockets.latent_input import latent_tensors
from ..sockets.vace_inputs import carried_control, check_length, control_size, own_control
from ..sockets.video_inputs import VideoInputs
from ..sockets.wrapper_model import AUTO
from . import saved_video
from .ground import as_switched
from .inference_inputs import HIDDEN, optional, required
from .no_effect import without_effect
from .outcome import inputs_writer, keep
from .planning import planned
from .unsuited import unsuited
from .video_node import VideoNode
from .wanted_images import TOO_LATE, images_linked


class WanVideoDistributedInference(VideoNode):
    DESCRIPTION = (
        "Makes a video with Wan2.2, from text, images or latents, on several GPUs: one process per GPU, started by "
        "torchrun, with Ulysses sequence parallelism and FSDP weight sharding. Shows progress while it runs and plays "
        "the video when it is done. Cancel ends all processes at once."
    )
    RETURN_TYPES = ("STRING", "STRING", "STRING", "VIDEO", "LATENT", "IMAGE")
    RETURN_NAMES = ("video_path", "log_output", "status", "video", "samples", "images")
    OUTPUT_TOOLTIPS = (
        "Path of the video in ComfyUI's output folder; empty if decode_video is off.",
        "The log of the job's first process, its last 64 KiB.",
        "Success, the settings that were in effect, times and warnings, as text.",
        "The video, for Save Video and other video nodes.",
        "The latents (un-normalised, as ComfyUI's own), for VAE Decode or another of these nodes.",
        "The frames as the VAE made them, before any video codec. Made only where something is linked; ComfyUI then "
        "keeps them in memory: 0.4 GB for 81 frames of 832x480.",
    )
    SEARCH_ALIASES: ClassVar[list[str]] = [
        "wan2.2", "text to video", "image to video", "t2v", "i2v", "multi gpu", "torchrun", "steps", "cfg", "guidance",
        "sampler", "KSampler", "seed", "shift", "frames", "video length",
    ]  # fmt: skip

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {"required": required(), "optional": optional(), "hidden": {**HIDDEN, "dynprompt": "DYNPROMPT"}}

    def _run(
        self,
        report: NodeReport,
        *,
        filename_prefix: str = "video/wan",
        unique_id: str | None = None,
        workflow_prompt: dict[str, Any] | None = None,
        extra_pnginfo: dict[str, Any] | None = None,
        dynprompt: Any = None,
        **settings: Any,
    ) -> dict[str, Any]:
        from ...distributed.planning.disk_room import room_of

        status = Status()
        asked = dataclasses.replace(VideoInputs.of(settings), frames=images_linked(dynprompt, unique_id))
        job, tensors = build_job(asked, status)
        sampling = job.sampling
        size = sampling.width, sampling.height
        output = saved_video.check_prefix(filename_prefix, *size, sampling.file_format.suffix)
        jobs = host.jobs_folder()
        host.free_memory()
        result = run_job(
            job,
            inputs_writer(tensors),
            parent=jobs,
            failed=host.failed_folder(),
            on_progress=report,
            on_log_line=host.log,
            cancelled=host.interrupted,
            pool=warm.pool(),
            room=room_of(job, tensors, jobs, output),
        )
        report.text("saving the video" if job.decode else "reading the latents")
        made = keep(job, result, filename_prefix, {"prompt": workflow_prompt, **(extra_pnginfo or {})})
        status.warn(*made.info["warnings"])
        videos = saved_video.shown([] if made.saved is None else [made.saved])
        report.end(status.ending(made.info, report.seconds), videos)
        self.made.remember(unique_id, () if made.path is None else (made.path,))
        return {
            "ui": {"video": videos} if videos else {},
            "result": (
                str(made.path or ""),
                made.log,
                status.block(made.path, made.info, report.seconds),
                made.video(),
                {"samples": made.samples},
                # Without a video whoever takes its frames does not run, as with the video itself.
                made.images if job.frames else host.blocked_output(TOO_LATE if job.decode else None),
            ),
        }

    def _failed(self, log: str, status: str) -> tuple[Any, ...]:
        return "", log, status, *(host.blocked_output() for _ in range(3))


def build_job(asked: VideoInputs, status: Status) -> tuple[Job, dict[str, Any]]:
    """The job that the inputs ask for, checked, and the tensors that travel with it."""
    from ...distributed.planning.preflight import check_job, check_model, needs_negative

    model = model_of(asked, status)
    config = check_model(model)
    sampling = _sampling(with_preset(asked.sampling, asked.preset, config.variant, status), status)
    text, tensors = embeds.text_inputs(asked, model, sampling, status)
    asked.say_overruled(status)
    control = carried_control(asked)
    check_length(control, sampling, config)
    features = clip_tensors(asked, config, status)
    guided = needs_negative(model, sampling)
    status.note(
        *without_effect(asked, model, config, sampling, carried=bool(control), seen=bool(features), guided=guided)
    )
    pictures = {} if features else shown(asked, model, config)
    if not pictures:
        model = dataclasses.replace(model, clip_vision=())
    parallel, sampling = planned(
        asked,
        lambda: _parallel(asked, model, sampling, status),
        model,
        sampling,
        config=config,
        control=control,
        encodes_text=text is not None,
        status=status,
    )
    images = image_tensors(asked, sampling, config, status)
    images |= reference_tensors(asked, config)
    images |= camera_tensors(asked, sampling)
    images |= animate_tensors(asked, config)
    images |= control or own_control(asked, sampling, config, status)
    images |= features or picture_tensors(pictures, status)
    _, references = control_size(asked, control, sampling, config)
    latents = {}
    if asked.samples is not None:
        latents = latent_tensors(asked.samples, sampling, config, status, references)
    if "samples" in images and latents:
        raise ValueError("samples is connected, and image_embeds carries extra_latents; take one of them out")
    tensors = {**tensors, **images, **latents}
    job = Job(
        id=new_job_id(),
        model=model,
        parallel=parallel,
        sampling=sampling,
        text=text,
        decode=asked.decode_video,
        preview=asked.preview,
        frames=asked.frames and asked.decode_video,
        verbose=host.verbose(),
    )
    status.warn(*unsuited(asked, model, config.variant), *lora_warnings(model, sampling))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    status.warn(*check_job(job, shapes, on_note=status.note))
    return dataclasses.replace(job, warnings=tuple(status.warnings)), tensors


def model_of(asked: VideoInputs, status: Status) -> ModelFiles:
    """The files that the inputs name, as they are now."""
    model, low_noise_model, vae = asked.model, asked.low_noise_model, asked.vae
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


def _parallel(asked: VideoInputs, model: ModelFiles, sampling: Sampling, status: Status) -> Parallel:
    from ...distributed.planning.preflight import always_guided

    chosen = asked.config
    if chosen.hosts:
        return parallel_over(chosen, asked.parallel(), guided=always_guided(model, sampling), status=status)
    return as_switched(chosen, asked.parallel(), guided=always_guided(model, sampling))


def _sampling(settings: SamplingSettings, status: Status) -> Sampling:
    frames = settings.num_frames
    fitting = frames + (1 - frames) % 4
    if fitting != frames:
        status.note(f"num_frames was raised from {frames} to {fitting}: the model makes 4n + 1 frames")
    return Sampling(**{**dataclasses.asdict(settings), "num_frames": fitting})
