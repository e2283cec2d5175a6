"""The experts that a rank holds, from job to job."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...wan.model.attention import Attention
from ...wan.model.config import HIGH_NOISE, LOW_NOISE
from ...wan.transformer.transformer import WanModel
from ..job.job import FileIdentity, Parallel
from ..job.model_files import ExpertFiles, ModelFiles
from ..parallel.mesh import Mesh
from ..parallel.parallelize import Computing, compute_as, release_gathered, set_shard
from ..parallel.sequence import SequenceShard, everywhere
from ..parallel.shared_reading import SharedReading
from ..planning.plan import HOST_SHARE
from ..weights.free_memory import free_bytes, free_host_bytes
from ..weights.prefetch import OnRead, Prefetch, prefetch_files
from ..weights.resharding import resharded
from ..weights.warm_up import NOTHING_BESIDE, BesideReading
from .expert import PendingExpert, Weights, build_expert, load_expert, relora_expert

log = logging.getLogger(__name__)

OnTensor = Callable[[str, int, int], None]
"""(message, tensors read, tensors in all), called while weights are loaded; 0 of 0 where none are counted."""


class ExpertCache:
    """Loads the experts of one job after another, and keeps what the next one can use.

    While the first expert runs, the weights of the second are read: onto the device where both have room there, else
    into the system's memory, from where they are loaded when it takes over.

    Attributes:
        models: expert name -> model.
        weights: expert name -> its weights, which can be parked in host memory.
    """

    def __init__(
        self, rank: int, device: torch.device, attention: Attention, ops: str, exact_attention: Attention | None = None
    ) -> None:
        self._rank, self._device = rank, device
        self.compute_by(attention, ops, exact_attention)
        self.models: dict[str, WanModel] = {}
        self.weights: dict[str, Weights] = {}
        self._made_of: dict[str, ExpertFiles] = {}
        self._pending: dict[str, PendingExpert] = {}
        self._numbers = itertools.count(2)
        self._mesh: Mesh | None = None
        self._computes: tuple[Mesh | None, bool, Computing] | None = None
        self._parallel: Parallel | None = None

    def compute_by(self, attention: Attention, ops: str, exact_attention: Attention | None = None) -> None:
        """From the next job on."""
        self._attention, self._ops, self._exact_attention = attention, ops, exact_attention

    def keep_only(self, model: ModelFiles) -> None:
        """Before a video: lets go of experts that are not this model's."""
        for name in [name for name, made_of in self._made_of.items() if made_of.files != model.expert(name).files]:
            self._drop(name)

    def prepare(self, parallel: Parallel) -> None:
        """Before a job takes any memory: models of no use as they lie are laid otherwise or let go. Collective."""
        before, self._parallel = self._parallel, parallel
        if before is None or before.weights_lie == parallel.weights_lie:
            return
        same = before.weights_are == parallel.weights_are
        for name in list(self.models):
            useful = same and name in self._made_of and self.is_on_device(name)
            moved = resharded(self.models[name], self._mesh, parallel, self._device) if useful else None
            if moved is None:
                self._drop(name)
            else:
                self.models[name], self.weights[name] = moved
        self._computes = None  # What is new has not been told.
        torch.cuda.empty_cache()

    def park_later(self) -> None:
        """Before a video whose experts take turns: of two on the device that which runs first stays."""
        for name in [name for name in (LOW_NOISE, HIGH_NOISE) if self.is_on_device(name)][:-1]:
            self.weights[name].park()

    def load(
        self, names: Sequence[str], wanted: Mapping[str, ExpertFiles], parallel: Parallel, mesh: Mesh | None,
        shard: SequenceShard, on_tensor: OnTensor, beside: BesideReading = NOTHING_BESIDE,
    ) -> None:  # fmt: skip
        """Loads the expert that runs first and begins to read the other's files; what a job before has loaded stays.

        With other LoRAs or strengths only the weights that they change are read again: adding a difference to rounded
        weights would not give what a fresh start gives.

        Args:
            names: of the experts that the schedule runs, in its order.
            wanted: name -> what it is made from; one of another name stays as it is.
            beside: of the first that is made.
        """
        settings = {
            "parallel": parallel, "mesh": mesh, "shard": shard, "device": self._device,
            "attention": self._attention, "exact_attention": self._exact_attention, "ops": self._ops,
        }  # fmt: skip
        for made_of in wanted.values():
            self._drop_replaced(made_of.files)
        self._mesh = mesh
        computes = mesh, shard.world > 1, Computing.of(parallel, self._attention, self._ops, self._exact_attention)
        if computes != self._computes:
            for model in self.models.values():
                compute_as(model, mesh, shard, computes[-1])
            self._computes = computes
        stale = [name for name in names if self._made_of.get(name) != wanted[name]]
        later = [name for name in stale if name != names[0] and name not in self.models]
        now = [name for name in stale if name not in later]
        # The one that runs first is read last, so that it is the one on the device.
        for index, name in enumerate(reversed(now)):

            def report(done: int, total: int, name: str = name, index: int = index) -> None:
                on_tensor(f"{name} expert", index * total + done, total * len(now))

            for other in set(self.weights) - {name} if parallel.parks_experts else ():
                self.weights[other].park()
            self._load(name, wanted[name], settings, report, beside, partial(on_tensor, "sharing the weights", 0, 0))
            beside = replace(beside, use=NOTHING_BESIDE.use)
        for name in names:
            log.debug("%s expert: %s", name, "loaded now" if name in now else "read later" if name in later else "kept")
            if name in later:
                with beside.span("second model built"):
                    self._pending[name] = self._read_ahead(name, wanted[name], settings)
            else:
                set_shard(self.models[name], shard)
                if not parallel.parks_experts:
                    self.weights[name].fetch()

    def named(self, files: tuple[FileIdentity, ...]) -> str:
        """The name by which a model of these files is held here, or can be; it counts as used now.

        A model of the same paths as they were before is let go: nobody can ask for it again.
        """
        self._drop_replaced(files)
        for name, made_of in self._made_of.items():
            if made_of.files == files:
                self._made_of[name] = self._made_of.pop(name)
                return name
        path = Path(files[0].path)
        known = path.stem if len(files) == 1 else path.parent.name
        return known if known not in self._made_of else f"{known} {next(self._numbers)}"

    def _drop_replaced(self, files: tuple[FileIdentity, ...]) -> None:
        now = {file.path: file for file in files}
        for name, made_of in list(self._made_of.items()):
            if any(now.get(file.path, file) != file for file in made_of.files):
                log.info("let go, for its files have changed: %s", name)
                self._drop(name)

    def is_on_device(self, name: str) -> bool:
        """Whether a model is there, and does not wait in the host's memory."""
        return name in self.weights and self.weights[name].resident_bytes > 0

    def make_room(self, needed: int, *, but: str, parks: bool, ranks: int) -> None:
        """Takes the models that were used longest ago off the device, until `needed` bytes are free. Collective.

        They wait in the host's memory where that has room, as far as it is another one than the device's.

        Args:
            but: the name of the one that stays.
            parks: all others go.
            ranks: that share the host's memory.
        """
        for name in [name for name in self._made_of if name != but and self.is_on_device(name)]:
            if not parks and self.has_room(needed, ranks):
                return
            waits = parks or self._device.type == "cuda"
            room = free_host_bytes(ranks) * HOST_SHARE >= self.weights[name].resident_bytes
            if self._everywhere(waits and room):
                log.info("waits in host memory: %s", name)
                self.weights[name].park()
            else:
                log.info("let go, for there is no room: %s", name)
                self._drop(name)

    def has_room(self, needed: int, ranks: int) -> bool:
        """Whether so many bytes are free on every rank's device. Collective."""
        return self._everywhere(free_bytes(self._device, ranks) >= needed)

    def _everywhere(self, mine: bool) -> bool:
        return mine if self._mesh is None else everywhere(mine, self._mesh.group, self._device)

    def check_pending(self) -> None:
        """Raises what has gone wrong with an expert that is still being read."""
        for pending in self._pending.values():
            pending.reading.check()

    def arrive(self, name: str, on_tensor: OnTensor) -> None:
        """Must be called before an expert takes over: loads its weights, unless they are there.

        Raises:
            JobError: a file changed while it was read.
            OSError, ValueError: a file is damaged.
        """
        pending = self._pending.get(name)
        if pending is None:
            return
        start = time.perf_counter()
        pending.finish(lambda done, total: on_tensor(f"{name} expert", done, total))
        pending.made_of.check_unchanged()
        log.info("the steps waited %.2f s for the %s expert", time.perf_counter() - start, name)
        self._made_of[name] = pending.made_of
        del self._pending[name]

    def stop_reading(self) -> None:
        """Ends what is read during the steps: the job has failed."""
        for pending in self._pending.values():
            pending.reading.stop(wait=1.0)

    def settle(self) -> None:
        """After a job that stopped between two steps: an expert that was still being read is let go."""
        for name, pending in self._pending.items():
            pending.reading.stop()
            if name in self.models:
                self._drop(name)
        self._pending.clear()
        for model in self.models.values():
            release_gathered(model)

    def drop(self) -> None:
        """Frees all memory."""
        for name in list(self.models):
            self._drop(name)
        torch.cuda.empty_cache()

    def _load(
        self, name: str, wanted: ExpertFiles, settings: dict[str, Any], report: OnRead,
        beside: BesideReading = NOTHING_BESIDE, on_send: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        if name in self.models and not self._everywhere(self._made_of[name].loras_are_there):
            # What they changed cannot be known any more; a file may go between two ranks' looks.
            self._drop(name)
        if name in self.models:
            before = [lora.file.path for lora in self._made_of.pop(name).loras]
            with self.weights[name].writable():
                changed = relora_expert(
                    self.models[name], wanted.paths, before, wanted.specs, parallel=settings["parallel"],
                    reading=SharedReading.of(settings["parallel"], settings["mesh"], self._device),
                    device=self._device, expert=wanted.side, on_tensor=report,
                )  # fmt: skip
            if not changed:
                self._drop(name)
        if name not in self.models:
            self.models[name] = load_expert(
                wanted.paths, wanted.specs, expert=wanted.side, **settings,
                on_tensor=report, beside=beside, on_send=on_send,
                on_weights=partial(self.weights.__setitem__, name),
            )  # fmt: skip
        wanted.check_unchanged()
        self._made_of[name] = wanted

    def _read_ahead(self, name: str, wanted: ExpertFiles, settings: dict[str, Any]) -> PendingExpert:
        parallel: Parallel = settings["parallel"]
        if not parallel.parks_experts:
            # Its memory is taken now: a device that is too small is to be noticed before the first step.
            built = build_expert(wanted.paths, wanted.specs, expert=wanted.side, **settings)
            self.models[name], self.weights[name] = built.model, built.weights
            reading = Prefetch(lambda on_read: built.read(on_tensor=on_read))

            def finish(on_read: OnRead) -> None:
                reading.wait(on_read)
                built.send()

            return PendingExpert(wanted, reading, finish)
        ranks = parallel.gpus_per_host  # Its place on the device is taken: only the system can keep it.
        reading = prefetch_files(wanted.files, part=self._rank % ranks, parts=ranks)

        def take_the_place(on_read: OnRead) -> None:
            # What it has not read yet is not read faster by two.
            reading.stop()
            reading.check()
            slabs = []
            for other in list(self.weights):
                if parallel.stays:
                    self.weights[other].park()
                else:  # Nobody asks for it again.
                    slabs += self.weights[other].hand_over()
                    self._drop(other)
            self._load(name, wanted, {**settings, "slabs": slabs}, on_read)

        return PendingExpert(wanted, reading, take_the_place)

    def _drop(self, name: str) -> None:
        # Not left to the garbage collector: FSDP's hooks and the model refer to each other.
        self.weights.pop(name).drop()
        del self.models[name]
        self._made_of.pop(name, None)
