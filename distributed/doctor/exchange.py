"""Whether two processes can exchange data, and how fast: a timed all-reduce that cannot hang its caller.

NCCL that cannot reach a peer mostly waits for ever, inside a driver; hence two processes of their own, which are killed
at a deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..group.environment import child_environment
from ..job.job import Parallel
from ..machine.memory_file import STORE_VARIABLE, MemoryFile
from ..machine.processes import AGENT_VARIABLE, die_with_parent, kill_all, members

DISTRIBUTED = Path(__file__).resolve().parent.parent
RANKS = 2
START_TIMEOUT = 60.0
"""Seconds until both have imported torch: long on a cold disk."""
TIMEOUT = 30.0
"""Seconds for joining and all exchanges together."""
CURES = (("NCCL_P2P_DISABLE", "1"), ("NCCL_SHM_DISABLE", "1"))
"""Variables that help where GPUs cannot reach each other, in the order in which they are tried."""
WARM_UP, REPEATS = 5, 25
"""Exchanges that do not count (links and buffers are set up by the first ones), and those that do."""
GPU_BYTES, CPU_BYTES = 64 << 20, 8 << 20
READY = "ready"
ROLE = "exchange"
POLL = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """What came of it."""

    gigabytes_per_second: float | None = None
    """Bytes reduced over seconds; None if nothing was exchanged."""
    problem: str = ""
    """Of the first try, without a cure."""
    cure: str = ""
    """NAME=value with which the exchange works although it did not without."""

    @property
    def out_of_memory(self) -> bool:
        """Whether the GPUs were too full to tell."""
        return "out of memory" in self.problem.lower()


def measure(gpu_ids: Sequence[str], environment: Mapping[str, str] = os.environ) -> Exchange:
    """Between two GPUs, or two CPU processes if none is named. Takes at most `START_TIMEOUT` + `TIMEOUT` per try.

    Args:
        gpu_ids: none or two, as in CUDA_VISIBLE_DEVICES.
        environment: the user's; the processes get what a job's get.
    """
    assert len(gpu_ids) in (0, RANKS)
    first = _try(gpu_ids, environment)
    if not first.problem or not gpu_ids or first.out_of_memory:
        return first
    for name, value in CURES:
        if environment.get(name) == value:
            continue
        second = _try(gpu_ids, {**environment, name: value})
        if not second.problem:
            return Exchange(
                gigabytes_per_second=second.gigabytes_per_second, problem=first.problem, cure=f"{name}={value}"
            )
    return first


def _try(gpu_ids: Sequence[str], environment: Mapping[str, str]) -> Exchange:
    folder, store = Path(tempfile.mkdtemp(prefix="wan-exchange-")), MemoryFile("wan-exchange")
    parallel = Parallel(gpu_count=RANKS, gpu_ids=tuple(gpu_ids))
    variables = {**child_environment(parallel, folder, environment), AGENT_VARIABLE: str(os.getpid())}
    variables[STORE_VARIABLE] = str(store.path)
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(RANKS):
            with open(_log(folder, rank), "wb") as log:
                command = [sys.executable, "-u", str(DISTRIBUTED), ROLE, str(folder), str(rank)]
                ranks.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                        cwd=folder, env=variables, start_new_session=True,
                    )
                )  # fmt: skip
        return _follow(folder, ranks)
    except OSError as error:
        return Exchange(problem=f"the processes could not be started: {error}")
    finally:
        for process in ranks:
            process.kill()
        kill_all(lambda: set(members(folder)), 2.0)
        for process in ranks:
            # One that waits inside the driver goes when the driver lets it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
        shutil.rmtree(folder, ignore_errors=True)
        store.close()


def _follow(folder: Path, ranks: Sequence[subprocess.Popen[bytes]]) -> Exchange:
    deadline, joining = time.monotonic() + START_TIMEOUT, False
    while any(process.poll() is None for process in ranks):
        failed = next((rank for rank, process in enumerate(ranks) if process.poll() not in (None, 0)), None)
        if failed is not None:
            return Exchange(problem=_failure(folder, failed))
        if not joining and all(READY in _words(folder, rank).splitlines() for rank in range(len(ranks))):
            joining, deadline = True, time.monotonic() + TIMEOUT
        if time.monotonic() >= deadline:
            if joining:
                return Exchange(problem=f"hangs: no exchange within {TIMEOUT:g} s")
            return Exchange(problem=f"the processes did not start within {START_TIMEOUT:g} s")
        time.sleep(POLL)
    failed = next((rank for rank, process in enumerate(ranks) if process.returncode), None)
    if failed is not None:
        return Exchange(problem=_failure(folder, failed))
    lines = [line for line in _words(folder, 0).splitlines() if line.startswith("{")]
    if not lines:
        return Exchange(problem="the processes ended without a result")
    return Exchange(gigabytes_per_second=float(json.loads(lines[-1])["gigabytes_per_second"]))


def _failure(folder: Path, rank: int) -> str:
    lines = [line for line in _words(folder, rank).splitlines() if line.strip() and line != READY]
    return f"process {rank} failed: {lines[-1][-300:] if lines else 'it left no word'}"


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _words(folder: Path, rank: int) -> str:
    return _log(folder, rank).read_bytes()[-(64 << 10) :].decode(errors="replace")


def median_seconds(exchange: Callable[[], None]) -> float:
    """Of one exchange: what else the machine does now and then must not be taken for the link."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        exchange()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main(arguments: Sequence[str]) -> int:
    """One of the two processes. Arguments: the folder that it works in, rank."""
    rank = int(arguments[1])
    die_with_parent(int(os.environ[AGENT_VARIABLE]))
    import torch
    import torch.distributed as dist

    from ..parallel.mesh import init_mesh

    cuda = bool(os.environ["CUDA_VISIBLE_DEVICES"])
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    print(READY, flush=True)
    if cuda:
        torch.cuda.set_device(device)
    store = Path(os.environ[STORE_VARIABLE])
    mesh = init_mesh(rank=rank, world=RANKS, device=device, store_file=store, master_port=0, timeout=TIMEOUT)
    assert mesh is not None
    size = GPU_BYTES if cuda else CPU_BYTES
    data = torch.ones(size // 4, device=device)

    def reduce() -> None:
        dist.all_reduce(data, group=mesh.group)
        if cuda:
            torch.cuda.synchronize(device)

    for _ in range(WARM_UP):
        data.fill_(1)
        reduce()
    if not bool((data == RANKS).all()):
        raise RuntimeError(f"the sum over {RANKS} processes is wrong: {data[:4].tolist()}, not {RANKS}")
    seconds = median_seconds(reduce)
    if rank == 0:
        print(json.dumps({"gigabytes_per_second": size / seconds / 1e9}), flush=True)
    # Not the ordinary way out, which a broken group can hold up.
    os._exit(0)
