"""What a machine must have for kernels that are compiled, what attention runs on, and which LoRA changes are used."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from wan_pack.wan.model import attention as module
from wan_pack.wan.model.attention_kernels import KERNELS, choose_kernel
from wan_pack.wan.model.kernels import choice
from wan_pack.wan.model.kernels.choice import check_compiling, check_kernels
from wan_pack.wan.model.selection import EVERYTHING, Selection

GPU = (8, 0)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for programs and headers, of a Linux that has Triton and nothing else."""
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sysconfig.get_path", lambda name, scheme: str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    return tmp_path


@pytest.mark.parametrize(
    ("capability", "compiler", "programs", "variable"),
    [
        (GPU, r"a C compiler \(gcc or clang\)", ("gcc", "clang"), "CC"),
        (None, r"a C\+\+ compiler \(g\+\+\)", ("g++",), "CXX"),
    ],
    ids=["GPU", "CPU"],
)  # fmt: skip
def test_compiling_needs_a_compiler_and_headers(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capability: Any, compiler: str, programs: tuple[str, ...],
    variable: str,
):  # fmt: skip
    told = "^torch_compile is on, which needs {} to make its kernels; turn it off or install it$"
    with pytest.raises(ValueError, match=told.format(compiler)):
        check_compiling(capability)
    header = rf"Python's headers \({machine}/Python\.h\)"
    for program in programs:
        (machine / program).touch(mode=0o755)
        with pytest.raises(ValueError, match=told.format(header)):
            check_compiling(capability)
        (machine / program).unlink()
    monkeypatch.setenv(variable, "cc-of-mine")
    (machine / "Python.h").touch()
    check_compiling(capability)
    (machine / "Python.h").unlink()
    monkeypatch.setattr("sys.platform", "win32")
    check_compiling(capability)


def test_only_gpus_are_compiled_for_by_triton(machine: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("g++", "gcc", "Python.h"):
        (machine / name).touch(mode=0o755)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_compiling(None)
    with pytest.raises(ValueError, match=r"^torch_compile is on, which needs the package triton to make"):
        check_compiling(GPU)
    with pytest.raises(
        ValueError, match=r"^kernels is 'triton', which needs the package triton to start its kernels; c"
    ):
        check_kernels(GPU, "triton")


@pytest.mark.parametrize(("scheme", "asked"), [("posix_local", "posix_prefix"), ("venv", "venv")])
def test_headers_are_looked_for_where_the_system_has_them(
    machine: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, asked: str
):
    (machine / "gcc").touch(mode=0o755)
    (machine / "Python.h").touch()
    seen = []
    monkeypatch.setattr("sysconfig.get_default_scheme", lambda: scheme)
    monkeypatch.setattr("sysconfig.get_path", lambda *given: (seen.append(given), str(machine))[1])
    check_compiling(GPU)
    assert seen == [("include", asked)]


def test_triton_is_not_taken_where_it_cannot_start(monkeypatch: pytest.MonkeyPatch):
    def fails() -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(choice, "_lacks_for_triton", lambda: "")
    monkeypatch.setattr(choice, "_start_triton", fails)
    assert choice.choose_ops((9, 0)) == ("plain", "RuntimeError: no driver")
    assert choice.choose_ops(None) == ("plain", "no GPU")
    assert choice.choose_ops((8, 9)) == ("plain", "others are measured on Hopper only")
    assert choice.OPS["plain"]().name == "plain"


def test_each_kernel_runs_its_own_function_on_its_own_backends():
    functions = {
        "fa3": "flash_attention_3", "flash-attn": "flash_attention_2", "fa3-fp8": "flash_attention_3_fp8",
        "sage": "sage_attention",
    }  # fmt: skip
    for name, kernel in KERNELS.items():
        assert kernel.run is getattr(module, functions.get(name, "attention")), name
        with kernel.activate():
            enabled = [
                getattr(torch.backends.cuda, f"{backend}_sdp_enabled")()
                for backend in ("cudnn", "flash", "mem_efficient", "math")
            ]
        assert enabled == [name in ("fa3", "cudnn", "fa3-fp8", "sol"), True, name != "cpu", True], name
    assert [name for name, kernel in KERNELS.items() if kernel.eight_bits] == ["fa3-fp8", "sage"]
    assert [name for name, kernel in KERNELS.items() if kernel.sparse] == ["sol"]


def test_a_kernel_for_one_gpu_is_not_for_newer_ones():
    for wanted in ("fa3", "fa3-fp8"):
        with pytest.raises(ValueError, match=r"needs compute capability 9\.0; this GPU has 12\.0"):
            choose_kernel((12, 0), torch.bfloat16, wanted)
    for capability in ((0, 0), (12, 1), (99, 9)):
        assert choose_kernel(capability, "float32", "flash").name == "flash"


def test_what_a_package_returns_beside_the_result_is_left_there(monkeypatch: pytest.MonkeyPatch):
    def flash_attn_func(q: Any, k: Any, v: Any, **scales: Any) -> tuple[torch.Tensor, str]:
        return torch.ones(q.shape, dtype=torch.float32), "logarithms of sums"

    fake = types.ModuleType("fa3_fwd_interface")
    fake.__dict__["flash_attn_func"] = flash_attn_func
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", fake)
    x = torch.randn(5, 2, 8).bfloat16()
    assert module.flash_attention_3(x, x, x).equal(torch.ones(5, 2, 8))
    out, empty = (module.flash_attention_3_fp8(part, part, part) for part in (x, x[:, :0]))
    assert out.shape == (5, 2, 8) and empty.shape == (5, 0, 8) and out.dtype == empty.dtype == torch.bfloat16


def test_a_layer_is_selected_by_its_block_and_its_name():
    some = Selection((1, 11), ("ffn", "cross_attn.k"))
    for layer, used in (
        ("blocks.1.self_attn.q", True), ("blocks.11.cross_attn.q", True), ("blocks.0.self_attn.q", False),
        ("blocks.1.ffn.0", False), ("blocks.1.cross_attn.k", False), ("text_embedding.2", True),
        ("vace_blocks.1.self_attn.q", False), ("head.head", True),
    ):  # fmt: skip
        assert some.has(layer) is used, layer
    assert Selection((), ("diffusion_model.blocks.1.",)).has("blocks.11.ffn.0")
    assert not Selection((), ("diffusion_model.blocks.1.",)).has("blocks.1.ffn.0")
    assert EVERYTHING.has("vace_blocks.1.ffn.0")
    found = [str(one) for one in (some, EVERYTHING, Selection((2,)), Selection((), ("ffn",)))]
    assert found == ["blocks 1, 11; without ffn, cross_attn.k", "", "blocks 2", "without ffn"]
