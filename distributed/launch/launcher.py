"""Runs a job from ComfyUI: gives it to a group of processes, follows it, says what went wrong.

What is covered:
- cancel, an exception in the caller, a crash or a stop of any rank or of the agent: every process of the job is gone
  before `run_job` returns; ComfyUI's own death ends them too (agent.py);
- a job that starts too slowly or stands still ends after its time-outs, with the stacks of its ranks;
- success means exit code 0 and a result with the job's id and the promised files.

What is not covered:
- a process in uninterruptible sleep inside the driver cannot be killed; its pid is named;
- a fork of ComfyUI without exec inherits the agent's pipe and keeps a job alive until it closes;
- root, or the same user, can read the job folder and the processes' environment;
- other systems than Linux.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ..group import worker_group
from ..group.failures import RankFailure, advice, read_failures, root_cause
from ..group.installation import check_installation
from ..group.leftovers import claim, keep_failed, remove_abandoned
from ..group.logs import LogFollower, log_tail
from ..group.lost_ranks import LostRanks
from ..group.signs_of_life import Problem, Seen, SignsOfLife, dump_stacks, find_suspect
from ..job.errors import counted
from ..job.job import GroupJob, Job, JobError
from ..job.job_folder import JobDir
from ..job.progress import Progress, read_progress
from ..machine.bell import Bell
from ..machine.cancelling import cancelled_by, check_cancelled
from ..machine.prerequisites import check_prerequisites, check_space, writing_problem
from ..machine.usage import Usage, UsageMonitor, all_gpus, gpu_usage, in_words, process_usage
from .changed_file import ChangedFile
from .group_source import GroupSource
from .pool import Pool
from .result import Result, checked_result
from .stopping import Stopping, cancel

POLL = 0.1
MAX_LOG = 64 << 10
MAX_PREVIEW = 4 << 20


class JobFailed(JobError):
    """The job ended without a result. The message starts with the failing rank's own words."""

    def __init__(self, message: str, *, rank: int | None, out_of_memory: bool, folder: Path | None, log: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.out_of_memory = out_of_memory
        self.folder = folder
        """Where the job folder was kept."""
        self.log = log


class _GroupLost(JobError):
    """A group that waited for the job had ended before it took it. Nothing of the job was done."""


def run_job(
    job: GroupJob,
    write_inputs: Callable[[Path], None],
    *,
    parent: Path,
    failed: Path,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_log_line: Callable[[str], None] = lambda line: None,
    cancelled: Callable[[], bool] = lambda: False,
    pool: GroupSource | None = None,
    room: Mapping[Path, int] | None = None,
) -> Result:
    """Runs a job to its end. Must be called on a thread that outlives the job.

    Args:
        pool: where a group of processes may wait for the next job; without one it ends with the job.
        write_inputs: writes inputs.safetensors to the given path; does nothing if the job has none.
        parent, failed: where job folders live, and where those of failed jobs are kept.
        on_progress, on_log_line: called on this thread; what they raise ends the job and is passed on.
        cancelled: asked every 0.1 s.
        room: as of `check_space`; without it what the job makes in its folder.
    Raises:
        JobCancelled, JobFailed; JobError if the job cannot start.
    """
    started = time.monotonic()
    with cancelled_by(cancelled):
        check_cancelled()
        on_progress(Progress(phase="start", message="looking for the packages that the processes import"))
        check_prerequisites(job.parallel, file_format=job.file_format)
        check_installation(encodes=job.encodes, looks=job.looks, decodes=job.file_format is not None)
        check_cancelled()
    if problem := writing_problem(parent):
        raise JobError(problem)
    remove_abandoned(parent)
    check_space(room or {parent: job.made_bytes()})
    pool = Pool() if pool is None else pool
    while True:
        folder = JobDir.create(parent)
        try:
            claim(folder)
            folder.write_job(job)
            write_inputs(folder.inputs)
            if folder.inputs.exists():
                folder.inputs.chmod(0o600)
            return _Run(job, folder, failed, on_progress, on_log_line, cancelled, pool).to_the_end(started)
        except (JobFailed, Stopping):
            # The folder of the one is kept; ranks still write into the other's, which the pool removes after them.
            raise
        except _GroupLost as error:
            # In a folder without that group's traces. This comes to an end: each time a group fewer waits.
            folder.remove()
            on_log_line(f"the job starts in new processes: before those that waited took it, {error}")
        except BaseException:
            folder.remove()
            raise


class _Run:
    """One running job."""

    def __init__(
        self, job: GroupJob, folder: JobDir, failed: Path, on_progress: Callable[[Progress], None],
        on_log_line: Callable[[str], None], cancelled: Callable[[], bool], pool: GroupSource,
    ) -> None:  # fmt: skip
        self._job, self._folder, self._failed = job, folder, failed
        self._on_progress, self._on_log_line, self._cancelled = on_progress, on_log_line, cancelled
        self._pool = pool
        self._shown: Progress | None = None
        self._waits = ""
        self._log = LogFollower(folder.log(0))
        self._preview = ChangedFile(folder.preview, MAX_PREVIEW)
        self._usage = UsageMonitor(self._read_usage)

    def to_the_end(self, started: float) -> Result:
        """`started`: when the job did, by `time.monotonic()`."""
        self._group = self._pool.take(self._job, self._folder.path.parent, cancelled=self._cancelled, on_wait=self._say)
        # Not before: the time-outs are the ranks', and waiting for a GPU is not their fault.
        self._signs = SignsOfLife(self._folder, self._job.parallel)
        self._lost = LostRanks(self._folder)
        lost = good = stays = False
        try:
            self._group.submit(self._folder)
            self._say(self._begins)
            self._usage.start()
            with Bell(self._folder.done_bell) as done:
                while self._group.exit_code is None and not self._signs.all_done():
                    if self._cancelled():
                        raise cancel(self._pool, self._group, self._job, self._folder, self._signs.ranks(), self._shown)
                    self._report()
                    self._report_wait()
                    if lost := self._lost.look(self._ranks(), lambda: self._group.agent_lives):
                        break
                    if (problem := self._signs.problem()) is not None:
                        raise self._stuck(problem)
                    done.wait(POLL)
            self._report()
            if lost or self._group.exit_code:
                self._end()
                cause = self._cause(agent_ended_itself=not lost)
                # Ranks begin a job together: without one of them, none has done anything yet.
                if self._group.ranks and len(self._signs.ranks()) < self._job.parallel.gpu_count:
                    raise _GroupLost(self._group.end_text() if cause is None else cause.headline)
                raise self._failure_of_ranks(cause)
            try:
                info = checked_result(self._folder, self._job)
            except (JobError, ValueError) as error:
                self._end()
                raise self._failure(f"the job ended without a valid result: {error}", None) from error
            good = True
        except Stopping:
            stays = True
            raise
        finally:
            try:
                if good and self._group.exit_code is None:
                    self._group.ranks = [seen.process for seen in self._signs.ranks().values()]
                    self._pool.give_back(self._group, self._job)
                elif not stays:
                    self._end()
            finally:
                # Last: what waits for a reading must not keep a GPU.
                self._usage.stop()
        log = log_tail(self._folder.log(0), lines=10_000, limit=MAX_LOG)
        return Result(self._folder, info, log, time.monotonic() - started)

    def _end(self) -> None:
        """Ends every process of the group. Raises JobFailed if one cannot be killed."""
        if self._group.ended:
            return
        left = self._group.end()
        # What explains a failure must not keep the GPUs: on a full disk it cannot be copied.
        with contextlib.suppress(OSError):
            self._group.hand_over(self._folder)
        self._pool.forget(self._group)
        if left:
            text = f"processes {', '.join(map(str, left))} cannot be killed; they wait inside a driver"
            raise self._failure(text, None)

    def _ranks(self) -> dict[int, Seen]:
        """Also those that waited for the job and have not taken it yet."""
        waited = {rank: Seen.of(process, phase="start", step=0) for rank, process in enumerate(self._group.ranks)}
        return waited | self._signs.ranks()

    @property
    def _begins(self) -> str:
        processes = counted(self._job.parallel.gpu_count, "process", "processes")
        return f"the {processes} of the last video begin" if self._group.ranks else f"starting {processes}"

    def _say(self, message: str) -> None:
        """While no rank says anything."""
        self._on_progress(Progress(phase="start", message=message))

    def _report_wait(self) -> None:
        """Of a job over several machines, whose agents wait for GPUs there."""
        reason = self._group.waits()
        if reason:
            self._signs.restart()
        if reason != self._waits:
            self._say(reason or self._begins)
        self._waits = reason

    def _report(self) -> None:
        progress = read_progress(self._folder)
        if progress is not None:
            # Looked for second: a rank writes the picture of a step before it reports the step.
            preview = self._preview.read()
            progress = dataclasses.replace(progress, usage=in_words(self._usage.latest()))
            if progress != self._shown or preview is not None:
                self._shown = progress
                self._on_progress(dataclasses.replace(progress, preview=preview))
        for line in self._log.new_lines():
            self._on_log_line(line)

    def _read_usage(self) -> list[Usage]:
        parallel = self._job.parallel
        if parallel.hosts:
            # Other machines' GPUs have the same numbers.
            return []
        if parallel.gpu_ids:
            return gpu_usage(parallel.gpu_ids, all_gpus())
        ranks = self._signs.ranks()
        # Not of some of them: the others have only not been seen yet.
        return process_usage(ranks[rank].process for rank in sorted(ranks)) if len(ranks) == parallel.gpu_count else []

    def _stuck(self, problem: Problem) -> JobFailed:
        """Has the ranks print their stacks, ends them and names the one that holds the others up."""
        ranks = self._signs.ranks()
        stacks = dump_stacks(self._folder, ranks, self._group.request_stacks)
        suspect = find_suspect(ranks, stacks, self._job.parallel.gpu_count)
        self._end()
        mine = ranks.get(suspect)
        what = "did not finish loading" if problem.setting == "start_timeout" else "made no progress"
        where = f"in {mine.where}" if mine is not None else "before its first sign of life"
        text = (
            f"rank {suspect}{self._group.host_of(suspect)} {what} for {problem.seconds:g} s {where} "
            f"({problem.setting} is {problem.seconds:g} s; raise it if that is too short)"
        )
        if mine is not None and mine.stopped:
            text += "\nit is frozen: a signal (SIGSTOP) or a debugger stopped it"
        text += "\nlast seen: " + ("; ".join(f"rank {r}: {s.where}" for r, s in sorted(ranks.items())) or "nothing")
        if stacks.get(suspect):
            text += f"\nits stack:\n{stacks[suspect]}"
        return self._failure(text, RankFailure(rank=suspect))

    def _cause(self, *, agent_ended_itself: bool) -> RankFailure | None:
        failures = read_failures(self._folder, self._job.parallel.gpu_count, self._group.said, self._lost.failures)
        return root_cause(failures, agent_failed=agent_ended_itself and self._group.agent_failed)

    def _failure_of_ranks(self, cause: RankFailure | None) -> JobFailed:
        if cause is None:
            return self._failure(self._group.end_text(), None)
        return self._failure(cause.headline + self._group.host_of(cause.rank) + cause.where, cause)

    def _failure(self, text: str, cause: RankFailure | None) -> JobFailed:
        path = self._folder.log(cause.rank if cause else 0)
        tail = log_tail(path if path.exists() else self._folder.agent_log)
        log = log_tail(self._folder.log(0), lines=10_000, limit=MAX_LOG)
        kept = keep_failed(self._folder, self._failed)
        out_of_memory = cause is not None and cause.out_of_memory
        hint = advice(text, tail, out_of_memory=out_of_memory, killed=cause is not None and cause.signal == "SIGKILL")
        again = f"the job is kept in {kept}"
        if isinstance(self._job, Job):
            command = shlex.join([sys.executable, str(worker_group.AGENT), "run", str(kept)])
            does = "continues from its denoised latents" if JobDir(kept).latents.exists() else "repeats it"
            again += f"; {command} {does}"
        parts = text, self._group.notes(), f"\nlast lines of its log:\n{tail}\n" if tail else "", again, hint
        said, rank = "\n".join(filter(None, parts)), cause.rank if cause else None
        return JobFailed(said, rank=rank, out_of_memory=out_of_memory, folder=kept, log=log)


def new_job_id() -> str:
    return secrets.token_hex(16)
