"""What a node of the syntax tree may be mistaken for."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
ORDERED = (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod)
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
DTYPES = {"float32": "bfloat16", "bfloat16": "float32", "float16": "float32", "float64": "float32", "int64": "int32"}
PLACES = {"rank", "start", "first", "begin", "offset", "cfg_rank", "ulysses_rank"}
"""Names of where a part begins: 0 in their place is the first rank's part on every rank."""
QUIET = {"debug", "info", "warning", "exception"}
"""Calls whose loss only a log shows."""


def replacements(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Kind of slip, and the node that it leaves."""
    make = _MAKERS.get(type(node))
    if make is not None:
        yield from make(node)


def _compare(node: ast.Compare) -> Iterator[tuple[str, ast.AST]]:
    if any(_is(other, type(None)) for other in node.comparators):
        yield "comparison", ast.UnaryOp(ast.Not(), node)
        return
    for place, operator in enumerate(node.ops):
        for other in COMPARISONS[type(operator)]:
            yield "comparison", _with(node, ops=[*node.ops[:place], other(), *node.ops[place + 1 :]])
    if len(node.ops) == 2:
        yield "bound dropped", ast.Compare(node.comparators[0], node.ops[1:], node.comparators[1:])
        yield "bound dropped", ast.Compare(node.left, node.ops[:1], node.comparators[:1])


def _boolean(node: ast.BoolOp) -> Iterator[tuple[str, ast.AST]]:
    yield "boolean", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    for dropped in range(len(node.values)):
        rest = node.values[:dropped] + node.values[dropped + 1 :]
        yield "condition dropped", rest[0] if len(rest) == 1 else _with(node, values=rest)


def _unary(node: ast.UnaryOp) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node.op, (ast.Not, ast.USub)):
        yield "sign dropped", node.operand


def _binary(node: ast.BinOp) -> Iterator[tuple[str, ast.AST]]:
    if any(isinstance(side, ast.JoinedStr) or _is(side, str) for side in (node.left, node.right)):
        return
    other = OPERATORS.get(type(node.op))
    if other is not None:
        yield "operator", _with(node, op=other())
    if isinstance(node.op, ORDERED):
        yield "sides exchanged", _with(node, left=node.right, right=node.left)
    if isinstance(node.op, ast.FloorDiv):
        yield "rounded up", ast.UnaryOp(ast.USub(), _with(node, left=ast.UnaryOp(ast.USub(), node.left)))


def _constant(node: ast.Constant) -> Iterator[tuple[str, ast.AST]]:
    value = node.value
    if isinstance(value, bool):
        yield "constant", ast.Constant(not value)
    elif isinstance(value, int):
        yield "constant", ast.Constant(value + 1)
        if value > 0:
            yield "constant", ast.Constant(value - 1)
    elif isinstance(value, float):
        yield "constant", ast.Constant(value * 2 if value else 1.0)


def _return(node: ast.Return) -> Iterator[tuple[str, ast.AST]]:
    if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
        yield "nothing returned", ast.Return(ast.Constant(None))


def _expression(node: ast.Expr) -> Iterator[tuple[str, ast.AST]]:
    function = node.value.func if isinstance(node.value, ast.Call) else None
    if function is not None and not (isinstance(function, ast.Attribute) and function.attr in QUIET):
        yield "call dropped", ast.Pass()


def _assign(node: ast.Assign | ast.AugAssign) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.AugAssign):
        other = OPERATORS.get(type(node.op))
        if other is not None:
            yield "operator", _with(node, op=other())
        yield "assignment dropped", ast.Pass()
    elif not all(isinstance(target, (ast.Name, ast.Tuple)) for target in node.targets):
        yield "assignment dropped", ast.Pass()


def _if(node: ast.If | ast.IfExp) -> Iterator[tuple[str, ast.AST]]:
    yield "condition turned", _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.If) and not node.orelse:
        yield "check dropped", _with(node, test=ast.Constant(False))


def _call(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name in NAMES:
        yield "function", _with(node, func=ast.Name(NAMES[name], ast.Load()))
    if name == "sorted":
        turned = [word for word in node.keywords if word.arg != "reverse"]
        if len(turned) == len(node.keywords):
            turned.append(ast.keyword("reverse", ast.Constant(True)))
        yield "order turned", _with(node, keywords=turned)
    if name == "reversed" and node.args:
        yield "order turned", node.args[0]
    if name == "int" and len(node.args) == 1 and isinstance(node.args[0], ast.BinOp):
        up = ast.BinOp(ast.UnaryOp(ast.USub(), node.args[0]), ast.FloorDiv(), ast.Constant(1))
        yield "rounded up", ast.UnaryOp(ast.USub(), _with(node, args=[up]))
    if isinstance(node.func, ast.Attribute) and node.func.attr in ("float", "contiguous", "clone", "strip", "resolve"):
        yield "method dropped", node.func.value
    if (
        len(node.args) >= 2
        and name not in NAMES
        and not any(isinstance(argument, ast.Starred) for argument in node.args[:2])
    ):
        yield "arguments exchanged", _with(node, args=[node.args[1], node.args[0], *node.args[2:]])
    for dropped, word in enumerate(node.keywords):
        if word.arg is not None:
            yield "option dropped", _with(node, keywords=node.keywords[:dropped] + node.keywords[dropped + 1 :])


def _slice(node: ast.Slice) -> Iterator[tuple[str, ast.AST]]:
    if node.lower is not None:
        yield "bound dropped", _with(node, lower=None)
    if node.upper is not None:
        yield "bound dropped", _with(node, upper=None)
    if (node.lower is None) != (node.upper is None) and node.step is None:
        yield "other end", _with(node, lower=node.upper, upper=node.lower)


def _name(node: ast.Name | ast.Attribute) -> Iterator[tuple[str, ast.AST]]:
    name = node.id if isinstance(node, ast.Name) else node.attr
    if isinstance(node.ctx, ast.Load):
        if name in PLACES:
            yield "another's place", ast.Constant(0)
        elif isinstance(node, ast.Attribute) and name in DTYPES:
            yield "dtype", _with(node, attr=DTYPES[name])


def _joined(node: ast.JoinedStr) -> Iterator[tuple[str, ast.AST]]:
    shown = [place for place, part in enumerate(node.values) if isinstance(part, ast.FormattedValue)]
    if len(shown) >= 2:
        values = list(node.values)
        first, second = shown[:2]
        values[first], values[second] = (
            _with(values[first], value=values[second].value), _with(values[second], value=values[first].value)
        )  # fmt: skip
        yield "exchanged in a message", _with(node, values=values)


def _collection(node: ast.Tuple | ast.List | ast.Set) -> Iterator[tuple[str, ast.AST]]:
    if len(node.elts) >= 2 and all(isinstance(element, ast.Constant) for element in node.elts):
        yield "entry dropped", _with(node, elts=node.elts[1:])
        yield "entry dropped", _with(node, elts=node.elts[:-1])


def _comprehension(node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> Iterator[tuple[str, ast.AST]]:
    for place, generator in enumerate(node.generators):
        if generator.ifs:
            without = _with(generator, ifs=[])
            generators = [*node.generators[:place], without, *node.generators[place + 1 :]]
            yield "condition dropped", _with(node, generators=generators)


def _handler(node: ast.ExceptHandler) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node.type, ast.Tuple) and len(node.type.elts) >= 2:
        for dropped in range(len(node.type.elts)):
            rest = node.type.elts[:dropped] + node.type.elts[dropped + 1 :]
            yield "error not caught", _with(node, type=ast.Tuple(rest, ast.Load()))


def _jump(node: ast.Break | ast.Continue) -> Iterator[tuple[str, ast.AST]]:
    yield "jump", ast.Continue() if isinstance(node, ast.Break) else ast.Break()


def _with(node: ast.AST, **fields: object) -> ast.AST:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def _is(node: ast.AST, kind: type) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, kind)


_MAKERS = {
    ast.Compare: _compare,
    ast.BoolOp: _boolean,
    ast.UnaryOp: _unary,
    ast.BinOp: _binary,
    ast.Constant: _constant,
    ast.Return: _return,
    ast.Expr: _expression,
    ast.Assign: _assign,
    ast.AugAssign: _assign,
    ast.If: _if,
    ast.IfExp: _if,
    ast.Call: _call,
    ast.Slice: _slice,
    ast.Name: _name,
    ast.Attribute: _name,
    ast.JoinedStr: _joined,
    ast.Tuple: _collection,
    ast.List: _collection,
    ast.Set: _collection,
    ast.ListComp: _comprehension,
    ast.SetComp: _comprehension,
    ast.GeneratorExp: _comprehension,
    ast.DictComp: _comprehension,
    ast.ExceptHandler: _handler,
    ast.Break: _jump,
    ast.Continue: _jump,
}
