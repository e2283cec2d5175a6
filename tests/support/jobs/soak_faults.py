"""What happens to every tenth job of the soak: one entry of `FAULTS` each."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from patience import until
from serving import Comfy, at_first_step
from soak import LONG, Soak, at_phase, message, small_disk, unfinished
from wan_pack.demo.client import Run
from wan_pack.demo.comfyui import Server
from wan_pack.demo.example import ROOT, node_of
from wan_pack.distributed.machine.processes import Process

DISK_MIB = 160
"""Enough for a small job to start."""
LONG_DECODING = {"sample_steps": 1, "num_frames": 201}
KILLER = Path(__file__).with_name("killed_at_naming_node.py")


@dataclass(frozen=True)
class Fault:
    """`run` has it happen to a job of this seed, and checks what becomes of that."""

    run: Callable[[Soak, int], None]
    quick: bool = False
    """In `make test` too."""
    mounts: bool = False
    """Needs the right to mount."""


def kill_a_rank(soak: Soak, seed: int) -> None:
    error = soak.broken(seed, "denoise", lambda: soak.rank(0).kill())
    assert error.startswith("rank 0 was killed by SIGKILL"), error


def kill_the_agent(soak: Soak, seed: int) -> None:
    error = soak.broken(seed, "denoise", lambda: os.kill(soak.agent(), signal.SIGKILL))
    assert error.startswith("the agent was killed by SIGKILL"), error


def cancel(soak: Soak, seed: int) -> None:
    def press(run: Run) -> None:
        soak.comfy.server.request("/interrupt", {"prompt_id": run.prompt_id})

    run = soak.comfy.run(soak.prompt(seed, **LONG), at_first_step(press))
    assert run.ending[0] == "execution_interrupted", run.ending


def kill_an_idle_process(soak: Soak, seed: int) -> None:
    """Nobody is told: the next job starts other processes."""
    for process in filter(None, map(Process.of, soak.processes()[:1])):
        process.kill()
        # On a busy machine a killed process may live on for a moment, in which its ranks would take the job.
        assert until(lambda process=process: not process.alive())
    soak.good(seed)


def kill_ffmpeg(soak: Soak, seed: int) -> None:
    def kill() -> None:
        (ffmpeg,) = [pid for pid in soak.processes() if b"rawvideo" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(ffmpeg, signal.SIGKILL)

    assert "ffmpeg" in soak.broken(seed, "decode", kill, **LONG_DECODING).splitlines()[0]


def damage_a_file(soak: Soak, seed: int) -> None:
    damaged = soak.comfy.server.base / "models" / "vae" / "damaged.safetensors"
    damaged.write_bytes(vae(soak).read_bytes()[:5000])
    prompt = soak.prompt(seed)
    node_of(prompt, "LoadWanVideoModel")["inputs"]["vae"] = damaged.name
    try:
        assert damaged.name in message(soak.comfy.run(prompt))
    finally:
        damaged.unlink()


def following(seed: int) -> int:
    """Not the seed of the job before, which ComfyUI would not run again."""
    return seed % 3 + 1


def vae(soak: Soak) -> Path:
    return soak.comfy.server.base / "models" / "vae" / soak.comfy.model.vae


@contextlib.contextmanager
def put_back(file: Path) -> Iterator[bytes]:
    """What it holds, and holds again afterwards."""
    data = file.read_bytes()
    try:
        yield data
    finally:
        file.write_bytes(data)


def replace_a_file(soak: Soak, seed: int) -> None:
    """Between two warm jobs, by a file with the same weights: they are read again, and the video is the same."""
    soak.good(following(seed))
    file = vae(soak)
    new = file.with_suffix(".new")
    shutil.copyfile(file, new)
    os.replace(new, file)
    soak.good(seed)


def cut_a_file_between_jobs(soak: Soak, seed: int) -> None:
    with put_back(vae(soak)) as data:
        os.truncate(vae(soak), len(data) // 2)
        assert vae(soak).name in message(soak.comfy.run(soak.prompt(seed)))


def cut_a_file_before_it_is_read(soak: Soak, seed: int) -> None:
    """After the check of its header: a process meets it."""
    soak.released()
    with put_back(vae(soak)) as data:
        error = soak.broken(seed, "denoise", lambda: os.truncate(vae(soak), len(data) // 2), sample_steps=20)
    assert vae(soak).name in error.splitlines()[0], error


def replace_a_file_before_it_is_read(soak: Soak, seed: int) -> None:
    soak.released()
    with put_back(vae(soak)) as data:
        other = data + b"\0" * 8
        error = soak.broken(seed, "denoise", lambda: vae(soak).write_bytes(other), sample_steps=20)
    assert vae(soak).name in error.splitlines()[0], error


def remove_the_job_folder(soak: Soak, seed: int) -> None:
    """Of processes that start with it: of warm ones it looks as if they had not taken it, and others make it again."""
    soak.released()

    def remove() -> None:
        (job,) = soak.jobs.glob("wan-job-*")
        # In one step: a folder that is emptied file by file may get new ones meanwhile, and the job is none the worse.
        shutil.rmtree(job.rename(job.with_name("removed")))

    assert soak.broken(seed, "denoise", remove)


def too_small_a_disk(soak: Soak, seed: int) -> None:
    """The folder of the jobs lies on a file system of 1 MiB meanwhile."""
    soak.released()
    with small_disk(soak.jobs, 1):
        assert "MiB free; the job needs" in message(soak.comfy.run(soak.prompt(seed)))


def full_disk(phase: str, **inference: int) -> Callable[[Soak, int], None]:
    """It becomes full in this phase."""

    def run(soak: Soak, seed: int) -> None:
        soak.released()
        with small_disk(soak.jobs, DISK_MIB):
            error = soak.broken(seed, phase, lambda: fill(soak.jobs), **inference)
            soak.comfy.wait_until_idle()
        assert re.search("no space left", error, re.IGNORECASE), error

    return run


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    with contextlib.suppress(OSError), (folder / "rest").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1))


@contextlib.contextmanager
def second_server(soak: Soak, name: str, *arguments: str, node: Path | None = None) -> Iterator[Soak]:
    """Another ComfyUI with the same models; killed at the end, like a crash."""
    base = soak.comfy.server.base.parent / f"{soak.comfy.server.base.name}-{name}"
    (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
    if not (base / "models").exists():
        (base / "models").symlink_to(soak.comfy.server.base / "models")
    if node is not None:
        shutil.copy(node, base / "custom_nodes")
    server = Server(base, pack=ROOT, arguments=arguments)
    try:
        server.start()
        yield Soak(Comfy(server, soak.comfy.model))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server.pid, signal.SIGKILL)
        server.stop()


def two_servers(soak: Soak, seed: int) -> None:
    """The second one wipes the temp folder, which both have, when it starts. Both make their video at once."""
    soak.good(seed)
    with second_server(soak, "shared", "--temp-directory", str(soak.comfy.server.base)) as other:
        problems: list[BaseException] = []

        def run_other() -> None:
            try:
                other.good(seed)
            except BaseException as error:
                problems.append(error)

        thread = threading.Thread(target=run_other)
        thread.start()
        try:
            soak.good(following(seed))
        finally:
            thread.join()
        assert not problems, problems
        assert other.latents[seed] == soak.latents[seed]
        shutil.rmtree(other.output)
    soak.good(seed)


def killed_at_naming(when: str) -> Callable[[Soak, int], None]:
    """A second ComfyUI, just before or just after the video has its name."""

    def run(soak: Soak, seed: int) -> None:
        os.environ["SOAK_KILLED"] = when
        try:
            with second_server(soak, "killed", node=KILLER) as other:
                with contextlib.suppress(ConnectionError):
                    run = other.comfy.run(other.prompt(seed))
                    raise AssertionError(f"it was not killed: {run.ending}")
                other.comfy.wait_until_ended()
                assert unfinished(other.output) == []
                assert bool(list(other.output.rglob("*.mp4"))) == (when == "after")
        finally:
            del os.environ["SOAK_KILLED"]
        shutil.rmtree(other.output, ignore_errors=True)

    return run


def cancel_while_loading(soak: Soak, seed: int) -> None:
    """A cancel before anything is sampled."""
    with at_phase(soak.jobs, "load", lambda: soak.comfy.server.request("/interrupt", {})):
        run = soak.comfy.run(soak.prompt(seed, **LONG))
    assert run.ending[0] == "execution_interrupted", run.ending


FAULTS = {
    "rank killed": Fault(kill_a_rank, quick=True),
    "agent killed": Fault(kill_the_agent),
    "cancelled": Fault(cancel, quick=True),
    "cancelled while loading": Fault(cancel_while_loading),
    "idle process killed": Fault(kill_an_idle_process, quick=True),
    "ffmpeg killed": Fault(kill_ffmpeg),
    "damaged file": Fault(damage_a_file, quick=True),
    "file replaced between jobs": Fault(replace_a_file),
    "file cut between jobs": Fault(cut_a_file_between_jobs),
    "file cut before it is read": Fault(cut_a_file_before_it_is_read),
    "file replaced before it is read": Fault(replace_a_file_before_it_is_read),
    "job folder removed": Fault(remove_the_job_folder),
    "too small a disk": Fault(too_small_a_disk, quick=True, mounts=True),
    "full disk, starting": Fault(full_disk("start"), mounts=True),
    "full disk, loading": Fault(full_disk("load"), mounts=True),
    "full disk, sampling": Fault(full_disk("denoise"), mounts=True),
    "full disk, decoding": Fault(full_disk("decode", **LONG_DECODING), mounts=True),
    "two servers, one temp folder": Fault(two_servers),
    "server killed before the video's name": Fault(killed_at_naming("before")),
    "server killed after it": Fault(killed_at_naming("after")),
}
