"""The benchmark of evaluations beside own steps, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mount import ROOT


@pytest.mark.ranks
@pytest.mark.processes
def test_evaluations_are_timed_beside_own_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpu_locks_folder: Path
):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import forwards

    monkeypatch.setattr(forwards, "mount_pack", lambda: None)
    results = tmp_path / "results.jsonl"
    sizes = ["--model", "tiny-vace", "--size", "64x48x5", "--steps", "3", "--guidance", "ulysses"]
    forwards.main(["--folder", str(tmp_path / "models"), *sizes, "--results", str(results)])
    (line,) = map(json.loads, results.read_text().splitlines())
    assert (len(line["own_steps"]), len(line["evaluations"])) == (3, 6)
    assert line["first_warm"] < line["first_cold"]
    # A caller waits for all that the ranks do.
    assert line["evaluation"] > 0 and line["own_step"] > 0
    assert line["before_first"] == pytest.approx(line["first_warm"] - line["evaluation"], abs=1e-3)
    assert isinstance(line["new_control"], float) and line["experts"] == 1
    assert line["more_percent"] == pytest.approx(100 * (line["evaluation"] / line["own_step"] - 1), abs=2)
    assert "1 GPU tiny-vace 64x48x5 guidance ulysses: own step" in capsys.readouterr().out
