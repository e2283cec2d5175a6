"""The house: which room imports which, which load without torch, what stands where. Reads CONTRIBUTING's table."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import kinds
import pytest
from mount import ROOT

PARTS = ("nodes", "distributed", "wan")
MOST_LINES = 300
MOST_FILES = 16
PROCESS_GROUPS = re.compile(r"new_group|new_subgroups|init_process_group|init_device_mesh")
HOLDS_GROUPS = {"distributed/parallel/mesh.py", "distributed/doctor/exchange.py"}
"""The doctor's two processes are not ranks of a job."""
IMPORTS_COMFYUI = {"nodes/host/host.py", "nodes/host/core_model.py", "nodes/host/core_vae.py"}
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "execution", "folder_paths", "nodes", "server"}


@dataclass(frozen=True, slots=True)
class Room:
    """One row of the table."""

    imports: frozenset[str]
    """Other rooms."""
    light: bool
    """Loads without torch."""
    heavy: frozenset[str]
    """Files of a light room that load torch."""


def read_table() -> dict[str, Room]:
    rooms = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and re.fullmatch(r"`(nodes|distributed|wan)[a-z/]*`", cells[0]):
            imports = frozenset(re.findall(r"`([a-z_/]+)`", cells[2]))
            light, _, heavy = cells[3].partition(" but ")
            assert light in ("no", "yes"), line
            rooms[cells[0].strip("`")] = Room(imports, light == "no", frozenset(re.findall(r"`(\w+)`", heavy)))
    return rooms


ROOMS = read_table()
FILES = sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py"))
ALL_FILES = [*FILES, *(path for part in ("tests", "benchmarks", "demo") for path in (ROOT / part).rglob("*.py"))]


def room_of(path: Path) -> str:
    return path.parent.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[str]:
    """Rooms of this pack that a file imports, at its top, in a function or for its types."""
    folder = path.parent
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        start = folder
        for _ in range(node.level - 1):
            start = start.parent
        base = start.joinpath(*(node.module or "").split(".")) if node.module else start
        for name in node.names:
            # A folder's own name in `from . import folder`; else the file, or the folder that the name is in.
            target = base / name.name
            room = target if target.is_dir() else base if base.is_dir() else base.parent
            yield room.relative_to(ROOT).as_posix()


def test_every_room_stands_in_the_table():
    assert {room_of(path) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_the_table_allows(room: str):
    found = {other for path in FILES if room_of(path) == room for other in imported(path)} - {room}
    assert found == ROOMS[room].imports


def test_imports_run_down_the_table():
    below = set(ROOMS)
    for name, room in ROOMS.items():
        below.remove(name)
        assert room.imports <= below, f"{name} imports {sorted(room.imports - below)}, which stand above it"


@pytest.mark.processes
def test_light_rooms_load_without_torch(tmp_path: Path):
    light = []
    for path in FILES:
        room = ROOMS[room_of(path)]
        if room.light and path.stem not in (*room.heavy, "__init__", "__main__"):
            light.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    code = (
        "import importlib, sys, types\n"
        "pack = types.ModuleType('pack'); pack.__path__ = [sys.argv[1]]; sys.modules['pack'] = pack\n"
        "before = list(sys.path)\n"
        "for name in sys.argv[2:]:\n"
        "    importlib.import_module(f'pack.{name}')\n"
        "    heavy = {'torch', 'numpy', 'safetensors', 'diffusers', 'transformers', 'gguf'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} loads {sorted(heavy)}'\n"
        "assert sys.path == before\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(ROOT), *light], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_table_names_no_light_file_as_heavy():
    for path in FILES:
        if path.stem in ROOMS[room_of(path)].heavy:
            source = path.read_text()
            loads = "import torch" in source or "from torch" in source or list(imported(path))
            assert loads, f"{path} needs no torch"


def test_files_are_short():
    """Those of the tests, the benchmarks and the demo as well."""
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in ALL_FILES}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


def test_rooms_are_small():
    crowded = {room: sum(room_of(path) == room for path in FILES) for room in ROOMS}
    assert {room: count for room, count in crowded.items() if count > MOST_FILES} == {}


def test_no_file_name_stands_twice():
    """Those of the tests, the benchmarks and the demo as well."""
    names = [path.name for path in ALL_FILES if path.stem not in ("__init__", "__main__", "conftest")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_what_types_leave_out_has_its_reason_above():
    for path in FILES:
        lines = path.read_text().splitlines()
        for above, line in pairwise(lines):
            if "type: ignore" in line:
                assert re.search(r"# type: ignore\[[a-z-]+\]$", line) and above.strip().startswith("# "), (path, line)


def test_process_groups_are_made_in_one_place():
    made = {path.relative_to(ROOT).as_posix() for path in FILES if PROCESS_GROUPS.search(path.read_text())}
    assert made <= HOLDS_GROUPS


def test_the_model_knows_nothing_of_ranks():
    for path in FILES:
        if path.is_relative_to(ROOT / "wan"):
            assert "torch.distributed" not in path.read_text(), path
            assert all(room.startswith("wan") for room in imported(path)), path


def test_three_files_import_comfyui():
    for path in FILES:
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").split(".")[0])
        if path.relative_to(ROOT).as_posix() not in IMPORTS_COMFYUI:
            assert not names & COMFYUI, path


def test_places_that_contributing_names_are_there():
    """Files and folders; and of "`NAME` of `file`" the name in that file."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:nodes|distributed|wan|tests|web)/[\w./]*)`", text)
    assert named and [path for path in named if not (ROOT / path).exists()] == []
    pairs = re.findall(r"`(\w+)` (?:of|in) `([\w/]+\.py)`", text)
    assert len(pairs) > 10
    assert [
        pair for pair in pairs if not re.search(rf"^(class )?{pair[0]}\b", (ROOT / pair[1]).read_text(), re.M)
    ] == []


OTHERS = {"main.py", "generate.py", "distributed_c10d.py", "_functional_collectives.py"}
"""Files of ComfyUI, of the official code and of torch."""


def test_files_that_are_named_in_the_order_of_tests_are_there():
    there = [path.stem for path in (ROOT / "tests").rglob("test_*.py")]
    for name in kinds.MEASURED:
        assert there.count(name) == 1, name
    pages = {path.stem for path in (ROOT / "tests" / "comfyui").glob("test_*.py")}
    assert pages > kinds.BROWSER


def test_files_and_modules_that_the_code_speaks_of_are_there():
    """In docstrings and comments: "job_folder.py", "hosts/host_agent.py", "`wan.model.ops`"."""
    paths = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/*.py")] + ["__init__.py"]
    for path in FILES:
        source = path.read_text()
        for name in set(re.findall(r"(?<![\w/.])[\w/]+\.py\b", source)) - OTHERS:
            assert any(f"/{there}".endswith(f"/{name}") for there in paths), f"{path} speaks of {name}"
        for name in re.findall(r"`((?:wan|distributed|nodes)\.[\w.]+)`", source):
            parts = name.split(".")
            files = (ROOT.joinpath(*parts[:end]).with_suffix(".py") for end in range(2, len(parts) + 1))
            assert any(file.exists() for file in files), f"{path} speaks of {name}"
