"""What the user is told of GPU memory and time, and that asking for it holds nothing up."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from patience import AT_ONCE
from wan_pack.distributed.machine import nvidia_smi, usage
from wan_pack.distributed.machine.processes import Process
from wan_pack.distributed.machine.usage import Usage, UsageMonitor, all_gpus, gpu_usage, in_words, process_usage

LISTING = "\n".join(f"{i}, GPU-{i}{i}, {60000 + 1024 * i}, 81559, {97 + i}" for i in range(3)) + (
    "\n3, GPU-33, 100, 81559, [N/A]\n4, GPU-44, [N/A], [N/A], 3\nan error"
)


def machine(monkeypatch: pytest.MonkeyPatch, listing: str | Exception) -> None:
    """nvidia-smi prints this, or fails like this."""

    def smi(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        if isinstance(listing, Exception):
            raise listing
        return subprocess.CompletedProcess(command, 0, listing.encode(), b"")

    monkeypatch.setattr(nvidia_smi, "ask_program", smi)


def test_gpus_are_found_by_index_and_uuid(monkeypatch: pytest.MonkeyPatch):
    machine(monkeypatch, LISTING)
    first, last = gpu_usage(["GPU-11", "7", "4", "3"], all_gpus())
    assert first == Usage(name="GPU 1", used_bytes=61024 << 20, total_bytes=81559 << 20, percent=98)
    assert (last.name, last.percent) == ("GPU 3", None)


@pytest.mark.parametrize("error", [FileNotFoundError("nvidia-smi"), subprocess.TimeoutExpired("nvidia-smi", 5)])
def test_without_an_answer_there_is_nothing_to_say(monkeypatch: pytest.MonkeyPatch, error: Exception):
    machine(monkeypatch, error)
    assert all_gpus() == {}
    assert in_words([]) == ""


def test_a_line_that_makes_no_sense_hides_no_other(monkeypatch: pytest.MonkeyPatch):
    machine(monkeypatch, "an error\n0, GPU-0, [N/A], [N/A], 3\n1, GPU-1, 100, 81559, 5")
    assert set(all_gpus()) == {"1", "GPU-1"}


def test_words_stay_one_short_line(monkeypatch: pytest.MonkeyPatch):
    machine(monkeypatch, LISTING)
    gpus = all_gpus()
    assert in_words(gpu_usage("012", gpus)) == "3 GPUs: 58.6-60.6 of 80 GiB, 97-99 % busy"
    assert in_words(gpu_usage("0", gpus)) == "GPU 0: 58.6 of 80 GiB, 97 % busy"
    assert in_words(gpu_usage("3", gpus)) == "GPU 3: 0.1 of 80 GiB"
    assert in_words([Usage(name=f"rank {i}", used_bytes=1 << 30) for i in range(2)]) == "2 processes: 1.0 GiB"


def test_a_process_is_measured_until_it_is_gone():
    me = Process.of(os.getpid())
    assert me is not None
    (mine,) = process_usage([me, Process(2**22 + 1, 1)])
    assert mine.name == "rank 0"
    assert 1 << 20 < mine.used_bytes < 1 << 40
    assert mine.total_bytes is None


def test_a_reading_that_hangs_holds_nothing_up_and_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    reading, hung = [Usage(name="GPU 0", used_bytes=1)], threading.Event()
    answers = iter([reading])
    blocked = threading.Event()

    def read() -> list[Usage]:
        for answer in answers:
            return answer
        blocked.set()
        hung.wait(60)
        return []

    monitor = UsageMonitor(read, interval=0.01)
    assert monitor.latest() == []
    monitor.start()
    assert blocked.wait(AT_ONCE)
    assert monitor.latest() == reading
    monkeypatch.setattr(usage, "STALE", 0.0)
    assert monitor.latest() == []
    since = time.monotonic()
    monitor.stop()
    assert time.monotonic() - since < AT_ONCE
    hung.set()


def test_what_is_over_at_once_waits_for_no_reading(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(usage, "FIRST", 60.0)
    read: list[int] = []
    monitor = UsageMonitor(lambda: read.append(1) or [], interval=60.0)
    monitor.start()
    monitor.stop()
    # A busy machine's thread may need longer than `stop` waits for it.
    monitor._thread.join(AT_ONCE)
    assert read == [] and not monitor._thread.is_alive()


@pytest.mark.parametrize(("first", "interval"), [(600.0, 0.01), (0.01, 600.0)])
def test_the_first_reading_comes_soon_and_the_others_at_their_intervals(
    first: float, interval: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(usage, "FIRST", first)
    came = threading.Event()
    monitor = UsageMonitor(lambda: came.set() or [], interval=interval)
    waits: list[float | None] = []
    wait = monitor._stop.wait
    monkeypatch.setattr(monitor._stop, "wait", lambda seconds: (waits.append(seconds), wait(seconds))[1])
    monitor.start()
    assert came.wait(AT_ONCE)
    monitor.stop()
    monitor._thread.join(AT_ONCE)
    assert waits[:2] == [0.01, interval] and monitor._thread.daemon


def test_a_process_that_has_ended_hides_no_other(monkeypatch: pytest.MonkeyPatch):
    """Ranks keep their names. What is being reaped has an empty file, or none."""

    class Files(dict[str, str]):
        def __call__(self, path: str) -> SimpleNamespace:
            def read_text(encoding: str) -> str:
                if path not in self:
                    raise FileNotFoundError(path)
                return self[path]

            return SimpleNamespace(read_text=read_text)

    files = Files({"/proc/1/statm": "9 3 1", "/proc/3/statm": "", "/proc/4/statm": "9 x", "/proc/5/statm": "9 5 1"})
    monkeypatch.setattr(usage, "Path", files)
    found = process_usage([Process(pid, 7) for pid in (1, 2, 3, 4, 5)])
    page = os.sysconf("SC_PAGE_SIZE")
    assert [(one.name, one.used_bytes // page) for one in found] == [("rank 0", 3), ("rank 4", 5)]


def test_how_often_and_how_long_nvidia_smi_is_asked(monkeypatch: pytest.MonkeyPatch):
    """After half a second and then every two; no longer than five; and what it said ten seconds ago says nothing."""
    asked: list[float] = []
    now, waits = [100.0], list[float]()
    monkeypatch.setattr(nvidia_smi, "ask", lambda *_, timeout: (asked.append(timeout), LISTING)[1])
    monkeypatch.setattr(usage, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monitor = UsageMonitor(lambda: gpu_usage("0", all_gpus()))
    monkeypatch.setattr(monitor._stop, "wait", lambda seconds: (waits.append(seconds), len(waits) > 2)[1])
    monitor._run()
    assert waits == [0.5, 2.0, 2.0] and asked == [5.0, 5.0]
    for now[0], there in ((109.9, 1), (110.0, 0)):
        assert len(monitor.latest()) == there
    joined: list[Any] = []
    monitor._thread = SimpleNamespace(is_alive=lambda: not joined, join=joined.append)  # type: ignore[assignment]
    monitor.stop()
    monitor.stop()
    assert joined == [0.2] and monitor._stop.is_set()
