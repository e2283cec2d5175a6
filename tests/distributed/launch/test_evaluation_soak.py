"""Many samplings whose models, LoRAs and seeds change, some cancelled, some whose ranks are killed: every other one is
right, and nothing is left.

`make soak` runs it long (SOAK_SAMPLINGS=100); without that, a sample.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluating import Known, Warm, inputs, write_lora
from patience import AT_ONCE
from shared_memory import orphans
from wan_pack.distributed.job.errors import JobCancelled
from wan_pack.distributed.launch.launcher import JobFailed

SAMPLINGS = int(os.environ.get("SOAK_SAMPLINGS", "14"))
FAULT_EVERY = 4 if SAMPLINGS < 100 else 5
LARGE = (5, 48, 48)
"""An evaluation long enough for something to happen to it."""


def cancelled(warm: Warm, name: str, seconds: float) -> None:
    """Between two evaluations or in one, as it comes."""
    evaluator = warm.open(name)
    threading.Timer(seconds, setattr, [warm, "cancelled", True]).start()
    evaluate_until(warm, evaluator.evaluate, name, JobCancelled)
    evaluator.close()
    warm.cancelled = False


def killed(warm: Warm, name: str, seconds: float) -> None:
    ranks = warm.sample(name)
    evaluator = warm.open(name)
    evaluator.evaluate(*inputs(warm.models[name].config, 0))
    threading.Timer(seconds, ranks[1].kill).start()
    error = evaluate_until(warm, evaluator.evaluate, name, JobFailed)
    evaluator.close()
    assert str(error).startswith("rank 1 was killed by SIGKILL"), error


def killed_at_rest(warm: Warm, name: str, seconds: float) -> None:
    """Nobody is told: the next sampling starts other processes."""
    ranks = warm.sample(name)
    ranks[0].kill()
    assert warm.sample(name) != ranks


def released(warm: Warm, name: str, seconds: float) -> None:
    warm.sample(name)
    assert warm.pool.release() == 1


def evaluate_until(warm: Warm, evaluate: Callable[..., object], name: str, kind: type[Exception]) -> Exception:
    given, started = inputs(warm.models[name].config, 1, shape=LARGE), time.monotonic()
    with pytest.raises(kind) as caught:
        while time.monotonic() - started < 60:
            evaluate(*given)
    return caught.value


FAULTS = {"cancelled": cancelled, "killed": killed, "killed at rest": killed_at_rest, "released": released}


def held() -> dict[str, int]:
    """What could grow in this process, or be left over by it."""
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "shared memory": len(orphans()),
    }


@pytest.mark.ranks
@pytest.mark.processes
def test_many_samplings_with_faults_leave_nothing_behind(tmp_path: Path):
    rng, counts = random.Random(1), Counter[str]()
    models = {name: Known.make(tmp_path / name, name) for name in ("T2V", "I2V")}
    models["T2V, the other"] = Known.make(tmp_path / "other", "T2V", seed=9)
    loras = [write_lora(tmp_path / f"lora{seed}.safetensors", seed) for seed in (1, 2)]
    warm = Warm(tmp_path, models)
    warm.sample()
    warm.pool.release()
    before, todo = held(), []
    for number in range(1, SAMPLINGS + 1):
        name = rng.choice(list(models))
        if number % FAULT_EVERY == 0:
            todo = todo or rng.sample(list(FAULTS), len(FAULTS))
            fault = todo.pop()
            FAULTS[fault](warm, name, rng.uniform(0.0, 0.6))
            counts[fault] += 1
            continue
        chosen = tuple((lora, round(rng.uniform(-1, 1), 2)) for lora in rng.sample(loras, rng.randint(0, 2)))
        warm.sample(name, chosen, seed=number, cfg_parallel=rng.random() < 0.5)
        counts["good"] += 1
    warm.pool.release()
    print(dict(counts))
    assert counts.total() == SAMPLINGS
    # A thread that was told to end may need a moment.
    deadline = time.monotonic() + AT_ONCE
    while held() != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert held() == before
    assert not list((tmp_path / "jobs").iterdir())
