"""What a sampler's evaluations are asked of the processes as: a few samples at a time, everything new once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from wan_pack.distributed.group.evaluation_memory import AnsweringEnd
from wan_pack.distributed.group.evaluation_request import Evaluation
from wan_pack.distributed.job.evaluator import SampleConditioning, SampleTold
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch.result import Result
from wan_pack.distributed.launch.served_job import ServedJob
from wan_pack.distributed.machine.bell import Bell, BellRope

SHAPE = (3, 2, 4, 6)


class Processes:
    """A thread in their place, whose velocity is the latents plus what it was told of each sample."""

    def __init__(self, folder: Path) -> None:
        self.folder = JobDir.create(folder)
        self.asked: list[Evaluation] = []
        self.tensors: dict[str, Tensor] = {}

    def run(self, write: Callable[[Path], None], cancelled: Callable[[], bool]) -> Result:
        with Bell(self.folder.bell(0)) as bell:
            write(self.folder.inputs)
            paths = self.folder.read_json(self.folder.evaluations)
            memory, answers = AnsweringEnd(Path(str(paths["memory"]))), BellRope(Path(str(paths["answers"])))
            while (evaluation := self.next(memory, bell, cancelled)) is not None:
                self.asked.append(evaluation)
                self.answer(memory, evaluation)
                memory.say_answered(len(self.asked))
                answers.ring()
            memory.close()
            answers.close()
        return Result(self.folder, {}, "", 0.0)

    def next(self, memory: AnsweringEnd, bell: Bell, cancelled: Callable[[], bool]) -> Evaluation | None:
        while memory.asked == len(self.asked) and not cancelled():
            bell.wait(0.1)
        return None if cancelled() else memory.read()[0].evaluation

    def answer(self, memory: AnsweringEnd, evaluation: Evaluation) -> None:
        latents, timesteps, sent = memory.parts(evaluation)
        for one, view in zip(evaluation.sent, sent, strict=True):
            self.tensors[one.key] = torch.frombuffer(bytearray(view), dtype=torch.float32).view(one.shape)
        velocity = torch.frombuffer(bytearray(latents), dtype=torch.float32).view(evaluation.shape).clone()
        velocity += torch.frombuffer(bytearray(timesteps), dtype=torch.float32)[:, None, None, None, None]
        for i, key in enumerate(evaluation.texts):
            velocity[i] += self.tensors[key].sum()
        for told in evaluation.told:
            for i, (keys, strengths) in enumerate(zip(told.keys, told.strengths, strict=True)):
                for key, strength in zip(keys, strengths, strict=True):
                    velocity[i] += strength * self.tensors[key].sum()
        memory.write(evaluation, evaluation.shape[1], velocity.numpy().data)


@pytest.fixture
def processes(tmp_path: Path) -> Processes:
    return Processes(tmp_path)


@pytest.fixture
def served(processes: Processes) -> Iterator[ServedJob]:
    job = ServedJob(processes.run)
    yield job
    job.close()


def video(seed: int) -> Tensor:
    return torch.randn(5, *SHAPE[1:], generator=torch.Generator().manual_seed(seed))


def sample(seed: int, *controls: SampleTold, conditional: bool = True) -> SampleConditioning:
    told = {"controls": controls} if controls else {}
    return SampleConditioning(torch.full((2, 3), float(seed)), told, conditional)


def controls_of(one: SampleConditioning) -> tuple[SampleTold, ...]:
    return one.told.get("controls", ())


def evaluate(served: ServedJob, samples: list[SampleConditioning]) -> None:
    """What comes back belongs to each sample."""
    x = torch.randn(len(samples), *SHAPE, generator=torch.Generator().manual_seed(1))
    timesteps = torch.arange(float(len(samples)))
    told = [one.text.sum() + sum(c.strength * c.values.sum() for c in controls_of(one)) for one in samples]
    expected = x + (timesteps + torch.stack(told))[:, None, None, None, None]
    assert torch.allclose(served.evaluate(x, timesteps, samples), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("conditional", "order"),
    [
        ("cu", [[0, 1]]), ("uc", [[0, 1]]), ("ccuu", [[0, 2], [1, 3]]), ("ccu", [[0, 1], [2]]), ("c", [[0]]),
        ("u" * 40 + "c" * 40, [[40 + i, i] for i in range(40)]),
        ("c" * 69, [*([i, i + 1] for i in range(0, 68, 2)), [68]]),
    ],
)  # fmt: skip
def test_a_batch_comes_in_twos_of_prompt_and_negative_prompt(
    conditional: str, order: list[list[int]], served: ServedJob, processes: Processes
):
    """Between which the processes give signs of life, and see a cancel."""
    samples = [sample(i, conditional=letter == "c") for i, letter in enumerate(conditional)]
    evaluate(served, samples)
    seeds = [[int(processes.tensors[key][0, 0]) for key in evaluation.texts] for evaluation in processes.asked]
    assert seeds == order


def test_controls_are_sent_once_and_their_strengths_each_time(served: ServedJob, processes: Processes):
    one, other = video(1), video(2)
    for strength in (1.0, 0.5):
        control = SampleTold(one, strength), SampleTold(other, 2.0)
        evaluate(served, [sample(1, *control), sample(2, *control, conditional=False)])
    evaluate(served, [sample(1, SampleTold(one, 1.0)), sample(2, SampleTold(other, 1.0))])
    one.add_(1)
    evaluate(served, [sample(1, SampleTold(one, 1.0)), sample(2, SampleTold(other, 1.0))])
    assert [len(evaluation.sent) for evaluation in processes.asked] == [4, 0, 0, 1]
    assert [evaluation.told[0].strengths[0] for evaluation in processes.asked] == [
        (1.0, 2.0),
        (0.5, 2.0),
        (1.0,),
        (1.0,),
    ]


def test_each_of_many_windows_sends_its_control_once(served: ServedJob, processes: Processes):
    windows = [video(seed) for seed in range(40)]
    for _ in range(3):
        for window in windows:
            evaluate(served, [sample(1, SampleTold(window)), sample(2, SampleTold(window), conditional=False)])
    assert [len(evaluation.sent) for evaluation in processes.asked] == [3, *[1] * 39, *[0] * 80]


def test_one_tensor_of_two_kinds_is_sent_as_each(served: ServedJob, processes: Processes):
    """A rank keeps another part of each."""
    both = (SampleTold(video(1)[:, :1].contiguous()),)
    told = {"reference": both, "pose": both}
    x = torch.zeros(1, *SHAPE)
    for _ in range(2):
        served.evaluate(x, torch.zeros(1), [SampleConditioning(torch.ones(2, 3), told)])
    first, second = processes.asked
    assert len(first.sent) == 3 and not second.sent and len(set(first.kinds)) == 2
    assert first.in_front == 1 and (first.count("pose"), first.count("face")) == (1, 0)


def test_what_nobody_has_any_more_is_not_held(served: ServedJob):
    for seed in range(30):
        evaluate(served, [sample(seed, SampleTold(video(seed), 1.0))])
    evaluate(served, [sample(0)])
    assert len(served._known) == 1
