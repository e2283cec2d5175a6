"""Part "dit": the two text-to-video experts and the text encoder, trained together by flow matching.

    x = (1 - sigma) * video + sigma * noise,  v = noise - video        (Lipman et al., 2022, arXiv 2210.02747)

Noise levels are drawn as the sampler visits them: uniform before the shift, each expert on its side of the boundary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...wan.model.ops import Rope
from ...wan.model.rope import rope_table
from ...wan.sampling.schedule import NUM_TRAIN_TIMESTEPS
from ...wan.vae.autoencoder import load_vae
from . import small_umt5
from .batched import BatchedModel, initialise
from .clip_pool import GRID, Batch, Pool, tokens_of
from .loop import Budget, fit, generator
from .sizes import Sizes
from .trained_files import NAMES, place, read_expert, write

Velocity = Callable[..., Tensor]
"""`BatchedModel.velocity`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """How a pair of experts is sampled, and so trained."""

    shift: float
    boundary: float
    """The high-noise expert's noise levels are this and above."""
    files: tuple[str, str]
    """Of the high-noise and the low-noise expert."""

    def sigmas(self, low: bool, count: int, generator: torch.Generator) -> Tensor:
        """[count] noise levels for one expert."""
        # Where the shift puts the boundary, before the shift.
        edge = self.boundary / (self.shift - (self.shift - 1) * self.boundary)
        first, last = (0.0, edge) if low else (edge, 1.0)
        u = first + (last - first) * torch.rand(count, generator=generator, device=generator.device)
        return self.shift * u / (1 + (self.shift - 1) * u)


T2V = Task(shift=12.0, boundary=0.875, files=(NAMES.high_noise, NAMES.low_noise))


def train(folder: Path, sizes: Sizes, budget: Budget, device: torch.device) -> None:
    """Trains the experts and the text encoder and writes their files. Needs the VAE's."""
    if place(folder, NAMES.text_encoder).exists():
        encoder = small_umt5.load(folder, device)
        spiece = spiece_model(place(folder, NAMES.text_encoder))
    else:
        spiece = small_umt5.train_spiece()
        encoder = small_umt5.build(sizes, spiece)
    # At the end it stays as it is: other parts may have been trained with it.
    encoder.model.to(device).requires_grad_(not budget.finish)
    experts = nn.ModuleList(
        read_expert(path, device) if (path := place(folder, name)).exists() else _new_expert(sizes, 16, seed).to(device)
        for seed, name in enumerate(T2V.files)
    )
    pool = Pool(load_vae([place(folder, NAMES.vae)], device=device), encoder.tokenizer, sizes, device, with_image=False)
    everything = nn.ModuleDict({"experts": experts, "text": encoder.model})
    losses = expert_losses(T2V, experts, encoder.model, pool, sizes)
    fit(
        "dit",
        everything,
        losses,
        folder=folder,
        budget=budget,
        learning_rate=sizes.learning_rate,
        warm_up=sizes.warm_up,
    )
    small_umt5.save(folder, encoder.model, spiece)
    for name, model in zip(T2V.files, experts, strict=True):
        write(place(folder, name), model.state_dict())


def _new_expert(sizes: Sizes, in_dim: int, seed: int) -> BatchedModel:
    model = BatchedModel(sizes.expert(in_dim))
    initialise(model, seed)
    return model


def expert_losses(
    task: Task, experts: nn.ModuleList, text_model: nn.Module, pool: Pool, sizes: Sizes
) -> Callable[[int], dict[str, Tensor]]:
    """The losses of a step, for `fit`: one per expert."""
    device = pool.no_text.device
    rope = rope_table(GRID, experts[0].config.head_dim, device=device)
    velocities = [model.velocity for model in experts]
    if device.type == "cuda":
        velocities = [torch.compile(velocity) for velocity in velocities]

    def losses(step: int) -> dict[str, Tensor]:
        named = {}
        for low, velocity in enumerate(velocities):
            batch = pool.batch(step, sizes.batch, stream=low)
            name = "low noise" if low else "high noise"
            named[name] = _loss(task, bool(low), velocity, text_model, batch, rope, step)
        return named

    return losses


def _loss(
    task: Task, low: bool, velocity: Velocity, text_model: nn.Module, batch: Batch, rope: Rope, step: int
) -> Tensor:
    random_ = generator(batch.latents.device, step, 2 + low)
    noise = torch.randn(batch.latents.shape, generator=random_, device=batch.latents.device)
    sigma = task.sigmas(low, len(noise), random_)
    x = torch.lerp(batch.latents, noise, sigma.view(-1, 1, 1, 1, 1))
    if batch.image is not None:
        x = torch.cat((x, batch.image), dim=1)
    rows, lengths = small_umt5.encode(text_model, batch.ids)
    out = velocity(tokens_of(x), NUM_TRAIN_TIMESTEPS * sigma, rows, lengths, rope)
    return F.mse_loss(out.float(), tokens_of(noise - batch.latents))


def spiece_model(path: Path) -> bytes:
    """The tokenizer in a text encoder's file."""
    from safetensors.torch import load_file

    return load_file(path)["spiece_model"].numpy().tobytes()
