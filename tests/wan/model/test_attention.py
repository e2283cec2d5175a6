"""Which attention kernel runs where, and what those compute that are not torch's."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from node_inputs import inputs_of, use_model_folders
from wan_pack.distributed.job.job import JobError, Parallel
from wan_pack.distributed.parallel.parallelize import ENGINES
from wan_pack.nodes.inference.inference import WanVideoDistributedInference
from wan_pack.nodes.settings.spread import WanVideoDistributedConfig
from wan_pack.wan.model import attention as module
from wan_pack.wan.model import attention_kernels
from wan_pack.wan.model.attention import attention
from wan_pack.wan.model.attention_kernels import KERNELS, choose_kernel
from wan_pack.wan.model.kernels.choice import OPS
from wan_pack.wan.sampling.schedule import SOLVERS, Solver

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
AMPERE, ADA, HOPPER, BLACKWELL = (8, 0), (8, 9), (9, 0), (12, 0)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The optional packages that can be found, new ones; none at first."""
    monkeypatch.setattr(attention_kernels, "version", lambda package: "9.9.9")
    names: set[str] = set()
    find = importlib.util.find_spec
    optional = {kernel.module for kernel in KERNELS.values()} - {""}
    spec = importlib.machinery.ModuleSpec("there", None)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n, *a: (spec if n in names else None) if n in optional else find(n, *a)
    )
    return names


@pytest.mark.parametrize(
    ("capability", "dtype", "packages", "name"),
    [
        (None, FP32, (), "cpu"),
        (HOPPER, BF16, (), "cudnn"),
        (HOPPER, BF16, ("fa3_fwd_interface",), "fa3"),
        (HOPPER, FP16, ("fa3_fwd_interface",), "cudnn"),
        (AMPERE, BF16, ("fa3_fwd_interface", "flash_attn", "sageattention"), "flash"),
        (BLACKWELL, BF16, ("fa3_fwd_interface", "sageattention"), "flash"),
        ((7, 0), FP16, (), "flash"),
    ],
)
def test_auto_takes_the_fastest_exact_kernel(
    capability: Any, dtype: torch.dtype, packages: tuple[str, ...], name: str, installed: set[str]
):
    installed.update(packages)
    assert choose_kernel(capability, dtype).name == name


@pytest.mark.parametrize(
    ("capability", "dtype", "wanted", "message"),
    [
        (None, FP32, "fa3", "'fa3', which needs a GPU; here it may be auto, cpu"),
        (HOPPER, BF16, "cpu", "'cpu', which is for machines without a GPU; here it may be auto, cudnn, flash$"),
        (HOPPER, BF16, "fa3", "needs the package fa3-fwd, which is not installed"),
        (ADA, BF16, "fa3-fp8", "needs compute capability 9.0; this GPU has 8.9"),
        ((7, 5), BF16, "cudnn", "needs compute capability 8.0 or newer; this GPU has 7.5"),
        (AMPERE, FP32, "sage", "computes in bfloat16, float16, not in float32"),
        (AMPERE, BF16, "ring", "attention is 'ring'; it must be one of auto, cudnn, flash"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(capability: Any, dtype: torch.dtype, wanted: str, message: str):
    with pytest.raises(ValueError, match=message):
        choose_kernel(capability, dtype, wanted)


def test_named_kernels_are_taken(installed: set[str]):
    installed.update(("fa3_fwd_interface", "flash_attn", "sageattention", "comfy_kitchen"))
    for name in set(KERNELS) - {"cpu"}:
        assert choose_kernel(HOPPER, BF16, name).name == name


@pytest.mark.parametrize(
    ("found", "refused"), [("0.2.39", True), ("0.2.40", False), ("0.2.40.post1", False), ("1.0rc2", False)]
)
def test_a_package_without_the_kernel_is_too_old(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], found: str, refused: bool
):
    installed.add("comfy_kitchen")
    monkeypatch.setattr(attention_kernels, "version", lambda package: found)
    if not refused:
        assert choose_kernel(ADA, BF16, "sol").sparse
        return
    with pytest.raises(ValueError, match=r"needs comfy-kitchen 0\.2\.40 or newer; installed is 0\.2\.39; here it may"):
        choose_kernel(ADA, BF16, "sol")


def test_the_nodes_choices_are_the_registries_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_model_folders(tmp_path, monkeypatch)
    inputs = {**inputs_of(WanVideoDistributedConfig), **inputs_of(WanVideoDistributedInference)}
    choices = {"attention": ["auto", *KERNELS], "kernels": ["auto", *OPS]}
    choices |= {"ulysses_engine": ["auto", *ENGINES], "scheduler": list(SOLVERS)}
    assert {name: inputs[name][0] for name in choices} == choices


def test_what_the_registries_name_is_there():
    assert all(callable(kernel.run) for kernel in KERNELS.values())
    assert all(issubclass(solver, Solver) for solver in SOLVERS.values())
    for kernel in KERNELS.values():
        with kernel.activate():
            pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "fa4"}, "attention is 'fa4'; it must be one of auto, fa3, cudnn"),
        ({"linear_precision": "int4"}, "linear_precision is 'int4'; it must be one of full, fp8, int8"),
        ({"linear_precision": "fp8", "mixed_precision": "fp16"}, "linear_precision is 'fp8'.*mixed_precision fp16"),
        ({"kernels": "triton", "torch_compile": True}, "kernels is 'triton'.*torch_compile"),
        (
            {"ulysses_engine": "packed-overlap"},
            "ulysses_engine is 'packed-overlap'; it must be one of auto, packed, symmetric, deepspeed",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Parallel(gpu_count=2, **settings)


@pytest.mark.parametrize(
    "settings", [{"attention": "fa3"}, {"kernels": "triton"}], ids=["kernel of GPUs", "Triton without a GPU"]
)
def test_a_rank_refuses_what_its_device_cannot_run(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """The job's fields reach the choice."""
    from jobs import stub_job
    from wan_pack.distributed.rank.session import Session

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(JobError, match="needs a GPU"):
        Session.of(stub_job(gpu_count=1, **settings))


def _install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    fake = types.ModuleType(name)
    vars(fake).update(functions)
    monkeypatch.setitem(sys.modules, name, fake)


def _qkv(heads: int = 3) -> tuple[torch.Tensor, ...]:
    """Strided views of one buffer, as Ulysses receives them; one head far larger than the others."""
    packed = torch.randn(40, 3, heads, 16, generator=torch.Generator().manual_seed(1))
    packed[:, :, -1:] *= 50
    return packed.bfloat16().unbind(1)


def test_fa3_fp8_gives_each_head_its_own_scale(monkeypatch: pytest.MonkeyPatch):
    """The kernel is handed e4m3 codes in [1, S, H, D] and scales in [1, H]; codes times scales are the values."""
    q, k, v = _qkv()
    seen: dict[str, Any] = {}

    def flash_attn_func(q8: Any, k8: Any, v8: Any, *, q_descale: Any, k_descale: Any, v_descale: Any) -> torch.Tensor:
        seen["dtypes"] = {x.dtype for x in (q8, k8, v8)}
        values = []
        for x, x8, scale in ((q, q8, q_descale), (k, k8, k_descale), (v, v8, v_descale)):
            assert scale.shape == (1, 3)
            assert scale.dtype == FP32
            assert torch.equal(x8.float().abs().amax(dim=(1, 3)), torch.full((1, 3), 448.0))
            values.append((x8.float() * scale[:, None, :, None])[0])
            torch.testing.assert_close(values[-1], x.float(), rtol=2**-4, atol=2e-3 * scale.max().item() * 448)
        return attention(*values)[None].bfloat16()

    _install(monkeypatch, "fa3_fwd_interface", flash_attn_func=flash_attn_func)
    out = module.flash_attention_3_fp8(q, k, v)
    assert seen["dtypes"] == {torch.float8_e4m3fn}
    assert out.dtype == BF16
    assert out.shape == q.shape
    # The first heads are small beside the last: one scale for all would lose them.
    exact = attention(*(x[:, :2].float() for x in (q, k, v)))
    assert ((out[:, :2].float() - exact).norm() / exact.norm()).item() < 0.1


def test_other_packages_get_unbatched_views_as_a_batch_of_one(monkeypatch: pytest.MonkeyPatch):
    q, k, v = _qkv()

    def flash(q: Any, k: Any, v: Any) -> Any:
        return attention(q[0], k[0], v[0])[None]

    def sage(q: Any, k: Any, v: Any, *, tensor_layout: str) -> Any:
        assert tensor_layout == "NHD"
        return flash(q, k, v)

    _install(monkeypatch, "fa3_fwd_interface", flash_attn_func=flash)
    _install(monkeypatch, "flash_attn", flash_attn_func=flash)
    _install(monkeypatch, "sageattention", sageattn=sage)
    for run in (module.flash_attention_3, module.flash_attention_2, module.sage_attention):
        assert torch.equal(run(q, k, v), attention(q, k, v))
        empty = q[:, :0]
        assert run(empty, empty, empty).shape == (40, 0, 16)


def test_flash_attention_3_is_the_packages_own_operator_where_it_has_one(monkeypatch: pytest.MonkeyPatch):
    """Its Python function imports torch's compiler first."""
    q, k, v = _qkv()
    seen: list[dict[str, Any]] = []

    def fwd(q: Any, k: Any, v: Any, **named: Any) -> Any:
        seen.append(named)
        return attention(q[0].float(), k[0].float(), v[0].float()).bfloat16()[None], None, None, None

    def flash_attn_func(*others: Any, **named: Any) -> Any:
        raise AssertionError("it has the operator")

    _install(monkeypatch, "fa3_fwd_interface", flash_attn_func=flash_attn_func)
    monkeypatch.setattr(torch.ops, "fa3_fwd", SimpleNamespace(fwd=fwd), raising=False)
    width = {"softmax_scale": 16**-0.5, "num_splits": 1}
    assert torch.equal(module.flash_attention_3(q, k, v), attention(q.float(), k.float(), v.float()).bfloat16())
    assert module.flash_attention_3_fp8(q, k, v).shape == q.shape
    assert seen[0] == width
    assert {name: seen[1][name] for name in width} == width
    assert sorted(seen[1].keys() - width.keys()) == ["k_descale", "q_descale", "v_descale"]
    empty = q[:, :0]
    assert module.flash_attention_3(empty, empty, empty).shape == (40, 0, 16)
    assert len(seen) == 2
