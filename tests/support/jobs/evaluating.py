"""Samplings whose evaluations a group of processes computes, and what they are compared with."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from plain_evaluator import conditions_of
from safetensors.torch import save_file
from tiny import TINY, TINY_ANIMATE, TINY_VACE, random_weights, write_official
from torch import Tensor
from wan_pack.distributed.job.evaluator import SampleConditioning, SampleTold
from wan_pack.distributed.job.job import FileIdentity, ForwardsJob, LoraFile, Parallel
from wan_pack.distributed.launch.group_evaluator import GroupEvaluator, GroupEvaluators
from wan_pack.distributed.launch.launcher import new_job_id
from wan_pack.distributed.launch.pool import Pool
from wan_pack.distributed.machine.processes import Process
from wan_pack.wan.model.config import FACE_SIDE, WanConfig
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.transformer.context import Context
from wan_pack.wan.transformer.transformer import WanModel

CONFIGS = {
    "T2V": TINY,
    "I2V": dataclasses.replace(TINY, in_dim=36),
    "TI2V-5B": dataclasses.replace(TINY, in_dim=48, out_dim=48),
    "VACE": TINY_VACE,
    "Fun": dataclasses.replace(TINY, in_dim=52, parts=frozenset({"ref_conv"})),
    "Camera": dataclasses.replace(TINY, in_dim=36, parts=frozenset({"control_adapter"}), camera_dim=2 * 64),
    "Animate": dataclasses.replace(TINY_ANIMATE, num_layers=2, face_blocks=1),
    "FLF2V": dataclasses.replace(TINY, in_dim=36, parts=frozenset({"img_emb", "emb_pos"}), clip_dim=64),
}
"""Variant -> a tiny one."""
SHAPE = (3, 6, 10)
"""Latent frames, rows and columns: 45 tokens, which few numbers of ranks divide."""
LORA_LAYERS = ("blocks.0.self_attn.v", "blocks.1.cross_attn.k")


@dataclass(frozen=True)
class Known:
    """A model as a file, and in this process."""

    config: WanConfig
    file: Path
    weights: dict[str, Tensor]

    @classmethod
    def make(cls, folder: Path, variant: str = "T2V", seed: int = 0) -> Known:
        weights = random_weights(CONFIGS[variant], seed)
        write_official(folder, weights, CONFIGS[variant])
        return cls(CONFIGS[variant], folder / "diffusion_pytorch_model.safetensors", weights)

    def job(self, loras: tuple[tuple[Path, float], ...] = (), **parallel: Any) -> ForwardsJob:
        """In fp32."""
        defaults = {"gpu_count": 1, "mixed_precision": "fp32", "start_timeout": 120.0, "stall_timeout": 60.0}
        files = tuple(LoraFile(file=FileIdentity.of(path), strength=strength) for path, strength in loras)
        return ForwardsJob(
            id=new_job_id(), model=(FileIdentity.of(self.file),), loras=files,
            parallel=Parallel(**{**defaults, "keep_warm_seconds": 300.0, **parallel}), verbose=True,
        )  # fmt: skip

    def evaluate(
        self,
        x: Tensor,
        timesteps: Tensor,
        samples: list[SampleConditioning],
        loras: tuple[tuple[Path, float], ...] = (),
    ) -> Tensor:
        """What an evaluator is to give."""
        model = WanModel(self.config)
        model.load_state_dict(self.weights if not loras else with_loras(self.weights, loras))
        velocities = []
        for latents, t, sample in zip(x, timesteps, samples, strict=True):
            conditions = conditions_of(sample, tuple(latents.shape[1:]))
            grid = conditions.grid(tuple(latents.shape))
            rope = rope_table(grid, self.config.head_dim)
            which = None
            if t.dim():
                t, index = t.unique(return_inverse=True)
                which = index.repeat_interleave(grid[1] * grid[2])
            here = conditions.on_rank(lambda tokens: tokens, grid[0] * grid[1] * grid[2], latents.device)
            text = Context(sample.text.float())
            velocity = model(conditions.tokens(latents), t.reshape(-1), text, rope, which, here.beside(keep=False))
            velocities.append(conditions.latents(velocity, grid))
        return torch.stack(velocities)


def write_lora(path: Path, seed: int) -> Path:
    """Of rank 4, for `TINY` and its like."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in LORA_LAYERS:
        tensors[f"diffusion_model.{layer}.lora_down.weight"] = torch.randn(4, TINY.dim, generator=generator) / 4
        tensors[f"diffusion_model.{layer}.lora_up.weight"] = torch.randn(TINY.dim, 4, generator=generator) / 4
    save_file(tensors, path)
    return path


def with_loras(weights: dict[str, Tensor], loras: tuple[tuple[Path, float], ...]) -> dict[str, Tensor]:
    """Merged."""
    from safetensors.torch import load_file

    merged = dict(weights)
    for path, strength in loras:
        tensors = load_file(path)
        for layer in LORA_LAYERS:
            up, down = (tensors[f"diffusion_model.{layer}.lora_{part}.weight"] for part in ("up", "down"))
            merged[f"{layer}.weight"] = merged[f"{layer}.weight"] + strength * up @ down
    return merged


def inputs(
    config: WanConfig, seed: int, *, batch: int = 1, shape: tuple[int, int, int] = SHAPE, by_frame: bool = False
) -> tuple[Tensor, Tensor, list[SampleConditioning]]:
    """Of an evaluation. Every second sample is of the negative prompt."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_dim, *shape, generator=generator)
    timesteps = torch.rand(batch, shape[0], generator=generator) * 1000
    if by_frame:
        timesteps[:, 0] = 0.0
        timesteps[:, 1:] = timesteps[:, 1:2]
    samples = [
        dataclasses.replace(sample, told={**sample.told, **told(config, shape, seed, number)})
        for number, sample in enumerate(texts(config, batch))
    ]
    return x, timesteps if by_frame else timesteps[:, 0], samples


def told(config: WanConfig, shape: tuple[int, int, int], seed: int, number: int) -> dict[str, tuple[SampleTold, ...]]:
    """What a sample is told, but for what CLIP sees."""
    found: dict[str, tuple[SampleTold, ...]] = {}
    if config.vace_layers:
        found["controls"] = controls(config, shape, number // 2)
    if config.reference_frame and seed % 2:
        found["reference"] = (SampleTold(reference(config, shape, seed)),)
    if config.camera:
        found["camera"] = (SampleTold(camera(config, shape, number // 2)),)
    if config.animates and shape[0] > 1:
        found["pose"] = (SampleTold(pose(config, shape, number // 2)),)
        found["face"] = (SampleTold(face(number % 2)),)
    return found


@functools.cache
def reference(config: WanConfig, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Of a picture in front, for odd seeds; the same for all samples and each call."""
    return torch.randn(config.reference_dim, 1, *shape[1:], generator=torch.Generator().manual_seed(400 + seed))


@functools.cache
def camera(config: WanConfig, shape: tuple[int, int, int], seed: int) -> Tensor:
    """The rays of each pixel; the same for each call."""
    frames, rows, columns = shape
    size = config.camera_dim // 64, frames, 8 * rows, 8 * columns
    return torch.randn(size, generator=torch.Generator().manual_seed(500 + seed))


@functools.cache
def pose(config: WanConfig, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Of all frames but the one in front, or of one less; the same for each call."""
    frames = max(shape[0] - 1 - seed % 2, 1)
    return torch.randn(config.out_dim, frames, *shape[1:], generator=torch.Generator().manual_seed(600 + seed))


@functools.cache
def face(seed: int) -> Tensor:
    """Of two frames; the same for each call, and another one with the negative prompt."""
    return torch.rand(3, 2, FACE_SIDE, FACE_SIDE, generator=torch.Generator().manual_seed(700 + seed)) * 2 - 1


@functools.cache
def controls(config: WanConfig, shape: tuple[int, int, int], seed: int) -> tuple[SampleTold, ...]:
    """One, or two for odd seeds; the same for each call."""
    generator = torch.Generator().manual_seed(300 + seed)
    return tuple(
        SampleTold(torch.randn(config.control_dim, *shape, generator=generator), strength)
        for strength in (0.8, 0.5)[: 1 + seed % 2]
    )


def texts(config: WanConfig, count: int) -> list[SampleConditioning]:
    """Of different lengths; the same for each call."""
    found = []
    for number in range(count):
        rows = torch.randn(5 + 2 * number, config.text_dim, generator=torch.Generator().manual_seed(100 + number))
        told = {}
        if config.image_branch:
            # Every third sample has another one, or a single one.
            generator = torch.Generator().manual_seed(200 + number // 3)
            picture = torch.randn(514 - 257 * (number // 3 % 2), config.clip_dim, generator=generator)
            told["picture"] = (SampleTold(picture),)
        found.append(SampleConditioning(text=rows, told=told, conditional=number % 2 == 0))
    return found


def difference(one: Tensor, other: Tensor) -> float:
    """The largest, of values whose size is about 1."""
    assert one.shape == other.shape and one.dtype == other.dtype
    return float((one - other).abs().max() / other.abs().max())


@dataclass
class Warm:
    """One group of two ranks for all tests that use it."""

    folder: Path
    models: dict[str, Known]
    pool: Pool = field(default_factory=Pool)
    cancelled: bool = False
    kept: bool = False
    """The model of the last sampling was there already."""

    def __post_init__(self) -> None:
        self.source = GroupEvaluators(
            self.pool, parent=self.folder / "jobs", failed=self.folder / "failed", cancelled=lambda: self.cancelled,
        )  # fmt: skip

    def open(self, name: str = "T2V", loras: tuple[tuple[Path, float], ...] = (), **parallel: Any) -> GroupEvaluator:
        return self.source.open(self.models[name].job(loras, gpu_count=2, **parallel))

    def sample(
        self, name: str = "T2V", loras: tuple[tuple[Path, float], ...] = (), seed: int = 0, **parallel: Any
    ) -> list[Process]:
        """Two evaluations, which must be right. Returns the ranks."""
        evaluator = self.open(name, loras, **parallel)
        try:
            for batch in (1, 2):
                given = inputs(self.models[name].config, seed, batch=batch)
                assert difference(evaluator.evaluate(*given), self.models[name].evaluate(*given, loras)) < 1e-5
        finally:
            evaluator.close()
        assert evaluator.result is not None and evaluator.result.info["evaluations"] == 2
        self.kept = "expert: kept" in evaluator.result.log
        (view,) = self.pool.view()
        return list(view.ranks)
