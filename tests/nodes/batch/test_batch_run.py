"""How the jobs of a batch go through its groups. The launcher is a stand-in, which has tests of its own."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import stub_job
from patience import AT_ONCE, COMES_UP, until
from wan_pack.distributed.job.errors import JobCancelled
from wan_pack.distributed.job.job import Job, Parallel
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.job.progress import Progress
from wan_pack.distributed.launch.launcher import JobFailed, Result
from wan_pack.nodes.batch import run
from wan_pack.nodes.batch.run import BatchProgress, BatchRun
from wan_pack.nodes.host import host

Act = Callable[[Job, dict[str, Any]], Any]


class FakePool:
    """Hands out groups that are no processes."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.back: list[tuple[Any, float]] = []
        self.gone: list[Any] = []

    def take(self, job: Job, parent: Path, **_: Any) -> Any:
        self.taken.append(SimpleNamespace(gpu_ids=job.parallel.gpu_ids, usable=True))
        return self.taken[-1]

    def give_back(self, group: Any, job: Job) -> None:
        self.back.append((group, job.parallel.keep_warm_seconds))

    def forget(self, group: Any) -> None:
        self.gone.append(group)


class Batch:
    """One batch on the stand-in; `act` says what a job does once it has its group."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._folder = folder
        self.pool = FakePool()
        self.act: Act = lambda job, callbacks: None
        self.ran: list[tuple[int, tuple[str, ...], bool]] = []
        self.results: dict[int, Result] = {}
        self.failures: dict[int, Exception] = {}
        self.shown: list[BatchProgress] = []
        self.cancelled = threading.Event()
        monkeypatch.setattr(run, "run_job", self._run_job)
        for name in ("jobs_folder", "failed_folder"):
            monkeypatch.setattr(host, name, lambda: folder)

    def _run_job(self, job: Job, write: Any, **callbacks: Any) -> Result:
        pool = callbacks["pool"]
        group = pool.take(job, self._folder, cancelled=callbacks["cancelled"], on_wait=str)
        try:
            assert group.gpu_ids == job.parallel.gpu_ids
            self.ran.append((job.sampling.seed, job.parallel.gpu_ids, job.parallel.stays))
            self.act(job, callbacks)
        except BaseException:
            pool.forget(group)
            raise
        pool.give_back(group, job)
        return Result(JobDir.create(self._folder), {"seed": job.sampling.seed}, "", 1.0)

    def run(self, videos: int, groups: list[tuple[str, ...]], keep_warm: float = 0.0) -> None:
        stay = {"keep_warm_seconds": keep_warm, "more_follow": videos > len(groups)}
        layouts = [Parallel(gpu_count=len(ids), gpu_ids=ids, **stay) for ids in groups]

        def keep(index: int, group: int, result: Result) -> None:
            assert threading.current_thread() is threading.main_thread()
            self.results[index] = result
            result.remove()

        BatchRun(
            [(stub_job(seed=seed), {}) for seed in range(videos)],
            layouts,
            self.pool,  # type: ignore[arg-type]
            on_result=keep,
            on_failure=self.failures.__setitem__,
            on_progress=self.shown.append,
            cancelled=self.cancelled.is_set,
        ).run()


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Batch]:
    before = threading.active_count()
    yield Batch(monkeypatch, tmp_path)
    assert until(lambda: threading.active_count() == before)
    assert list(tmp_path.iterdir()) == []


def test_each_group_starts_once_and_the_free_one_goes_on(batch: Batch) -> None:
    fast_is_done = threading.Event()

    def act(job: Job, callbacks: dict[str, Any]) -> None:
        """The slow video is done when the other group has made all others."""
        if job.sampling.seed == 0:
            assert fast_is_done.wait(COMES_UP)
        elif job.sampling.seed == 4:
            fast_is_done.set()

    batch.act = act
    batch.run(5, [("0", "1"), ("2", "3")])
    assert {index: result.info["seed"] for index, result in batch.results.items()} == {i: i for i in range(5)}
    by_group: dict[tuple[str, ...], list[int]] = {}
    for seed, gpus, _ in batch.ran:
        by_group.setdefault(gpus, []).append(seed)
    slow = next(gpus for gpus, seeds in by_group.items() if 0 in seeds)
    assert by_group.pop(slow) == [0]
    assert list(by_group.values()) == [[1, 2, 3, 4]]
    assert len(batch.pool.taken) == 2, "a group is taken once, however many videos it makes"
    assert sorted(seconds for _, seconds in batch.pool.back) == [0, 0], "and ends with the batch"


@pytest.mark.parametrize(("videos", "keep_warm", "stays"), [(3, 0.0, True), (3, 60.0, True), (2, 0.0, False)])
def test_ranks_are_told_to_stay_only_while_more_videos_may_come(
    batch: Batch, videos: int, keep_warm: float, stays: bool
) -> None:
    batch.run(videos, [("0",), ("1",)], keep_warm)
    assert {told for _, _, told in batch.ran} == {stays}
    assert {seconds for _, seconds in batch.pool.back} == {keep_warm}


def test_a_failed_video_does_not_end_the_others(batch: Batch) -> None:
    def act(job: Job, callbacks: dict[str, Any]) -> None:
        if job.sampling.seed == 1:
            raise JobFailed("rank 0: ValueError: no", rank=0, out_of_memory=False, folder=None, log="")
        if job.sampling.seed == 2:
            raise OSError("disk full")
        if job.sampling.seed == 4:
            raise ValueError("a GPU is gone")

    batch.act = act
    batch.run(5, [("0",)])
    assert sorted(batch.results) == [0, 3]
    said = {1: "rank 0: ValueError: no", 2: "disk full", 4: "a GPU is gone"}
    assert {index: str(error) for index, error in batch.failures.items()} == said
    assert len(batch.pool.taken) == 3, "a group ends with the video that failed on it"
    assert len(batch.pool.gone) == 3


def test_a_group_that_died_between_two_videos_is_replaced(batch: Batch) -> None:
    def act(job: Job, callbacks: dict[str, Any]) -> None:
        group = batch.pool.taken[-1]
        group.usable, group.end = False, lambda: []

    batch.act = act
    batch.run(2, [("0",)])
    assert (len(batch.pool.taken), len(batch.pool.gone), len(batch.results)) == (2, 1, 2)


def until_cancelled(job: Job, callbacks: dict[str, Any]) -> None:
    deadline = time.monotonic() + COMES_UP
    while not callbacks["cancelled"]():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    raise JobCancelled("cancelled")


def test_cancel_ends_all_groups_within_a_second(batch: Batch) -> None:
    started = threading.Barrier(3)

    def act(job: Job, callbacks: dict[str, Any]) -> None:
        started.wait(COMES_UP)
        until_cancelled(job, callbacks)

    batch.act = act
    pressed: list[float] = []

    def press() -> None:
        started.wait(COMES_UP)
        pressed.append(time.monotonic())
        batch.cancelled.set()

    threading.Thread(target=press).start()
    with pytest.raises(JobCancelled):
        batch.run(6, [("0",), ("1",)])
    assert time.monotonic() - pressed[0] < AT_ONCE
    assert len(batch.ran) == 2, "no further video is begun"
    assert len(batch.pool.gone) == 2


def test_what_the_node_raises_ends_all_groups(batch: Batch) -> None:
    """ComfyUI's progress bar raises on cancel."""

    def act(job: Job, callbacks: dict[str, Any]) -> None:
        callbacks["on_progress"](Progress(phase="denoise", step=1, total=2))
        until_cancelled(job, callbacks)

    def interrupt(progress: BatchProgress) -> None:
        raise KeyboardInterrupt

    batch.act = act
    batch.shown = SimpleNamespace(append=interrupt)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        batch.run(6, [("0",), ("1",)])
    assert len(batch.pool.gone) == 2


def test_our_own_mistake_is_raised_and_ends_all_groups(batch: Batch) -> None:
    def act(job: Job, callbacks: dict[str, Any]) -> None:
        if job.sampling.seed == 0:
            raise AssertionError("a mistake")
        until_cancelled(job, callbacks)

    batch.act = act
    with pytest.raises(AssertionError, match="a mistake"):
        batch.run(6, [("0",), ("1",)])


def test_a_result_that_comes_after_the_cancel_is_removed(batch: Batch) -> None:
    """The fixture looks for folders that are left."""

    def act(job: Job, callbacks: dict[str, Any]) -> None:
        batch.cancelled.set()
        deadline = time.monotonic() + COMES_UP
        while not callbacks["cancelled"]() and time.monotonic() < deadline:
            time.sleep(0.01)

    batch.act = act
    with pytest.raises(JobCancelled):
        batch.run(2, [("0",)])
    assert batch.results == {}


def test_progress_is_that_of_all_videos(batch: Batch) -> None:
    both = threading.Barrier(2)

    def act(job: Job, callbacks: dict[str, Any]) -> None:
        report = callbacks["on_progress"]
        if job.sampling.seed == 0:
            report(Progress(phase="denoise", step=4, total=20, seconds_per_step=2.0))
        elif job.sampling.seed == 1:
            report(Progress(phase="load", step=1, total=2, message="high_noise expert"))
        if job.sampling.seed < 2:
            both.wait(COMES_UP)

    batch.act = act
    batch.run(4, [("0", "1"), ("2", "3")])
    texts = [progress.text for progress in batch.shown]
    assert "0/4 done; GPU 0,1: sampling 4/20; GPU 2,3: loading 1/2 - high_noise expert" in texts or (
        "0/4 done; GPU 0,1: loading 1/2 - high_noise expert; GPU 2,3: sampling 4/20" in texts
    )
    assert batch.shown[-1] == BatchProgress(1.0, "4/4 done")
    one = Progress(phase="denoise", step=4, total=20).fraction
    two = Progress(phase="load", step=1, total=2).fraction
    assert any(abs(progress.fraction - (one + two) / 4) < 1e-9 for progress in batch.shown)


def test_pictures_of_all_groups_come_together_when_one_is_new(batch: Batch) -> None:
    second, third, slow = threading.Event(), threading.Event(), list[str]()

    def act(job: Job, callbacks: dict[str, Any]) -> None:
        """The first group's only video is the slow one."""
        seed, report = job.sampling.seed, callbacks["on_progress"]
        if seed == 0:
            slow.extend(job.parallel.gpu_ids)
            report(Progress(phase="denoise", step=1, preview=b"first"))
            report(Progress(phase="denoise", step=2))
            second.set()
            assert third.wait(COMES_UP)
            return
        assert second.wait(COMES_UP)
        report(Progress(phase="denoise", step=1, preview=b"%d" % seed))
        if seed == 2:
            third.set()

    batch.act = act
    batch.run(3, [("0",), ("1",)])
    shown = [progress.previews for progress in batch.shown if progress.previews]
    # Either group may take the slow video.
    assert [sorted(previews) for previews in shown] == [[b"first"], [b"1", b"first"], [b"2", b"first"]]
    assert [previews.index(b"first") for previews in shown[1:]] == [int(slow[0])] * 2, "each group has its place"


def test_groups_without_gpus_have_numbers(batch: Batch) -> None:
    batch.act = lambda job, callbacks: callbacks["on_progress"](Progress(phase="start"))
    jobs = [(dataclasses.replace(stub_job(), parallel=Parallel(gpu_count=1)), {})]
    BatchRun(
        jobs,
        [Parallel(gpu_count=1)],
        batch.pool,  # type: ignore[arg-type]
        on_result=lambda index, group, result: result.remove(),
        on_failure=batch.failures.__setitem__,
        on_progress=batch.shown.append,
        cancelled=lambda: False,
    ).run()
    assert batch.shown[0].text == "0/1 done; group 1: starting"
