"""The benchmark of forwards on a CPU: variants, what is said of each, and the table and plot of them."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from mount import ROOT

BENCHMARKS = ROOT / "benchmarks"


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
    systems = ["ours", "ours:fp8", "ours:fp8+steps4+blocks9", "ours:triton", "ours:symmetric", "ours:fa3", "ours:turbo"]
    forward.run_rank(
        argparse.Namespace(
            model="tiny", systems=systems, sizes=["64x48x5"], repeats=1, latents=True, results=results, kernels=3
        )
    )
    out = capsys.readouterr().out
    assert "ours:triton is left out: kernels is 'triton', which needs a GPU" in out
    assert "ours:symmetric is left out: one GPU has nothing to send" in out
    assert "ours:fa3 is left out: attention is 'fa3', which needs a GPU" in out
    assert "ours:turbo is left out: option 'turbo'" in out
    plain, fp8, exact = (json.loads(line) for line in results.read_text().splitlines())
    assert [plain["precision"], fp8["precision"]] == ["full", "fp8"]
    assert float(plain["difference"]) == float(plain["latents_difference"]) == 0
    assert 1e-4 < float(fp8["difference"]) < 0.2
    assert 1e-5 < float(fp8["latents_difference"]) < 0.2
    # All of its steps and blocks are.
    assert float(exact["difference"]) == float(exact["latents_difference"]) == 0
    assert plain["block_ms"]["gemm"] > 0
    assert len(fp8["kernels"]) == 3 and all(ms > 0 and times > 0 for ms, times in fp8["kernels"].values())
    lines = table.read_lines(results)
    text = table.table(lines)
    assert [row.count("|") for row in text.splitlines()[2:]] == [16] * 5
    assert "ours:fp8" in text
    bars = ElementTree.fromstring(table.plot(lines)).iter("{http://www.w3.org/2000/svg}rect")
    assert sum(float(bar.get("height", "0").strip("%")) == table.ROW - 6 for bar in bars) == 3 * len(table.COLUMNS)
    once = table.replace_marked("# Title\n", text)
    assert table.replace_marked(once, text) == once
    assert once.startswith("# Title\n")


def test_a_system_that_fails_leaves_the_others_their_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    import forward
    import systems

    def broken(config: object, place: object, option: str) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(systems.SYSTEMS, "diffusers", broken)
    results = tmp_path / "results.jsonl"
    forward.run_rank(
        argparse.Namespace(
            model="tiny",
            systems=["diffusers", "ours"],
            sizes=["64x48x5"],
            repeats=1,
            latents=False,
            results=results,
            kernels=0,
        )
    )
    said = capsys.readouterr()
    assert "diffusers is left out: it failed with RuntimeError" in said.out
    assert "no kernel image" in said.err
    assert [json.loads(line)["system"] for line in results.read_text().splitlines()] == ["ours"]


def test_floor_is_that_of_the_measured_kernels():
    """2.39 s for one A14B forward at 832x480x81 on one H200, half of it on two, less in 8 bits."""
    from breakdown import floor_seconds, work
    from wan_pack.benchmarks.released_sizes import WAN_CONFIGS

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


def test_scaling_starts_from_what_was_measured():
    """It passes through one, two and four, never promises more than the work divided, and had four nearly right."""
    import scaling

    scalings = scaling.read_scalings(BENCHMARKS / "results.jsonl")
    assert list(scalings) == ["480p", "720p"]
    assert [scalings["480p"].range(gpus) for gpus in (1, 2, 4)] == [(2.394,) * 2, (1.350,) * 2, (0.679,) * 2]
    # 40 layers, of whose exchange each rank of P sends (P - 1) / P of its P-th.
    assert scalings["480p"].exchange(4) == pytest.approx(40 * (0.61e-3 + 0.22e-3))
    assert scalings["480p"].exchange(8) == pytest.approx(40 * 0.83e-3 * (7 / 64) / (3 / 16))
    for measured in scalings.values():
        for gpus in (2, 4):
            known = measured.seconds[1] / gpus + measured.exchange(gpus) + measured.rest(gpus)
            assert known == pytest.approx(measured.seconds[gpus])
            assert measured.predict(gpus, gpus)[1] == pytest.approx(measured.seconds[gpus])
        low, high = measured.range(8)
        assert measured.seconds[1] / 8 < low < high < measured.seconds[4]
        assert low == pytest.approx(measured.seconds[1] / 8 + measured.exchange(8) + measured.rest(4) / 2)
        low, high = measured.predict(4, 2)
        assert 0.985 * low < measured.seconds[4] < 1.01 * high
    text = scaling.table(scalings)
    assert f"{(BENCHMARKS / 'README.md').read_text()}".count(text) == 1, "scaling.py was not run after a change"
    svg = scaling.plot(scalings)
    assert (BENCHMARKS / "scaling.svg").read_text() == svg
    texts = [text.text for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "0.34 to 0.37 s" in texts and "2.47 s" in texts


def test_scaling_needs_all_measurements(tmp_path: Path):
    import scaling

    results = tmp_path / "results.jsonl"
    lines = [
        {"benchmark": "scaling", "model": "t2v-A14B", "size": "480p", "gpus": gpus, "seconds": 2.5 / gpus}
        for gpus in (1, 4)
    ]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"at 480p on \[1, 4\] GPUs and no exchange; \[1, 2, 4\] and the exchange"):
        scaling.read_scalings(results)
    results.write_text("")
    with pytest.raises(ValueError, match=r"holds no run on \[1, 2, 4\] GPUs"):
        scaling.read_scalings(results)


@pytest.mark.processes
def test_vae_before_and_after_are_compared_in_one_run():
    """As on a GPU, without its kernels: every part ran, and what is timed is near diffusers' in float32."""
    command = [sys.executable, str(BENCHMARKS / "vae.py"), "--sizes", "32x32x5", "--base-dim", "4", "--repeats", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    table = run.stdout.partition("table\n")[2].splitlines()
    assert run.returncode == 0 and "failed" not in run.stdout, run.stdout + run.stderr
    for part in ("decode, before", "decode, after", "encode, before", "encode, after", "mp4, before", "mp4, after"):
        assert sum(f"| {part} | 1 GPUs |" in line for line in table) == 1, part
    errors = [re.findall(r"[\d.]+e[-+]\d+", line) for line in table if "decode's error" in line]
    assert len(errors) == 3 and all(0 <= float(error) < 1e-4 for line in errors for error in line)
    assert float(errors[1][0]) > 0, "another forward rounds otherwise"


def test_every_way_to_keep_8_bits_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Of each file; a strength that changes is timed wherever there is a LoRA, and files are gone afterwards."""
    import kept_weights

    results = tmp_path / "results.jsonl"
    arguments = ["--folder", str(tmp_path / "files"), "--model", "tiny", "--size", "32x32x1", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["kept_weights.py", *arguments, "--results", str(results)])
    kept_weights.main()
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    ways = [(kind, *way) for kind, listed in kept_weights.CASES.items() for way in listed]
    assert [(line["file"], line["linear_precision"], line["lora"]) for line in lines] == ways
    assert all("what" not in line and line["seconds_per_forward"] > 0 for line in lines)
    assert all(("strength_seconds" in line) == (line["lora"] != "none") for line in lines)
    weights = {(line["file"], line["linear_precision"], line["lora"]): line["weights_gib"] for line in lines}
    assert weights.keys() == set(ways) and not list((tmp_path / "files").glob("**/*.safetensors"))
    assert capsys.readouterr().out.count("| convrot |") == 2


def test_what_merging_leaves_of_a_lora(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    import lora_noise

    monkeypatch.setattr(lora_noise, "SIDE", 256)
    monkeypatch.setattr(sys, "argv", ["lora_noise.py", "--strengths", "0.01"])
    lora_noise.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    slopes = {(row[1], row[2]): float(row[4]) for row in rows}
    assert len(rows) == 10 and slopes["bf16", "merged"] == pytest.approx(1, abs=0.05)
    assert slopes["fp8 by tensor", "the file's scales"] < 0.5 and slopes["fp8 by tensor", "beside"] == 1


@pytest.mark.processes
def test_vace_blocks_that_are_not_split_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What their splitting is compared with."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    results = tmp_path / "results.jsonl"
    command = [
        sys.executable, str(BENCHMARKS / "forward.py"), "--model", "tiny-vace", "--gpus", "2", "--sizes", "96x48x9",
        "--systems", "ours", "ours:unsplit", "--repeats", "1", "--results", str(results),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    split, whole = (json.loads(line) for line in results.read_text().splitlines())
    assert whole["system"] == "ours:unsplit"
    assert float(whole["difference"]) < 1e-5 and float(whole["latents_difference"]) < 1e-5
    assert split["block_ms"]["gemm"] > 0
