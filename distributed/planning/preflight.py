"""Checks a job against its files before any process starts. Reads headers only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ...wan.checkpoint.checkpoint import Checkpoint
from ...wan.files.identify import noise_side
from ...wan.lora.lora import Lora
from ...wan.model.config import HIGH_NOISE, LOW_NOISE, WanConfig
from ...wan.model.latent_space import WAN21
from ...wan.text.t5_keys import check_text_encoder_files
from ...wan.vae.vae_keys import check_vae_file
from ...wan.video.video_formats import CRF
from ...wan.vision.clip_keys import check_clip_files
from ..job.input_tensors import Shape, check_inputs
from ..job.job import FileIdentity, Job, LoraFile, ModelFiles, Parallel, Sampling
from ..job.sampling import rounded_steps
from ..job.setting import numbers_in
from ..machine.host_memory import available_bytes
from ..machine.prerequisites import check_switches

IMAGE_PIXEL_BYTES = 3 * 4
"""Of ComfyUI's IMAGE: float32."""
SPARSE_HEAD_DIM = 128
"""Of `attention` sol."""
SIZE_MULTIPLE = WAN21.pixel_multiple
"""Of width and height, for every model but TI2V-5B, whose tokens are twice as wide."""


def check_size(name: str, value: int, multiple: int = SIZE_MULTIPLE) -> None:
    """Raises ValueError naming the two nearest sizes unless `value` is a whole number of tokens."""
    if value % multiple:
        below = max(value // multiple, 1) * multiple
        raise ValueError(
            f"{name} is {value}; it must be a multiple of {multiple}. The nearest are {below} and {below + multiple}"
        )


def needs_negative(model: ModelFiles, sampling: Sampling) -> bool:
    """Whether an unconditional pass runs at all."""
    low = bool(model.low_noise) and sampling.guidance_low != 1
    return low or (bool(model.high_noise) and sampling.guidance_high != 1)


def always_guided(model: ModelFiles, sampling: Sampling) -> bool:
    """Whether every step has an unconditional pass, as far as the experts that the model has go."""
    guidance = [(model.low_noise, sampling.guidance_low), (model.high_noise, sampling.guidance_high)]
    return all(scale != 1 for files, scale in guidance if files)


def check_model(model: ModelFiles, on_report: Callable[[str], None] = lambda line: None) -> WanConfig:
    """The transformer's sizes, once the headers show that all files are what they should be and belong together.

    Args:
        on_report: told of each LoRA that fits in part.
    Raises:
        ValueError: naming the file, what it is and what was expected.
    """
    experts = [Checkpoint([part.path for part in files]) for files in (model.high_noise, model.low_noise) if files]
    config = experts[0].config
    for other in experts[1:]:
        if other.config != config:
            raise ValueError(
                f"the experts do not belong together: {config.describe()} high-noise with {other.config.describe()} "
                f"low-noise{config.differences(other.config)}. high_noise is {experts[0].label}, low_noise is "
                f"{other.label}; choose both from one release"
            )
    vae, latents = model.vae[0].path, config.variant.latents
    found = check_vae_file(vae)
    if found.kind != latents:
        raise ValueError(
            f"{vae} is a {found.kind.vae}; a {config.describe()} model goes with the {latents.vae} ({latents.example})"
        )
    for report in _lora_reports(model, experts):
        on_report(report)
    if model.text_encoder:
        encoder = [part.path for part in model.text_encoder]
        dim = check_text_encoder_files(encoder, [part.path for part in model.tokenizer]).dim
        if dim != config.text_dim:
            raise ValueError(f"{encoder[0]} makes rows of {dim} channels; the transformer takes {config.text_dim}")
    if model.clip_vision:
        clip = [part.path for part in model.clip_vision]
        dim = check_clip_files(clip).dim
        if config.image_branch and dim != config.clip_dim:
            raise ValueError(
                f"{clip[0]} makes rows of {dim} channels; a {config.describe()} model takes {config.clip_dim}, as "
                "clip_vision_h makes them"
            )
    return config


def _lora_reports(model: ModelFiles, experts: list[Checkpoint]) -> Iterator[str]:
    """A line for each LoRA of which something does not fit. Opening one refuses it if nothing does."""
    slots = [(name, getattr(model, f"{name}_loras")) for name in (HIGH_NOISE, LOW_NOISE) if getattr(model, name)]
    for expert, (name, loras) in zip(experts, slots, strict=True):
        yield from _of_one_expert(expert, loras, name)


def _of_one_expert(expert: Checkpoint, loras: Iterable[LoraFile], side: str | None) -> Iterator[str]:
    for lora in loras:
        opened = Lora(lora.file.path, lora.strength, expert.shapes, expert=side, selection=lora.selection)
        if opened.skipped or not opened.applied:
            yield opened.report()


def check_job(
    job: Job, shapes: Mapping[str, Shape], on_note: Callable[[str], None] = lambda line: None
) -> tuple[str, ...]:
    """Everything that can be known to be wrong without running.

    Args:
        shapes: of the tensors that travel with the job, by name (input_tensors.py).
        on_note: told of what is as it should be, but would not be seen.
    Returns:
        warnings for the status: what the user may have to change.
    Raises:
        ValueError: naming the field or the file, its value and what is allowed.
    """
    sampling, parallel, model = job.sampling, job.parallel, job.model
    warnings: list[str] = []
    config = check_model(model, warnings.append)
    scale = check_vae_file(model.vae[0].path).upscale
    if scale > 1:
        size = f"{scale * sampling.width}x{scale * sampling.height}"
        on_note(f"{model.vae[0].path} makes {scale} x the size: the video is {size}")
    _check_file(job, scale, on_note)
    for name in ("width", "height"):
        check_size(name, getattr(sampling, name), config.variant.latents.pixel_multiple)
    check_inputs(job, config, shapes)
    if job.text is None and "context_null" not in shapes and needs_negative(model, sampling):
        raise ValueError(
            f"guidance is {sampling.guidance_low} (low) and {sampling.guidance_high} (high), which needs "
            "negative embeddings; connect them, or set both to 1"
        )
    if parallel.attention == "sol" and config.head_dim != SPARSE_HEAD_DIM:
        raise ValueError(
            f"attention is 'sol', which is for heads of {SPARSE_HEAD_DIM} channels; this model's have "
            f"{config.head_dim}. Choose 'auto'"
        )
    if parallel.cfg_parallel and not needs_negative(model, sampling):
        raise ValueError(
            f"cfg_parallel is on, but guidance is {sampling.guidance_low:g} (low) and {sampling.guidance_high:g} "
            "(high): there is no second pass for the other GPUs; turn it off"
        )
    warnings += _side_warnings(model, sampling)
    warnings += _check_layout(parallel, config, on_note)
    steps = sampling.step_range
    if parallel.rounds and not rounded_steps(steps, sampling.schedule_steps, parallel.exact_steps):
        on_note(f"exact_steps is {parallel.exact_steps}: none of the {len(steps)} steps rounds to 8 bits")
    return tuple(warnings)


def _check_file(job: Job, scale: int, on_note: Callable[[str], None]) -> None:
    sampling = job.sampling
    if sampling.crf != CRF and not sampling.file_format.takes_crf:
        on_note(f"crf has no effect: {sampling.video_format} takes none")
    if not job.frames:
        return
    width, height = scale * sampling.width, scale * sampling.height
    needed, available = sampling.num_frames * width * height * IMAGE_PIXEL_BYTES, available_bytes()
    if available is not None and needed > available:
        raise ValueError(
            f"images is linked: {sampling.num_frames} frames of {width}x{height} take {needed / 2**30:.1f} GiB of this "
            f"machine's memory, of which {available / 2**30:.1f} GiB are free. Take fewer frames, or the video instead"
        )


def check_forwards(
    model: Sequence[FileIdentity], loras: Iterable[LoraFile], side: str | None, parallel: Parallel,
    on_note: Callable[[str], None] = lambda line: None,
) -> tuple[str, ...]:  # fmt: skip
    """As `check_job`, for one transformer whose evaluations a sampler elsewhere asks for.

    Args:
        side: "high_noise" or "low_noise", if that is known.
    """
    checkpoint = Checkpoint([part.path for part in model])
    return *_of_one_expert(checkpoint, loras, side), *_check_layout(parallel, checkpoint.config, on_note)


def _check_layout(parallel: Parallel, config: WanConfig, on_note: Callable[[str], None]) -> list[str]:
    _check_exact(parallel, config.num_layers, on_note)
    if not parallel.hosts:
        # Other machines look for themselves.
        check_switches(parallel)
    if parallel.gpu_count > 1:
        return _check_engine(parallel, config.num_heads) if parallel.use_ulysses else []
    for name in ("use_fsdp", "master_port"):
        if getattr(parallel, name):
            on_note(f"{name} has no effect on one GPU")
    return []


def _check_exact(parallel: Parallel, blocks: int, on_note: Callable[[str], None]) -> None:
    numbers = numbers_in(parallel.exact_blocks)
    if numbers and numbers[-1] >= blocks:
        raise ValueError(
            f"exact_blocks is {parallel.exact_blocks!r}, which names block {numbers[-1]}; this model's are 0 to "
            f"{blocks - 1}"
        )
    if not parallel.rounds:
        for name in ("exact_steps", "exact_blocks"):
            if getattr(parallel, name):
                on_note(f"{name} has no effect: nothing is rounded to 8 bits")


def _check_engine(parallel: Parallel, heads: int) -> list[str]:
    ranks = parallel.ulysses_size
    if parallel.ulysses_engine == "deepspeed" and heads % ranks:
        divisors = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"ulysses_engine is 'deepspeed' and {ranks} GPUs share a sequence, which does not divide the "
            f"model's {heads} heads. Choose gpu_count {', '.join(divisors)}, or ulysses_engine 'packed'"
        )
    if heads % ranks:
        most, least = -(-heads // ranks), heads // ranks
        return [
            f"{heads} heads do not divide by {ranks} GPUs: some compute {most}, some {least}; "
            "attention runs at the pace of the fullest"
        ]
    return []


def _side_warnings(model: ModelFiles, sampling: Sampling) -> Iterator[str]:
    if not (model.high_noise and model.low_noise):
        path = model.transformer[0].path
        side, whole = noise_side(path), len(sampling.step_range) == sampling.schedule_steps
        if side is not None and whole:
            yield f"only one expert is given, which looks like the {side}-noise one, and it runs every step: {path}"
        return
    high, low = model.high_noise[0].path, model.low_noise[0].path
    if model.high_noise == model.low_noise:
        yield f"both experts are the same file, {high}"
        return
    sides = noise_side(high), noise_side(low)
    if sides == ("low", "high"):
        yield f"the experts look swapped: high_noise is {high}, low_noise is {low}"
    elif sides[0] is not None and sides[0] == sides[1]:
        yield f"both experts look like the {sides[0]}-noise one: {high} and {low}"
