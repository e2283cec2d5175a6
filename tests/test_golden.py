"""Every golden case that this version runs, on every layout; and that a wrong result is noticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch
from safetensors.torch import load_file, save_file

WHOLE = "SOAK_GOLDEN" in os.environ


@pytest.mark.parametrize(
    ("world", "layouts"),
    [
        (2, "packed packed+fsdp symmetric+fsdp deepspeed packed+cfg"),
        (3, "packed packed+fsdp symmetric"),
        (4, "packed packed+fsdp deepspeed+fsdp packed+fsdp+cfg"),
        # Some of them hold no head of these small models.
        (7, "packed symmetric"),
        (8, "packed+fsdp+cfg symmetric+cfg"),
    ],
)
def test_agrees_with_the_official_code(golden_folder: Path, tmp_path: Path, world: int, layouts: str):
    """Several layouts in one group: the processes take longer to start than the cases to run. Whole loops run in the
    first layout and in one of the others; in all of them in `make soak` and by `python tests/golden.py`."""
    log, listed = tmp_path / "log", [golden.Layout.of(text) for text in layouts.split()]
    code = golden.run(golden_folder, world=world, layouts=listed, log=log, thin=not WHOLE)
    assert code == 0, log.read_text()
    lines = [line for line in log.read_text().splitlines() if line.endswith(" ok")]
    forwards, loops, others = len(list(golden_folder.glob("dit_*"))), len(list(golden_folder.glob("gen_*"))), 3
    assert len(lines) == forwards * len(listed) + loops * (len(listed) if WHOLE else 2) + others


def test_a_deviation_fails(golden_folder: Path, tmp_path: Path):
    """An expected output that is off by 0.1 % makes the command fail, and the line says which case."""
    shutil.copytree(golden_folder / "dit_t2v", tmp_path / "dit_t2v")
    tensors = load_file(golden_folder / "dit_t2v" / "io.safetensors")
    tensors["out"] = tensors["out"] * (1 + 1e-3 * torch.sign(tensors["out"]))
    save_file(tensors, tmp_path / "dit_t2v" / "io.safetensors")
    done = subprocess.run(
        [sys.executable, golden.__file__, str(tmp_path), "--ranks", "1"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "dit_t2v" in done.stdout
    assert "FAILED" in done.stdout


def test_a_folder_without_cases_is_refused(tmp_path: Path):
    done = subprocess.run([sys.executable, golden.__file__, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "holds no golden case" in done.stderr
