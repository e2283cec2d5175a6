"""The groups of a batch on one machine's GPUs. Processes without torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import HELPERS, run_stub, stub_job
from patience import COMES_UP
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.launch.launcher import Result
from wan_pack.distributed.launch.pool import Pool
from wan_pack.distributed.machine.gpu_locks import wait_for_gpus
from wan_pack.distributed.machine.processes import Process
from wan_pack.nodes.batch.run import BatchRun
from wan_pack.nodes.host import host

pytestmark = pytest.mark.processes

Groups = list[tuple[str, ...]]
Run = Callable[..., list[Process]]


@pytest.fixture
def run(pool: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a batch. Returns the first rank of each video, in order."""
    monkeypatch.setattr(worker_group, "AGENT", HELPERS / "staying_agent.py")
    monkeypatch.setattr(host, "jobs_folder", lambda: tmp_path / "jobs")
    monkeypatch.setattr(host, "failed_folder", lambda: tmp_path / "failed")

    def start(
        videos: int, groups: Groups, *, pool: Pool = pool, told: list[str] | None = None, keep_warm: float = 0.0
    ) -> list[Process]:
        ranks: dict[int, Process] = {}

        def look(index: int, group: int, result: Result) -> None:
            sign = result.folder.read_json(result.folder.alive(0))
            ranks[index] = Process(sign["pid"], sign["started"])
            result.remove()

        failures: dict[int, Exception] = {}
        texts: list[str] = [] if told is None else told
        BatchRun(
            [(stub_job(seed=seed), {}) for seed in range(videos)],
            [
                Parallel(gpu_count=len(ids), gpu_ids=ids, keep_warm_seconds=keep_warm, more_follow=videos > len(groups))
                for ids in groups
            ],
            pool,
            on_result=look,
            on_failure=failures.__setitem__,
            on_progress=lambda progress: texts.append(progress.text),
            cancelled=lambda: False,
        ).run()
        assert failures == {}
        return [ranks[index] for index in range(videos)]

    return start


def test_each_group_starts_once_for_all_its_videos(run: Run, pool: Pool, tmp_path: Path) -> None:
    """On GPUs that a group of another layout holds, idle: that one is ended."""
    before = stub_job(gpu_count=4, gpu_ids=("0", "1", "2", "3"), keep_warm_seconds=60.0)
    run_stub(tmp_path, before, pool=pool).remove()
    ranks = run(5, [("0", "1"), ("2", "3")])
    assert len(set(ranks)) == 2
    assert not any(rank.alive() for rank in ranks)
    assert pool.release() == 0, "they ended with the batch"
    wait_for_gpus(["0", "1", "2", "3"], cancelled=lambda: True, on_wait=lambda text: None).release()


def test_groups_stay_warm_for_the_next_batch(run: Run, pool: Pool) -> None:
    first = run(2, [("0",), ("1",)], keep_warm=600.0)
    second = run(3, [("0",), ("1",)], keep_warm=600.0)
    assert set(second) == set(first)
    assert pool.release() == 2


def test_a_gpu_in_use_elsewhere_holds_up_its_own_group_only(run: Run) -> None:
    other = wait_for_gpus(["2"], cancelled=lambda: False, on_wait=lambda text: None)
    told: list[str] = []

    class Told(list[str]):
        """Lets go of the GPU once the other group has made all other videos."""

        def append(self, text: str) -> None:
            told.append(text)
            if text.startswith("3/4 done"):
                other.release()

    run(4, [("0", "1"), ("2", "3")], told=Told())
    assert any("GPU 2,3: waiting for GPU 2, in use by process" in text for text in told)
    assert told[-1] == "4/4 done"


def test_two_batches_that_want_each_others_gpus_both_end(run: Run) -> None:
    """As two ComfyUIs have them: no group holds some of its GPUs while it waits for others."""
    done: list[int] = []

    def batch(groups: Groups) -> None:
        done.append(len(run(3, groups, pool=Pool())))

    threads = [
        threading.Thread(target=batch, args=([ids, others],), daemon=True)
        for ids, others in ((("0", "1"), ("2", "3")), (("3", "0"), ("1", "2")))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(COMES_UP)
    assert done == [3, 3]
