"""Mounts the pack as `wan_pack`, so that tests run from any folder and without ComfyUI."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))  # golden.py, ranks.py and the other helpers beside the tests

from golden import mount_pack  # noqa: E402

mount_pack()
# Two cores, several processes: more threads each only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Inputs and outputs of the official code."""
    return TESTS / "data" / "golden"


@pytest.fixture(autouse=True)
def _no_gradients():
    import torch

    with torch.no_grad():
        yield
