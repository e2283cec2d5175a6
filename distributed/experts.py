"""The two experts of one job on one rank: loaded, parallelized, switched and asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..wan.checkpoint import Checkpoint
from ..wan.lora import Lora
from ..wan.model import TextContext, WanModel, meta_model, pad_text
from ..wan.rope import rope_table
from .job import Parallel
from .offload import HostParking
from .parallelize import parallelize_wan
from .sequence import SequenceShard
from .weights import load_weights

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The names are those of `Parallel.mixed_precision`."""

log = logging.getLogger(__name__)


def load_expert(
    files: Sequence[str],
    loras: Sequence[tuple[str, float]] = (),
    *,
    parallel: Parallel,
    mesh: DeviceMesh | None,
    shard: SequenceShard,
    device: torch.device,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> WanModel:
    """One expert on `device`, parallelized over `mesh` as `parallel` says.

    Args:
        loras: (path, strength) of each LoRA to merge.
    """
    checkpoint = Checkpoint(files)
    matrices = {name: shape for name, shape in checkpoint.shapes.items() if len(shape) == 2}
    opened = [Lora(path, strength, matrices) for path, strength in loras]
    for lora in opened:
        log.info(lora.report())
    model = meta_model(checkpoint.config, COMPUTE_DTYPES[parallel.mixed_precision])
    parallelize_wan(
        model,
        mesh,
        shard=shard,
        use_fsdp=parallel.use_fsdp,
        ulysses_engine=parallel.ulysses_engine,
        torch_compile=parallel.torch_compile,
        memory_optimization=parallel.memory_optimization,
    )
    load_weights(model, checkpoint, device=device, loras=opened, on_tensor=on_tensor)
    return model


class Experts:
    """What the sampling loop asks for velocities (`wan.denoise.Predict`).

    Args:
        models: expert name -> model; only those that the schedule runs.
        texts: conditional? -> text rows [n, text_dim].
        grid: tokens per axis.
        keep_text: keep each expert's cross-attention keys and values between steps.
        parkings: expert name -> its host parking, where the idle expert is offloaded.
    """

    def __init__(
        self,
        models: dict[str, WanModel],
        texts: dict[bool, Tensor],
        *,
        grid: tuple[int, int, int],
        shard: SequenceShard,
        device: torch.device,
        keep_text: bool,
        parkings: dict[str, HostParking],
    ) -> None:
        self._models = models
        self._rows = {conditional: pad_text(rows).to(device) for conditional, rows in texts.items()}
        self._keep_text = keep_text
        self._parkings = parkings
        self._device = device
        self._active: str | None = None
        self._contexts: dict[bool, TextContext] = {}
        config = next(iter(models.values())).config
        self._rope = rope_table(grid, config.head_dim, start=shard.start, stop=shard.stop, device=device)

    def predict(self, expert: str, tokens: Tensor, timestep: float, conditional: bool) -> Tensor:
        """tokens: this rank's [S, 4 * in_dim] -> velocity [S, 4 * out_dim], float32."""
        if expert != self._active:
            self._activate(expert)
        t = torch.tensor([timestep], dtype=torch.float32, device=self._device)
        return self._models[expert](tokens, t, self._contexts[conditional], self._rope)

    def _activate(self, expert: str) -> None:
        for name, parking in self._parkings.items():
            if name != expert:
                parking.park()
        if expert in self._parkings:
            self._parkings[expert].fetch()
        resident = sum(parking.resident_bytes for parking in self._parkings.values())
        if len(self._parkings) > 1:
            log.info("offload: %s expert on the device (%.2f GiB), the other in host memory", expert, resident / 2**30)
        self._contexts = {c: TextContext(rows, keep=self._keep_text) for c, rows in self._rows.items()}
        self._active = expert
