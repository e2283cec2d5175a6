"""What connects the machine's GPUs, by `nvidia-smi topo -m`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from . import nvidia_smi

NVLINK, PCIE, HOST, UNKNOWN = "nvlink", "pcie", "host", "unknown"
KINDS = {"PIX": PCIE, "PXB": PCIE, "PHB": HOST, "NODE": HOST, "SYS": HOST, "SOC": HOST}
"""nvidia-smi's word -> ours: through PCIe switches only, or through the host's bridges and processors. NV<links> is
beside the table."""
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_GPU = re.compile(r"GPU(\d+)")
_NVLINKS = re.compile(r"NV\d+")


@dataclass(frozen=True, slots=True)
class Topology:
    """Links between the GPUs of one machine."""

    words: Mapping[tuple[str, str], str]
    """(index, index) of nvidia-smi -> its own word, such as NV18 or PHB."""

    def link(self, index_a: str, index_b: str, /) -> str:
        """nvlink, pcie (through switches), host (through the processors) or unknown."""
        word = self.words.get((index_a, index_b), "")
        return NVLINK if _NVLINKS.fullmatch(word) else KINDS.get(word, UNKNOWN)


def read_topology() -> Topology:
    """Of this machine; every link is unknown where nvidia-smi is missing, fails or takes too long."""
    try:
        return ask_topology()
    except nvidia_smi.FAILURES:
        return Topology({})


def ask_topology() -> Topology:
    """Of this machine. Raises one of `nvidia_smi.FAILURES`."""
    return parse_topology(nvidia_smi.ask("topo", "-m"))


def read_peer_access() -> Mapping[tuple[str, str], str]:
    """(index, index) -> OK, or nvidia-smi's word for why one cannot read the other's memory, such as CNS (chipset).

    Empty where nvidia-smi does not say.
    """
    try:
        return parse_topology(nvidia_smi.ask("topo", "-p2p", "r")).words
    except nvidia_smi.FAILURES:
        return {}


def parse_topology(text: str) -> Topology:
    """Reads the matrix that `nvidia-smi topo -m` prints; what is no part of it is left out.

    The first line names the columns (GPUs, network cards, then affinities); each row starts with its own name.
    """
    # The header is underlined by escape codes, also when nobody looks at a terminal.
    rows = [_ESCAPES.sub("", line).split() for line in text.splitlines()]
    header = next((row for row in rows if row and _GPU.fullmatch(row[0])), [])
    words = {}
    for row in rows[rows.index(header) + 1 :] if header else []:
        name = _GPU.fullmatch(row[0]) if row else None
        if name is None:
            continue
        # Cells of one word each up to the affinities, whose own names and values may be several.
        for column, word in zip(header, row[1:], strict=False):
            other = _GPU.fullmatch(column)
            if other is not None and other[1] != name[1]:
                words[name[1], other[1]] = word
    return Topology(words)
