"""Every golden case that this version runs, on every layout; and that a wrong result is noticed."""

from __future__ import annotations

import functools
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
LAYOUTS = {
    2: "deepspeed | packed packed+fsdp symmetric+fsdp packed+cfg",
    3: "symmetric | packed packed+fsdp",
    4: "packed+fsdp+cfg | packed packed+fsdp deepspeed+fsdp",
    # Some of them hold no head of these small models.
    8: "packed symmetric",
}
"""Number of ranks -> layouts in one group of processes, which take longer to start than most cases to run. Of those
between two bars a case runs in one; in all of them in `make soak` and by `python tests/golden.py`."""
GUIDED = {8: "packed+fsdp+cfg symmetric+cfg"}
"""Of which whole loops run in one besides: a single forward is the same there as on four ranks, twice."""


def layouts_of(world: int) -> list[list[golden.Layout]]:
    return [turns_of(turns) for turns in LAYOUTS[world].split("|")]


def guided_of(world: int) -> list[golden.Layout]:
    return turns_of(GUIDED.get(world, ""))


def turns_of(text: str) -> list[golden.Layout]:
    return [golden.Layout.of(word) for word in text.split()]


@pytest.mark.parametrize("world", LAYOUTS)
def test_agrees_with_the_official_code(golden_folder: Path, tmp_path: Path, world: int):
    log, layouts, guided = tmp_path / "log", layouts_of(world), guided_of(world)
    if WHOLE:
        layouts, guided = [[layout] for turns in [*layouts, guided] for layout in turns], []
    code = golden.run(golden_folder, world=world, layouts=layouts, guided=guided, log=log)
    assert code == 0, log.read_text()
    lines = [line for line in log.read_text().splitlines() if line.endswith(" ok")]
    forwards, loops = (len(list(golden_folder.glob(f"{kind}_*"))) for kind in ("dit", "gen"))
    assert len(lines) == (forwards + loops) * len(layouts) + loops * bool(guided) + 3, "and the cases without a layout"


def test_every_case_meets_every_kind_of_layout(golden_folder: Path):
    """Whichever has its turn where: every engine, sharded weights, both prompts at once, tokens that two ranks do not
    divide and ranks without a head."""
    ranks = [
        golden.Ranks(
            rank=0, world=world, store=golden_folder, layouts=tuple(map(tuple, layouts_of(world))),
            guided=tuple(guided_of(world)),
        )
        for world in LAYOUTS
    ]  # fmt: skip
    for number, (case, _) in enumerate(golden.cases(golden_folder)):
        if case.name[:4] not in ("dit_", "gen_"):
            continue
        met = [(of.world, layout) for of in ranks for layout in of.of(case.name, number)]
        assert {layout.engine for _, layout in met} == {"packed", "symmetric", "deepspeed"}, case.name
        assert {layout.fsdp for _, layout in met} == {layout.cfg for _, layout in met} == {True, False}, case.name
        assert {world for world, layout in met if not layout.cfg} >= {3, 8}, case.name
        assert {world for world, layout in met if layout.cfg} >= ({4, 8} if case.name[:4] == "gen_" else {4}), case.name


def test_a_deviation_fails(golden_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An expected output that is off by 0.1 % makes the command fail, and the line says which case."""
    folder, log = tmp_path / "golden", tmp_path / "log"
    shutil.copytree(golden_folder / "dit_t2v", folder / "dit_t2v")
    tensors = load_file(golden_folder / "dit_t2v" / "io.safetensors")
    tensors["out"] = tensors["out"] * (1 + 1e-3 * torch.sign(tensors["out"]))
    save_file(tensors, folder / "dit_t2v" / "io.safetensors")
    # Otherwise its ranks print where this process prints.
    monkeypatch.setattr(golden, "run", functools.partial(golden.run, log=log))
    assert golden.main([str(folder), "--ranks", "1"]) == 1
    (line,) = [line for line in log.read_text().splitlines() if "dit_t2v" in line]
    assert "FAILED" in line


def test_a_folder_without_cases_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        golden.main([str(tmp_path)])
    assert ended.value.code == 2
    assert "holds no golden case" in capsys.readouterr().err


def test_the_command_says_what_it_takes():
    """It starts without pytest's paths."""
    done = subprocess.run([sys.executable, golden.__file__, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--layouts" in done.stdout
