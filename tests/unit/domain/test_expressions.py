import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preservarium.domain.expressions import ARITHMETIC_ERRORS, ExpressionError, Name, check, compile_expression


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x", 7),
        ("-x + 2 * 3", -1),
        ("(x - 32768) / 100", -327.61),
        ("x ** 2 - x**3 / 7", 0.0),
        ("pow(x, 2) + pow(x, 0.5) ** 2", 56.0),
        ("x // 2 + x % 4", 6),
        ("x & 3 | 8 ^ 1 << 2", 15),
        ("~x", -8),
        ("bit(x, 1) + bits(x, 1, 2) * 10", 31),
        ("signed(255, 8)", -1),
        ("1 if x > 5 and not x == 8 else 0", 1),
        ("5 < x <= 7", True),
        ("max(min(x, 3, 9), abs(-4))", 4),
        ("round(x / 3, 2)", 2.33),
        ("floor(x / 2) + ceil(x / 2) + trunc(-x / 2) + int(2.9) + float(1)", 7.0),
        ("sqrt(49) + exp(0) + log(exp(2)) + log10(100) + log2(8)", 15.0),
        ("degrees(atan2(1, 1)) + hypot(3, 4) + radians(0)", 50.0),
        ("1e-3 * x", 0.007),
        ("angle_diff(x, 353, 360) + angle_diff(353, x, 360) * 2 + angle_diff(x, x + 12, 24)", -2.0),
    ],
)
def test_an_expression_says_what_it_says(text, value):
    assert compile_expression(text, ("x",))(7) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "", "x +", "x.real", "x.__class__", "x[0]", "__import__('os')", "open('a')", "(lambda: 1)()", "[x for x in y]", "f'{x}'",
        "x := 1", "exec('1')", "eval('1')", "print(x)", "y", "_pow(x, 2)", "abs", "x if", "'a' * 100000", "'a' + 'b'", "b'a'",
        "1j", "...", "None", "x; x", "x\ny", "x is x", "x in x", "{1: 2}", "(1, 2)", "max(x)", "max(*x)", "pow(x, y=2)",
        "1e999", "x == 'a'", "round(1, 2, 3)",
        # what would take for ever or fill the memory
        "x ** 17", "x << 65", "x << x", "pow(2, 9999)",
        "x*x*x*x*x*x*x*x*x*x*x*x*x*x*x*x*x", "(" * 300 + "x" + ")" * 300, "-" * 900 + "x", "x" * 1001, "+".join("x" * 300),
    ],
)  # fmt: skip
def test_what_is_not_arithmetic_or_has_no_bound_is_refused(text):
    with pytest.raises(ExpressionError):
        compile_expression(text, ("x",))


@pytest.mark.parametrize("text", ["9 ** 9 ** 9", "2 ** 16 ** 16 ** 16", "floor(1e300)", "exp(1000)"])
def test_what_grows_too_large_has_no_answer(text):
    with pytest.raises(ARITHMETIC_ERRORS):
        compile_expression(text, ())()


def test_text_can_be_compared():
    checked = check("kind == 'HT'", {"kind": Name("k", "text")})
    assert checked.source == "(k == 'HT')"
    with pytest.raises(ExpressionError):
        check("kind + 1", {"kind": Name("k", "text")})


def test_widths_are_followed():
    names = {"a": Name("a", bits=32), "f": Name("f", bits=0)}
    assert check("a * a", names).bits == 64
    assert check("a + 1", names).bits == 33
    assert check("a / 2", names).bits == 0
    assert check("a * f", names).bits == 0
    assert not check("a / 2 + 3 * a", names).risky
    assert check("1 / a", names).risky
    assert check("log(a)", names).risky


def test_a_negative_base_has_no_complex_power():
    with pytest.raises(ValueError, match="math domain"):
        compile_expression("x ** 0.5", ("x",))(-8)


TREES = st.recursive(
    st.one_of(st.sampled_from(["x", "y"]), st.integers(-(2**70), 2**70).map(str), st.floats(0, 1e300).map(repr)),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "&", "|", "^", ">>", "**", "<", "==", "and", "or"]), inner)
        .map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(st.sampled_from(["abs", "sqrt", "log", "exp", "floor", "int", "round", "sin"]), inner).map(lambda t: f"{t[0]}({t[1]})"),
        st.tuples(inner, inner, inner).map(lambda t: f"({t[0]} if {t[1]} else {t[2]})"),
    ),
    max_leaves=25,
)  # fmt: skip
NUMBERS = st.one_of(st.integers(-(2**64), 2**64), st.floats())


@settings(max_examples=300, deadline=1000)
@given(text=TREES, x=NUMBERS, y=NUMBERS)
def test_any_accepted_expression_answers_or_raises_arithmetic(text, x, y):
    try:
        function = compile_expression(text, ("x", "y"))
    except ExpressionError:
        return
    try:
        value = function(x, y)
    except ARITHMETIC_ERRORS:
        return
    assert isinstance(value, int | float)
    assert not isinstance(value, int) or value.bit_length() <= 2 * 1_024


@settings(max_examples=300)
@given(text=st.text(alphabet="xy0123456789+-*/%&|^~<>=!(),. abcdefgilmnopqrstu_'\"[]{}:;@\n\\", max_size=60))
def test_any_text_is_refused_with_one_error_or_answers(text):
    try:
        function = compile_expression(text, ("x", "y"))
    except ExpressionError:
        return
    try:
        function(3, 0.5)
    except ARITHMETIC_ERRORS:
        return


def test_nan_is_a_number():
    assert math.isnan(compile_expression("x * 2 + 1", ("x",))(math.nan))
