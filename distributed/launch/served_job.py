"""A job whose processes answer evaluations of this one."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...wan.sampling.told import KINDS
from ..group.evaluation_memory import AskingEnd
from ..group.evaluation_request import MAX_SAMPLES, Evaluation, Request, SentKeys, SentTensor, ToldKeys
from ..job.errors import JobError
from ..job.evaluator import KEPT_ROW_BYTES, KEPT_VOLUME_BYTES, SampleConditioning, SampleTold
from ..job.job_folder import JobDir
from ..machine.bell import Bell, ring, ring_all
from .result import Result

if TYPE_CHECKING:
    from torch import Tensor

LOOK_AGAIN = 1.0
"""Seconds after which an answer is looked for although nobody rang."""

Run = Callable[[Callable[[Path], None], Callable[[], bool]], Result]
"""Runs a job to its end, given what writes into its folder and what asks whether nobody wants it any more."""


class ServedJob:
    """It runs on a thread of its own from now on. Not for several threads at once."""

    def __init__(self, run: Run) -> None:
        self._memory, self._bell = AskingEnd(), Bell()
        self._folder: JobDir | None = None
        self._number = 0
        self._rows, self._volumes = SentKeys(KEPT_ROW_BYTES), SentKeys(KEPT_VOLUME_BYTES)
        self._known: list[tuple[weakref.ref[Tensor], int, str, str]] = []
        """What was sent and lives, its versions, kinds and keys."""
        self._given_up = False
        self._error: BaseException | None = None
        self.result: Result | None = None
        """When it is closed, of a job that went well; its folder is gone."""
        self._thread = threading.Thread(target=self._run, args=(run,), name="wan-evaluations", daemon=True)
        self._thread.start()

    def evaluate(self, x: Tensor, timesteps: Tensor, samples: Sequence[SampleConditioning]) -> Tensor:
        """As `Evaluator.evaluate`. Raises ValueError for what no model takes."""
        import torch

        for name, given in (("x", x), ("timesteps", timesteps)):
            if given.dtype != torch.float32 or given.device.type != "cpu":
                raise ValueError(f"{name} is {given.dtype} on {given.device}; it must be torch.float32 on the CPU")
        expected = (x.shape[0], x.shape[2]) if timesteps.dim() == 2 else (x.shape[0],)
        if tuple(timesteps.shape) != expected:
            raise ValueError(f"timesteps have shape {list(timesteps.shape)}; these latents call for {list(expected)}")
        if len(samples) <= MAX_SAMPLES:
            return self._evaluate(x, timesteps, samples)
        order = _pairs([sample.conditional for sample in samples])
        parts = []
        for first in range(0, len(order), MAX_SAMPLES):
            some = order[first : first + MAX_SAMPLES]
            parts.append(self._evaluate(x[some], timesteps[some], [samples[i] for i in some]))
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def _evaluate(self, x: Tensor, timesteps: Tensor, samples: Sequence[SampleConditioning]) -> Tensor:
        """As `evaluate`, of what the ranks compute at a time."""
        import torch

        tensors: dict[str, Tensor] = {}

        def key(kind: str, told: Tensor) -> str:
            tensors[found := self._key(kind, told)] = told
            return found

        def of_kind(kind: str, given: list[tuple[SampleTold, ...]]) -> ToldKeys:
            keys = tuple(tuple(key(kind, one.values) for one in some) for some in given)
            return ToldKeys(
                kind=kind, keys=keys, strengths=tuple(tuple(one.strength for one in some) for some in given)
            )

        texts = tuple(key("text", sample.text) for sample in samples)
        given = {kind: [sample.told[kind] for sample in samples if sample.told.get(kind)] for kind in KINDS}
        told = tuple(of_kind(kind, some) for kind, some in given.items() if some)
        asked = Evaluation(shape=tuple(x.shape), by_frame=timesteps.dim() == 2, texts=texts, told=told)
        rows, volumes = asked.rows, asked.volumes
        missing = self._rows.missing(rows) + self._volumes.missing(volumes)
        evaluation = replace(asked, sent=tuple(_sent(key, tensors[key]) for key in missing))
        self._ask(evaluation, [_bytes(part) for part in (x, timesteps, *(tensors[key] for key in missing))])
        self._rows.use(rows, evaluation.sent)
        self._volumes.use(volumes, evaluation.sent)
        try:
            self._wait()
        except BaseException:
            # What is still computed is of no use to anybody.
            self._given_up = True
            raise
        channels, data = self._memory.velocity(evaluation)
        batch, _, *size = evaluation.shape
        return torch.frombuffer(data, dtype=torch.float32).view(batch, channels, *size)

    def close(self) -> None:
        """No further evaluation is wanted: its processes rest or end. A second call does nothing."""
        if self._thread.is_alive() and not self._given_up:
            self._ask(None)
        self._thread.join()
        if self.result is not None:
            self.result.remove()
        self._bell.close()
        self._memory.close()

    def _run(self, run: Run) -> None:
        try:
            self.result = run(self._write, lambda: self._given_up)
        except BaseException as error:
            self._error = error
        finally:
            ring(self._bell.path)

    def _write(self, inputs: Path) -> None:
        """Tells the ranks where to look, in the folder of the job; a second time if it starts again."""
        folder = JobDir(inputs.parent)
        paths = {"memory": str(self._memory.path), "answers": str(self._bell.path)}
        folder.write_json(folder.evaluations, paths)
        self._folder = folder

    def _ask(self, evaluation: Evaluation | None, parts: Sequence[memoryview] = ()) -> None:
        self._memory.ask(Request(number=self._number + 1, evaluation=evaluation), parts)
        self._number += 1
        if self._folder is not None:
            ring_all(self._folder.bells())

    def _wait(self) -> None:
        """Until it is answered. Raises what has ended the job."""
        while self._memory.answered != self._number:
            running = self._thread.is_alive()
            if not running and self._memory.answered != self._number:
                raise self._error or JobError("the processes have ended, though the sampling has not")
            if running:
                self._bell.wait(LOOK_AGAIN)

    def _key(self, kind: str, told: Tensor) -> str:
        """Of what it holds now, as one of a kind; not computed twice for one that is unchanged."""
        self._known = [known for known in self._known if known[0]() is not None]
        for known, version, of, key in self._known:
            if known() is told and (version, of) == (told._version, kind):
                return key
        digest = hashlib.sha256(f"{kind} {told.dtype} {tuple(told.shape)}".encode())
        digest.update(_bytes(told))
        self._known.append((weakref.ref(told), told._version, kind, digest.hexdigest()))
        return digest.hexdigest()


def _pairs(conditional: Sequence[bool]) -> list[int]:
    """The samples in the order in which two at a time are computed: of the prompt, of the negative prompt."""
    order = list(range(len(conditional)))
    prompt = [index for index in order if conditional[index]]
    negative = [index for index in order if not conditional[index]]
    if len(prompt) != len(negative):
        return order
    return [index for pair in zip(prompt, negative, strict=True) for index in pair]


def _sent(key: str, told: Tensor) -> SentTensor:
    return SentTensor(key=key, shape=tuple(told.shape), dtype=str(told.dtype).removeprefix("torch."))


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    flat = tensor.detach().reshape(-1)
    if flat.stride(0) != 1:
        # One value counts as contiguous whatever lies behind it.
        flat = flat.clone(memory_format=torch.contiguous_format)
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view
