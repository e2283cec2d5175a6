"""How much memory of the host a job may take, by files as Linux writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from wan_pack.distributed.machine.host_memory import available_bytes

GIB = 2**30


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text(
        f"MemTotal: {64 << 20} kB\nMemFree: {1 << 20} kB\nMemAvailable: {60 << 20} kB\nHugePages_Total: 0\n"
    )
    return path


@pytest.fixture
def container(tmp_path: Path) -> Path:
    """One that may use 40 GiB and has 39 in use, most of it pages of model files that it has read."""
    folder = tmp_path / "cgroup"
    folder.mkdir()
    (folder / "memory.max").write_text(f"{40 * GIB}\n")
    (folder / "memory.current").write_text(f"{39 * GIB}\n")
    (folder / "memory.stat").write_text(
        f"anon {4 * GIB}\nfile {35 * GIB}\ninactive_file {30 * GIB}\nactive_file {GIB}\n"
    )
    return folder


def test_files_that_were_read_are_no_use_of_a_containers_memory(meminfo: Path, container: Path):
    assert available_bytes(meminfo, container) == 32 * GIB
    (container / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, container) == 60 * GIB


def test_what_the_system_does_not_tell(meminfo: Path, container: Path, tmp_path: Path):
    assert available_bytes(meminfo, tmp_path / "none") == 60 * GIB
    assert available_bytes(tmp_path / "none", container) is None
    (container / "memory.current").write_text(f"{90 * GIB}\n")
    assert available_bytes(meminfo, container) == 0


@pytest.mark.parametrize("text", ["MemAvailable: much kB\n", "MemAvailable:\n", "\n", "caf\u00e9 1 kB\n"])
def test_files_that_make_no_sense_tell_nothing(container: Path, tmp_path: Path, text: str):
    (tmp_path / "meminfo").write_text(text, encoding="utf-8")
    assert available_bytes(tmp_path / "meminfo", tmp_path / "none") is None
    (tmp_path / "meminfo").write_text("MemAvailable: 2 kB\n")
    (container / "memory.stat").write_text("inactive_file many\n")
    assert available_bytes(tmp_path / "meminfo", container) == 2048
