"""Evaluations for a sampler elsewhere: what a group computes is what the model in this process gives."""

from __future__ import annotations

import functools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluating import SHAPE, Known, Warm, difference, inputs, write_lora
from fresh_jobs import run_fresh
from patience import COMES_UP
from wan_pack.distributed.group.group_folder import GroupDir
from wan_pack.distributed.job.errors import JobCancelled
from wan_pack.distributed.job.job import ForwardsJob
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch import standalone, stopping
from wan_pack.distributed.launch.result import Result
from wan_pack.distributed.launch.served_job import ServedJob
from wan_pack.distributed.machine.processes import Process
from wan_pack.distributed.rank import experts
from wan_pack.distributed.rank.session import Session
from wan_pack.distributed.rank.signs import RankFiles
from wan_pack.distributed.rank.worker import main as run_rank

VARIANTS = ("I2V", "TI2V-5B", "FLF2V", "VACE", "Fun", "Camera", "Animate")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Known]:
    folder = tmp_path_factory.mktemp("models")
    return {name: Known.make(folder / name, name) for name in ("T2V", *VARIANTS)}


@pytest.fixture(scope="module")
def asked(models: dict[str, Known]) -> Callable[[str], list[tuple[Any, Any]]]:
    """Variant -> inputs of evaluations and what the model in this process gives, for all layouts."""

    @functools.cache
    def of(variant: str) -> list[tuple[Any, Any]]:
        model, found = models[variant], []
        for seed, (batch, shape) in enumerate([(1, SHAPE), (2, SHAPE), (3, SHAPE), (2, (1, 4, 6)), (5, SHAPE)]):
            given = inputs(model.config, seed, batch=batch, shape=shape, by_frame=variant == "TI2V-5B" and seed > 0)
            found.append((given, model.evaluate(*given)))
        return found

    return of


def on_forked_ranks(job: ForwardsJob, folder: Path) -> ServedJob:
    """On real ranks, without the seconds of their start."""
    return ServedJob(lambda write, cancelled: Result(run_fresh(job, folder, write), {}, "", 0.0))


LAYOUTS: dict[str, dict[str, Any]] = {
    "1": {"gpu_count": 1},
    "2": {"gpu_count": 2},
    "2 sharded": {"gpu_count": 2, "use_fsdp": True},
    "2 by prompt": {"gpu_count": 2, "cfg_parallel": True},
    "3": {"gpu_count": 3, "memory_optimization": True},
    "4 by prompt": {"gpu_count": 4, "cfg_parallel": True},
    "4 by prompt, sharded": {"gpu_count": 4, "cfg_parallel": True, "use_fsdp": True, "gather": "expert"},
    "1 streamed": {"gpu_count": 1, "stream_blocks": True},
}


CASES = (
    [("T2V", layout) for layout in LAYOUTS]
    + [(variant, layout) for variant in VARIANTS for layout in ("1", "3", "4 by prompt, sharded")]
    + [("VACE", "2 by prompt")]
)


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_a_group_gives_what_the_model_gives(
    variant: str, layout: str, models: dict[str, Known], asked: Callable[[str], list[tuple[Any, Any]]], tmp_path: Path
):
    """Batches of one to five, other sizes meanwhile, timesteps by frame where the model has them."""
    evaluator = on_forked_ranks(models[variant].job(**LAYOUTS[layout], keep_warm_seconds=0), tmp_path)
    try:
        for given, expected in asked(variant):
            assert difference(evaluator.evaluate(*given), expected) < 1e-5
    finally:
        evaluator.close()


def test_texts_are_sent_once_and_of_those_that_come_and_go_each_is_right(models: dict[str, Known], tmp_path: Path):
    """More than the ranks keep what is derived of, and one that is changed in place."""
    model = models["T2V"]
    served = on_forked_ranks(model.job(gpu_count=1, keep_warm_seconds=0), tmp_path)
    sent = []
    ask = served._ask
    served._ask = lambda evaluation, parts=(): (  # type: ignore[method-assign]
        sent.append(len(evaluation.sent) if evaluation else 0),
        ask(evaluation, parts),
    )
    x, timesteps, samples = inputs(model.config, 1, batch=5)
    try:
        for numbers in ([0], [1], [0, 1, 2, 3, 4], [3, 3, 0], [4, 2]):
            given = x[: len(numbers)], timesteps[: len(numbers)], [samples[number] for number in numbers]
            assert difference(served.evaluate(*given), model.evaluate(*given)) < 1e-5
        samples[0].text.mul_(2)
        given = x[:1], timesteps[:1], [samples[0]]
        assert difference(served.evaluate(*given), model.evaluate(*given)) < 1e-5
    finally:
        served.close()
    # The five of a batch come in twos.
    assert sent == [1, 1, 0, 2, 1, 0, 0, 0, 1, 0]


class RankHere:
    """One rank in this process, from sampling to sampling."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.session: Session | None = None

    def sample(self, model: Known, seed: int, **settings: Any) -> None:
        """It must be right."""
        folder = JobDir.create(self.folder)
        folder.write_job(model.job(**settings))

        def run(write: Callable[[Path], None], cancelled: object) -> Result:
            write(folder.inputs)
            self.session = run_rank(GroupDir(self.folder), folder, RankFiles(folder, 0), self.session)
            return Result(folder, folder.read_json(folder.result), "", 0.0)

        served, given = ServedJob(run), inputs(model.config, seed, batch=2)
        try:
            assert difference(served.evaluate(*given), model.evaluate(*given)) < 1e-5
        finally:
            served.close()
        assert served.result is not None

    @property
    def held(self) -> tuple[int, int]:
        """Models, and those on the device."""
        assert self.session is not None
        cache = self.session.experts
        return len(cache.models), sum(map(cache.is_on_device, cache.models))


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RankHere:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(experts, "free_bytes", lambda device, ranks: 1 << 40)
    return RankHere(tmp_path)


@pytest.mark.parametrize(
    ("settings", "free", "held", "on_device"),
    [({}, 1 << 40, 2, 2), ({}, 0, 1, 1), ({"offload_model": True}, 1 << 40, 2, 1), ({"stream_blocks": True}, 0, 2, 1)],
)
def test_two_models_take_turns_where_there_is_no_room_for_both(
    settings: dict[str, Any], free: int, held: int, on_device: int, models: dict[str, Known], rank: RankHere,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """Of a device that has as much memory as is said."""
    monkeypatch.setattr(experts, "free_bytes", lambda device, ranks: free)
    for seed, name in enumerate(("T2V", "I2V", "T2V", "T2V", "I2V")):
        rank.sample(models[name], seed, **settings)
    assert rank.held == (held, on_device)


@pytest.mark.parametrize("settings", [{}, {"offload_model": True}])
def test_of_a_file_that_is_replaced_no_second_copy_stays(
    settings: dict[str, Any], models: dict[str, Known], rank: RankHere, tmp_path: Path
):
    """Though there were room for it, on the device and in the host's memory."""
    for seed in (0, 1, 2):
        model = Known.make(tmp_path / "model", "T2V", seed)
        os.utime(model.file, ns=(seed, seed))
        rank.sample(models["I2V"], seed, **settings)
        rank.sample(model, seed, **settings)
        assert rank.held[0] == 2


def test_such_a_job_cannot_be_run_again_by_itself(
    models: dict[str, Known], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(standalone.signal, "signal", lambda number, act: None)
    folder = JobDir.create(tmp_path)
    folder.write_job(models["T2V"].job())
    assert standalone.main([str(folder.path)]) == 1
    assert "served a node of ComfyUI's: queue that workflow again" in capsys.readouterr().err
    folder.remove()


@pytest.fixture(scope="module")
def warm(models: dict[str, Known], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    folder = tmp_path_factory.mktemp("warm")
    second = {"T2V, the other": Known.make(folder / "second", "T2V", seed=9)}
    warm = Warm(folder, models | second)
    yield warm
    warm.pool.release()
    assert not list((folder / "jobs").iterdir())


@pytest.mark.ranks
@pytest.mark.processes
def test_models_and_loras_change_on_the_same_processes(warm: Warm):
    """Two models in turns are read once each; other LoRAs, also where the file of the last one is gone."""
    loras = [write_lora(warm.folder / f"lora{seed}.safetensors", seed) for seed in (1, 2)]
    ranks = warm.sample("T2V")
    for name, kept in (
        ("T2V, the other", False),
        ("T2V", True),
        ("T2V, the other", True),
        ("I2V", False),
        ("T2V", True),
    ):
        assert warm.sample(name, seed=3) == ranks
        assert warm.kept is kept, name
    for strengths in ((0.5, 0.0), (0.5, 0.25), (-1.0, 0.25)):
        given = tuple(zip(loras, strengths, strict=True))
        assert warm.sample("T2V", given) == ranks
    loras[0].unlink()
    assert warm.sample("T2V", ((loras[1], 0.7),)) == ranks
    assert warm.sample("T2V", cfg_parallel=True) == ranks
    assert warm.sample("T2V") == ranks


@pytest.mark.ranks
@pytest.mark.processes
@pytest.mark.parametrize("when", ["between two", "in one"])
def test_fault_07_a_cancelled_sampling_leaves_the_processes_for_the_next(
    when: str, warm: Warm, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stopping, "SECONDS", COMES_UP)
    ranks = warm.sample()
    config, evaluator = warm.models["T2V"].config, warm.open()
    evaluator.evaluate(*inputs(config, 1))
    given = inputs(config, 1, shape=SHAPE if when == "between two" else (5, 60, 60))
    threading.Timer(0.3, setattr, [warm, "cancelled", True]).start()
    if when == "between two":
        time.sleep(1)
    started = time.monotonic()
    with pytest.raises(JobCancelled):
        while time.monotonic() - started < COMES_UP:
            evaluator.evaluate(*given)
    evaluator.close()
    warm.cancelled = False
    assert warm.sample(seed=5) == ranks


@pytest.mark.ranks
@pytest.mark.processes
def test_fault_05_waiting_for_an_evaluation_is_no_hang_and_costs_less_than_two_percent_of_a_core(warm: Warm):
    ranks = warm.sample()
    evaluator = warm.open(stall_timeout=3.0)
    given = inputs(warm.models["T2V"].config, 1)
    evaluator.evaluate(*given)
    try:
        # On a busy machine they may still be at work; then they are looked at again.
        for _ in range(3):
            time.sleep(0.5)
            before = {process: cpu_seconds(process) for process in ranks}
            time.sleep(3.0)
            used = {process: cpu_seconds(process) - before[process] for process in ranks}
            if all(seconds <= 0.06 for seconds in used.values()):
                break
        assert all(seconds <= 0.06 for seconds in used.values()), "still at work"
        evaluator.evaluate(*given)
    finally:
        evaluator.close()


def cpu_seconds(process: Process) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("variant", "words"), [("FLF2V", "connect CLIP Vision Encode"), ("I2V", "this model .I2V. has no place for one")]
)
def test_pictures_belong_to_the_models_that_look_at_them(
    variant: str, words: str, models: dict[str, Known], tmp_path: Path
):
    other = models["I2V" if variant == "FLF2V" else "FLF2V"]
    served = on_forked_ranks(models[variant].job(gpu_count=1, keep_warm_seconds=0), tmp_path)
    try:
        # Of the same channels, and told what the other model is.
        with pytest.raises(Exception, match=words):
            served.evaluate(*inputs(other.config, 1))
    finally:
        served.close()
        for folder in (path for kind in ("job", "group") for path in tmp_path.rglob(f"wan-{kind}-*")):
            shutil.rmtree(folder)
