"""Conditions on sizes, as torch.export writes them in Python: read as arithmetic, and nothing of them executed.

A condition compares sums, products, quotients and remainders of sizes of inputs, and of inputs that are numbers. What
else may be written in Python is no condition.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

Condition = Callable[[Mapping[str, Any]], Any]  # of the inputs by name

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.USub: operator.neg,
    ast.Not: operator.not_, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max": max, "min": min, "abs": abs, "int": int, "float": float, "math.floor": math.floor,
    "math.ceil": math.ceil, "math.trunc": math.trunc,
}  # fmt: skip
_METHODS = ("size", "stride", "storage_offset", "dim", "numel")


def condition(text: str) -> Condition:
    """The condition that ``text`` is, of ``L``, the inputs by name.

    Raises:
        ValueError: it is none.
    """
    try:
        return _read(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError) as error:
        raise ValueError(f"{text!r} is no condition on sizes") from error


def _read(node: ast.expr) -> Condition:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, bool, str, type(None))):
        value = node.value
        return lambda given: value
    if isinstance(node, ast.Name) and node.id == "L":
        return lambda given: given
    if isinstance(node, ast.Subscript):
        whole, at = _read(node.value), _read(node.slice)
        return lambda given: whole(given)[at(given)]
    if isinstance(node, ast.Call) and not node.keywords:
        parts = [_read(x) for x in node.args]
        if isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
            of, name = _read(node.func.value), node.func.attr
            return lambda given: getattr(of(given), name)(*(part(given) for part in parts))
        function = _FUNCTIONS[ast.unparse(node.func)]
        return lambda given: function(*(part(given) for part in parts))
    if isinstance(node, ast.UnaryOp):
        one, turn = _read(node.operand), _OPERATORS[type(node.op)]
        return lambda given: turn(one(given))
    if isinstance(node, ast.BinOp):
        left, right, join = _read(node.left), _read(node.right), _OPERATORS[type(node.op)]
        return lambda given: join(left(given), right(given))
    if isinstance(node, ast.BoolOp):
        terms, every = [_read(x) for x in node.values], all if isinstance(node.op, ast.And) else any
        return lambda given: every(term(given) for term in terms)
    if isinstance(node, ast.Compare):
        sides = [_read(x) for x in (node.left, *node.comparators)]
        tests = [_OPERATORS[type(x)] for x in node.ops]
        return lambda given: all(test(sides[i](given), sides[i + 1](given)) for i, test in enumerate(tests))
    raise KeyError(type(node).__name__)
