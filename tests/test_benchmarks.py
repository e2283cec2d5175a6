"""The benchmark of forwards on a CPU: variants, what is said of each, and the table and plot of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")


def test_variants_are_compared_with_the_first_and_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What cannot run here is left out, with the reason."""
    import forward
    import table

    results = tmp_path / "results.jsonl"
    systems = ["ours", "ours:fp8", "ours:triton", "ours:overlap", "ours:fa3", "ours:turbo"]
    forward.run_rank(
        argparse.Namespace(model="tiny", systems=systems, sizes=["64x48x5"], repeats=1, latents=True, results=results)
    )
    out = capsys.readouterr().out
    assert "ours:triton is left out: kernels is 'triton', which needs a GPU" in out
    assert "ours:overlap is left out: one GPU has nothing to send" in out
    assert "ours:fa3 is left out: attention is 'fa3', which needs a GPU" in out
    assert "ours:turbo is left out: option 'turbo'" in out
    plain, fp8 = (json.loads(line) for line in results.read_text().splitlines())
    assert [plain["precision"], fp8["precision"]] == ["full", "fp8"]
    assert float(plain["difference"]) == float(plain["latents_difference"]) == 0
    assert 1e-4 < float(fp8["difference"]) < 0.2
    assert 1e-5 < float(fp8["latents_difference"]) < 0.2
    assert plain["block_ms"]["gemm"] > 0
    lines = table.read_lines(results)
    text = table.table(lines)
    assert [row.count("|") for row in text.splitlines()[2:]] == [16] * 4
    assert "ours:fp8" in text
    bars = ElementTree.fromstring(table.plot(lines)).iter("{http://www.w3.org/2000/svg}rect")
    assert sum(float(bar.get("height", "0").strip("%")) == table.ROW - 6 for bar in bars) == 2 * len(table.COLUMNS)
    once = table.replace_marked("# Title\n", text)
    assert table.replace_marked(once, text) == once
    assert once.startswith("# Title\n")


def test_floor_is_that_of_the_measured_kernels():
    """2.39 s for one A14B forward at 832x480x81 on one H200, half of it on two, less in 8 bits."""
    from breakdown import floor_seconds, work
    from wan_pack.wan.config import WAN_CONFIGS

    config = WAN_CONFIGS["t2v-A14B"]
    linear, attention = work(config, 32760)
    assert linear / 1e12 == pytest.approx(783, abs=1)
    assert attention / 1e12 == pytest.approx(893, abs=1)
    exact = floor_seconds(config, 32760, 1, attention="fa3", precision="full")
    assert exact == pytest.approx(2.39, abs=0.01)
    assert floor_seconds(config, 32760, 2, attention="cudnn", precision="full") == exact / 2
    assert floor_seconds(config, 32760, 1, attention="fa3-fp8", precision="fp8") == pytest.approx(1.55, abs=0.01)


def test_kernels_are_sorted_by_kind_and_idling_is_what_none_covers():
    from breakdown import busy, kind_of

    kinds = {
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90>": "attention",
        "cudnn_generated_fort_native_sdpa_sm90": "attention",
        "nvjet_hsh_128x256": "gemm",
        "void cutlass::device_kernel<at::cuda::detail::f8f8bf16_rowwise>": "gemm",
        "ncclDevKernel_SendRecv": "communication",
        "triton_red_fused_add_addmm_native_layer_norm_0": "elementwise",
        "_norm_kernel": "elementwise",
    }
    assert {name: kind_of(name) for name in kinds} == kinds
    assert busy([(5, 7), (0, 2), (1, 3), (6, 6.5)]) == 5
