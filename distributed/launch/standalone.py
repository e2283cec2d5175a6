"""`run`: repeats the job in a folder without ComfyUI, through the same launcher."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from ...wan.video.video_formats import FORMATS
from ..hosts.hostfile import host_warnings, over_hosts, read_hostfile
from ..job.errors import JobCancelled
from ..job.job import Job, JobError
from ..job.job_folder import JobDir
from ..job.progress import Progress, steady_seconds
from .launcher import new_job_id, run_job
from .result import Result


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, or 1 if the job failed."""
    parser = argparse.ArgumentParser(
        prog="distributed run", description="Runs the job in a folder (job.json, inputs.safetensors) again."
    )
    parser.add_argument("folder", type=Path, help="a job folder, such as one that a failed run kept")
    parser.add_argument("--hostfile", type=Path, help="run on its machines: lines of NAME slots=N (see README)")
    parser.add_argument("--output", type=Path, help="where the video goes (default: the job folder)")
    options = parser.parse_args(arguments)
    source, output = JobDir(options.folder.resolve()), (options.output or options.folder).resolve()
    interrupted: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, frame: interrupted.append(received))
    try:
        read = source.read_job()
        if not isinstance(read, Job):
            raise JobError(f"the job in {source.path} served a node of ComfyUI's: queue that workflow again")
        # Its frames were for a node of ComfyUI's.
        job = dataclasses.replace(read, id=new_job_id(), frames=False)
        if options.hostfile is not None:
            job = _over(job, options.hostfile.resolve())
            for warning in host_warnings(job.parallel):
                print(warning, file=sys.stderr)
        output.mkdir(parents=True, exist_ok=True)
        result = run_job(
            job,
            lambda path: _copy_inputs(source, JobDir(path.parent)),
            parent=Path(tempfile.gettempdir()) / "wan_distributed",
            failed=output / "failed",
            on_progress=_show,
            cancelled=lambda: bool(interrupted),
        )
    except JobCancelled:
        print("\ncancelled", file=sys.stderr)
        return 1
    except (JobError, ValueError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    try:
        _keep(result, output)
    finally:
        result.remove()
    _print_summary(result, output)
    return 0


def _over(job: Job, hostfile: Path) -> Job:
    """The job on the machines of a hostfile."""
    from ..planning.preflight import always_guided

    guided = always_guided(job.model, job.sampling)
    parallel = over_hosts(job.parallel, read_hostfile(hostfile), guided=guided)
    return dataclasses.replace(job, parallel=parallel)


def _copy_inputs(source: JobDir, target: JobDir) -> None:
    if source.inputs.exists():
        shutil.copyfile(source.inputs, target.inputs)
    # Of a job that failed after it had denoised: what it was still to do is cheap. One that has a result is repeated.
    if source.latents.exists() and not source.result.exists():
        shutil.copyfile(source.latents, target.latents)
        print("continuing from the denoised latents that the job has kept", file=sys.stderr)


def _show(progress: Progress) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{progress.text}", end="", file=sys.stderr, flush=True)
    elif progress.phase == "denoise" or progress.step in (0, progress.total):
        print(progress.text, file=sys.stderr, flush=True)


def _keep(result: Result, output: Path) -> None:
    video = (_video(result),) if result.info["video"] else ()
    for path in (*video, result.folder.latents, result.folder.result, result.folder.log(0)):
        draft = output / f".{path.name}.{os.getpid()}"
        shutil.copyfile(path, draft)
        os.replace(draft, output / path.name)


def _video(result: Result) -> Path:
    return result.folder.video(FORMATS[result.info["video"]["format"]].suffix)


def _print_summary(result: Result, output: Path) -> None:
    info = result.info
    steps = info["step_seconds"]
    made = _video(result) if info["video"] else result.folder.latents
    print(f"\n{made.stem}: {output / made.name}")
    for name, seconds in info["phases"].items():
        print(f"{name:8} {seconds:8.2f} s")
    if steps:
        print(f"step     {steady_seconds(steps):8.2f} s (the first {steps[0]:.2f} s)")
    for rank, (gpu, host) in enumerate(zip(info["peak_gpu_bytes"], info["peak_rss_bytes"], strict=True)):
        print(f"rank {rank}: peak GPU memory {gpu / 2**30:.2f} GiB, peak host memory {host / 2**30:.2f} GiB")
