"""The stacks of ranks that stand still, in their logs."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from wan_pack.distributed.group.signs_of_life import dump_stacks
from wan_pack.distributed.job.job_folder import JobDir

STACK = 'Current thread 0x0 (most recent call first):\n  File "expert.py", line 1 in step\n'


def test_a_stack_may_take_its_time_to_come(tmp_path: Path):
    """On a busy machine; of two ranks one prints at once."""
    folder = JobDir(tmp_path)
    folder.logs.mkdir()

    def rank(number: int) -> Any:
        def write() -> None:
            with folder.log(number).open("a") as log:
                log.write(STACK)

        folder.log(number).write_text("begins\n")
        process = SimpleNamespace(
            catches=lambda signal: True, kill=lambda signal: threading.Timer(number, write).start()
        )
        return SimpleNamespace(process=process, stopped=False)

    assert dump_stacks(folder, {0: rank(0), 1: rank(1)}) == dict.fromkeys((0, 1), '  File "expert.py", line 1 in step')
