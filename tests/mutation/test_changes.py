"""The wrong changes that `make mutants` makes, and that it tells a caught one from a survivor."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

import cover
from changes import changed, changes
from cover import Lines, near_and_far

SOURCE = '''
"""A docstring with 5."""
import os
LIMIT = 16

def cut(rows: "list[3]", rank: int, world: int, *, all_of: bool = True) -> int:
    """And 7."""
    assert rank < 9
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}; world is {world}")
    count = -(-len(rows) // world)
    rows[0] = max(count, LIMIT)
    print(rank, world)
    return int(rank / world) if all_of and rows else sorted(rows)[rank:]
'''


def test_every_kind_of_slip_is_made():
    made = {str(change).partition(": ")[2] for change in changes(SOURCE)}
    for wanted in (
        "constant: 16  ->  17", "constant: True  ->  False", "comparison: 0 <= rank < world  ->  0 < rank < world",
        "bound dropped: 0 <= rank < world  ->  rank < world", "operator: rank / world  ->  rank * world",
        "sides exchanged: rank / world  ->  world / rank",
        "rounded up: int(rank / world)  ->  -int(-(rank / world) // 1)",
        "boolean: all_of and rows  ->  all_of or rows", "condition dropped: all_of and rows  ->  rows",
        "function: max(count, LIMIT)  ->  min(count, LIMIT)",
        "assignment dropped: rows[0] = max(count, LIMIT)  ->  pass",
        "call dropped: print(rank, world)  ->  pass", "arguments exchanged: print(rank, world)  ->  print(world, rank)",
        "order turned: sorted(rows)  ->  sorted(rows, reverse=True)", "another's place: rank  ->  0",
        "bound dropped: rank:  ->  :", "other end: rank:  ->  :rank",
        "exchanged in a message: f'rank is {rank}; world is {world}'  ->  f'rank is {world}; world is {rank}'",
    ):  # fmt: skip
        assert wanted in made, wanted
    assert any(entry.startswith("check dropped: if not 0 <= rank") for entry in made)
    assert any(entry.startswith("nothing returned: return int(rank / world)") for entry in made)


def test_types_docstrings_and_assertions_stay():
    assert not {3, 5, 7, 9} & {
        int(change.before) for change in changes(SOURCE) if change.kind == "constant" and change.before.isdecimal()
    }


def test_each_change_is_one_and_compiles():
    before = ast.unparse(ast.parse(SOURCE)).splitlines()
    for change in changes(SOURCE):
        tree = changed(SOURCE, change)
        compile(tree, "x.py", "exec")
        after = ast.unparse(tree).splitlines()
        assert before != after and abs(len(before) - len(after)) <= 1, change


@pytest.mark.parametrize(
    ("line", "tests"),
    [
        (9, ["tests/wan/files/test_a.py::quick", "tests/wan/files/test_a.py::slow", "tests/x.py::other"]),
        (10, []),
        (12, []),
    ],
)
def test_a_line_is_given_to_the_tests_that_run_it(line: int, tests: list[str]):
    """Those of its room first, and the quick ones first."""
    seconds = {
        "tests/wan/files/test_a.py::slow": 3.0,
        "tests/x.py::other": 0.1,
        "tests/wan/files/test_a.py::quick": 1.0,
    }
    lines = Lines({"seconds": seconds, "lines": {"wan/files/a.py": {"9": list(seconds), "13": list(seconds)}}})
    assert lines.tests("wan/files/a.py", line, SOURCE) == tests


def test_the_tests_of_other_rooms_are_asked_last():
    near, far = "tests/wan/files/test_a.py::x", "tests/wan/files_of_others/test_a.py::x"
    assert near_and_far("wan/files/a.py", [near, far]) == [[near], [far]]
    assert near_and_far("wan/files/a.py", [far]) == [[far]]
    assert near_and_far("wan/files/a.py", []) == []


def test_a_constant_is_given_to_the_tests_of_what_is_made_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = "MOST = 9\nLEAST = 1\nclass Settings:\n    seed: int = number(0, MOST)\n    step: int = number(LEAST)\n"
    for name in ("seed", "step"):
        (tmp_path / f"test_{name}.py").write_text(f"def test_x():\n    assert {name}\n")
    monkeypatch.setattr(cover, "ROOT", tmp_path)
    lines = Lines({"seconds": {f"test_{name}.py::test_x": 1.0 for name in ("seed", "step")}, "lines": {}})
    assert lines.tests("a.py", 1, source) == ["test_seed.py::test_x"]
    assert lines.tests("a.py", 5, source) == ["test_step.py::test_x"]
