"""Which test runs which line: coverage of every test that starts no process."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from mount import ROOT

PARTS = ("nodes", "distributed", "wan", "demo", "tests")
STORE = ROOT / ".mutants" / "lines.json"


class Lines:
    """The tests of a recording, and the lines that each of them ran."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.seconds: dict[str, float] = record["seconds"]
        """Test -> how long it took; in the order in which they ran."""
        self._lines: dict[str, dict[str, list[str]]] = record["lines"]
        """File -> line -> tests."""

    def tests(self, file: str, line: int, source: str) -> list[str]:
        """The tests that may notice what is wrong in a line: the likely and the quick ones first.

        Those that run it. What runs on import is a constant, a field or a signature: of those the tests that run a
        line with its name, or that of a constant or field made of it, or have it in their own file.
        """
        tree = ast.parse(source)
        statement, inside = _statement(tree, line)
        if inside:
            lines = self._lines.get(file, {})
            span = range(statement.lineno, _end(statement) + 1)
            found = {test for number in span for test in lines.get(str(number), ())}
        else:
            found = set(self._naming(_made_of(tree, _bound(statement))))
        room = _room(file)
        return sorted(found, key=lambda test: (not test.startswith(room), self.seconds[test]))

    @functools.cache  # noqa: B019 - one for the whole run
    def _naming(self, names: tuple[str, ...]) -> frozenset[str]:
        pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
        found: set[str] = set()
        for file, lines in self._lines.items():
            for number, text in enumerate((ROOT / file).read_text().splitlines(), start=1):
                if pattern.search(text):
                    found.update(lines.get(str(number), ()))
        naming = {file for file in {_file(test) for test in self.seconds} if pattern.search((ROOT / file).read_text())}
        return frozenset(found | {test for test in self.seconds if _file(test) in naming})


def near_and_far(file: str, tests: Sequence[str]) -> list[list[str]]:
    """The tests of the file's room, and the others, which are only asked if those notice nothing; none of them empty.

    Most changes are noticed by the former, and to collect tests takes longer than to run them.
    """
    near = [test for test in tests if test.startswith(_room(file))]
    far = [test for test in tests if not test.startswith(_room(file))]
    return [part for part in (near, far) if part]


def _room(file: str) -> str:
    return f"tests/{file.rpartition('/')[0]}/"


def _file(test: str) -> str:
    return test.partition("::")[0]


def _statement(tree: ast.Module, line: int) -> tuple[ast.stmt, bool]:
    """The innermost statement that a line is part of, and whether it is in a function."""
    holding = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node.lineno <= line <= node.end_lineno]
    inner = max(holding, key=lambda node: (node.lineno, -node.end_lineno))
    functions = [node for node in holding if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return inner, any(node is not inner for node in functions)


def _end(statement: ast.stmt) -> int:
    """The last line of its own: a loop's or function's body is other statements."""
    body = getattr(statement, "body", None)
    return max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno


def _bound(statement: ast.stmt) -> tuple[str, ...]:
    """Names that a statement gives a meaning."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return (statement.name,)
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", statement)]
    names = {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return tuple(sorted(names)) or ("no name",)


def _made_of(tree: ast.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, and those that are bound to something with one of them on import."""
    found = set(names)
    left: list[ast.stmt] = [*tree.body]
    while left:
        statement = left.pop()
        if isinstance(statement, ast.ClassDef):
            left += statement.body
        value = getattr(statement, "value", None)
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and value is not None:
            used = {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}
            found.update(_bound(statement) if used & set(names) else ())
    return tuple(sorted(found))


def state() -> str:
    """Of the sources: another one, and the recording is of no use."""
    digest = hashlib.sha256()
    for part in PARTS:
        for path in sorted((ROOT / part).rglob("*.py")):
            if path.parent == Path(__file__).parent:
                continue
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def load() -> Lines | None:
    """The recording of these sources, if there is one."""
    if not STORE.exists():
        return None
    record = json.loads(STORE.read_text())
    return Lines(record) if record["state"] == state() else None


def record(arguments: Sequence[str]) -> int:
    """Runs the tests and writes what they ran. Returns pytest's exit code."""
    import coverage

    before = state()
    measured = coverage.Coverage(data_file=None, source=[str(ROOT / part) for part in PARTS[:3]], config_file=False)
    recorder = _Recorder(measured)
    measured.start()
    code = pytest.main([*arguments, "-q", "-p", "no:cacheprovider"], plugins=[recorder])
    measured.stop()
    data, lines = measured.get_data(), {}
    for file in data.measured_files():
        lines[Path(file).relative_to(ROOT).as_posix()] = {
            # The empty context is the import's.
            str(line): sorted(set(contexts) - {""} - recorder.failed)
            for line, contexts in data.contexts_by_lineno(file).items()
        }
    STORE.parent.mkdir(exist_ok=True)
    STORE.write_text(json.dumps({"state": before, "seconds": recorder.passed(), "lines": lines}))
    return int(code)


class _Recorder:
    def __init__(self, measured: Any) -> None:
        self._measured = measured
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._measured.switch_context(item.nodeid)
        yield
        self._measured.switch_context("")

    def passed(self) -> dict[str, float]:
        return {test: seconds for test, seconds in self.seconds.items() if test not in self.failed}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.add(report.nodeid)


if __name__ == "__main__":
    raise SystemExit(record(sys.argv[1:]))
