"""The two experts of one job on one rank: loaded, parallelized, switched and asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...wan.checkpoint.checkpoint import Checkpoint
from ...wan.checkpoint.weights import COMPUTE_DTYPES, empty_model, kept_weights, take_memory
from ...wan.lora.beside import LORA_FACTORS
from ...wan.lora.lora import Lora
from ...wan.lora.merging import changes
from ...wan.model.attention import Attention, attention
from ...wan.model.int8_products import use_int8_products
from ...wan.model.latent_space import PATCH_SIZE
from ...wan.model.rope import rope_table
from ...wan.model.selection import EVERYTHING
from ...wan.transformer.conditions import NONE, Beside, Conditions
from ...wan.transformer.context import Context, pad_text
from ...wan.transformer.transformer import WanModel
from ..job.job import Parallel
from ..job.model_files import ExpertFiles, LoraSpec
from ..job.sampling import EVERYWHERE, RoundedTimesteps
from ..job.setting import numbers_in
from ..parallel.mesh import Mesh
from ..parallel.parallelize import parallelize_wan, release_gathered
from ..parallel.passes import Pass, evaluate_passes
from ..parallel.sequence import SequenceShard
from ..parallel.shared_reading import ALONE, SharedReading
from ..planning.workload import keeping_of
from ..weights.offload import HostParking
from ..weights.prefetch import OnRead, Prefetch
from ..weights.streaming import BlockStream
from ..weights.warm_up import NOTHING_BESIDE, BesideReading

Weights = HostParking | BlockStream
"""What holds an expert's weights, and takes them off the device and back."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UnreadExpert:
    """One expert with its memory, whose weights are still to be read."""

    model: WanModel
    weights: Weights
    read: Callable[..., None]
    """Reads this rank's part of them; takes the callbacks of `read_weights`."""
    send: Callable[..., None]
    """Afterwards every rank has all parts. Collective."""


@dataclass(frozen=True, slots=True)
class PendingExpert:
    """An expert whose files are read during the steps of the other."""

    made_of: ExpertFiles
    reading: Prefetch
    finish: Callable[[OnRead], None]
    """Afterwards it is loaded."""


def build_expert(
    files: Sequence[str],
    loras: Sequence[LoraSpec] = (),
    *,
    parallel: Parallel,
    mesh: Mesh | None,
    shard: SequenceShard,
    device: torch.device,
    expert: str | None = None,
    attention: Attention = attention,
    exact_attention: Attention | None = None,
    ops: str = "plain",
    slabs: Sequence[Tensor] = (),
) -> UnreadExpert:
    """One expert on `device`, parallelized over `mesh` as `parallel` says.

    Args:
        loras: to merge into the weights, or to keep beside them.
        expert: HIGH_NOISE or LOW_NOISE, for a LoRA file that holds both experts' changes.
        slabs: see `BlockStream`.
    """
    checkpoint = Checkpoint(files)
    opened = _opened(loras, checkpoint, expert)
    for lora in opened:
        log.info(lora.report())
    keeping = keeping_of(parallel)
    log.info(checkpoint.describe(keeping.weights(checkpoint, opened)))
    model = empty_model(checkpoint, COMPUTE_DTYPES[parallel.mixed_precision], opened, keeping)
    if device.type == "cuda" and use_int8_products(model):
        log.info("products of int8 by comfy-kitchen")
    parallelize_wan(
        model, mesh, shard=shard, attention=attention, use_fsdp=parallel.use_fsdp, gather=parallel.gather,
        ulysses_engine=parallel.ulysses_engine, torch_compile=parallel.torch_compile,
        memory_optimization=parallel.memory_optimization, ops=ops, exact_attention=exact_attention,
        exact_blocks=numbers_in(parallel.exact_blocks),
    )  # fmt: skip
    if parallel.stream_blocks:
        weights: Weights = BlockStream(model, device, slabs)
    else:
        take_memory(model, device)
        weights = HostParking(model)

    reading = SharedReading.of(parallel, mesh, device)

    def read(**how: Any) -> None:
        with weights.writable():
            reading.read(model, checkpoint, device=device, loras=opened, **how)

    return UnreadExpert(model, weights, read, partial(reading.send, model))


def load_expert(
    files: Sequence[str],
    loras: Sequence[LoraSpec] = (),
    *,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
    beside: BesideReading = NOTHING_BESIDE,
    on_send: Callable[[], None] = lambda: None,
    on_weights: Callable[[Weights], None] = lambda weights: None,
    **settings: Any,
) -> WanModel:
    """What `build_expert` makes with the same `settings`, its weights read.

    Args:
        beside: on this thread, while others read the weights.
        on_send: called when this rank's part is read, where the ranks hand each other theirs.
        on_weights: given what holds the weights.
    """
    with beside.span("model built"):
        built = build_expert(files, loras, **settings)
    with beside.span("weights read"):
        built.read(on_tensor=on_tensor, meanwhile=partial(beside.use, built.model))
    with beside.span("weights shared"):
        built.send(on_send=on_send)
    on_weights(built.weights)
    return built.model


def relora_expert(
    model: WanModel,
    files: Sequence[str],
    before: Sequence[str],
    loras: Sequence[LoraSpec],
    *,
    parallel: Parallel,
    reading: SharedReading = ALONE,
    device: torch.device,
    expert: str | None = None,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> bool:
    """Makes a loaded expert what `load_expert` with other LoRAs would give; reads only weights that a LoRA is merged
    into, and the LoRAs that stay beside their weights.

    Args:
        model: from `load_expert` with the LoRA files `before`.
        parallel: with which it was loaded.
        reading: of its weights. Collective, if several ranks share it.
    Returns:
        False, with `model` as it was, if its parameters cannot hold them: what is merged into a weight in 8 bits gives
        it a scale for each row, and what stays beside one has at most the rank that there is room for.
    """
    checkpoint, kept = Checkpoint(files), kept_weights(model)
    opened = _opened(loras, checkpoint, expert)
    old = [Lora(path, 1.0, checkpoint.shapes, expert=expert) for path in before]
    wanted = keeping_of(parallel).weights(checkpoint, opened)
    if wanted.keys() != kept.keys() or not all(kept[name].holds(wanted[name]) for name in kept):
        return False

    def touched(name: str) -> bool:
        if name.endswith(LORA_FACTORS):
            return True
        # A weight that no LoRA changes any more gets its own scale back.
        weight = name.removesuffix("_scale")
        beside = weight in kept and kept[weight].lora_rank > 0
        return changes(opened, weight, without_products=beside) or changes(old, weight, without_products=beside)

    for lora in opened:
        log.info(lora.report())
    names = [name for name, _ in model.named_parameters() if touched(name)]
    reading.read(model, checkpoint, names, device=device, loras=opened, on_tensor=on_tensor)
    reading.send(model, names)
    return True


def _opened(loras: Sequence[LoraSpec], checkpoint: Checkpoint, expert: str | None) -> list[Lora]:
    return [
        Lora(lora[0], lora[1], checkpoint.shapes, expert=expert, selection=lora[2] if len(lora) == 3 else EVERYTHING)
        for lora in loras
    ]


def take_turn(weights: dict[str, Weights], expert: str) -> None:
    """Brings one expert's weights onto the device, where those of the others leave it.

    Args:
        weights: of each that takes part; empty where all stay.
    """
    coming = weights.get(expert)
    for name, others in weights.items():
        if name == expert:
            continue
        if not (isinstance(coming, HostParking) and isinstance(others, HostParking) and coming.trade(others)):
            others.park()
    if coming is not None:
        coming.fetch()
    if weights:
        resident = sum(each.resident_bytes for each in weights.values())
        other = ", the other in host memory" if len(weights) > 1 else ""
        log.info("offload: %s expert on the device (%.2f GiB)%s", expert, resident / 2**30, other)


class VelocityPredictor:
    """What the sampling loop asks for velocities (`wan.sampling.denoise.Predict`).

    Args:
        models: expert name -> model; only those that the schedule runs, and one of them from the start.
        texts: conditional? -> text tokens [n, text_dim].
        grid: tokens per axis.
        keep_text: keep each expert's cross-attention keys and values between steps.
        weights: expert name -> what holds its weights, where the idle expert is offloaded.
        conditions: what the video is made from beside noise and text, on this rank.
        mesh: the ranks; with CFG parallel each computes one of the two passes of a guided step.
        which_timestep: [S], 0 for tokens that are given (`wan.sampling.denoise.Known`), 1 for the others;
            None: none is given.
        arrive: called with an expert's name before its first evaluation, and whenever it takes over from the other;
            `models` and `weights` must have it afterwards.
        rounded: of `exact_steps`.
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
        weights: dict[str, Weights],
        conditions: Conditions = NONE,
        which_timestep: Tensor | None = None,
        mesh: Mesh | None = None,
        arrive: Callable[[str], None] = lambda expert: None,
        rounded: RoundedTimesteps = EVERYWHERE,
    ) -> None:
        self._models = models
        self._rounded = rounded
        self._texts = {conditional: pad_text(text).to(device) for conditional, text in texts.items()}
        self._keep_text = keep_text
        self._weights = weights
        self._device = device
        image = conditions.image
        self._image = None if image is None else image.unflatten(1, (PATCH_SIZE[1] * PATCH_SIZE[2], -1))
        self._conditions = conditions
        self._which_timestep = which_timestep
        self._mesh = mesh
        self._arrive = arrive
        self._active: str | None = None
        self._contexts: dict[bool, Context] = {}
        self._besides: dict[bool, Beside] = {}
        config = next(iter(models.values())).config
        self._rope = rope_table(
            grid, config.head_dim, start=shard.start, stop=shard.stop, device=device, order=shard.order
        )

    def predict(self, expert: str, tokens: Tensor, timestep: float, passes: tuple[bool, ...]) -> list[Tensor]:
        """tokens: this rank's [S, 4 * out_dim] -> for each pass the velocity, the same shape, float32."""
        if expert != self._active:
            self._activate(expert)
        which = self._which_timestep
        t = torch.tensor([timestep] if which is None else [0.0, timestep], dtype=torch.float32, device=self._device)
        if self._image is not None:
            # Channels are fastest within a token: the image's go behind the latent's at each of its positions.
            tokens = torch.cat((tokens.unflatten(1, (self._image.shape[1], -1)), self._image), dim=2).flatten(1)
        self._models[expert].compute_exactly(not self._rounded.holds(timestep))
        asked = [Pass(tokens, t, self._contexts[one], which, self._besides[one]) for one in passes]
        return evaluate_passes(self._models[expert], asked, self._rope, self._mesh)

    def release(self) -> None:
        """After the last step: what FSDP has gathered and kept is let go."""
        for model in self._models.values():
            release_gathered(model)

    def _activate(self, expert: str) -> None:
        self.release()
        self._arrive(expert)
        take_turn(self._weights, expert)
        self._contexts = {c: Context(text, keep=self._keep_text) for c, text in self._texts.items()}
        self._besides = self._conditions.besides(keep=self._keep_text)
        self._active = expert
