"""The trained model in one process, by the code that a job's ranks run: files in, frames out."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...distributed.job.sampling import rounded_timesteps
from ...distributed.parallel.sequence import SequenceShard
from ...distributed.rank.expert import VelocityPredictor, load_expert
from ...wan.model.config import HIGH_NOISE, LOW_NOISE
from ...wan.model.latent_space import WAN21
from ...wan.model.patch import patchify, token_grid, unpatchify
from ...wan.sampling.denoise import Guidance, denoise, draw_noise
from ...wan.sampling.image_channels import Given, image_channels
from ...wan.sampling.schedule import make_solver
from ...wan.sampling.step_cache import StepCache
from ...wan.text.text_encoder import DEFAULT_NEGATIVE_PROMPT, load_text_encoder
from ...wan.transformer.conditions import Conditions
from ...wan.transformer.transformer import WanModel
from ...wan.vae.autoencoder import decode_frames, encode, load_vae
from ...wan.video.video import VideoWriter
from ..train.trained_files import NAMES, place
from ..train.world import FRAMES, HEIGHT, WIDTH
from .arithmetic import FULL, Arithmetic

FPS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a clip is sampled."""

    steps: int
    solver: str
    shift: float
    guidance: Guidance
    frames: int = FRAMES
    reuse_threshold: float = 0.0
    """As the node has it."""


T2V = Settings(steps=20, solver="unipc", shift=12.0, guidance=Guidance(low=3.0, high=4.0, boundary=0.875))
I2V = Settings(steps=20, solver="unipc", shift=5.0, guidance=Guidance(low=3.5, high=3.5, boundary=0.9))
FOUR_STEPS = Settings(steps=4, solver="euler", shift=5.0, guidance=Guidance(low=1.0, high=1.0, boundary=0.875))


class Pipeline:
    """Two experts, text encoder and VAE, float32.

    Args:
        models: ComfyUI's models folder with the trained files.
        experts: names of the high-noise and the low-noise file.
        loras: likewise, or none.
        arithmetic: of the experts.
    """

    def __init__(
        self,
        models: Path,
        experts: tuple[str, str],
        loras: tuple[str, str] | None = None,
        *,
        device: str = "cpu",
        arithmetic: Arithmetic = FULL,
    ) -> None:
        self.device, self._exact_steps = torch.device(device), arithmetic.parallel.exact_steps
        self.text = load_text_encoder([place(models, NAMES.text_encoder)], dtype=torch.float32, device=device)
        self.vae = load_vae([place(models, NAMES.vae)], device=device)
        self._experts: dict[str, WanModel] = {}
        self.reused: list[int] = []
        """Steps of the last clip that took their velocity from an earlier one."""
        for i, side in enumerate((HIGH_NOISE, LOW_NOISE)):
            self._experts[side] = load_expert(
                [str(place(models, experts[i]))], [(str(place(models, loras[i])), 1.0)] if loras else [], expert=side,
                parallel=arithmetic.parallel, attention=arithmetic.attention,
                exact_attention=arithmetic.exact_attention, mesh=None,
                # One rank's, whatever the length.
                shard=SequenceShard(length=1), device=self.device,
            )  # fmt: skip

    @torch.no_grad()
    def clip(
        self, prompt: str, settings: Settings, *, seed: int, negative: str = "", picture: Tensor | None = None
    ) -> Tensor:
        """Frames [3, F, H, W] in [-1, 1]. picture: [3, H, W] in [-1, 1], an I2V model's first frame."""
        shape = WAN21.shape(WIDTH, HEIGHT, settings.frames)
        grid = token_grid(shape)
        image = None
        if picture is not None:
            variant = next(iter(self._experts.values())).config.variant
            given = Given(
                start=picture, num_frames=settings.frames, shape=shape, encode=lambda video: encode(self.vae, video)
            )
            image = patchify(image_channels(variant, given)).to(self.device)
        solver = make_solver(settings.solver, settings.steps, settings.shift)
        rows = self.text.encode([prompt, negative or DEFAULT_NEGATIVE_PROMPT])
        ask = VelocityPredictor(
            self._experts, dict(zip((True, False), rows, strict=True)), grid=grid,
            shard=SequenceShard(length=math.prod(grid)), device=self.device, keep_text=True, weights={},
            conditions=Conditions(image=image), rounded=rounded_timesteps(solver.timesteps, self._exact_steps),
        )  # fmt: skip
        cache = StepCache(
            ask.predict, threshold=settings.reuse_threshold, steps=range(settings.steps), schedule_steps=settings.steps,
            mean=lambda tokens: tokens.abs().mean().item(),
        )  # fmt: skip
        tokens = denoise(
            patchify(draw_noise(shape, seed)).to(self.device), guidance=settings.guidance,
            predict=cache, solver=solver,
        )  # fmt: skip
        self.reused = cache.reused
        latents = unpatchify(tokens, grid)[None]
        return torch.cat(list(decode_frames(self.vae, latents)), dim=1).float().cpu()


def as_video(clip: Tensor) -> Tensor:
    """[3, F, H, W] in [-1, 1] -> the same, as a player shows it: an mp4 of the pack's own writer, read back."""
    height, width = clip.shape[2:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with VideoWriter(path, width=width, height=height, fps=FPS) as writer:
            writer.write(clip)
        return read_video(path)


def read_video(path: Path) -> Tensor:
    """Frames [3, F, H, W] in [-1, 1]."""
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    frames = torch.stack([torch.frombuffer(bytearray(frame), dtype=torch.uint8) for frame in reader])
    return frames.view(-1, height, width, 3).permute(3, 0, 1, 2).float() / 127.5 - 1


def guided(settings: Settings, scale: float) -> Settings:
    """The same with another guidance for both experts."""
    return replace(settings, guidance=replace(settings.guidance, low=scale, high=scale))


def bounded(settings: Settings, boundary: float) -> Settings:
    """The same with another boundary between the experts."""
    return replace(settings, guidance=replace(settings.guidance, boundary=boundary))


def sheet(clips: Sequence[Tensor], path: Path, *, every: int = 4, zoom: int = 2) -> None:
    """Clips [3, F, H, W] as a PNG: a row each, of every fourth frame."""
    from PIL import Image

    rows = [torch.cat(list(clip[:, ::every].unbind(1)), dim=2) for clip in clips]
    picture = ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    picture = picture.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.numpy()).save(path)
