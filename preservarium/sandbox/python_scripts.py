"""Python parser scripts: `def decode(payload, context) -> list[dict]`, compiled by RestrictedPython.

The names a script may use are a short list of pure functions. It can import nothing, reach no attribute that starts with an
underscore, and has no str.format (which walks attributes). The process around it is confined besides.

A script runs from its first line for each payload, with names of its own: variables, default arguments, classes and closures are
new each time. What it is given it cannot write to: RestrictedPython's guard lets it assign to items of its own lists and
dictionaries, and to no attribute of anything.
"""

import _strptime  # type: ignore[import-not-found]  # noqa: F401 - datetime.strptime imports it on first use, too late here
import base64
import binascii
import datetime
import math
import operator
import signal
import struct
from collections.abc import Callable, Iterator
from types import CodeType, SimpleNamespace
from typing import Any, Final

import orjson
from RestrictedPython import compile_restricted, limited_builtins, safe_builtins, utility_builtins  # noqa: F401
from RestrictedPython.Eval import default_guarded_getitem
from RestrictedPython.Guards import (
    full_write_guard,
    guarded_iter_unpack_sequence,
    guarded_unpack_sequence,
    safer_getattr,
)

from preservarium.domain.readings import json_text
from preservarium.errors import ReasonCode
from preservarium.sandbox.javascript import ScriptError

#: Longest sequence that `range` and repetition may make in a script.
SEQUENCE_MAX: Final = 1_000_000

_IN_PLACE: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "+=": operator.iadd, "-=": operator.isub, "*=": operator.imul, "/=": operator.itruediv, "//=": operator.ifloordiv,
    "%=": operator.imod, "<<=": operator.ilshift, ">>=": operator.irshift, "|=": operator.ior, "&=": operator.iand,
    "^=": operator.ixor, "**=": operator.ipow,
}  # fmt: skip


def _inplace(op: str, x: Any, y: Any) -> Any:
    return _IN_PLACE[op](x, y)


def _range(*arguments: int) -> range:
    made = range(*arguments)
    if len(made) > SEQUENCE_MAX:
        message = f"range of more than {SEQUENCE_MAX}"
        raise ValueError(message)
    return made


def _apply(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    return function(*arguments, **keywords)


def _names(source: Any, names: str) -> SimpleNamespace:
    # Only the functions themselves: a whole module would carry its imports along (json.codecs.open, …).
    return SimpleNamespace(**{n: getattr(source, n) for n in names.split()})


def _names_of_a_run() -> dict[str, Any]:
    builtins = {
        **safe_builtins,
        "range": _range, "min": min, "max": max, "sum": sum, "all": all, "any": any, "enumerate": enumerate, "reversed": reversed,
        "map": map, "filter": filter, "list": list, "dict": dict, "set": set, "frozenset": frozenset, "bytearray": bytearray, "bytes": bytes,
        "iter": iter, "next": next, "int_from_bytes": int.from_bytes,
    }  # fmt: skip
    return {
        "__builtins__": builtins,
        "__name__": "script",
        "__metaclass__": type,
        "_getattr_": safer_getattr,
        "_getitem_": default_guarded_getitem,
        "_getiter_": iter,
        "_write_": full_write_guard,
        "_iter_unpack_sequence_": guarded_iter_unpack_sequence,
        "_unpack_sequence_": guarded_unpack_sequence,
        "_inplacevar_": _inplace,
        "_apply_": _apply,
        "struct": _names(struct, "unpack unpack_from pack calcsize iter_unpack error"),
        "math": _names(
            math,
            "sqrt log log10 log2 exp pow floor ceil trunc sin cos tan atan atan2 pi e isnan isinf isfinite fabs fmod",
        ),
        "datetime": _names(datetime, "datetime timedelta timezone date time UTC"),
        "base64": _names(base64, "b64decode b64encode b16decode"),
        "binascii": _names(binascii, "hexlify unhexlify crc32 crc_hqx"),
        "json": SimpleNamespace(loads=orjson.loads),
    }


#: What each run begins with. Nothing in it can be written to by a script, so a copy of the outermost dictionary is enough.
_NAMES: Final = _names_of_a_run()


class _OverTime(BaseException):
    """Not an Exception, so that a script's `except Exception` does not swallow it."""


def _alarm(_number: int, _frame: Any) -> None:
    raise _OverTime


class PythonScript:
    """One script, compiled.

    Raises:
        ScriptError: it does not compile, uses what is not allowed, or defines no `decode`.
    """

    def __init__(self, source: str, cpu_s: float) -> None:
        self._cpu_s = cpu_s
        try:
            code = compile_restricted(source, "<script>", "exec")
        except SyntaxError as e:
            raise ScriptError(ReasonCode.SCRIPT_FAULT, str(e.args[0] if e.args else e)[:500], e.lineno) from None
        self._code: CodeType = code
        signal.signal(signal.SIGVTALRM, _alarm)
        names = self._run(self._executed, cpu_s * 10)
        if not callable(names.get("decode")):
            raise ScriptError(ReasonCode.SCRIPT_FAULT, "the script defines no decode(payload, context)")
        self.functions = [n for n in ("decode", "encode") if callable(names.get(n))]

    def _executed(self) -> dict[str, Any]:
        """The script's names after its last line."""
        names = dict(_NAMES)
        exec(self._code, names)
        return names

    def call(self, function: str, arguments: str, result_bytes_max: int) -> str:
        """Run `function(payload, context)`; the result as JSON text, with NaN and Infinity where they are in it.

        Raises:
            ScriptError: as JavaScript.call.
        """
        if function not in self.functions:
            raise ScriptError(ReasonCode.SCRIPT_FAULT, f"the script has no {function}")
        given = json_text.loads(json_text.unmarked(arguments).encode())
        payload = bytes(given["bytes"]) if "bytes" in given else given.get("payload")
        result = self._run(lambda: self._executed()[function](payload, given.get("context", {})), self._cpu_s)
        try:
            result = _plain(result)
            text = _json(result)
            if "null" in text:  # orjson writes it for NaN and Infinity, too
                text = json_text.unmarked(_json(json_text.mark(result)))
        except (TypeError, ValueError, RecursionError) as e:
            raise ScriptError(ReasonCode.SCRIPT_FAULT, f"the result is not JSON: {e}") from None
        if len(text) > result_bytes_max:
            raise ScriptError(
                ReasonCode.DECODE_LIMIT, f"the result has {len(text)} characters, more than {result_bytes_max}"
            )
        return text

    def _run(self, body: Callable[[], Any], cpu_s: float) -> Any:
        signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)
        try:
            return body()
        except _OverTime:
            raise ScriptError(ReasonCode.SCRIPT_TIMEOUT, "over its CPU limit", discard=True) from None
        except MemoryError:
            raise ScriptError(ReasonCode.SCRIPT_TIMEOUT, "over its memory limit", discard=True) from None
        except RecursionError:
            raise ScriptError(ReasonCode.SCRIPT_FAULT, "recursion too deep") from None
        except ScriptError:
            raise
        except Exception as e:
            raise ScriptError(ReasonCode.SCRIPT_FAULT, f"{e.__class__.__name__}: {e}"[:500], _line(e)) from None
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _plain(value: Any) -> Any:
    """Generators and views a script may return, as lists."""
    return list(value) if isinstance(value, Iterator) else value


def _json(value: Any) -> str:
    return orjson.dumps(value, default=_known, option=orjson.OPT_NON_STR_KEYS).decode()


def _known(value: Any) -> Any:
    """Bytes, which an encoder returns, as numbers; a number that is not finite and was given to the script, as any other."""
    if isinstance(value, bytes | bytearray):
        return list(value)
    if isinstance(value, float):
        return float(value)
    raise TypeError


def _line(e: BaseException) -> int | None:
    line = None
    trace = e.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<script>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
