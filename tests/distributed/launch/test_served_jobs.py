"""A job that serves evaluations, seen from ComfyUI: in the place of its ranks a thread answers."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_pack.distributed.group.evaluation_memory import AnsweringEnd
from wan_pack.distributed.group.evaluation_request import Evaluation
from wan_pack.distributed.job.errors import JobCancelled, JobError
from wan_pack.distributed.job.evaluator import SampleConditioning, SampleTold
from wan_pack.distributed.job.job import FileIdentity, ForwardsJob, Parallel
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch import group_evaluator, served_job
from wan_pack.distributed.launch.group_evaluator import GroupEvaluators
from wan_pack.distributed.launch.pool import Pool
from wan_pack.distributed.launch.result import Result
from wan_pack.distributed.launch.served_job import ServedJob
from wan_pack.distributed.machine.bell import Bell, BellRope

FILE = FileIdentity(path="/models/t2v.safetensors", size=1, mtime_ns=1)
JOB = ForwardsJob(id="0" * 32, model=(FILE,), parallel=Parallel(gpu_count=1))


class Ranks:
    """They answer with the latents, doubled.

    Args:
        answers: how many evaluations; to the next one they say nothing.
    """

    def __init__(self, folder: Path, answers: int = 99) -> None:
        self._parent, self._answers = folder, answers
        self.seen: list[Evaluation] = []
        self.folder: JobDir | None = None
        self.ended = ""

    def __call__(self, write: Callable[[Path], None], given_up: Callable[[], bool]) -> Result:
        self.folder = JobDir.create(self._parent)
        with Bell(self.folder.bell(0)) as bell:
            write(self.folder.inputs)
            paths = self.folder.read_json(self.folder.evaluations)
            memory, rope = AnsweringEnd(Path(paths["memory"])), BellRope(Path(paths["answers"]))
            try:
                while self._answer(memory, rope):
                    while memory.asked == len(self.seen):
                        bell.wait(0.05)
                        if given_up():
                            self.ended = "given up"
                            self.folder.remove()
                            raise JobCancelled("cancelled")
            finally:
                memory.close()
                rope.close()
        self.ended = "well"
        return Result(self.folder, {"folder": str(self.folder.path)}, "", 0.0)

    def _answer(self, memory: AnsweringEnd, rope: BellRope) -> bool:
        """Whether more may be asked."""
        if memory.asked == len(self.seen):
            return True
        request, _ = memory.read()
        if request.evaluation is None:
            return False
        self.seen.append(request.evaluation)
        if len(self.seen) <= self._answers:
            latents = torch.frombuffer(bytearray(memory.parts(request.evaluation)[0]), dtype=torch.float32)
            memory.write(request.evaluation, request.evaluation.shape[1], (latents * 2).numpy().data)
            memory.say_answered(request.number)
            rope.ring()
        return True


def asked(texts: list[Tensor], frames: int = 2) -> tuple[Tensor, Tensor, list[SampleConditioning]]:
    samples = [SampleConditioning(text=text, conditional=i == 0) for i, text in enumerate(texts)]
    return torch.randn(len(texts), 16, frames, 4, 6), torch.full((len(texts),), 500.0), samples


def texts(*seeds: int) -> list[Tensor]:
    return [torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def test_a_text_is_sent_once_until_it_changes(tmp_path: Path):
    ranks = Ranks(tmp_path)
    served = ServedJob(ranks)
    cat, dog = texts(1, 2)
    same = cat.clone()
    for given in ([cat], [cat, dog], [dog], [same]):
        call = asked(given)
        assert torch.equal(served.evaluate(*call), 2 * call[0])
    dog.mul_(2)
    served.evaluate(*asked([cat, dog]))
    served.close()
    assert [len(one.sent) for one in ranks.seen] == [1, 1, 0, 0, 1]
    first, both, other, again, changed = (one.texts for one in ranks.seen)
    assert both == (*first, *other) and again == first and changed[0] == first[0] and changed[1] != other[0]


def test_of_evaluations_that_take_turns_each_control_is_sent_once(tmp_path: Path):
    """As of two prompts that ComfyUI does not put together, each with a control of its own."""
    ranks = Ranks(tmp_path)
    served = ServedJob(ranks)
    controls = [torch.full((96, 2, 4, 6), float(value)) for value in (1, 2)]
    for _ in range(3):
        for text, control in zip(texts(1, 2), controls, strict=True):
            x, timesteps, (sample,) = asked([text])
            served.evaluate(x, timesteps, [dataclasses.replace(sample, told={"controls": (SampleTold(control),)})])
    served.close()
    assert [[one.shape for one in evaluation.sent] for evaluation in ranks.seen] == [[(3, 8), (96, 2, 4, 6)]] * 2 + [
        []
    ] * 4


def test_the_same_bytes_in_another_shape_are_another_text(tmp_path: Path):
    ranks = Ranks(tmp_path)
    served = ServedJob(ranks)
    (cat,) = texts(1)
    long = cat.view(2 * cat.shape[0], -1)
    for given in (cat, long, cat.view(torch.int32).view(torch.float32)):
        served.evaluate(*asked([given]))
    served.close()
    assert [[sent.shape for sent in one.sent] for one in ranks.seen] == [[tuple(cat.shape)], [tuple(long.shape)], []]


def test_when_it_is_closed_its_folder_is_gone_and_its_result_there(tmp_path: Path):
    ranks = Ranks(tmp_path)
    served = ServedJob(ranks)
    served.evaluate(*asked(texts(1)))
    assert served.result is None and list(tmp_path.iterdir())
    served.close()
    served.close()
    assert ranks.ended == "well"
    assert served.result is not None and not list(tmp_path.iterdir())


def test_who_stops_waiting_lets_the_ranks_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cancel, or whatever else ends the wait: what is still computed is of no use."""
    ranks = Ranks(tmp_path, answers=0)
    served = ServedJob(ranks)

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(served._bell, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        served.evaluate(*asked(texts(1)))
    served.close()
    assert (ranks.ended, served.result) == ("given up", None)


@pytest.mark.parametrize("when", ["before it is asked", "while it is waited for"])
def test_what_ends_the_job_is_raised_where_an_answer_is_waited_for(when: str, tmp_path: Path):
    go = threading.Event()
    if when == "before it is asked":
        go.set()

    def run(write: Callable[[Path], None], given_up: Callable[[], bool]) -> Result:
        go.wait(60)
        raise JobError("rank 1 was killed")

    served = ServedJob(run)
    if go.is_set():
        served._thread.join()
    else:
        threading.Timer(0.2, go.set).start()
    with pytest.raises(JobError, match="rank 1 was killed"):
        served.evaluate(*asked(texts(1)))
    served.close()


def test_a_job_that_ends_although_it_is_still_asked_is_an_error(tmp_path: Path):
    def run(write: Callable[[Path], None], given_up: Callable[[], bool]) -> Result:
        folder = JobDir.create(tmp_path)
        write(folder.inputs)
        return Result(folder, {}, "", 0.0)

    served = ServedJob(run)
    with pytest.raises(JobError, match="ended, though the sampling has not"):
        served.evaluate(*asked(texts(1)))
    served.close()


def test_an_answer_is_looked_for_although_nobody_rings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(served_job, "LOOK_AGAIN", 0.05)
    monkeypatch.setattr(BellRope, "ring", lambda rope: None)
    served = ServedJob(Ranks(tmp_path))
    call = asked(texts(1))
    assert torch.equal(served.evaluate(*call), 2 * call[0])
    served.close()


def test_what_no_model_takes_is_refused_and_the_next_evaluation_goes_on(tmp_path: Path):
    ranks = Ranks(tmp_path)
    served = ServedJob(ranks)
    x, timesteps, samples = asked(texts(1, 2))
    wrong: list[tuple[Any, str]] = [
        ((x.half(), timesteps, samples), r"x is torch\.float16 on cpu"),
        ((x, timesteps.double(), samples), "timesteps is torch.float64"),
        ((x, timesteps[:1], samples), r"timesteps have shape \[1\]; these latents call for \[2\]"),
        ((x, timesteps[:, None].expand(2, 3).contiguous(), samples), r"these latents call for \[2, 2\]"),
        ((x, timesteps, samples[:1]), "texts is 1"),
        ((x, timesteps, [dataclasses.replace(s, text=s.text[0]) for s in samples]), "it must be .rows, channels"),
    ]
    for given, words in wrong:
        with pytest.raises(ValueError, match=words):
            served.evaluate(*given)
    assert torch.equal(served.evaluate(x, timesteps, samples), 2 * x)
    served.close()
    assert len(ranks.seen) == 1


@pytest.fixture
def evaluators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GroupEvaluators:
    """Whose jobs `Ranks` run; they are in `jobs`, with their own side of a cancel."""
    evaluators = GroupEvaluators(Pool(), parent=tmp_path, failed=tmp_path / "failed", cancelled=lambda: bool(stopped))
    stopped: list[int] = []
    evaluators.stopped, evaluators.jobs = stopped, []  # type: ignore[attr-defined]

    def run_job(job: ForwardsJob, write: Callable[[Path], None], **how: Any) -> Result:
        assert (how["parent"], how["failed"], how["pool"]) == (tmp_path, tmp_path / "failed", evaluators._pool)
        ranks = Ranks(tmp_path)
        evaluators.jobs.append((job, ranks))  # type: ignore[attr-defined]
        return ranks(write, how["cancelled"])

    monkeypatch.setattr(group_evaluator, "run_job", run_job)
    return evaluators


def test_a_sampling_inside_of_another_ones_step_has_the_gpus_meanwhile(evaluators: Any):
    """Each time another job, with its own id; never two at once."""
    outer, inner = evaluators.open(JOB), evaluators.open(dataclasses.replace(JOB, side="low_noise"))
    assert evaluators.jobs == [], "not before the first evaluation"
    for one in (outer, outer, inner, inner, outer):
        call = asked(texts(1))
        assert torch.equal(one.evaluate(*call), 2 * call[0])
        assert [ranks.ended for _, ranks in evaluators.jobs[:-1]] == ["well"] * (len(evaluators.jobs) - 1)
        assert evaluators.jobs[-1][1].ended == ""
    inner.close()
    assert evaluators.jobs[-1][1].ended == "", "it has rested already, and is not the one at work"
    outer.close()
    assert [(job.side, len(ranks.seen)) for job, ranks in evaluators.jobs] == [("", 2), ("low_noise", 2), ("", 1)]
    assert len({job.id for job, _ in evaluators.jobs} | {JOB.id}) == 4
    assert outer.result is not None and inner.result is not None
    # Nothing is at work: the next one has nobody to wait for.
    assert evaluators._at_work is None


@pytest.mark.parametrize("who", ["the user", "who waits"])
def test_a_cancel_reaches_the_job_whoever_says_it(evaluators: Any, who: str, monkeypatch: pytest.MonkeyPatch):
    one = evaluators.open(JOB)
    one.evaluate(*asked(texts(1)))
    (_, ranks), served = evaluators.jobs[0], one._served
    if who == "the user":
        evaluators.stopped.append(1)
    else:
        served._given_up = True
    served._thread.join(60)
    assert ranks.ended == "given up"
    if who == "the user":
        with pytest.raises(JobCancelled):
            one.evaluate(*asked(texts(1)))
    one.close()
    assert one.result is None


def test_it_keeps_nobody_from_ending(tmp_path: Path):
    """Neither its thread, nor a bell that a child of ComfyUI would hold on to."""
    served = ServedJob(Ranks(tmp_path))
    assert served._thread.daemon
    assert not os.get_inheritable(served._bell._descriptor) and not os.get_inheritable(served._bell._other)
    assert not os.get_blocking(served._bell._descriptor)
    served.close()
