"""Runs cases on the machine's GPUs, as many at a time as have GPUs of their own."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Case = TypeVar("Case")


def run_side_by_side(
    cases: Iterable[Case], gpus_of: Callable[[Case], int], run: Callable[[Case, list[str]], None]
) -> None:
    """Calls run(case, ids) for every case, those of equally many GPUs side by side.

    Args:
        gpus_of: how many GPUs a case takes.
        run: ids are nvidia-smi's indices, none on a machine without a GPU, where one case runs at a time.
    """
    from wan_pack.distributed.machine.gpus import list_gpus

    ids = [gpu.index for gpu in list_gpus()]
    by_count: dict[int, list[Case]] = {}
    for case in cases:
        by_count.setdefault(gpus_of(case), []).append(case)
    for count, same in sorted(by_count.items()):
        places: queue.Queue[list[str]] = queue.Queue()
        for first in range(0, len(ids) - count + 1, count):
            places.put(ids[first : first + count])
        if not ids:
            places.put([])
        if places.empty():
            print(f"left out, {count} GPUs are needed: {', '.join(map(str, same))}", flush=True)
            continue

        def run_one(case: Case, places: queue.Queue[list[str]] = places) -> None:
            place = places.get()
            try:
                run(case, place)
            finally:
                places.put(place)

        with ThreadPoolExecutor(places.qsize()) as pool:
            # What one raises is raised here, when all have ended.
            for done in [pool.submit(run_one, case) for case in same]:
                done.result()
