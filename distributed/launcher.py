"""Runs a job from ComfyUI: spawns the agent, follows it, ends it, and says what went wrong. Standard library only.

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

import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..wan.headers import read_header
from .environment import child_environment
from .failures import RankFailure, advice, read_failures, root_cause
from .job import VERSION, Job, JobError
from .jobdir import JobDir
from .leftovers import claim, keep_failed, remove_abandoned
from .logs import LogFollower, log_tail
from .loopback import listen
from .processes import Process, descendants, kill_all, members, signal_name
from .progress import Progress, place, read_progress
from .signs_of_life import Problem, SignsOfLife, dump_stacks, find_suspect

POLL = 0.1
END_TIMEOUT = 5.0
"""Seconds that killed processes get to disappear."""
MAX_LOG = 64 << 10
MIN_FREE_BYTES = 64 << 20
AGENT = Path(__file__).resolve().parent


class JobCancelled(JobError):
    """The user cancelled; nothing is left."""


class JobFailed(JobError):
    """The job ended without a result. The message starts with the failing rank's own words."""

    def __init__(self, message: str, *, rank: int | None, out_of_memory: bool, folder: Path | None, log: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.out_of_memory = out_of_memory
        self.folder = folder
        """Where the job folder was kept."""
        self.log = log


@dataclass(frozen=True, slots=True)
class Result:
    """A finished job. Its folder is the caller's to remove."""

    folder: JobDir
    info: dict[str, Any]
    """result.json."""
    log: str
    """Rank 0's log, its last 64 KiB."""

    def remove(self) -> None:
        self.folder.remove()


def require_platform() -> None:
    """Raises JobError where jobs cannot run."""
    if sys.platform != "linux":
        raise JobError(
            f"this system is {sys.platform}; videos are made on Linux (or WSL2) only: NCCL and the way the processes "
            "are tied to ComfyUI need it"
        )


def run_job(
    job: Job,
    write_inputs: Callable[[Path], None],
    *,
    parent: Path,
    failed: Path,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_log_line: Callable[[str], None] = lambda line: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Result:
    """Runs a job to its end. Must be called on a thread that outlives the job.

    Args:
        write_inputs: writes inputs.safetensors to the given path; does nothing if the job has none.
        parent: where job folders live.
        failed: where the folders of failed jobs are kept.
        on_progress, on_log_line: called on this thread; what they raise ends the job and is passed on.
        cancelled: asked every 0.1 s.
    Raises:
        JobCancelled, JobFailed; JobError if the job cannot start.
    """
    require_platform()
    if cancelled():
        raise JobCancelled("cancelled before the job started")
    if job.parallel.master_port:
        listen(job.parallel.master_port).close()
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent)
    _check_space(parent, job)
    folder = JobDir.create(parent)
    try:
        claim(folder)
        folder.write_job(job)
        write_inputs(folder.inputs)
        if folder.inputs.exists():
            folder.inputs.chmod(0o600)
        run = _Run(job, folder, failed, on_progress, on_log_line, cancelled)
        return run.to_the_end()
    except JobFailed:
        raise
    except BaseException:
        folder.remove()
        raise


class _Run:
    """One running job."""

    def __init__(
        self,
        job: Job,
        folder: JobDir,
        failed: Path,
        on_progress: Callable[[Progress], None],
        on_log_line: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._job, self._folder, self._failed = job, folder, failed
        self._on_progress, self._on_log_line, self._cancelled = on_progress, on_log_line, cancelled
        self._shown: Progress | None = None
        self._log = LogFollower(folder.log(0))
        self._signs = SignsOfLife(folder, job.parallel)

    def to_the_end(self) -> Result:
        with open(self._folder.agent_log, "wb", opener=_private) as log:
            self._agent = subprocess.Popen(
                [sys.executable, "-u", str(AGENT), "agent", str(self._folder.path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder.path,
                env=child_environment(self._job.parallel, self._folder.path),
                start_new_session=True,
                umask=0o077,
            )
        try:
            while self._agent.poll() is None:
                if self._cancelled():
                    raise JobCancelled("cancelled")
                self._report()
                if (problem := self._signs.problem()) is not None:
                    raise self._stuck(problem)
                time.sleep(POLL)
            self._report()
        finally:
            left = self._end()
        if left:
            pids = ", ".join(map(str, left))
            raise self._failure(f"processes {pids} cannot be killed; they wait inside a driver", None)
        if self._agent.returncode != 0:
            raise self._failure_of_ranks()
        try:
            info = self._checked_result()
        except (JobError, ValueError) as error:
            raise self._failure(f"the job ended without a valid result: {error}", None) from error
        return Result(self._folder, info, log_tail(self._folder.log(0), lines=10_000, limit=MAX_LOG))

    def _end(self) -> list[int]:
        """Ends every process of the job. Returns the pids that could not be killed."""
        # Listed before the agent ends: afterwards orphans have another parent, and only their environment tells.
        below = descendants(self._agent.pid) if self._agent.poll() is None else []
        agent = Process.of(self._agent.pid)
        assert self._agent.stdin is not None
        self._agent.stdin.close()
        if agent is not None and self._agent.poll() is None:
            agent.kill()
        left = kill_all(lambda: {*below, *members(self._folder.path)}, END_TIMEOUT)
        if not left:
            self._agent.wait(END_TIMEOUT)
        return sorted(process.pid for process in left)

    def _report(self) -> None:
        progress = read_progress(self._folder)
        if progress is not None and progress != self._shown:
            self._shown = progress
            self._on_progress(progress)
        for line in self._log.new_lines():
            self._on_log_line(line)

    def _stuck(self, problem: Problem) -> JobFailed:
        """Has the ranks print their stacks, ends them and names the one that holds the others up."""
        ranks = self._signs.ranks()
        stacks = dump_stacks(self._folder, ranks)
        suspect = find_suspect(ranks, stacks, self._job.parallel.gpu_count)
        self._end()
        mine = ranks.get(suspect)
        what = "did not finish loading" if problem.setting == "start_timeout" else "made no progress"
        where = f"in {mine.where}" if mine is not None else "before its first sign of life"
        text = (
            f"rank {suspect} {what} for {problem.seconds:g} s {where} "
            f"({problem.setting} is {problem.seconds:g} s; raise it if that is too short)"
        )
        if mine is not None and mine.stopped:
            text += "\nit is frozen: a signal (SIGSTOP) or a debugger stopped it"
        if mine is not None and mine.gone:
            text += "\nit has ended before the others, without an error"
        text += "\nlast seen: " + ("; ".join(f"rank {r}: {s.where}" for r, s in sorted(ranks.items())) or "nothing")
        if stacks.get(suspect):
            text += f"\nits stack:\n{stacks[suspect]}"
        return self._failure(text, RankFailure(rank=suspect))

    def _failure_of_ranks(self) -> JobFailed:
        cause = root_cause(read_failures(self._folder, self._job.parallel.gpu_count))
        if cause is not None:
            where = f"\nin {place(cause.phase, cause.step)}" if cause.phase else ""
            return self._failure(cause.headline + where, cause)
        code = self._agent.returncode
        name = signal_name(code)
        return self._failure(
            f"the agent was killed by {name}" if name else f"the agent ended with exit code {code}", None
        )

    def _failure(self, text: str, cause: RankFailure | None) -> JobFailed:
        path = self._folder.log(cause.rank if cause else 0)
        tail = log_tail(path if path.exists() else self._folder.agent_log)
        log = log_tail(self._folder.log(0), lines=10_000, limit=MAX_LOG)
        kept = keep_failed(self._folder, self._failed)
        out_of_memory = cause is not None and cause.out_of_memory
        hint = advice(text, out_of_memory=out_of_memory, killed=cause is not None and cause.signal == "SIGKILL")
        again = f"the job is kept in {kept}; {shlex.join([sys.executable, str(AGENT), 'run', str(kept)])} repeats it"
        parts = [text, f"\nlast lines of its log:\n{tail}\n" if tail else "", again, hint]
        return JobFailed(
            "\n".join(part for part in parts if part),
            rank=cause.rank if cause else None, out_of_memory=out_of_memory, folder=kept, log=log,
        )  # fmt: skip

    def _checked_result(self) -> dict[str, Any]:
        info = self._folder.read_json(self._folder.result)
        if info.get("id") != self._job.id or info.get("version") != VERSION:
            raise JobError(f"result.json is of job {info.get('id')!r}, not of {self._job.id!r}")
        samples = read_header(self._folder.latents).tensors.get("samples")
        if samples is None or samples.dtype != "F32" or list(samples.shape) != info.get("latents", {}).get("shape"):
            raise JobError("latents.safetensors is not what result.json promises")
        if not self._folder.video.is_file() or self._folder.video.stat().st_size == 0:
            raise JobError("video.mp4 is missing or empty")
        return info


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def new_job_id() -> str:
    return secrets.token_hex(16)


def _check_space(parent: Path, job: Job) -> None:
    sampling = job.sampling
    # Latents are 4 bytes x 16 channels per 8x8x4 pixels; a noisy mp4 stays under half a byte per pixel.
    needed = MIN_FREE_BYTES + sampling.width * sampling.height * sampling.num_frames * 3 // 4
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise JobError(
            f"{parent} has {free / 2**20:.0f} MiB free; the job needs {needed / 2**20:.0f} MiB. Free some space there"
        )
