"""Small arithmetic expressions written by users: checked once, then compiled to Python.

An expression is a subset of Python's grammar: numbers, names, arithmetic, comparisons, `and`/`or`/`not`, `a if c else b`,
bit operations and calls of a short list of functions. There are no attributes, subscripts, assignments, lambdas or
comprehensions, so an expression can reach nothing but the numbers that it is given.

What it costs is bounded before it runs: the text, the number of nodes, and the width in bits that any whole number in it
can reach, because `9**9**9` is three characters and a day of work.
"""

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

from preservarium.domain.circular import arc
from preservarium.errors import reason

#: Longest text; the longest formula of a data sheet that we met has 160 characters.
TEXT_CHARACTERS_MAX: Final = 1_000
#: Most syntax nodes; a third-degree polynomial over a bridge ratio takes about 60.
NODES_MAX: Final = 400
#: Widest whole number that an intermediate result may reach; a u64 to the 16th power.
BITS_MAX: Final = 1_024
#: Largest whole-number exponent; calibration polynomials end at the fifth degree.
EXPONENT_MAX: Final = 16
#: Furthest shift to the left.
SHIFT_MAX: Final = 64
#: Width that a result counts with once it is a field of its own; wider whole numbers become floats there.
FIELD_BITS_MAX: Final = 128

#: What an evaluation may raise where the numbers do not allow it (log of a negative, division by zero, NaN to integer).
ARITHMETIC_ERRORS: Final = (ArithmeticError, ValueError, TypeError)


class ExpressionError(ValueError):
    """The expression is not allowed, or not an expression."""


Kind = Literal["number", "text"]


@dataclass(frozen=True, slots=True)
class Name:
    """What is known of a name before the expression runs."""

    source: str  #: the Python expression that stands for it: a variable, or a literal
    kind: Kind = "number"
    bits: int = 64  #: widest whole number it may be; 0 for a float


@dataclass(frozen=True, slots=True)
class Expression:
    """A checked expression."""

    source: str  #: Python source over the sources of its names and the functions of `FUNCTIONS`
    kind: Kind
    bits: int  #: widest whole number that it can be; 0 where it is always a float
    risky: bool  #: whether it can raise one of ARITHMETIC_ERRORS
    names: frozenset[str]


def _bit(x: Any, n: Any) -> int:
    return (int(x) >> int(n)) & 1


def _bits(x: Any, low: Any, high: Any) -> int:
    return (int(x) >> int(low)) & ((1 << (min(int(high) - int(low), FIELD_BITS_MAX) + 1)) - 1)


def _signed(x: Any, width: Any) -> int:
    value, size = int(x), int(width)
    return value - (1 << size) if 0 < size <= FIELD_BITS_MAX and value >> (size - 1) & 1 else value


def _round(x: Any, digits: Any = 0) -> Any:
    return round(x, int(digits)) if digits else _narrow(round(x))


def _narrow(x: int) -> int:
    """A float has whole parts of up to 1,024 bits, and none that wide is a measurement."""
    if x.bit_length() > FIELD_BITS_MAX:
        message = f"a whole number of {x.bit_length()} bits"
        raise OverflowError(message)
    return x


def _floor(x: Any) -> int:
    return _narrow(math.floor(x))


def _ceil(x: Any) -> int:
    return _narrow(math.ceil(x))


def _int(x: Any) -> int:
    return _narrow(int(x))


def _angle_diff(a: Any, b: Any, period: Any) -> float:
    if not period > 0:
        message = f"a period is over 0, not {period!r}"
        raise ValueError(message)
    return arc(a, b, period)


#: Callable by name: name -> (function, least arguments, most arguments).
FUNCTIONS: Final[dict[str, tuple[Callable[..., Any], int, int]]] = {
    "abs": (abs, 1, 1),
    "angle_diff": (_angle_diff, 3, 3),
    "min": (min, 2, 16),
    "max": (max, 2, 16),
    "round": (_round, 1, 2),
    "floor": (_floor, 1, 1),
    "ceil": (_ceil, 1, 1),
    "trunc": (_int, 1, 1),
    "int": (_int, 1, 1),
    "float": (float, 1, 1),
    "pow": (math.pow, 2, 2),
    "sqrt": (math.sqrt, 1, 1),
    "exp": (math.exp, 1, 1),
    "log": (math.log, 1, 1),
    "log10": (math.log10, 1, 1),
    "log2": (math.log2, 1, 1),
    "sin": (math.sin, 1, 1),
    "cos": (math.cos, 1, 1),
    "tan": (math.tan, 1, 1),
    "asin": (math.asin, 1, 1),
    "acos": (math.acos, 1, 1),
    "atan": (math.atan, 1, 1),
    "atan2": (math.atan2, 2, 2),
    "hypot": (math.hypot, 2, 2),
    "radians": (math.radians, 1, 1),
    "degrees": (math.degrees, 1, 1),
    "bit": (_bit, 2, 2),
    "bits": (_bits, 3, 3),
    "signed": (_signed, 2, 2),
}
#: The names under which generated source calls them: no user's name can be one of these.
NAMESPACE: Final[dict[str, Any]] = {
    "__builtins__": {},
    "_pow": math.pow,
    **{f"_{name}": function for name, (function, _, _) in FUNCTIONS.items()},
}
_WHOLE_RESULT: Final = {"floor", "ceil", "trunc", "int", "round"}
_WIDEST_ARGUMENT: Final = {"abs", "min", "max"}
_NEVER_RAISE: Final = {"abs", "min", "max"}

_ARITHMETIC: Final[dict[type[ast.operator], str]] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%",
    ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^", ast.LShift: "<<", ast.RShift: ">>",
}  # fmt: skip
_COMPARISON: Final[dict[type[ast.cmpop], str]] = {
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
}  # fmt: skip


@dataclass(slots=True)
class _Part:
    source: str
    kind: Kind
    bits: int
    risky: bool


class _Checker:
    def __init__(self, text: str, names: Mapping[str, Name]) -> None:
        self.text = text
        self.names = names
        self.used: set[str] = set()

    def refuse(self, why: str) -> NoReturn:
        message = f"{self.text!r}: {why}"
        raise ExpressionError(message) from None

    def part(self, node: ast.expr) -> _Part:
        part = self._part(node)
        if part.bits > BITS_MAX:
            self.refuse(f"a whole number in it could have {part.bits} bits; {BITS_MAX} are allowed")
        return part

    def number(self, node: ast.expr) -> _Part:
        part = self.part(node)
        if part.kind != "number":
            self.refuse("text can be compared and nothing else")
        return part

    def _part(self, node: ast.expr) -> _Part:
        match node:
            case ast.Constant(value=bool() as value):
                return _Part(repr(value), "number", 1, False)
            case ast.Constant(value=int() as value):
                # In parentheses: what follows a literal must not be read as part of it.
                return _Part(f"({value!r})", "number", max(value.bit_length(), 1), False)
            case ast.Constant(value=float() as value):
                if not math.isfinite(value):
                    self.refuse("a constant is not finite")
                return _Part(f"({value!r})", "number", 0, False)
            case ast.Constant(value=str() as value):
                return _Part(repr(value), "text", 0, False)
            case ast.Name(id=name):
                known = self.names.get(name)
                if known is None:
                    self.refuse(f"{name} is not known here")
                self.used.add(name)
                return _Part(known.source, known.kind, known.bits, False)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                inner = self.part(operand)
                return _Part(f"(not {inner.source})", "number", 1, inner.risky)
            case ast.UnaryOp(op=op, operand=operand):
                inner = self.number(operand)
                sign = "-" if isinstance(op, ast.USub) else "+" if isinstance(op, ast.UAdd) else "~"
                return _Part(f"({sign}{inner.source})", "number", inner.bits, inner.risky or sign == "~")
            case ast.BinOp():
                return self._binary(node)
            case ast.BoolOp(op=op, values=values):
                parts = [self.number(v) for v in values]
                word = " and " if isinstance(op, ast.And) else " or "
                return self._joined("(" + word.join(p.source for p in parts) + ")", parts)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                return self._comparison(left, ops, comparators)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                condition, yes, no = self.part(test), self.part(body), self.part(orelse)
                if yes.kind != no.kind:
                    self.refuse("both sides of a condition must be numbers, or both text")
                joined = self._joined(f"({yes.source} if {condition.source} else {no.source})", [condition, yes, no])
                joined.kind, joined.bits = yes.kind, max(yes.bits, no.bits)
                return joined
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
                return self._call(name, args)
        message = f"{self.text!r}: {type(node).__name__} is not allowed"
        raise ExpressionError(message)

    def _joined(self, source: str, parts: list[_Part]) -> _Part:
        return _Part(source, "number", max(p.bits for p in parts), any(p.risky for p in parts))

    def _comparison(self, left: ast.expr, ops: list[ast.cmpop], comparators: list[ast.expr]) -> _Part:
        parts = [self.part(left), *(self.part(c) for c in comparators)]
        source = parts[0].source
        for op, right in zip(ops, parts[1:], strict=True):
            if type(op) not in _COMPARISON:
                self.refuse(f"{type(op).__name__} is not allowed")
            if right.kind != parts[0].kind:
                self.refuse("text is compared with a number")
            source += f" {_COMPARISON[type(op)]} {right.source}"
        return _Part(f"({source})", "number", 1, any(p.risky for p in parts))

    def _binary(self, node: ast.BinOp) -> _Part:
        if isinstance(node.op, ast.Pow):
            return self._power(node.left, node.right)
        symbol = _ARITHMETIC.get(type(node.op))
        if symbol is None:
            self.refuse(f"{type(node.op).__name__} is not allowed")
        left, right = self.number(node.left), self.number(node.right)
        source = f"({left.source} {symbol} {right.source})"
        risky = left.risky or right.risky
        match symbol:
            case "+" | "-":
                # A float among them makes the result a float, but which branch runs is not known: keep the bound.
                bits = max(left.bits, right.bits) + 1 if left.bits and right.bits else 0
            case "*":
                bits = left.bits + right.bits if left.bits and right.bits else 0
            case "/":
                bits, risky = 0, risky or not _non_zero(node.right)
            case "//" | "%":
                bits, risky = max(left.bits, right.bits), risky or not _non_zero(node.right)
            case "<<":
                if not (isinstance(node.right, ast.Constant) and isinstance(node.right.value, int)):
                    self.refuse("a shift to the left needs a constant")
                if not 0 <= node.right.value <= SHIFT_MAX:
                    self.refuse(f"a shift to the left of more than {SHIFT_MAX}")
                bits, risky = left.bits + node.right.value, True
            case _:
                bits, risky = max(left.bits, right.bits), True
        # A product of a wide whole number with a float overflows into an exception; narrow ones cannot.
        return _Part(source, "number", bits, risky or max(left.bits, right.bits) > FIELD_BITS_MAX * 4)

    def _power(self, base_node: ast.expr, exponent_node: ast.expr) -> _Part:
        base, exponent = self.number(base_node), self.number(exponent_node)
        constant = _constant(exponent_node)
        if isinstance(constant, int) and abs(constant) <= EXPONENT_MAX:
            bits = base.bits * abs(constant) if constant >= 0 else 0
            # Whole powers of floats overflow too: 1e300 ** 2.
            return _Part(f"({base.source} ** {exponent.source})", "number", max(bits, 1 if base.bits else 0), True)
        if isinstance(constant, int):
            self.refuse(f"a power of more than {EXPONENT_MAX}")
        # math.pow has no complex results and no large integers.
        return _Part(f"_pow({base.source}, {exponent.source})", "number", 0, True)

    def _call(self, name: str, args: list[ast.expr]) -> _Part:
        if name not in FUNCTIONS:
            self.refuse(f"{name}() is not one of {', '.join(sorted(FUNCTIONS))}")
        _, least, most = FUNCTIONS[name]
        if not least <= len(args) <= most:
            self.refuse(f"{name}() takes {least}{f' to {most}' if most != least else ''} arguments")
        if name == "pow":
            return self._power(args[0], args[1])
        parts = [self.number(a) for a in args]
        source = f"_{name}({', '.join(p.source for p in parts)})"
        risky = name not in _NEVER_RAISE or any(p.risky for p in parts)
        if name in _WIDEST_ARGUMENT:
            bits = max(p.bits for p in parts)
        elif name in _WHOLE_RESULT:
            bits = parts[0].bits or FIELD_BITS_MAX
        elif name in {"bit", "bits", "signed"}:
            bits = FIELD_BITS_MAX
        else:
            bits = 0
        return _Part(source, "number", bits, risky)


def _constant(node: ast.expr) -> int | float | None:
    match node:
        case ast.Constant(value=bool()):
            return None
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
    return None


def _non_zero(node: ast.expr) -> bool:
    return bool(_constant(node))


def check(text: str | float, names: Mapping[str, Name]) -> Expression:
    """Check an expression and translate it.

    Args:
        text: the expression; a number stands for itself.
        names: what it may refer to.

    Raises:
        ExpressionError: it is not allowed; the message says what is wrong and quotes it.
    """
    text = str(text)
    if len(text) > TEXT_CHARACTERS_MAX:
        message = f"an expression has {len(text)} characters; {TEXT_CHARACTERS_MAX} are allowed"
        raise ExpressionError(message)
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        message = f"{text!r}: not an expression ({getattr(e, 'msg', None) or reason(e)})"
        raise ExpressionError(message) from None
    nodes = sum(1 for _ in ast.walk(tree))
    if nodes > NODES_MAX:
        message = f"{text!r}: {nodes} parts; {NODES_MAX} are allowed"
        raise ExpressionError(message)
    checker = _Checker(text, names)
    try:
        part = checker.part(tree.body)
    except RecursionError:
        checker.refuse("nested too deeply")
    return Expression(part.source, part.kind, part.bits, part.risky, frozenset(checker.used))


def compile_expression(text: str | float, names: tuple[str, ...]) -> Callable[..., Any]:
    """A function of `names`, in their order, that evaluates the expression.

    It raises one of ARITHMETIC_ERRORS where the numbers do not allow an answer, and nothing else.

    Raises:
        ExpressionError: the expression is not allowed.
    """
    for name in names:
        if not name.isidentifier() or name.startswith("_"):
            message = f"{name!r} cannot be a name in an expression"
            raise ExpressionError(message)
    checked = check(text, {name: Name(f"n_{name}", bits=FIELD_BITS_MAX) for name in names})
    source = f"lambda {', '.join(f'n_{name}' for name in names)}: {checked.source}"
    # The source was made from a checked tree: names are ours, constants are repr() of numbers and text.
    function: Callable[..., Any] = eval(source, dict(NAMESPACE))
    return function
