"""Small wrong changes of a source file: what a slip of the hand or of the mind leaves behind.

Each is one node of the syntax tree replaced by another, so that line numbers stay.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass

from replacements import replacements


@dataclass(frozen=True, slots=True)
class Change:
    """One wrong change of one file."""

    node: int
    """Which node of the tree, in the order of `ast.walk`."""
    way: int
    """Which of the node's replacements."""
    line: int
    kind: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.line}: {self.kind}: {self.before}  ->  {self.after}"


def changes(source: str) -> list[Change]:
    """Every change that this module knows of a file's text."""
    tree = ast.parse(source)
    kept, found = _mutable(tree), []
    for index, node in enumerate(ast.walk(tree)):
        if id(node) not in kept:
            continue
        for way, (kind, other) in enumerate(replacements(node)):
            before, after = ast.unparse(node), ast.unparse(ast.fix_missing_locations(copy.deepcopy(other)))
            if before != after:
                found.append(Change(index, way, node.lineno, kind, _line(before), _line(after)))
    return found


def changed(source: str, change: Change) -> ast.Module:
    """The tree of the file with the change made."""
    tree = ast.parse(source)
    node = list(ast.walk(tree))[change.node]
    _, other = list(replacements(node))[change.way]
    tree = _Put(node, ast.copy_location(other, node)).visit(tree)
    return ast.fix_missing_locations(tree)


class _Put(ast.NodeTransformer):
    def __init__(self, node: ast.AST, other: ast.AST) -> None:
        self._node, self._other = node, other

    def visit(self, node: ast.AST) -> ast.AST:
        return self._other if node is self._node else self.generic_visit(node)


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 110 else text[:107] + "..."


def _mutable(tree: ast.Module) -> set[int]:
    """Nodes that run: no types, docstrings, decorators or imports. Of a raised error only what its message shows."""
    left: list[ast.AST] = [tree]
    kept: set[int] = set()
    while left:
        node = left.pop()
        if hasattr(node, "lineno"):
            kept.add(id(node))
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_comment", "bases", "format_spec"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(node, ast.Call) and name == "func" and isinstance(child, ast.Attribute):
                    # A method's name stays; what it is called on does not.
                    child = child.value
                if isinstance(child, ast.AST) and not _idle(child):
                    left.append(child)
    return kept


def _idle(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    guard = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    # A protocol's or an abstract method's.
    return guard or isinstance(node, (ast.Import, ast.ImportFrom, ast.Assert))
