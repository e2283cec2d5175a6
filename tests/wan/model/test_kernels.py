"""The Triton kernels and where the fused arithmetic may run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mount import SUPPORT
from wan_pack.wan.model.kernels.choice import OPS, check_kernels, choose_ops


@pytest.mark.processes
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, of torch's CUDA builds")
def test_triton_kernels_equal_their_plain_forms():
    """Every kernel, and a whole forward, in Triton's interpreter; it must be on before Triton is imported."""
    script = SUPPORT / "ranks" / "triton_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    made = {line.split()[0] for line in run.stdout.splitlines()}
    vae = {"vae_add", "vae_norm", "vae_upsample"}
    assert made == vae | {
        "norm", "add_norm", "add", "cast", "gelu", "rms_norm", "rotate", "rotate_codes", "quantise_heads",
        "write_heads", "model,",
    }  # fmt: skip


def test_fused_kernels_need_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wan_pack.wan.model.kernels.choice._lacks_for_triton", lambda: "")
    for name in OPS:
        check_kernels((8, 0), name)
    check_kernels(None, "plain")
    with pytest.raises(ValueError, match="'triton', which needs a GPU; choose 'plain'"):
        check_kernels(None, "triton")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, of torch's CUDA builds")
def test_what_triton_builds_its_launchers_with_is_missed_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("sysconfig.get_path", lambda name, scheme: str(tmp_path))
    with pytest.raises(ValueError, match=r"needs a C compiler \(gcc or clang\)"):
        check_kernels((9, 0), "triton")
    (tmp_path / "gcc").touch(mode=0o755)
    with pytest.raises(ValueError, match="needs Python's headers"):
        check_kernels((9, 0), "triton")
    (tmp_path / "Python.h").touch()
    check_kernels((9, 0), "triton")
    check_kernels((9, 0), "plain")


def test_fused_kernels_are_taken_where_they_were_measured(monkeypatch: pytest.MonkeyPatch):
    def check(capability: tuple[int, int] | None, name: str) -> None:
        if lacking:
            raise ValueError(lacking)

    lacking = ""
    monkeypatch.setattr("wan_pack.wan.model.kernels.choice.check_kernels", check)
    monkeypatch.setattr("wan_pack.wan.model.kernels.choice._start_triton", lambda: None)
    assert choose_ops((9, 0)) == ("triton", "fused, the fastest measured on Hopper")
    assert choose_ops((9, 0), "plain") == ("plain", "as asked")
    assert choose_ops((8, 9), "triton") == ("triton", "as asked")
    assert {choose_ops(gpu)[0] for gpu in ((8, 0), (8, 9), (10, 0), (12, 0), None)} == {"plain"}
    assert choose_ops((9, 0), compiled=True) == ("plain", "torch.compile makes kernels of it")
    lacking = "it needs a C compiler"
    assert choose_ops((9, 0)) == ("plain", "ValueError: it needs a C compiler")
    with pytest.raises(ValueError, match="C compiler"):
        choose_ops((9, 0), "triton")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, of torch's CUDA builds")
def test_plain_kernels_are_taken_where_triton_does_not_start(monkeypatch: pytest.MonkeyPatch):
    """As here, without a driver."""
    monkeypatch.setattr("wan_pack.wan.model.kernels.choice._lacks_for_triton", lambda: "")
    name, reason = choose_ops((9, 0))
    assert name == "plain" and "driver" in reason, reason
