"""A machine of two consumer GPUs, as nvidia-smi tells it; and what the doctor says, as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from patience import COMES_UP
from wan_pack.distributed.doctor import exchange

SMI = """#!/bin/sh
case "$*" in
*driver_version*) printf '580.65.06\\n580.65.06\\n' ;;
*index,uuid,name*) printf '0, GPU-a, NVIDIA RTX 4090, 24564, 24000\\n1, GPU-b, NVIDIA RTX 4090, 24564, 1000\\n' ;;
*compute-apps*) printf 'GPU-b, 4242, /usr/bin/blender, 20000\\n' ;;
*"topo -m"*) printf '\\tGPU0\\tGPU1\\tCPU Affinity\\nGPU0\\t X \\tPHB\\t0-31\\nGPU1\\tPHB\\t X \\t0-31\\n' ;;
*"topo -p2p"*) printf ' \\tGPU0\\tGPU1\\n GPU0\\tX\\tCNS\\n GPU1\\tCNS\\tX\\n\\nLegend:\\n\\n  X    = Self\\n' ;;
*) exit 2 ;;
esac
"""


def texts(findings: Any) -> str:
    return "\n".join(f"{finding.level} {finding.topic}: {finding.text} / {finding.remedy}" for finding in findings)


def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Lets `script` be the processes that exchange: `sys.executable -u PACK exchange FOLDER RANK`.

    Nothing is said to hang, unless a test has it wait for less.
    """
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nrank=$5\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(exchange.sys, "executable", str(program))
    monkeypatch.setattr(exchange, "START_TIMEOUT", COMES_UP)
    monkeypatch.setattr(exchange, "TIMEOUT", COMES_UP)
