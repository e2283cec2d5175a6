"""How a rank waits for evaluations, makes room for them and answers: without a model, on a clock of its own."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import FILE, stub_job
from wan_pack.distributed.group.evaluation_request import Evaluation, Request, ToldKeys
from wan_pack.distributed.job.job import ForwardsJob, JobError
from wan_pack.distributed.launch.launcher import new_job_id
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.rank import forwards_work
from wan_pack.distributed.rank.forwards_work import STOP, ForwardsWork
from wan_pack.distributed.rank.session import Stopped
from wan_pack.wan.transformer.context import Context

KEYS = [f"{number:064x}" for number in range(9)]
DIGEST = b"d" * len(STOP)


def evaluation(batch: int = 1, controls: int = 0, *, reference: bool = False, by_frame: bool = False) -> Evaluation:
    """Each sample has the same controls, and the same reference."""
    keys = {"controls": tuple(KEYS[1 : 1 + controls]), "reference": (KEYS[8],) * reference}
    told = tuple(
        ToldKeys(kind=kind, keys=(some,) * batch, strengths=((1.0,) * len(some),) * batch)
        for kind, some in keys.items() if some
    )  # fmt: skip
    return Evaluation(shape=(batch, 16, 3, 4, 6), by_frame=by_frame, texts=(KEYS[0],) * batch, told=told)


class Serving:
    """A rank's work, whose clock runs while it waits at its bell."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int = 0, *, ranks: int = 1, **settings: Any) -> None:
        self.now, self.asked, self.done, self.stops = 0.0, 10**9, 0, 10**9
        self.waits: list[float] = []
        self.told: list[Any] = []
        self.happens: list[Any] = []
        self.everyone: list[bytes] = []
        self.digest = DIGEST
        clock = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now)
        monkeypatch.setattr(forwards_work, "time", clock)
        monkeypatch.setattr(forwards_work, "gather_bytes", self._gather)
        work: Any = object.__new__(ForwardsWork)
        work.rank, work.device, work.done, work.step_seconds = rank, torch.device("cpu"), 0, []
        parallel = stub_job(gpu_count=1, **settings).parallel
        work.job = ForwardsJob(id=new_job_id(), model=(FILE,), parallel=parallel)
        mesh = None if ranks == 1 else SimpleNamespace()
        work.session = SimpleNamespace(mesh=mesh, make_room=lambda *given, **how: self.happens.append((*given, how)))
        work.folder = SimpleNamespace(stop=SimpleNamespace(exists=lambda: self.now >= self.stops))
        work.files = SimpleNamespace(progress=lambda *given, **how: self.told.append((self.now, *given, how)))
        work.check_all_have = lambda digest, other: self.happens.append((digest, other))
        self.request = Request(number=1, evaluation=evaluation())
        work.memory = type("Memory", (), {"asked": property(lambda _: int(self.now >= self.asked))})()
        work.memory.read = lambda: (self.request, self.digest)
        work.memory.write = lambda *given: self.happens.append(("written", *given[:2], bytes(given[2])))
        work.memory.say_answered = lambda number: self.happens.append(("answered", number))
        work.answers = SimpleNamespace(ring=lambda: self.happens.append("rung"))
        self.work, self.bell = work, SimpleNamespace(wait=self._wait)

    def _wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def _gather(self, mine: bytes, device: torch.device) -> list[bytes]:
        self.happens.append(mine)
        return [mine, *self.everyone]

    def next_request(self) -> Request:
        return self.work.next_request(self.bell)


@pytest.mark.parametrize(("stall", "signs", "look"), [(60.0, 5.0, 0.25), (8.0, 2.0, 0.25), (1.0, 0.25, 0.25)])
def test_a_rank_that_waits_looks_for_a_cancel_and_gives_signs_of_life(
    stall: float, signs: float, look: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times in the time in which one is expected, every five seconds at least."""
    serving = Serving(monkeypatch, stall_timeout=stall)
    serving.asked = 3 * signs
    assert serving.next_request() is serving.request
    assert set(serving.waits) == {look}
    assert [at for at, *_ in serving.told] == [signs, 2 * signs, 3 * signs]
    assert serving.told[0][1:4] == ("denoise", 0, 0)
    assert serving.happens == [(DIGEST, "another evaluation to compute")]
    serving.request = Request(number=2, evaluation=None)
    with pytest.raises(JobError, match="evaluation 2 is asked for after 0; it must be the next one"):
        serving.next_request()


def test_a_cancel_ends_the_wait_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has not seen it yet hears of it from those that have; alone a rank needs nobody."""
    alone = Serving(monkeypatch)
    alone.stops = 0.5
    with pytest.raises(Stopped):
        alone.next_request()
    assert alone.now == 0.5 and alone.happens == []
    for seen, others in ((True, [DIGEST]), (False, [STOP]), (False, [DIGEST])):
        serving = Serving(monkeypatch, ranks=2)
        serving.asked, serving.stops, serving.everyone = 0.0, 0.0 if seen else 1e9, others
        stopped = seen or STOP in others
        with pytest.raises(Stopped) if stopped else contextlib.nullcontext():
            serving.next_request()
        assert serving.happens[0] == (STOP if seen else DIGEST)
        assert len(serving.happens) == (1 if stopped else 2)


def test_room_is_made_once_for_each_size_and_number_of_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    serving, seen = Serving(monkeypatch, offload_model=True), []
    serving.work.name, serving.work.roomy = "a", set()

    @dataclasses.dataclass
    class Work:
        size: tuple[int, ...]
        controls: int
        given_frames: bool = False

    monkeypatch.setattr(
        forwards_work, "workload_of_forwards",
        lambda model, size, parallel, *, steps, guided, loras, expert, controls: (
            seen.append((model, steps, guided, loras, expert)), Work(size, controls)
        )[1],
    )  # fmt: skip
    monkeypatch.setattr(forwards_work, "evaluation_bytes", lambda work, parallel: work)
    plain, two = evaluation(), evaluation(2)
    for one in (plain, plain, two, evaluation(controls=1), evaluation(controls=2), evaluation(controls=1),
                evaluation(reference=True), evaluation(reference=True), two):  # fmt: skip
        serving.work.make_room_for(one)
    how = {"but": "a", "parks": True}
    sizes = [((3, 4, 6), 0), ((3, 4, 6), 0), ((3, 4, 6), 1), ((3, 4, 6), 2), ((4, 4, 6), 0)]
    assert serving.happens == [(Work(size, count), how) for size, count in sizes]
    assert set(seen) == {((FILE,), 1, True, (), None)}
    serving.work.roomy.clear()
    serving.happens.clear()
    serving.work.make_room_for(evaluation(by_frame=True))
    assert serving.happens == [(Work((3, 4, 6), 0, given_frames=True), how)]


@pytest.mark.parametrize("shard", [None, SequenceShard(length=18, rank=1, world=3)])
def test_tokens_have_the_timestep_of_their_frame(shard: SequenceShard | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three frames of six tokens; one timestep of all needs no telling which."""
    work = Serving(monkeypatch).work
    shard = SequenceShard(length=18) if shard is None else shard
    text, beside, latents = Context(torch.zeros(1)), object(), torch.arange(3 * 4 * 6.0).view(1, 3, 4, 6)
    asked = work.asked(latents, torch.tensor([500.0, 0.0, 500.0]), text, beside, shard)
    assert asked.timestep.tolist() == [0.0, 500.0]
    assert asked.which.tolist() == [*[1] * 6, *[0] * 6, *[1] * 6][shard.start : shard.stop]
    assert len(asked.tokens) == shard.size and (asked.text, asked.beside) == (text, beside)
    assert asked.tokens[0, 0] == (0 if shard.rank == 0 else 24)
    for timesteps in ([7.0], [7.0, 7.0, 7.0]):
        asked = work.asked(latents, torch.tensor(timesteps), text, beside, shard)
        assert asked.timestep.tolist() == [7.0] and asked.which is None


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_answers_once_all_have_read_what_was_asked(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving(monkeypatch, rank, ranks=2)
    velocity, one = torch.randn(1, 2, 3, 4, 6), evaluation()
    for now in (4.0, 6.0, 9.0):
        serving.work._began, serving.now = serving.now, now
        serving.work.answer(one, torch.zeros(1), velocity)
    first = [("written", one, 2, velocity.numpy().tobytes()), b"\0", ("answered", 1), "rung"]
    assert serving.happens[:4] == first if rank == 0 else serving.happens == [b"\0"] * 3
    assert serving.work.done == 3 and serving.work.step_seconds == [4.0, 2.0, 3.0]
    shown = [(number, how["seconds_per_step"], how["message"]) for _, _, number, _, how in serving.told]
    assert shown == [
        (1, 4.0, "1 evaluation for ComfyUI's sampler"), (2, 2.0, "2 evaluations for ComfyUI's sampler"),
        (3, 2.5, "3 evaluations for ComfyUI's sampler"),
    ]  # fmt: skip


def test_an_answer_of_no_numbers_says_whose_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = torch.tensor([1.0, float("nan")])
    for latents, words in ((bad, "the latents that the sampler gave are"), (bad.nan_to_num(), "the velocity is")):
        serving = Serving(monkeypatch)
        with pytest.raises(JobError, match=f"^{words} not finite; with mixed_precision fp16 try bf16"):
            serving.work.answer(evaluation(), latents, bad)
        assert serving.happens == []


def test_at_its_end_models_stay_where_the_processes_do_and_rank_0_tells_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards_work, "release_gathered", lambda model: None)
    monkeypatch.setattr(forwards_work, "gather_peaks", lambda session: [[1, 2]])
    monkeypatch.setattr(forwards_work, "result_of", lambda job, session, **made: made)
    for rank, settings, dropped in ((0, {}, True), (1, {}, True), (0, {"keep_warm_seconds": 9.0}, False)):
        serving, written = Serving(monkeypatch, rank, **settings), []
        work = serving.work
        work.model, work.phase_seconds, work.done = None, {"load": 1.0}, 1001
        work.step_seconds = [float(number) for number in range(1001)]
        work.session.experts = SimpleNamespace(drop=lambda: serving.happens.append("dropped"))  # noqa: B023
        work.folder = SimpleNamespace(result="result", write_json=lambda *given: written.append(given))  # noqa: B023
        work.finish()
        assert serving.happens == ["dropped"] * dropped
        told = {
            "phases": {"load": 1.0}, "step_seconds": work.step_seconds[:1000], "peaks": [[1, 2]], "evaluations": 1001,
        }  # fmt: skip
        assert written == ([("result", told)] if rank == 0 else [])
