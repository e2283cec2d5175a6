"""Jobs of real size on random_models.py: what is made, from what, on how many GPUs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from random_models import EXPERTS, model_config, write_text_encoder

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from wan_pack.distributed.job.job import Job

SIZES = {"480p": (832, 480), "720p": (1280, 720)}
PICTURES = {"none": (), "start": ("start_image",), "start+end": ("start_image", "end_image")}
SINGLE = ("ti2v-5B", "tiny-5B", "t2v-1.3B", "vace-14B", "vace-1.3B", "tiny-vace", "animate-14B", "tiny-animate")
"""Models of one transformer."""
WAVES = 48
"""Of which the moving picture is the sum."""
PROMPT = "A red fox walks through deep snow at sunrise, the camera follows it slowly."


@dataclass(frozen=True, slots=True)
class Shape:
    """What a job makes."""

    model: str
    size: str = "480p"
    """A name in SIZES, or WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES."""
    steps: int = 4
    pictures: str = "none"
    """A name in PICTURES."""
    guided: bool = False
    encodes: bool = False
    """The prompt is encoded in the job; else random rows travel with it."""
    seed: int = 0

    @property
    def pixels(self) -> tuple[int, int, int]:
        """Width, height, frames: 81, or 121 of the 5B model, unless the size says."""
        if self.size in SIZES:
            width, height = SIZES[self.size]
            # Of whole 32-pixel steps, as the official example has it.
            return (1280, 704, 121) if self.model == "ti2v-5B" and height == 720 else (width, height, self._frames)
        sizes = [int(part) for part in self.size.split("x")]
        return (*sizes, self._frames)[:3]

    @property
    def _frames(self) -> int:
        return 121 if self.model == "ti2v-5B" else 81

    @property
    def name(self) -> str:
        return f"{self.model} {self.size}, {self.steps} steps, pictures {self.pictures}" + (
            ", guided" if self.guided else ""
        )


def make_job(folder: Path, shape: Shape, gpu_ids: tuple[str, ...], gpus: int, **settings: Any) -> Job:
    """Checked as a node checks it.

    Args:
        folder: of `write_model`.
        gpu_ids: of this machine; empty: CPU processes.
        settings: of Job or Parallel, by name.
    """
    from wan_pack.distributed.job.job import FileIdentity, Job, ModelFiles, Parallel, Sampling, Text
    from wan_pack.distributed.launch.launcher import new_job_id
    from wan_pack.distributed.planning.preflight import check_job
    from wan_pack.wan.checkpoint.checkpoint import checkpoint_files

    model = folder / shape.model
    experts = [
        tuple(FileIdentity.of(file.absolute()) for file in checkpoint_files(model / expert))
        for expert in EXPERTS[: 1 if shape.model in SINGLE else 2]
    ]
    encoder = ()
    if shape.encodes:
        encoder = (FileIdentity.of(write_text_encoder(folder, model_config(shape.model).text_dim).absolute()),)
    width, height, frames = shape.pixels
    guidance = 4.0 if shape.guided else 1.0
    own = {name: settings.pop(name) for name in ("preview", "decode") if name in settings}
    job = Job(
        id=new_job_id(),
        model=ModelFiles(
            high_noise=experts[0], low_noise=experts[1] if len(experts) > 1 else (),
            vae=(FileIdentity.of((model / "vae.safetensors").absolute()),), text_encoder=encoder,
        ),
        parallel=Parallel(
            gpu_count=gpus, gpu_ids=gpu_ids, **{"mixed_precision": "bf16" if gpu_ids else "fp32", **settings}
        ),
        sampling=Sampling(
            width=width, height=height, num_frames=frames, steps=shape.steps, seed=shape.seed, solver="euler",
            shift=5.0,
            guidance_low=guidance, guidance_high=guidance, fps=24.0 if shape.model == "ti2v-5B" else 16.0,
            add_noise=False,
        ),
        text=Text(prompt=f"{PROMPT} {shape.seed}") if shape.encodes else None,
        **own,
    )  # fmt: skip
    check_job(job, {name: tuple(tensor.shape) for name, tensor in make_inputs(shape, meta=True).items()})
    return job


def make_inputs(shape: Shape, *, meta: bool = False) -> dict[str, Tensor]:
    """For inputs.safetensors. The latents are a moving picture without noise, so that the video is none either.

    Args:
        meta: shapes only.
    """
    import torch
    from wan_pack.distributed.job.control_inputs import TOLD
    from wan_pack.distributed.job.input_tensors import CLIP_FEATURES, CONTEXT, CONTEXT_NULL, IMAGE_CONDITIONING, SAMPLES
    from wan_pack.wan.model.config import PICTURE_ROWS
    from wan_pack.wan.vae.latents import denormalise

    config = model_config(shape.model)
    width, height, frames = shape.pixels
    channels, length, *sides = config.variant.latents.shape(width, height, frames)
    latents = (channels, length + config.variant.frames_in_front, *sides)
    shapes = {SAMPLES: latents} | dict.fromkeys(PICTURES[shape.pictures], (3, height, width))
    if not shape.encodes:
        shapes |= {CONTEXT: (64, config.text_dim)} | ({CONTEXT_NULL: (32, config.text_dim)} if shape.guided else {})
    if config.animates:
        # The picture, what CLIP sees of it, a pose and a face of each frame.
        shapes |= {IMAGE_CONDITIONING: (config.in_dim - config.out_dim, *latents[1:])}
        shapes |= {CLIP_FEATURES: (PICTURE_ROWS, config.clip_dim)}
        shapes |= {n: TOLD[n].shape(config, latents[1:]) for n in ("pose_video_latent", "face_video_pixels")}
    if meta:
        return {name: torch.empty(size, device="meta") for name, size in shapes.items()}
    generator = torch.Generator().manual_seed(shape.seed)
    inputs = {}
    for name, size in shapes.items():
        if name == SAMPLES:
            inputs[name] = denormalise(moving_picture(size, generator), config.out_dim).contiguous()
        elif len(size) == 4:
            inputs[name] = moving_picture(size, generator).clamp(-1, 1)
        elif len(size) == 2:
            inputs[name] = torch.randn(size, generator=generator)
        else:
            picture = moving_picture((3, 1, *size[1:]), generator)[:, 0]
            inputs[name] = (picture / picture.abs().max()).contiguous()
    return inputs


def moving_picture(size: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """[C, T, h, w] of variance 1: plane waves that move, the finer the weaker, as in pictures of the world."""
    import torch

    channels, frames, height, width = size
    octave, direction, phase = torch.rand(3, WAVES, 1, generator=generator)
    speed = 0.02 * torch.randn(WAVES, 1, generator=generator)
    time, y, x = (
        axis.flatten()
        for axis in torch.meshgrid(
            torch.arange(frames) * 1.0, torch.arange(height) / height, torch.arange(width) / height, indexing="ij"
        )
    )
    cycles, angle = 2 ** (4.5 * octave), 2 * math.pi * direction
    along = x * angle.cos() + y * angle.sin() + speed * time
    # [WAVES, T * h * w]
    waves = (2 * math.pi * (cycles * along + phase)).sin()
    mixture = torch.randn(channels, WAVES, generator=generator) / cycles.squeeze(1).sqrt()
    picture = (mixture @ waves).view(size)
    return picture / picture.std()


def moved(latents: Path, shape: Shape) -> Tensor:
    """What denoising has changed of the given latents."""
    from safetensors.torch import load_file

    return load_file(latents)["samples"][0] - make_inputs(shape)["samples"]


def difference(first: Tensor, second: Tensor) -> float:
    """||a - b|| / ||a||: 0 where equal in every bit."""
    return ((first - second).norm() / first.norm()).item()


def another_seed(shape: Shape, seed: int) -> Shape:
    return dataclasses.replace(shape, seed=seed)
