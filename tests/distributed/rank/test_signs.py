"""What a rank tells the launcher, and in which order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from patience import AT_ONCE
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.machine.processes import Process
from wan_pack.distributed.rank import signs
from wan_pack.distributed.rank.signs import RankFiles


def test_that_it_is_done_is_the_last_that_a_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder may be gone a moment later, and with it the rank that would still write into it."""
    folder, written = JobDir(tmp_path), []
    monkeypatch.setattr(JobDir, "write_json", lambda folder, path, value: written.append(path))
    RankFiles(folder, 0).progress("done", 0, 0)
    assert written == [folder.progress, folder.alive(0)]


def test_of_what_is_read_only_some_is_told_and_of_steps_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tensors are read by the hundred a second: the first and the last count, and one now and then."""
    folder, written = JobDir(tmp_path), list[tuple[str, int]]()
    monkeypatch.setattr(
        JobDir, "write_json", lambda folder, path, value: written.append((value["phase"], value["step"]))
    )
    for interval, told in ((1e9, [0, 5]), (0.0, [0, 1, 2, 3, 4, 5])):
        monkeypatch.setattr(signs, "MIN_INTERVAL", interval)
        files = RankFiles(folder, 1)
        for phase in ("load", "denoise", "load"):
            written.clear()
            for step in range(6):
                files.progress(phase, step, 5)
            assert written == [(phase, step) for step in (told if phase == "load" else range(6))]


def test_a_traceback_is_in_the_log_before_anybody_hears_of_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Who hears of it ends the rank, whose way out may take longer: it leaves its group first."""
    heard: list[str] = []
    monkeypatch.setattr(signs, "leave_words", lambda path, record: heard.append(capfd.readouterr().err))
    files = RankFiles(JobDir(tmp_path), 0)
    for message in ("the first", "a consequence"):
        try:
            raise ValueError(message)
        except ValueError as error:
            files.error(error)
    (log,) = heard
    assert "in test_a_traceback_is_in_the_log" in log and log.endswith("ValueError: the first\n")
    assert capfd.readouterr().err == ""


def test_what_a_start_consists_of_is_noted_with_its_times(tmp_path: Path):
    files = RankFiles(JobDir(tmp_path), 0)
    files.own_start()
    with pytest.raises(ValueError, match="in the midst of it"), files.span("outer"), files.span("inner"):
        raise ValueError("in the midst of it")
    (process, inner, outer) = files.spans
    assert [name for name, *_ in files.spans] == ["process", "inner", "outer"]
    assert outer[1] <= inner[1] and inner[2] <= outer[2]
    # As old as the system says, give or take its clock's ticks.
    assert abs(process[1] + process[2] - outer[1]) < AT_ONCE and process[2] > 0


def test_an_error_is_kept_in_the_ranks_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """With where it was; of what is very long the beginning of the message and the end of the traceback."""
    kept: list[dict[str, Any]] = []
    monkeypatch.setattr(signs, "leave_words", lambda path, record: kept.append(record | {"path": path}))
    monkeypatch.setattr(signs.time, "time_ns", lambda: 77)
    folder = JobDir(tmp_path)
    errors = (ValueError("a" * 20_000), "ValueError"), (JobError("b"), f"{JobError.__module__}.JobError")
    for number, (error, name) in enumerate(errors):
        files = RankFiles(folder, number)
        files.phase, files.step = "load", 3
        files.error(error)
        record = kept[number]
        assert (record["rank"], record["type"], record["phase"], record["step"]) == (number, name, "load", 3)
        assert record["time_ns"] == 77 and record["path"] == folder.error(number)
    first, second = kept
    assert first["message"] == "a" * (16 << 10) and first["traceback"] == "a" * ((8 << 10) - 1) + "\n"
    assert second["message"] == "b" and second["traceback"].endswith("JobError: b\n")
    capfd.readouterr()


def test_who_reads_the_log_has_gone_and_the_error_is_kept_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError

    kept: list[str] = []
    monkeypatch.setattr("builtins.print", gone)
    monkeypatch.setattr(signs, "leave_words", lambda path, record: kept.append(record["message"]))
    monkeypatch.setattr(signs.os, "_exit", lambda code: kept.append(f"ends with {code}"))
    RankFiles(JobDir(tmp_path), 0).end_process(ValueError("no"))
    assert kept == ["no", "ends with 1"]


def test_how_old_a_process_is_is_counted_from_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """500 ticks after boot, of which a second has 100; it is the 12th second by now."""
    files = RankFiles(JobDir(tmp_path), 0)
    files._process = Process(1, 500)
    clock = SimpleNamespace(
        CLOCK_BOOTTIME=7, clock_gettime=lambda which: 12.0 if which == 7 else 0.0, time=lambda: 1000.0
    )
    monkeypatch.setattr(signs, "time", clock)
    monkeypatch.setattr(signs.os, "sysconf", lambda name: 100 if name == "SC_CLK_TCK" else 0)
    files.own_start()
    times = iter([20.0, 22.5])
    clock.time = lambda: next(times)
    with files.span("inside"):
        pass
    assert files.spans == [("process", 993.0, 7.0), ("inside", 20.0, 2.5)]


def test_tensors_are_told_five_times_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a user looks at; and that a phase begins, whenever that is."""
    clock, written = SimpleNamespace(now=5.0), list[float]()
    monkeypatch.setattr(signs, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(JobDir, "write_json", lambda folder, path, value: written.append(clock.now))
    files = RankFiles(JobDir(tmp_path), 1)
    for number in range(9):
        clock.now = 5 + number / 8
        files.progress("load", 1 + number, 100)
    assert written == [5.0, 5.25, 5.5, 5.75, 6.0]


def test_who_waits_for_the_end_is_woken_by_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rung: list[Path] = []
    monkeypatch.setattr(signs, "ring", rung.append)
    folder = JobDir.create(tmp_path)
    for phase in ("denoise", "done"):
        RankFiles(folder, 1).progress(phase, 1, 1)
    assert rung == [folder.done_bell]
    folder.remove()
