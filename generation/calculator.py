"""The calculator that an assistant may call: arithmetic, evaluated from a syntax tree, never run as code.

    calculate("347 * (20 + 6)")      # "9022"
    calculate("1 / 0")               # "error: division by zero"

It knows numbers, + - * / // % ** and brackets. Anything else returns an error in words for the model to read,
and so does a calculation that would take long.
"""

import ast
import operator
from collections.abc import Mapping
from typing import Any

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
             ast.UAdd: operator.pos, ast.USub: operator.neg}
NO_NAMES: Mapping[str, float] = {}
LONGEST = 200  # characters of an expression; this also bounds the depth of its tree
LARGEST = 10**30  # of any intermediate result, so that no power takes long


def evaluate(node: ast.expr, names: Mapping[str, float] = NO_NAMES) -> int | float:
    """Return the value of a syntax tree; ValueError for anything but arithmetic, or a number too large.

    names: values of variables.
    """
    if isinstance(node, ast.Name) and node.id in names:
        value = names[node.id]
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](evaluate(node.operand, names))
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = evaluate(node.left, names), evaluate(node.right, names)
        if isinstance(node.op, ast.Pow) and abs(right) > 100:
            raise ValueError("the exponent is too large")
        value = OPERATORS[type(node.op)](left, right)
    else:
        raise ValueError("only numbers, + - * / // % ** and brackets")
    # A negative number to a fractional power is complex; nan and inf fail the comparison.
    if isinstance(value, complex) or not abs(value) <= LARGEST:
        raise ValueError("the number is too large")
    return value


def calculate(expression: Any) -> str:
    """Return the value as text (whole numbers without a decimal point), or "error: " and a reason."""
    if not isinstance(expression, str) or len(expression) > LONGEST:
        return f"error: give an expression of at most {LONGEST} characters"
    try:
        value = evaluate(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        return f"error: {error if type(error) is ValueError else 'not an expression'}"
    return str(int(value)) if value == value // 1 else f"{value:.12g}"
