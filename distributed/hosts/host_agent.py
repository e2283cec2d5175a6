"""torchrun's agent on one machine of several.

DeepSpeed's launcher has started it over ssh. It ends everything below it when the ssh connection closes, and also when
the launching machine falls silent: over a link that is cut, nothing ever closes.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..group.agent import end_all, run_ranks, wait_for_end_of_stdin
from ..group.environment import child_environment
from ..group.lost_ranks import LostRanks
from ..group.signs_of_life import read_ranks
from ..job.errors import JobError
from ..job.job import Job, Parallel
from ..job.json_files import read_json, write_json
from ..machine.gpu_locks import GpuLocks, wait_for_gpus
from ..machine.import_paths import VARIABLE, take_on
from ..machine.loopback import LOOPBACK
from ..machine.processes import GROUP_VARIABLE, descendants
from .host_check import IMPORT_PATHS, check_host
from .hostfile import HostsDir
from .network import ADDRESS_VARIABLE, address_toward, interface_of, open_store

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

BACKEND = "hosts"
LOOK_SECONDS = 0.25
READY_SECONDS = 0.05
MAX_SILENCE = 30.0
"""Seconds without a heartbeat after which this machine's part of the job is ended."""


def main(folder: HostsDir) -> int:
    """Runs this machine's ranks. Returns the exit code."""
    # From DeepSpeed's launcher, which starts one process on each machine.
    node = int(os.environ["RANK"])
    threading.Thread(target=_end_with_stdin, args=(folder, node), daemon=True).start()
    try:
        job = folder.read_job()
        write_json(folder.started(node), {"hostname": socket.gethostname(), "pid": os.getpid()})
        Tether(folder, node, job.parallel).start()
        expected = read_json(folder.expected)
        paths = str(expected.get(IMPORT_PATHS, "{}"))
        take_on(paths)
        check_host(job, expected)
        locks = take_gpus(folder, job, node)
        _enter_environment(folder, job, node, paths)
        code = _run(folder, job, node)
        locks.release()
    except Exception as error:
        print(error, file=sys.stderr, flush=True)
        if not isinstance(error, JobError):
            traceback.print_exc()
        if folder.path.is_dir():
            write_json(folder.failed(node), {"message": f"{type(error).__name__}: {error}", "failures": []})
        code = 1
    if folder.path.is_dir():
        write_json(folder.ended(node), {})
    return code


def take_gpus(folder: HostsDir, job: Job, node: int) -> GpuLocks:
    """Takes this machine's GPUs. Returns when every machine has its own: only then do the time-outs begin.

    One machine after the other, by their names: two jobs that want the same machines must not each hold one of them.
    """
    hosts = job.parallel.hosts
    _wait_until_ready(folder, [other for other, name in enumerate(hosts) if name < hosts[node]])
    locks = wait_for_gpus(
        job.parallel.gpu_ids,
        # A cancel ends this process.
        cancelled=lambda: False,
        on_wait=lambda reason: write_json(folder.waits(node), {"reason": reason}),
    )
    write_json(folder.ready(node), {})
    _wait_until_ready(folder, range(len(hosts)))
    return locks


def _wait_until_ready(folder: HostsDir, nodes: Iterable[int]) -> None:
    for node in nodes:
        while not folder.ready(node).exists():
            time.sleep(READY_SECONDS)
            # NFS remembers for half a minute that a file was not there, unless its folder is opened.
            os.listdir(folder.path)


def _run(folder: HostsDir, job: Job, node: int) -> int:
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    def meet(parameters: RendezvousParameters) -> RendezvousHandler:
        return _rendezvous(folder, job, node, parameters)

    rendezvous_handler_registry.register(BACKEND, meet)
    return run_ranks(
        folder.path,
        [
            f"--nnodes={len(job.parallel.hosts)}",
            f"--nproc-per-node={job.parallel.gpus_per_host}",
            f"--rdzv-backend={BACKEND}",
            f"--rdzv-endpoint={folder.agents_store}",
            # torchrun ranks machines by the order of these names: the hostfile's.
            f"--local-addr=node-{node:03}",
            f"--log-dir={folder.path / f'torchrun-{node}'}",
        ],
        folder.failed(node),
    )


def _rendezvous(folder: HostsDir, job: Job, node: int, parameters: RendezvousParameters) -> RendezvousHandler:
    """torchrun's own, over a store that listens on one interface only."""
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    class Backend(C10dRendezvousBackend):
        @property
        def name(self) -> str:
            return BACKEND

    store = open_store(
        folder.agents_store,
        listens=node == 0,
        world=len(job.parallel.hosts),
        timeout=job.parallel.start_timeout,
    )
    return create_handler(store, Backend(store, parameters.run_id), parameters)


def _enter_environment(folder: HostsDir, job: Job, node: int, import_paths: str) -> None:
    """The allowlist for what starts below, and the interface that it talks over."""
    address = address_toward(job.parallel.hosts, node)
    environment = child_environment(job.parallel, folder.path) | {VARIABLE: import_paths}
    if address != LOOPBACK:
        interface = interface_of(address)
        environment |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    environment[GROUP_VARIABLE] = str(folder.mark(node))
    os.environ.clear()
    os.environ.update(environment, **{ADDRESS_VARIABLE: address})


def _end_with_stdin(folder: HostsDir, node: int) -> None:
    wait_for_end_of_stdin()
    _end(folder, node)


def _end(folder: HostsDir, node: int) -> None:
    def confirm() -> None:
        if folder.path.is_dir():
            write_json(folder.ended(node), {})

    end_all(folder.mark(node), confirm)


class Tether:
    """Ends this machine's part of the job when the heartbeat stops, its folder is gone, or a rank here is lost."""

    def __init__(self, folder: HostsDir, node: int, parallel: Parallel) -> None:
        self._folder, self._node = folder, node
        self._silence = min(MAX_SILENCE, parallel.stall_timeout)
        self._ranks = range(node * parallel.gpus_per_host, (node + 1) * parallel.gpus_per_host)
        self._heard = time.monotonic()
        self._gone = False

    def start(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._look_at_ranks, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def _listen(self) -> None:
        last, dumped = b"", False
        while not self._gone:
            # On a network file system whose server is away this waits for ever: hence a thread of its own.
            try:
                beat = self._folder.heartbeat.read_bytes()
            except FileNotFoundError:
                self._gone = True
                return
            except OSError:
                beat = last
            if beat != last:
                last, self._heard = beat, time.monotonic()
            if not dumped and self._folder.stacks.exists():
                dumped = True
                for process in descendants(os.getpid()):
                    # Before a rank has its handler, the signal would end it.
                    if process.catches(signal.SIGUSR1) and not process.stopped():
                        process.kill(signal.SIGUSR1)
            time.sleep(LOOK_SECONDS)

    def _look_at_ranks(self) -> None:
        """Ends this machine's part when a rank is lost and torchrun does not say so: it waits for another machine."""
        while (job := self._folder.read_request(1)) is None:
            time.sleep(LOOK_SECONDS)
        lost = LostRanks(job)
        while not lost.look(read_ranks(job, self._ranks, here=True)):
            time.sleep(LOOK_SECONDS)
        if not self._folder.failed(self._node).exists():
            ended = [{"rank": one.rank, "exitcode": one.exitcode, "signal": one.signal} for one in lost.failures]
            write_json(self._folder.failed(self._node), {"failures": ended})
        _end(self._folder, self._node)

    def _watch(self) -> None:
        while not self._gone and time.monotonic() - self._heard < self._silence:
            time.sleep(LOOK_SECONDS)
        _end(self._folder, self._node)
