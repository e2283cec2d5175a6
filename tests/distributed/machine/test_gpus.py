"""Which GPUs a job gets, on machines that this one is not."""

from __future__ import annotations

import subprocess

import pytest
from wan_pack.distributed.machine import nvidia_smi
from wan_pack.distributed.machine.gpus import choose_gpus, compute_capabilities, list_gpus, suitable_gpus

LISTING = "\n".join(f"{i}, GPU-{i}{i}{i}, NVIDIA H200, 143771, {140000 - i}" for i in range(4))


def machine(monkeypatch: pytest.MonkeyPatch, listing: str | None) -> None:
    """nvidia-smi prints `listing`, or is not there."""

    def smi(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        if listing is None:
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, 0, listing.encode(), b"")

    monkeypatch.setattr(nvidia_smi, "ask_program", smi)


def test_listing(monkeypatch: pytest.MonkeyPatch):
    machine(monkeypatch, LISTING)
    assert [gpu.index for gpu in list_gpus()] == ["0", "1", "2", "3"]
    assert str(list_gpus()[1]) == "1 NVIDIA H200 (137 of 140 GiB free)"
    assert (list_gpus()[1].free_bytes, list_gpus()[1].total_bytes) == (139999 << 20, 143771 << 20)
    machine(monkeypatch, "name, GPU-000, H200, 1, 1\n7, GPU-777, H200\n" + LISTING)
    assert [gpu.uuid for gpu in list_gpus()] == ["GPU-000", "GPU-111", "GPU-222", "GPU-333"]
    machine(monkeypatch, "No devices were found")
    assert list_gpus() == []


def test_a_gpu_that_shares_the_hosts_memory_is_one(monkeypatch: pytest.MonkeyPatch):
    machine(monkeypatch, "0, GPU-000, NVIDIA GB10, [N/A], [N/A]")
    assert choose_gpus(0) == (1, ("0",))
    assert str(list_gpus()[0]) == "0 NVIDIA GB10 (memory unknown)"


@pytest.mark.parametrize(
    ("count", "ids", "visible", "chosen"),
    [
        (0, "", None, ("0", "1", "2", "3")),
        (2, "", None, ("0", "1")),
        (0, "3,1", None, ("3", "1")),
        (1, "GPU-222", None, ("2",)),
        (0, "", "2,3", ("2", "3")),
        (1, "", "GPU-3", ("3",)),
        (0, "", "1,-1,2", ("1",)),
        (0, "", "MIG-8a1f", ("MIG-8a1f",)),
        (3, "", "MIG-8a1f, 1 ,MIG-9", ("MIG-8a1f", "1", "MIG-9")),
        (0, "", "", ()),
        (0, "", "2,,3", ("2",)),
        (3, " 3, GPU-111 ,,0, ", None, ("3", "1", "0")),
        (0, "", "-1", ()),
    ],
)
def test_choice(monkeypatch: pytest.MonkeyPatch, count: int, ids: str, visible: str | None, chosen: tuple[str, ...]):
    machine(monkeypatch, LISTING)
    assert choose_gpus(count, ids, visible) == (len(chosen) or 1, chosen)


def test_a_small_gpu_is_only_taken_when_asked_for(monkeypatch: pytest.MonkeyPatch):
    machine(monkeypatch, LISTING + f"\n4, GPU-444, NVIDIA A, {143771 // 2}, 4000")
    assert choose_gpus(0) == (4, ("0", "1", "2", "3"))
    machine(monkeypatch, LISTING + f"\n4, GPU-444, NVIDIA A, {143771 // 2 + 1}, 4000")
    assert choose_gpus(0) == (5, tuple("01234")), "half of the largest one's memory"
    machine(monkeypatch, LISTING + "\n4, GPU-444, NVIDIA T400, 4096, 4000")
    assert choose_gpus(0) == (4, ("0", "1", "2", "3"))
    assert choose_gpus(0, "4") == (1, ("4",))
    assert choose_gpus(5) == (5, ("0", "1", "2", "3", "4"))


@pytest.mark.parametrize(
    ("count", "ids", "visible", "words"),
    [
        (5, "", None, r"gpu_count is 5; it must be 1 to 4.*NVIDIA H200"),
        (2, "", "3", r"gpu_count is 2; it must be 1 to 1"),
        (0, "", "7", r"CUDA_VISIBLE_DEVICES is '7', which names none of: 0 NVIDIA"),
        (0, "7", None, "gpu_ids is '7'; it must name different GPUs of: 0 NVIDIA"),
        (0, "1,1", None, "must name different GPUs"),
        (3, "0,1", None, "gpu_count is 3, but gpu_ids names 2"),
        (0, "1; rm -rf /", None, "must name different GPUs"),
        (-1, "", None, r"gpu_count is -1"),
        (65, "", None, r"gpu_count is 65"),
        (0, ",".join(map(str, range(65))), None, "gpu_ids is .*; it must be at most 64 GPUs"),
    ],
)
def test_bad_choices(monkeypatch: pytest.MonkeyPatch, count: int, ids: str, visible: str | None, words: str):
    machine(monkeypatch, LISTING)
    with pytest.raises(ValueError, match=words):
        choose_gpus(count, ids, visible)


def test_without_a_gpu_there_are_cpu_processes(monkeypatch: pytest.MonkeyPatch):
    for listing in (None, ""):
        machine(monkeypatch, listing)
        assert choose_gpus(0) == (1, ())
        assert choose_gpus(3) == (3, ()) and choose_gpus(8) == (8, ())
        assert choose_gpus(0, visible="7") == (1, ()), "a variable that names nothing is no error where nothing is"
        with pytest.raises(ValueError, match="gpu_count is 9; without a GPU"):
            choose_gpus(9)
        with pytest.raises(ValueError, match="gpu_ids is '0', but no GPU"):
            choose_gpus(1, "0")


def test_a_hanging_driver_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    def hang(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(nvidia_smi, "ask_program", hang)
    assert list_gpus() == []


@pytest.mark.parametrize("count", [-1, 65])
def test_a_number_of_gpus_beyond_the_bounds_is_refused(count: int):
    with pytest.raises(ValueError, match=rf"gpu_count is {count}; it must be 0 \(all\) to 64"):
        suitable_gpus(count)


def test_compute_capabilities_of_what_can_be_read(monkeypatch: pytest.MonkeyPatch):
    """By index and UUID; a line that makes no sense hides no other."""
    machine(monkeypatch, "9.0\n0, GPU-0, 9.0\n1, GPU-1, [N/A]\nan error, 8.9\n2, GPU-2, 12.1\n3, GPU, 3, 8.6")
    assert compute_capabilities() == {"0": (9, 0), "GPU-0": (9, 0), "2": (12, 1), "GPU-2": (12, 1)}
    machine(monkeypatch, None)
    assert compute_capabilities() == {}
