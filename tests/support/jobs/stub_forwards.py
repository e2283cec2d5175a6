"""Takes the place of rank/worker.py in a copy of the pack: ranks without torch that answer evaluations.

The velocity is the latents themselves; each sample takes `seconds`. At the evaluation `at` of fault.json rank 1 does
what its action says. Not imported by tests.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from ..group.evaluation_memory import AnsweringEnd
from ..machine.bell import Bell, BellRope

FAULT = json.loads((Path(__file__).parent / "fault.json").read_text())


def main(group, folder, files, session):  # type: ignore[no-untyped-def]
    rank, job = int(os.environ["RANK"]), folder.read_job()
    paths = folder.read_json(folder.evaluations)
    memory, answers = AnsweringEnd(Path(paths["memory"])), BellRope(Path(paths["answers"]))
    done = 0
    files.progress("denoise", 0, 0)
    with Bell(folder.bell(rank)) as bell:
        while not folder.stop.exists():
            if memory.asked == done:
                bell.wait(0.1)
                files.progress("denoise", done, 0)
                continue
            request, _ = memory.read()
            done += 1
            if request.evaluation is None:
                if rank == 0:
                    result = {"id": job.id, "version": job.version, "evaluations": done - 1}
                    folder.write_json(folder.result, result)
                break
            if done == FAULT.get("at") and rank == 1:
                ACTIONS[FAULT["action"]]()
            time.sleep(FAULT.get("seconds", 0.0) * request.evaluation.shape[0])
            # Real ones wait for one another.
            (folder.path / f"rank{rank}-{done}").touch()
            while not (folder.path / f"rank{1 - rank}-{done}").exists():
                time.sleep(0.01)
            latents, _, _ = memory.parts(request.evaluation)
            if rank == 0:
                memory.write(request.evaluation, request.evaluation.shape[1], bytes(latents))
                memory.say_answered(done)
                answers.ring()
            files.progress("denoise", done, 0)
    return session


def fail() -> None:
    raise ValueError("the weights of layer 3 are bad")


def stuck_in_a_test() -> None:
    time.sleep(600)


def full() -> None:
    raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""

    __module__ = "torch"


ACTIONS = {"raise": fail, "hang": stuck_in_a_test, "full": full}
