"""The node that makes several videos: prompts x seeds -> jobs -> groups of GPUs side by side -> files, logs, status."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from ...distributed.job.errors import counted
from ...distributed.job.job import Job, JobError
from ...distributed.launch.launcher import MAX_LOG, JobFailed, new_job_id
from ...distributed.launch.result import Result
from ...distributed.machine.prerequisites import check_space, writing_problem
from ..host import host, warm
from ..host.groups import place_of
from ..host.node_report import NodeReport
from ..host.status import Status, with_warnings
from ..inference import saved_video
from ..inference.inference import build_job, model_of
from ..inference.inference_inputs import HIDDEN
from ..inference.outcome import Outcome, keep
from ..inference.video_node import VideoNode
from ..settings.spread import AS_SET, DistributedConfig
from ..sockets.video_inputs import VideoInputs
from . import batch_inputs
from .requests import Request, requests_of
from .run import BatchProgress, BatchRun
from .split import splits


class WanVideoDistributedBatch(VideoNode):
    DESCRIPTION = (
        "Makes several videos with Wan2.2, of a list of prompts, seeds or both. The GPUs are shared out in groups that "
        "each make one video at a time, side by side, and load the model once. Every video is the one that Wan Video "
        "Distributed Inference makes with the same seed. Cancel ends all processes at once."
    )
    RETURN_TYPES = ("VIDEO", "STRING", "STRING", "STRING", "LATENT")
    RETURN_NAMES = ("videos", "video_paths", "log_output", "status", "samples")
    OUTPUT_IS_LIST = (True, True, False, False, True)
    OUTPUT_TOOLTIPS = (
        "The videos in the order of the prompts, as a list: nodes behind it run once for each.",
        "Paths of the videos in ComfyUI's output folder, as a list; empty where there is none.",
        "The logs of the jobs' first processes one after another, 64 KiB in all.",
        "One block for each video, in order: its seed and prompt, success or error, settings, times and warnings.",
        "The latents (un-normalised, as ComfyUI's own), as a list.",
    )
    SEARCH_ALIASES: ClassVar[list[str]] = [
        "wan2.2", "batch", "queue", "prompts", "seeds", "multi gpu", "list", "steps", "cfg", "sampler",
    ]  # fmt: skip

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {"required": batch_inputs.required(), "optional": batch_inputs.optional(), "hidden": dict(HIDDEN)}

    def _run(
        self,
        report: NodeReport,
        *,
        prompts: str,
        batch_count: int,
        gpus_per_video: int,
        on_error: str = "raise",
        filename_prefix: str = "video/wan",
        unique_id: str | None = None,
        workflow_prompt: dict[str, Any] | None = None,
        extra_pnginfo: dict[str, Any] | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        asked = VideoInputs.of(settings)
        connected = asked.text_embeds is not None
        requests = requests_of(prompts, asked.sampling.seed, batch_count, embeds_connected=connected)
        batch = _Batch(requests, asked, gpus_per_video)
        if connected and prompts.strip():
            batch.warn("text_embeds is connected: prompts of this node had no effect")
        first = batch.jobs[0][0].sampling
        size = first.width, first.height
        output = saved_video.check_prefix(filename_prefix, *size, first.file_format.suffix)
        host.free_memory()
        workflow = {"prompt": workflow_prompt, **(extra_pnginfo or {})}
        batch.run(report, filename_prefix, output, workflow)
        made = [batch.made.get(index) for index in range(len(requests))]
        saved = [one.saved for one in made if one is not None and one.saved is not None]
        self.made.remember(unique_id, [video.path for video in saved])
        videos = saved_video.shown(saved)
        report.end(with_warnings(f"{batch.line} in {report.seconds:.0f} s", batch.warnings), videos)
        if batch.failures and on_error == "raise":
            raise batch.failure()
        return {
            "ui": {"video": videos} if videos else {},
            "result": (
                [host.blocked_output() if one is None else one.video() for one in made],
                ["" if one is None else str(one.path or "") for one in made],
                batch.log(),
                batch.status(),
                [host.blocked_output() if one is None else {"samples": one.samples} for one in made],
            ),
        }

    def _failed(self, log: str, status: str) -> tuple[Any, ...]:
        return [host.blocked_output()], [""], log, status, [host.blocked_output()]


class _Batch:
    """The videos of one run of the node."""

    def __init__(self, requests: list[Request], asked: VideoInputs, gpus_per_video: int) -> None:
        """Builds and checks every job, before anything starts."""
        self._requests = requests
        self._statuses: list[Status] = []
        """One per group: what is to be said of its jobs."""
        built = self._first_jobs(asked, gpus_per_video)
        self._as_set = asked.config.plan == AS_SET
        self.groups = [job.parallel for job, _ in built]
        first, tensors = built[0]
        # Nothing else differs between the videos.
        self.jobs = [
            (
                dataclasses.replace(
                    first,
                    id=new_job_id(),
                    sampling=dataclasses.replace(first.sampling, seed=request.seed),
                    text=None if first.text is None else dataclasses.replace(first.text, prompt=request.prompt),
                ),
                tensors,
            )
            for request in requests
        ]
        self.made: dict[int, Outcome] = {}
        self.failures: dict[int, Exception] = {}
        self._group_of: dict[int, int] = {}

    def _first_jobs(self, asked: VideoInputs, gpus_per_video: int) -> list[tuple[Job, dict[str, Any]]]:
        """The first video's job on each group, of the most groups that have the memory for it."""
        from ...distributed.planning.plan import DoesNotFit

        common, model, refused = Status(), model_of(asked, Status()), None
        asked.say_overruled(common)
        visible = host.visible_gpus()
        ways = splits(asked.config, len(self._requests), gpus_per_video, model=model, visible=visible, status=common)
        for configs in ways:
            try:
                return self._build(asked, configs, common)
            except DoesNotFit as error:
                refused = error
        assert refused is not None, "there is always a way: one group of all GPUs"
        raise refused

    def _build(
        self, asked: VideoInputs, configs: list[DistributedConfig], common: Status
    ) -> list[tuple[Job, dict[str, Any]]]:
        self._statuses = [Status() for _ in configs]
        # Then they have the weights on their GPUs while they decode, too.
        more_follow = len(self._requests) > len(configs)
        built = []
        for config, status in zip(configs, self._statuses, strict=True):
            status.warn(*common.warnings)
            status.note(*common.notes)
            one = dataclasses.replace(
                asked, config=config, overruled=(), prompt=self._requests[0].prompt,
                side_by_side=len(configs), more_follow=more_follow,
            )  # fmt: skip
            built.append(build_job(one, status))
        sizes = {(job.sampling.width, job.sampling.height) for job, _ in built}
        if len(sizes) == 1:
            return built
        # dynamic_resolution, on GPUs of which some have less memory: all videos get the size that fits everywhere.
        width, height = min(sizes, key=lambda size: size[0] * size[1])
        common.warn(f"batch: all videos are {width}x{height}, which fits every group of GPUs")
        smaller = dataclasses.replace(asked.sampling, width=width, height=height)
        return self._build(dataclasses.replace(asked, sampling=smaller), configs, common)

    def warn(self, line: str) -> None:
        for status in self._statuses:
            status.warn(line)

    def run(self, report: NodeReport, filename_prefix: str, output: Path, workflow: dict[str, Any]) -> None:
        """Makes the videos; `made` and `failures` hold what came of each. output: the folder that they come to."""
        from ...distributed.planning.disk_room import room_of

        folder, groups, videos = host.jobs_folder(), len(self.groups), len(self.jobs)
        if problem := writing_problem(folder):
            raise JobError(problem)
        try:
            # Now, and not when half of them are made; a warning, as videos are counted as if they were noise.
            whole = room_of(*self.jobs[0], folder, output, at_once=groups, videos=videos)
            check_space(whole, f"at the most the batch of {counted(videos, 'video')}")
        except JobError as error:
            self.warn(f"{error}, or the last videos may fail")

        def save(index: int, group: int, result: Result) -> None:
            self._group_of[index] = group
            try:
                made = keep(self.jobs[index][0], result, filename_prefix, workflow)
            except JobError as error:
                self.failures[index] = error
                return
            self.made[index] = made

        def show(progress: BatchProgress) -> None:
            report.show(progress.fraction, progress.text)
            if progress.previews:
                report.pictures(progress.previews)

        run = BatchRun(
            self.jobs,
            self.groups,
            warm.pool(),
            # Of each video those that are made beside it: if the disk fills up later, as many come out as fit.
            room=room_of(*self.jobs[0], folder, output, at_once=groups, videos=groups),
            on_result=save,
            on_failure=self.failures.__setitem__,
            on_progress=show,
            cancelled=host.interrupted,
        )
        run.run()

    @property
    def warnings(self) -> Iterator[str]:
        """Of all groups and videos."""
        for status in self._statuses:
            yield from status.warnings
        for _, made in sorted(self.made.items()):
            yield from made.info["warnings"]

    @property
    def line(self) -> str:
        """One line for the node."""
        return f"{len(self.made)} of {len(self._requests)} done"

    def status(self) -> str:
        """One block per video."""
        asked = counted(len(self._requests), "video")
        lines = [
            "success" if not self.failures else f"error: {len(self.failures)} of {asked} failed",
            f"- {asked}, {len(self.groups)} at a time, {self._where}",
            *(f"- {line}" for line in self._advice()),
        ]
        for index in range(len(self._requests)):
            made = self.made.get(index)
            block = f"error: {self.failures[index]}" if made is None else self._block(index, made)
            lines += ["", self._title(index), block]
        return "\n".join(lines)

    @property
    def _where(self) -> str:
        places = [place_of(group) for group in self.groups]
        # Without GPUs all are the same.
        return f"each on {places[0]}" if len(set(places)) == 1 else f"on {'; '.join(places)}"

    def _block(self, index: int, made: Outcome) -> str:
        status = copy.deepcopy(self._statuses[self._group_of[index]])
        status.warn(*made.info["warnings"])
        return status.block(made.path, made.info, made.seconds)

    def log(self) -> str:
        """All logs, each cut to an equal part of what one job's may have."""
        share = MAX_LOG // len(self._requests)
        logs = {index: made.log for index, made in self.made.items()}
        logs |= {index: error.log for index, error in self.failures.items() if isinstance(error, JobFailed)}
        return "\n".join(f"{self._title(index)}\n{log[-share:]}" for index, log in sorted(logs.items()))

    def failure(self) -> JobFailed:
        """What the node raises: each failure in its own words, and where the videos that are done lie."""
        first, *others = sorted(self.failures)
        lines = [f"{self._title(first)} failed: {self.failures[first]}"]
        lines += [f"{self._title(index)} failed: {str(self.failures[index]).splitlines()[0]}" for index in others]
        for index, made in sorted(self.made.items()):
            where = made.path or "latents only, which on_error return hands on"
            lines.append(f"{self._title(index)} is done: {where}")
        text = "\n".join([*lines, *self._advice()])
        return JobFailed(text, rank=None, out_of_memory=self._out_of_memory, folder=None, log=self.log())

    @property
    def _out_of_memory(self) -> bool:
        return any(isinstance(error, JobFailed) and error.out_of_memory for error in self.failures.values())

    def _advice(self) -> list[str]:
        """What a job's own error cannot say: alone, it would have let the model go before it decoded."""
        if not (self._as_set and self._out_of_memory and len(self._requests) > len(self.groups)):
            return []
        return [
            "the model stays on the GPUs for the next video while one is decoded; plan auto sees to it that both fit, "
            "plan 'as set' does not"
        ]

    def _title(self, index: int) -> str:
        return f"video {index + 1} of {len(self._requests)} ({self._requests[index]})"
