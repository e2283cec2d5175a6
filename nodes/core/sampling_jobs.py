"""What a group of processes is asked for one sampling of ComfyUI's: checked, and planned for these GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...distributed.job.errors import listed
from ...distributed.job.evaluator import Evaluator, EvaluatorSource
from ...distributed.job.job import FileIdentity, ForwardsJob, LoraFile, Parallel
from ...distributed.job.sampling import rounded_of_sigmas
from ...distributed.launch.launcher import new_job_id
from ...distributed.machine.prerequisites import require_platform
from ...wan.files.identify import noise_side
from ..host import host
from ..host.core_model import CoreSampling
from ..host.status import Status
from ..inference.ground import as_switched, ground_for, shown
from ..models.loras import lora_as_it_is
from ..settings.spread import DistributedConfig
from .door_config import check_one_machine
from .patch_files import PatchFiles
from .prompt_entries import check_conditioning

if TYPE_CHECKING:
    from ...wan.model.config import WanConfig


@functools.cache
def patch_files() -> PatchFiles:
    """One for the whole ComfyUI, in its temp folder; not among the jobs, which leave nothing there."""
    return PatchFiles(lambda: host.jobs_folder().with_name("wan_distributed_loras"))


@dataclass(frozen=True, slots=True)
class SamplingJobs:
    """One transformer's evaluations."""

    files: tuple[FileIdentity, ...]
    loras: tuple[LoraFile, ...]
    config: DistributedConfig
    model: WanConfig
    source: EvaluatorSource

    def prepare(self, sampling: CoreSampling) -> Callable[[], Evaluator]:
        """Checks and plans a sampling; returns what gets its evaluator, for the first evaluation.

        Raises:
            ValueError: the latents, the conditioning or the LoRAs do not fit the model, or the video does not fit the
                GPUs.
        """
        require_platform()
        self._check_latents(sampling.shape)
        check_conditioning(sampling, self.model)
        job = self._job(sampling)
        return lambda: self.source.open(job)

    def _evaluated(self, sampling: CoreSampling) -> tuple[int, ...]:
        """Shape of what is computed at once, with the picture in front."""
        *batch, frames, rows, columns = sampling.window
        return (*batch, frames + (sampling.references and "ref_conv" in self.model.parts), rows, columns)

    def _check_latents(self, shape: tuple[int, ...]) -> None:
        channels = self.model.out_dim
        if len(shape) != 5 or shape[1] != channels:
            raise ValueError(
                f"the latents are [{listed(shape)}]; a {self.model.variant.name} model's are videos of {channels} "
                "channels [batch, channels, frames, rows, columns]"
            )

    def _job(self, sampling: CoreSampling) -> ForwardsJob:
        from ...distributed.planning.preflight import check_forwards

        status = Status()
        loras = (*map(lora_as_it_is, self.loras), *patch_files().files(sampling.added))
        side = {"high": "high_noise", "low": "low_noise"}.get(noise_side(self.files[0].path) or "", "")
        parallel = self._planned(sampling, loras, side or None, status)
        status.warn(*check_forwards(self.files, loras, side or None, parallel, on_note=status.note))
        for line in (*status.notes, *status.warnings):
            host.log(line)
        return ForwardsJob(
            id=new_job_id(),
            model=self.files,
            loras=loras,
            side=side,
            parallel=parallel,
            rounded=rounded_of_sigmas(sampling.sigmas.tolist(), parallel.exact_steps),
            warnings=tuple(status.warnings),
            verbose=host.verbose(),
        )

    def _planned(
        self, sampling: CoreSampling, loras: tuple[LoraFile, ...], side: str | None, status: Status
    ) -> Parallel:
        from ...distributed.planning.plan import as_set
        from ...distributed.planning.policies import Request
        from ...distributed.planning.workload import workload_of_forwards

        check_one_machine(self.config, "a sampler of ComfyUI's needs")
        base, ground = self.config.parallel(), ground_for(self.config)
        if isinstance(ground, str):
            # What ComfyUI itself holds is not in the job's way, planned or not.
            host.free_memory()
            return shown(as_set(as_switched(self.config, base, guided=sampling.guided), ground), status)
        request = Request(
            base=base,
            gpu_count=self.config.gpu_count,
            cfg_parallel=self.config.cfg_parallel,
            always_guided=sampling.guided,
        )
        steps = max(len(sampling.sigmas) - 1, 1)
        work = workload_of_forwards(
            self.files,
            self._evaluated(sampling),
            base,
            steps=steps,
            guided=sampling.guided,
            loras=loras,
            expert=side,
            controls=sampling.controls if self.model.variant.controlled else 0,
        )
        return shown(ground.plan(work, request), status)
