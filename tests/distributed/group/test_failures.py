"""Which of several failing ranks is named, and in which words; of files alone, without a rank."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wan_pack.distributed.group import agent
from wan_pack.distributed.group.failures import RankFailure, advice, read_failures, root_cause
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.job.progress import place


@pytest.fixture
def folder(tmp_path: Path) -> JobDir:
    (tmp_path / "logs").mkdir()
    return JobDir(tmp_path)


def own(rank: int, message: str = "no", kind: str = "ValueError", **fields: Any) -> RankFailure:
    return RankFailure(rank=rank, type=kind, message=message, **fields)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (RankFailure(rank=3, type="torch.cuda.Error", message="a.b"), "rank 3: Error: a.b"),
        (RankFailure(rank=2, signal="SIGSEGV"), "rank 2 was killed by SIGSEGV"),
        (RankFailure(rank=2, signal="SIGKILL"), "rank 2 was killed by SIGKILL, often by the system's out-of-memory"),
        (RankFailure(rank=1, exitcode=7), "rank 1 ended with exit code 7 and left no error"),
        (RankFailure(rank=1), "rank 1 ended and left no error"),
    ],
)
def test_a_rank_is_named_with_its_end(failure: RankFailure, words: str):
    assert failure.headline.startswith(words)


ORIGINS = [
    # Each is the origin of all that come behind it.
    RankFailure(rank=5, signal="SIGKILL", seconds=100.0),
    own(4, "the file is damaged", time_ns=9),
    RankFailure(rank=3, signal="SIGABRT", seconds=100.0),
    own(2, "Connection closed by peer", "RuntimeError", time_ns=1),
    RankFailure(rank=1, signal="SIGTERM", seconds=100.0),
]


def test_the_origin_is_told_from_what_followed():
    for first, failure in enumerate(ORIGINS):
        assert root_cause(ORIGINS[first:]) is root_cause([*ORIGINS[:first:-1], failure]) is failure
    assert root_cause([RankFailure(rank=0, signal="SIGINT", seconds=100.0), ORIGINS[3]]) is ORIGINS[3]
    assert root_cause([]) is None
    late = RankFailure(rank=0, signal="SIGKILL", seconds=102.0)
    assert root_cause([late, ORIGINS[0]]) is ORIGINS[0] and root_cause([late, *ORIGINS[3:]]) is ORIGINS[3]
    # In the agent's whole seconds, one second is no order.
    almost = RankFailure(rank=0, signal="SIGKILL", seconds=101.0)
    assert root_cause([ORIGINS[0], almost]) is almost
    # In all of torch's words.
    for kind in ("torch.distributed.DistNetworkError", "torch._C._DistBackendError"):
        echo = own(0, "Broken pipe", kind)
        assert echo.echo and root_cause([echo, own(3)]).rank == 3  # type: ignore[union-attr]
    # No words of a peer, whatever they say: memory, and errors that torch does not raise.
    for cause in (own(3, "CUDA out of memory: timeout", "torch.distributed.DistBackendError"), own(3, "timed out")):
        assert root_cause([ORIGINS[3], cause]) is cause


def test_among_equals_the_earliest_counts():
    assert root_cause([own(0, time_ns=7), own(1, time_ns=5), own(2, time_ns=6)]) == own(1, time_ns=5)
    assert root_cause([own(1, time_ns=5), own(0, time_ns=5)]) == own(0, time_ns=5)


@pytest.mark.parametrize(
    ("message", "kind", "memory"),
    [("CUDA out of memory", "x", True), ("", "OutOfMemoryError", True), ("Cannot allocate memory", "OSError", True),
     ("", "MemoryError", True), ("memory", "ValueError", False)],
)  # fmt: skip
def test_memory_that_ran_out(message: str, kind: str, memory: bool):
    assert own(0, message, kind).out_of_memory is memory


def test_what_agent_and_ranks_left_is_put_together(folder: JobDir):
    error = {"type": "ValueError", "message": "no", "phase": "load", "step": 2, "time_ns": 5}
    folder.write_json(folder.error(1), error)
    folder.write_json(folder.alive(0), {"phase": "denoise", "step": 4, "pid": 1})
    folder.write_json(folder.alive(1), {"phase": "decode", "step": 9})
    folder.write_json(folder.failures, {"failures": [
        {"rank": 0, "signal": "SIGKILL", "seconds": 3}, {"rank": 1, "exitcode": 1, "seconds": 4.5},
        {"rank": 2, "exitcode": 1}, {"rank": "0"}, {}, 7,
    ]})  # fmt: skip
    assert read_failures(folder, 2) == [
        RankFailure(rank=1, exitcode=1, seconds=4.5, **error),
        RankFailure(rank=0, signal="SIGKILL", seconds=3, phase="denoise", step=4),
    ]


def test_what_was_said_in_memory_counts_before_what_was_said_later(folder: JobDir):
    """A full disk leaves no files; what the agent says of a rank first is how it ended by itself."""
    words = [
        {"failures": [{"rank": 0, "signal": "SIGSEGV"}]}, {"failures": [{"rank": 0, "signal": "SIGTERM"}]},
        {"rank": 1, "type": "", "message": "nothing"}, {"rank": 1, "type": "OSError", "message": "full", "step": 3},
        {"rank": 1, "type": "KeyError", "message": "later"}, {"rank": 5, "type": "KeyError"},
    ]  # fmt: skip
    folder.write_json(folder.failures, {"failures": [{"rank": 0, "signal": "SIGKILL"}]})
    lost = [RankFailure(rank=0, signal="SIGHUP"), RankFailure(rank=2, signal="SIGBUS")]
    assert read_failures(folder, 3, words, lost) == [
        RankFailure(rank=0, signal="SIGSEGV"),
        RankFailure(rank=1, type="OSError", message="full", step=3),
        RankFailure(rank=2, signal="SIGBUS"),
    ]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"failures": 3}', '{"failures": [[0]]}', "\xff"])
def test_damaged_files_are_missing_files(folder: JobDir, text: str):
    folder.failures.write_text(text, encoding="latin-1")
    folder.error(0).write_text(text, encoding="latin-1")
    assert read_failures(folder, 1) == []


def test_fields_of_another_type_are_left_out(folder: JobDir):
    folder.write_json(folder.error(0), {"type": "OSError", "message": 5, "phase": ["x"], "step": "3", "time_ns": None})
    assert read_failures(folder, 1) == [RankFailure(rank=0, type="OSError")]


def test_one_thing_to_try():
    assert "fewer frames" in advice("CUDA out of memory", "", out_of_memory=True, killed=False)
    assert "dmesg" in advice("", "", out_of_memory=False, killed=True)
    for text, log in (("No space left on device", ""), ("x", "OSError: File too large"), ("Disk quota exceeded", "")):
        assert "Free space" in advice(text, log, out_of_memory=False, killed=False)
    assert "NCCL_DEBUG" in advice("NCCL error", "", out_of_memory=False, killed=False)
    assert advice("x", "nccl", out_of_memory=False, killed=False) == ""


def test_a_rank_that_left_no_word_was_where_its_own_sign_of_life_says(folder: JobDir):
    for rank, (phase, step) in enumerate((("load", 0), ("denoise", 3), ("decode", 9))):
        folder.write_json(folder.alive(rank), {"phase": phase, "step": step})
    ended = [{"rank": rank, "exitcode": -9, "signal": "SIGKILL"} for rank in (1, 2)]
    found = read_failures(folder, 3, [{"failures": ended}])
    assert [(one.rank, one.phase, one.step) for one in found] == [(2, "decode", 9), (1, "denoise", 3)]


def test_how_ranks_end_that_their_agent_ends_with_itself_is_no_news(folder: JobDir, monkeypatch: pytest.MonkeyPatch):
    """Its main thread may see it before it is gone, as it sees a rank that ends of something else."""
    ended: Any = {0: SimpleNamespace(exitcode=-9, timestamp=1)}
    here = SimpleNamespace(pid=1, started=1, kill=lambda: None)
    monkeypatch.setattr(agent, "_ENDING", threading.Event())
    monkeypatch.setattr(agent, "Process", SimpleNamespace(of=lambda pid: here))
    monkeypatch.setattr(agent, "kill_all", lambda *_: agent._leave_failures(folder.failures, ended))
    agent.end_all(folder.path)
    assert not folder.failures.exists()
    agent._ENDING.clear()
    agent._leave_failures(folder.failures, ended)
    assert [one.signal for one in read_failures(folder, 1)] == ["SIGKILL"]


def test_where_agents_fail_what_ranks_say_of_others_is_no_origin():
    """They were ended with it."""
    echo, killed = ORIGINS[3], ORIGINS[4]
    assert root_cause([echo, killed]) is echo
    assert root_cause([echo, killed], agent_failed=True) is killed and root_cause([echo], agent_failed=True) is None


def test_a_place_is_told_where_it_is_known():
    assert own(0, phase="denoise", step=3).where == f"\nin {place('denoise', 3)}" and own(0).where == ""
