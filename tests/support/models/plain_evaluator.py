"""An `Evaluator` in this process: the model without any rank, as what evaluations elsewhere are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from wan_pack.distributed.job.evaluator import SampleConditioning, SampleTold
from wan_pack.distributed.job.model_files import LoraFile
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.checkpoint.weights import empty_model, read_weights
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.model.latent_space import WAN21
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.transformer.conditions import Conditions, made
from wan_pack.wan.transformer.context import Context


def conditions_of(sample: SampleConditioning, latents: tuple[int, ...]) -> Conditions:
    """latents: frames, rows and columns of what is evaluated."""
    found: dict[str, Any] = {}
    for kind, told in sample.told.items():
        parts = [made(kind, one.values, latents, WAN21.stride) for one in told]
        (found[kind], *_) = parts
        if kind == "controls":
            found[kind] = tuple(replace(part, strength=one.strength) for part, one in zip(parts, told, strict=True))
    return Conditions(**found)


class PlainEvaluator:
    """Of one transformer, in float32; counts what it is asked for."""

    def __init__(self, file: Path, loras: Sequence[LoraFile] = ()) -> None:
        checkpoint = Checkpoint([file])
        merged = [Lora(lora.file.path, lora.strength, checkpoint.shapes) for lora in loras]
        self.config = checkpoint.config
        self._model = empty_model(checkpoint, torch.float32, merged)
        self._model.to_empty(device="cpu")
        read_weights(self._model, checkpoint, device=torch.device("cpu"), loras=merged)
        self.batches: list[tuple[tuple[int, ...], list[bool]]] = []
        """(shape of the latents, which samples are conditional), of each call."""
        self.timesteps: list[Tensor] = []
        self.texts: dict[int, Tensor] = {}
        self.controls: dict[int, SampleTold] = {}
        """By identity: those that came again came as the same object."""
        self.closed = 0

    def evaluate(self, x: Tensor, timesteps: Tensor, samples: Sequence[SampleConditioning]) -> Tensor:
        assert self.closed == 0, "evaluated after it was closed"
        assert x.dtype == timesteps.dtype == torch.float32 and len(samples) == x.shape[0] == timesteps.shape[0]
        self.batches.append((tuple(x.shape), [sample.conditional for sample in samples]))
        self.timesteps.append(timesteps)
        self.texts |= {id(sample.text): sample.text for sample in samples}
        self.controls |= {
            id(control.values): control for sample in samples for control in sample.told.get("controls", ())
        }
        return torch.stack([self._one(*one) for one in zip(x, timesteps, samples, strict=True)])

    def close(self) -> None:
        self.closed += 1

    def _one(self, latents: Tensor, timestep: Tensor, sample: SampleConditioning) -> Tensor:
        conditions = conditions_of(sample, tuple(latents.shape[1:]))
        grid = conditions.grid(tuple(latents.shape))
        different, which = timestep.reshape(-1), None
        if timestep.ndim:
            which = torch.arange(grid[0]).repeat_interleave(grid[1] * grid[2])
        rope = rope_table(grid, self.config.head_dim)
        text = Context(sample.text.float(), keep=False)
        length = grid[0] * grid[1] * grid[2]
        beside = conditions.on_rank(lambda tokens: tokens, length, latents.device).beside(keep=False)
        velocity = self._model(conditions.tokens(latents), different, text, rope, which, beside)
        return conditions.latents(velocity, grid)
