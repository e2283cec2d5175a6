"""Every row of the fault contract has a test, and the pack's own source keeps to its security rules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from fault_report import ROWS, rows_of
from mount import ROOT, TESTS

PACK = [ROOT / "__init__.py", *(path for part in ("distributed", "nodes", "wan", "demo", "benchmarks")
                                for path in (ROOT / part).rglob("*.py"))]  # fmt: skip
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "imp", "multiprocessing"}
"""Not to be imported: they turn bytes into code, or carry pickles."""
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
ATTRIBUTES = {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "numpy.load", "np.load",
    "torch.hub.load", "dist.broadcast_object_list", "dist.all_gather_object", "dist.gather_object",
    "dist.scatter_object_list", "dist.send_object_list", "dist.recv_object_list",
}  # fmt: skip


def test_fault_22_every_row_has_a_test():
    names = re.findall(r"def (test_fault_\w+)", "".join(path.read_text() for path in TESTS.rglob("test_*.py")))
    assert {row for name in names for row in rows_of(name)} == set(ROWS)


def offences(source: str) -> Iterator[str]:
    """What in a file could run what it was given, or unpickle it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {name}" for name in names if name.partition(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        name = ast.unparse(node.func)
        if name in CALLS or name in ATTRIBUTES or name.endswith("_object_list"):
            yield name
        if name == "torch.load" and not _is(keywords.get("weights_only"), True):
            yield "torch.load without weights_only=True"
        if "shell" in keywords and not _is(keywords["shell"], False):
            yield f"{name} with shell"
        if "allow_pickle" in keywords and not _is(keywords["allow_pickle"], False):
            yield f"{name} with allow_pickle"


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_fault_22_nothing_in_the_pack_runs_or_unpickles_what_it_is_given():
    assert len(PACK) > 80
    found = {str(path.relative_to(ROOT)): list(offences(path.read_text(encoding="utf-8"))) for path in PACK}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import yaml", "eval(x)", "exec(x)", "__import__(x)",
        "torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(p, weights_only=w)", "os.system(x)",
        "subprocess.run(x, shell=True)", "np.load(p, allow_pickle=True)", "dist.broadcast_object_list(x)",
        "def f():\n    import marshal",
    ],
)  # fmt: skip
def test_fault_22_the_check_finds_what_it_looks_for(source: str):
    assert list(offences(source))


@pytest.mark.parametrize(
    "source", ["torch.load(p, weights_only=True)", "model.eval()", "re.compile(x)", "subprocess.run([x])"]
)
def test_fault_22_the_check_leaves_the_rest_alone(source: str):
    assert not list(offences(source))
