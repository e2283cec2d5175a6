"""What connects GPUs, on machines that this one is not."""

from __future__ import annotations

import subprocess
from itertools import combinations
from pathlib import Path

import pytest
from wan_pack.distributed.machine import nvidia_smi
from wan_pack.distributed.machine.topology import Topology, parse_topology, read_peer_access, read_topology

LEGEND = """
Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NODE = Connection traversing PCIe as well as the interconnect between PCIe Host Bridges within a NUMA node
  PHB  = Connection traversing PCIe as well as a PCIe Host Bridge (typically the CPU)
  PXB  = Connection traversing multiple PCIe bridges (without traversing the PCIe Host Bridge)
  PIX  = Connection traversing at most a single PCIe bridge
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
  NIC1: mlx5_1
"""
ONE = "\t\x1b[4mGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\nGPU0\t X \t0-15\t0\t\tN/A\n" + LEGEND
TWO_CONSUMER = (
    """\t\x1b[4mGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tPHB\t0-31\t0\t\tN/A
GPU1\tPHB\t X \t0-31\t0\t\tN/A
"""
    + LEGEND
)
FOUR_PAIRS = (
    """\tGPU0\tGPU1\tGPU2\tGPU3\tmlx5_0\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV4\tPXB\tSYS\tPIX\t0-23,48-71\t0
GPU1\tNV4\t X \tSYS\tPIX\tSYS\t0-23,48-71\t0
GPU2\tPXB\tSYS\t X \tNODE\tSYS\t24-47,72-95\t1
GPU3\tSYS\tPIX\tNODE\t X \tSYS\t24-47,72-95\t1
mlx5_0\tPIX\tSYS\tSYS\tSYS\t X \t\t
"""
    + LEGEND
)


def eight_with_nics() -> str:
    """An NVSwitch machine: all pairs alike, network cards in rows and columns of their own."""
    gpus, nics = [f"GPU{i}" for i in range(8)], ["NIC0", "NIC1"]
    lines = ["\t" + "\t".join([*gpus, *nics, "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"])]
    for row in (*gpus, *nics):
        cells = [" X " if row == c else "SYS" if "NIC" in row + c else "NV18" for c in (*gpus, *nics)]
        lines.append("\t".join([row, *cells, *(("0-51", "0", "N/A") if row in gpus else ())]))
    return "\n".join(lines) + "\n" + LEGEND


@pytest.mark.parametrize(
    ("text", "links"),
    [
        (ONE, {}),
        (TWO_CONSUMER, {("0", "1"): "host"}),
        ("a warning of the driver\n\n" + TWO_CONSUMER, {("0", "1"): "host"}),
        # Rows of other things between those of GPUs.
        (TWO_CONSUMER.replace("GPU1\tPHB", "\nNIC0\tSYS\tSYS\nGPU1\tPHB"), {("0", "1"): "host"}),
        (
            FOUR_PAIRS,
            {
                ("0", "1"): "nvlink",
                ("0", "2"): "pcie",
                ("0", "3"): "host",
                ("1", "2"): "host",
                ("1", "3"): "pcie",
                ("2", "3"): "host",
            },
        ),
        (eight_with_nics(), {(str(a), str(b)): "nvlink" for a, b in combinations(range(8), 2)}),
    ],
)
def test_matrices(text: str, links: dict[tuple[str, str], str]):
    found = parse_topology(text)
    assert len(found.words) == 2 * len(links)
    for (a, b), link in links.items():
        assert (found.link(a, b), found.link(b, a)) == (link, link)


@pytest.mark.parametrize("text", ["", "No devices were found", LEGEND, "GPU0\nGPU1 NEW\n", TWO_CONSUMER[:40]])
def test_what_is_no_matrix_leaves_links_unknown(text: str):
    assert parse_topology(text).link("0", "1") == "unknown"


def test_a_gpu_that_the_matrix_does_not_have():
    assert parse_topology(TWO_CONSUMER).link("0", "MIG-8a1f") == "unknown"
    assert Topology({("0", "1"): "C2C"}).link("0", "1") == "unknown"


@pytest.mark.parametrize(
    "script", ["sleep 60", "exit 9", "head -c 2000 /dev/urandom"], ids=["sleeps", "fails", "garbage"]
)
def test_a_bad_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nexec {script}\n" if script != "exit 9" else "#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(nvidia_smi, "TIMEOUT", 0.5)
    assert read_topology().link("0", "1") == "unknown"


def test_the_tool_is_asked_for_the_matrix(monkeypatch: pytest.MonkeyPatch):
    def smi(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(
            command, 0, (TWO_CONSUMER if command[1:] == ["topo", "-m"] else "").encode(), b""
        )

    monkeypatch.setattr(nvidia_smi, "ask_program", smi)
    assert read_topology().link("1", "0") == "host"


@pytest.mark.parametrize(("code", "words"), [(0, {("0", "1"): "CNS", ("1", "0"): "OK"}), (9, {})])
def test_which_gpus_read_each_others_memory_is_asked_and_is_nothing_where_nobody_says(
    monkeypatch: pytest.MonkeyPatch, code: int, words: dict[tuple[str, str], str]
):
    matrix = " \tGPU0\tGPU1\n GPU0\tX\tCNS\n GPU1\tOK\tX\n"

    def smi(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert command[1:] == ["topo", "-p2p", "r"]
        return subprocess.CompletedProcess(command, code, matrix.encode(), b"")

    monkeypatch.setattr(nvidia_smi, "ask_program", smi)
    assert read_peer_access() == words
