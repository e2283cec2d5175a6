"""Part "distill": LoRAs with which the text-to-video experts need four steps and no guidance.

The teacher is the guided model in many small steps of Euler's method. Between two of the four noise levels the student
learns the mean velocity along the teacher's path (Liu et al., 2022, arXiv 2209.03003, the distillation of section 2.3).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...wan.model.ops import Rope
from ...wan.model.rope import rope_table
from ...wan.sampling.denoise import Guidance
from ...wan.sampling.schedule import NUM_TRAIN_TIMESTEPS, make_solver
from ...wan.text.tokenizer import Tokenizer
from . import small_umt5
from .batched import BatchedModel
from .captions import draw_caption
from .clip_pool import GRID, LATENTS, tokens_of
from .dit import T2V, Velocity
from .loop import Budget, autocast, fit, generator
from .sizes import Sizes
from .trained_files import NAMES, place, read_expert, write
from .world import draw_scenes

STEPS, SHIFT = 4, 5.0
"""Of the released four-step LoRAs."""
GUIDANCE = Guidance(low=3.0, high=4.0, boundary=T2V.boundary)
FILES = (NAMES.high_noise_lora, NAMES.low_noise_lora)
LAYERS = (
    *(f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"), "ffn.0", "ffn.2"
)  # fmt: skip
"""Of a block, that a LoRA changes."""


class Update(nn.Module):
    """A LoRA of one expert: W + up @ down for the layers of every block (Hu et al., 2021, arXiv 2106.09685)."""

    def __init__(self, model: BatchedModel, rank: int, seed: int) -> None:
        super().__init__()
        random_ = torch.Generator("cpu").manual_seed(seed)
        self.rank = rank
        self.names = [f"blocks.{i}.{layer}" for i in range(len(model.blocks)) for layer in LAYERS]
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for name in self.names:
            rows, columns = model.get_parameter(f"{name}.weight").shape
            self.down.append(torch.randn(rank, columns, generator=random_) * columns**-0.5)
            self.up.append(torch.zeros(rows, rank))

    def weights(self, model: BatchedModel) -> dict[str, Tensor]:
        """The changed parameters, by name."""
        factors = zip(self.names, self.up, self.down, strict=True)
        return {f"{name}.weight": model.get_parameter(f"{name}.weight") + up @ down for name, up, down in factors}

    def tensors(self) -> dict[str, Tensor]:
        """As the released files name them."""
        named = {}
        for name, up, down in zip(self.names, self.up, self.down, strict=True):
            named[f"diffusion_model.{name}.lora_up.weight"] = up
            named[f"diffusion_model.{name}.lora_down.weight"] = down
            named[f"diffusion_model.{name}.alpha"] = torch.tensor(float(self.rank))
        return named


class Paths:
    """The teacher's paths from noise to video, all on the device.

    points: [n, STEPS + 1, S, 64]; rows: [n, R, text_dim]; lengths: [n].
    """

    def __init__(
        self, velocities: list[Velocity], encode: Callable[[Tensor], tuple[Tensor, Tensor]], tokenizer: Tokenizer,
        sizes: Sizes, rope: Rope, device: torch.device,
    ) -> None:  # fmt: skip
        solver = make_solver("euler", STEPS, SHIFT)
        self.sigmas, self.timesteps = solver.sigmas, solver.timesteps
        rows = small_umt5.longest(tokenizer)
        nothing = small_umt5.pad_ids([tokenizer(small_umt5.NO_TEXT[1])] * sizes.block, rows).to(device)
        points, texts, lengths = [], [], []
        for block in range(sizes.trajectories // sizes.block):
            captions = _captions(sizes.block, block)
            conditional = encode(small_umt5.pad_ids([tokenizer(c) for c in captions], rows).to(device))
            random_ = generator(device, block)
            noise = torch.randn(sizes.block, *LATENTS, generator=random_, device=device)
            both = conditional, encode(nothing)
            points.append(_path(velocities, tokens_of(noise), both, self.sigmas, sizes.substeps, rope))
            texts.append(conditional[0])
            lengths.append(conditional[1])
        self.points, self.rows, self.lengths = torch.cat(points), torch.cat(texts), torch.cat(lengths)


def _captions(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [draw_caption(scene, rng) for scene in draw_scenes(count, 500_000_000 + seed)]


def _path(
    velocities: list[Velocity], tokens: Tensor, texts: Sequence[tuple[Tensor, Tensor]], sigmas: Sequence[float],
    substeps: int, rope: Rope,
) -> Tensor:  # fmt: skip
    """[B, S, 64] noise -> [B, STEPS + 1, S, 64]: where the teacher is at each of `sigmas`."""
    points = [tokens]
    for sigma, sigma_next in pairwise(sigmas):
        inner = torch.linspace(sigma, sigma_next, substeps + 1).tolist()
        for now, then in pairwise(inner):
            timestep = torch.full((len(tokens),), NUM_TRAIN_TIMESTEPS * now, device=tokens.device)
            expert = GUIDANCE.expert(NUM_TRAIN_TIMESTEPS * now)
            velocity = velocities[expert == "low_noise"]
            with autocast(tokens.device):
                conditional, unconditional = (velocity(tokens, timestep, *text_, rope).float() for text_ in texts)
            guided = unconditional + GUIDANCE.scale(expert) * (conditional - unconditional)
            tokens = tokens + (then - now) * guided
        points.append(tokens)
    return torch.stack(points, 1)


def train(folder: Path, sizes: Sizes, budget: Budget, device: torch.device) -> None:
    """Makes the teacher's paths, trains both LoRAs and writes their files. Needs the files of the part "dit"."""
    encoder = small_umt5.load(folder, device)
    encoder.model.requires_grad_(False)
    experts = [read_expert(place(folder, name), device).requires_grad_(False) for name in T2V.files]
    rope = rope_table(GRID, experts[0].config.head_dim, device=device)
    velocities = [model.velocity for model in experts]
    if device.type == "cuda":
        velocities = [torch.compile(velocity) for velocity in velocities]
    with torch.no_grad():
        paths = Paths(
            velocities, lambda ids: small_umt5.encode(encoder.model, ids), encoder.tokenizer, sizes, rope, device
        )  # fmt: skip
    updates = nn.ModuleList(Update(model, sizes.lora_rank, seed) for seed, model in enumerate(experts)).to(device)

    def losses(step: int) -> dict[str, Tensor]:
        named = {}
        for low, (model, update) in enumerate(zip(experts, updates, strict=True)):
            random_ = generator(device, step, low)
            which = torch.randint(len(paths.points), (sizes.batch,), generator=random_, device=device)
            # The first two of the four steps are the high-noise expert's.
            at = 2 * low + torch.randint(2, (sizes.batch,), generator=random_, device=device)
            sigmas = torch.tensor(paths.sigmas, device=device)
            x, target = paths.points[which, at], paths.points[which, at + 1]
            mean_velocity = (target - x) / (sigmas[at + 1] - sigmas[at])[:, None, None]
            timestep, texts = NUM_TRAIN_TIMESTEPS * sigmas[at], (paths.rows[which], paths.lengths[which])
            velocity = student(model, update, x, timestep, *texts, rope)
            named["low noise" if low else "high noise"] = F.mse_loss(velocity, mean_velocity)
        return named

    fit(
        "distill",
        updates,
        losses,
        folder=folder,
        budget=budget,
        learning_rate=sizes.learning_rate,
        warm_up=sizes.warm_up,
    )
    for name, update in zip(FILES, updates, strict=True):
        write(place(folder, name), update.tensors())


def student(model: BatchedModel, update: Update, *inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """`BatchedModel.velocity` with the LoRA, float32."""
    changed = {f"model.{name}": weight for name, weight in update.weights(model).items()}
    return functional_call(_Velocity(model), changed, inputs).float()


class _Velocity(nn.Module):
    """`functional_call` calls a module's forward."""

    def __init__(self, model: BatchedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return self.model.velocity(*inputs)
