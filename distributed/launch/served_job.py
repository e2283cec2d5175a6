"""A job whose processes answer evaluations of this one."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..group.evaluation_memory import AskingEnd
from ..group.evaluation_request import Evaluation, Request, SentText, TextKeys
from ..job.errors import JobError
from ..job.evaluator import SampleConditioning
from ..job.job_folder import JobDir
from ..machine.bell import Bell, ring
from .result import Result

if TYPE_CHECKING:
    from torch import Tensor

LOOK_AGAIN = 1.0
"""Seconds after which an answer is looked for although nobody rang."""
MAX_KNOWN = 64
"""Texts whose keys are remembered."""


Run = Callable[[Callable[[Path], None], Callable[[], bool]], Result]
"""Runs a job to its end, given what writes into its folder and what asks whether nobody wants it any more."""


class ServedJob:
    """It runs on a thread of its own from now on. Not for several threads at once."""

    def __init__(self, run: Run) -> None:
        self._memory, self._bell = AskingEnd(), Bell()
        self._folder: JobDir | None = None
        self._number = 0
        self._keys = TextKeys()
        self._known: list[tuple[Tensor, int, str]] = []
        """Texts, their versions and their keys; the one that was used last is last."""
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
        by_frame = timesteps.dim() == 2
        pictures = [sample.picture for sample in samples if sample.picture is not None]
        told = [*(sample.text for sample in samples), *pictures]
        keys = [self._key(one) for one in told]
        texts = dict(zip(keys, told, strict=True))
        missing = self._keys.missing(keys)
        evaluation = Evaluation(
            shape=tuple(x.shape), by_frame=by_frame,
            texts=tuple(keys[: len(samples)]), pictures=tuple(keys[len(samples) :]),
            conditional=tuple(sample.conditional for sample in samples),
            sent=tuple(_sent(key, texts[key]) for key in missing),
        )  # fmt: skip
        expected = (x.shape[0], x.shape[2]) if by_frame else (x.shape[0],)
        if tuple(timesteps.shape) != expected:
            raise ValueError(f"timesteps have shape {list(timesteps.shape)}; these latents call for {list(expected)}")
        self._ask(evaluation, [_bytes(part) for part in (x, timesteps, *(texts[key] for key in missing))])
        self._keys.use(keys)
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
            for bell in self._folder.path.glob("bell-*"):
                ring(bell)

    def _wait(self) -> None:
        """Until it is answered. Raises what has ended the job."""
        while self._memory.answered != self._number:
            running = self._thread.is_alive()
            if not running and self._memory.answered != self._number:
                raise self._error or JobError("the processes have ended, though the sampling has not")
            if running:
                self._bell.wait(LOOK_AGAIN)

    def _key(self, text: Tensor) -> str:
        """Of what it holds now; not computed twice for one that is unchanged."""
        for at, (known, version, key) in enumerate(self._known):
            if known is text and version == text._version:
                self._known.append(self._known.pop(at))
                return key
        digest = hashlib.sha256(f"{text.dtype} {tuple(text.shape)}".encode())
        digest.update(_bytes(text))
        self._known = [*self._known, (text, text._version, digest.hexdigest())][-MAX_KNOWN:]
        return digest.hexdigest()


def _sent(key: str, text: Tensor) -> SentText:
    if text.dim() != 2:
        raise ValueError(f"a text has shape {list(text.shape)}; it must be [rows, channels]")
    rows, channels = text.shape
    return SentText(key=key, rows=rows, channels=channels, dtype=str(text.dtype).removeprefix("torch."))


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    flat = tensor.detach().reshape(-1)
    if flat.stride(0) != 1:
        # One value counts as contiguous whatever lies behind it.
        flat = flat.clone(memory_format=torch.contiguous_format)
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view
