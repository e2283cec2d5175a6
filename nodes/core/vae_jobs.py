"""What a group of processes is asked for by ComfyUI's VAE nodes: checked, and planned for these GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...distributed.job.errors import listed
from ...distributed.job.job import FileIdentity, Parallel, VaeJob
from ...distributed.launch.group_kind import without_weights
from ...distributed.launch.launcher import new_job_id
from ...distributed.launch.vae_calls import VaeCalls
from ...distributed.machine.cancelling import cancelled_by
from ...distributed.machine.gpus import choose_gpus
from ...distributed.machine.prerequisites import check_switches, require_platform
from ...wan.model.latent_space import TEMPORAL_STRIDE, LatentSpace
from ..host import host
from ..host.exceptions import told_to_comfyui
from ..inference.ground import Ground, ground_for
from ..settings.spread import DistributedConfig
from .door_config import check_one_machine

if TYPE_CHECKING:
    from torch import Tensor

OTHER = "load the VAE that goes with them with Load VAE"


class VaeJobs:
    """One VAE, as `core_vae.VideoVae`.

    Args:
        files: its.
        upscale: pixels per row and column that it makes for one of the video.
    """

    def __init__(
        self, files: tuple[FileIdentity, ...], config: DistributedConfig, latents: LatentSpace, upscale: int,
        calls: VaeCalls,
    ) -> None:  # fmt: skip
        self._files, self._config, self._latents, self._upscale = files, config, latents, upscale
        self._calls = calls
        self._together = False
        self._parallel: Parallel | None = None
        """Of the calls that are together."""

    @contextmanager
    def together(self) -> Iterator[None]:
        if self._together:
            yield
            return
        self._together = True
        try:
            with self._calls.together():
                yield
        finally:
            self._together, self._parallel = False, None

    def decode(self, latents: Tensor) -> Tensor:
        space, shape = self._latents, tuple(latents.shape)
        if len(shape) != 5 or shape[1] != space.channels or not all(shape):
            raise ValueError(
                f"the latents are [{listed(shape)}]; a {space.vae} decodes videos of {space.channels} channels "
                f"[batch, channels, frames, rows, columns]. {OTHER[0].upper()}{OTHER[1:]}"
            )
        batch, _, frames, rows, columns = shape
        scale = space.stride * self._upscale
        made = (batch, 3, (frames - 1) * TEMPORAL_STRIDE + 1, rows * scale, columns * scale)
        return self._run(latents, made, encode=False)

    def encode(self, frames: Tensor) -> Tensor:
        space, shape = self._latents, tuple(frames.shape)
        stride = space.stride
        if len(shape) != 5 or shape[1] != 3 or not all(shape) or shape[3] % stride or shape[4] % stride:
            raise ValueError(
                f"the frames are [{listed(shape)}]; a {space.vae} encodes videos of 3 channels [batch, channels, "
                f"frames, rows, columns] whose rows and columns are multiples of {stride}"
            )
        batch, _, count, height, width = shape
        # ComfyUI's own leaves those out that fill no latent frame.
        whole = frames[:, :, : count - (count - 1) % TEMPORAL_STRIDE]
        made = (batch, *space.shape(width, height, whole.shape[2]))
        return self._run(whole, made, encode=True)

    def _run(self, given: Tensor, made: tuple[int, ...], *, encode: bool) -> Tensor:
        from ...distributed.planning.plan import DoesNotFit

        with told_to_comfyui(), cancelled_by(host.interrupted), self.together():
            parallel = self._parallel
            job = VaeJob(
                id=new_job_id(), vae=self._files, encode=encode, given=tuple(given.shape), made=made,
                parallel=self._switches() if parallel is None else parallel, verbose=host.verbose(),
            )  # fmt: skip
            if parallel is None:
                try:
                    job = self._planned(job)
                except DoesNotFit as error:
                    # ComfyUI goes on with tiles.
                    host.log(str(error))
                    raise host.out_of_memory(str(error)) from error
                self._parallel = job.parallel
            return self._calls.run(job, given)

    def _switches(self) -> Parallel:
        """What the config says, but of how a transformer lies."""
        check_one_machine(self._config, "the VAE nodes of ComfyUI's need")
        parallel = without_weights(self._config.parallel())
        return dataclasses.replace(parallel, more_follow=not parallel.keep_warm_seconds)

    def _planned(self, job: VaeJob) -> VaeJob:
        """On the processes that are there, where they may be used; else on all GPUs with room for it."""
        from ...distributed.planning.vae_plan import described

        require_platform()
        ground = ground_for(self._config)
        if isinstance(ground, str):
            # What ComfyUI itself holds is not in the job's way, planned or not.
            host.free_memory()
            count, ids = choose_gpus(self._config.gpu_count, self._config.gpu_ids, host.visible_gpus())
            job = dataclasses.replace(job, parallel=dataclasses.replace(job.parallel, gpu_count=count, gpu_ids=ids))
        else:
            for line in ground.kept:
                host.log(line)
            job = self._placed(job, ground)
        check_switches(job.parallel)
        host.log(described(job))
        return job

    def _placed(self, job: VaeJob, ground: Ground) -> VaeJob:
        from ...distributed.planning.plan import DoesNotFit
        from ...distributed.planning.vae_plan import check_fits, on_gpus

        wanted = self._config.gpu_count
        moved = self._calls.moved(job)
        if moved is not None and wanted in (0, moved.parallel.gpu_count):
            allowed = {gpu.index for gpu in ground.gpus}
            try:
                if allowed.issuperset(moved.parallel.gpu_ids):
                    check_fits(moved, ground.gpus)
                    return moved
            except DoesNotFit:
                pass
        free = [gpu for gpu in ground.gpus if gpu.index not in ground.taken]
        return on_gpus(job, free if len(free) >= max(wanted, 1) else ground.gpus, wanted)
