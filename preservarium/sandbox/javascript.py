"""JavaScript codecs in QuickJS: one context per script version, kept between calls."""

import re
from pathlib import Path
from typing import Any, Final

import orjson
import quickjs

from preservarium.domain.errors import ReasonCode

HARNESS: Final = Path(__file__).with_name("harness.js").read_text(encoding="utf-8")
#: A codec keeps tables, not data: 32 MiB is a hundred times what the public ones use.
CONTEXT_BYTES_MAX: Final = 32 << 20
#: Deep enough for any recursive decoder, shallow enough that QuickJS notices before the C stack ends.
STACK_BYTES_MAX: Final = 512 << 10
_EXPORT: Final = re.compile(
    r"^[ \t]*export\s+(?:(?:default\s+)?(?=function|class|const|let|var|async)|\{[^{}]*\}[ \t]*;?|(?P<object>default)(?=\s+\{))",
    re.MULTILINE,
)
_LINE: Final = re.compile(r"<input>:(\d+)")
#: QuickJS names every source "<input>"; a codec's lines are told from the harness's by starting further down.
_LINES_BEFORE: Final = 10_000
#: Functions that a codec may define; see `resolve` in the harness.
_NAMES: Final = (
    "decodeUplink", "decodeDownlink", "encodeDownlink", "Decoder", "Decode", "Encoder", "Encode",
)  # fmt: skip
_BEFORE: Final = "\n" * _LINES_BEFORE + "__setup(function () {"
_AFTER: Final = (
    "\n;return {" + ", ".join(f"{n}: typeof {n} === 'function' ? {n} : undefined" for n in _NAMES) + "};\n})"
)


def _plain(found: re.Match[str]) -> str:
    """What stands for `export`: nothing, or for a default object what CommonJS would say; on as many lines."""
    return "module.exports =" if found["object"] else "\n" * found[0].count("\n")


class ScriptError(Exception):
    """A script failed: `code` says how; `line` is in the script, where known."""

    def __init__(self, code: ReasonCode, message: str, line: int | None = None, *, discard: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.line = line
        self.discard = discard  #: the context cannot be trusted any more


class JavaScript:
    """One codec in its own context.

    Raises:
        ScriptError: the source does not compile, or defines none of the known functions.
    """

    def __init__(self, source: str, cpu_s: float) -> None:
        self._context = quickjs.Context()
        self._context.set_memory_limit(CONTEXT_BYTES_MAX)
        self._context.set_max_stack_size(STACK_BYTES_MAX)
        self._context.eval(HARNESS)
        # Compiling a large codec may take longer than a call; ten calls' worth is still bounded.
        self._context.set_time_limit(cpu_s * 10)
        try:
            try:
                functions = self._context.eval(_BEFORE + source + _AFTER)
            except quickjs.JSException as e:
                if "SyntaxError" not in str(e) or not _EXPORT.search(source):
                    raise
                # A codec published as a module: the same functions, without the keyword.
                functions = self._context.eval(_BEFORE + _EXPORT.sub(_plain, source) + _AFTER)
            self.functions: list[str] = orjson.loads(functions)
            self._call = self._context.eval("__call")
        except quickjs.JSException as e:
            raise self._error(e) from None
        if not self.functions:
            raise ScriptError(ReasonCode.SCRIPT_FAULT, "the script defines none of decodeUplink, Decoder, Decode")
        self._context.set_time_limit(cpu_s)

    def call(self, function: str, arguments: str, result_bytes_max: int) -> str:
        """Run `function` on the JSON text `arguments`; returns its result as JSON text.

        Raises:
            ScriptError: it raised, went over its time, memory or stack, or returned more than `result_bytes_max`.
        """
        try:
            result: Any = self._call(function, arguments)
        except quickjs.JSException as e:
            raise self._error(e) from None
        if not isinstance(result, str):
            raise ScriptError(ReasonCode.SCRIPT_FAULT, "the result is not JSON")
        if len(result) > result_bytes_max:
            raise ScriptError(
                ReasonCode.DECODE_LIMIT, f"the result has {len(result)} characters, more than {result_bytes_max}"
            )
        return result

    @staticmethod
    def _error(e: quickjs.JSException) -> ScriptError:
        text = str(e).strip()
        first = text.splitlines()[0][:500] if text else "unknown error"
        lines = [int(n) - _LINES_BEFORE for n in _LINE.findall(text)]
        line = next((n for n in lines if n > 0), None)
        if "InternalError: interrupted" in text:
            return ScriptError(ReasonCode.SCRIPT_TIMEOUT, "over its CPU limit", line, discard=True)
        if "out of memory" in text:
            return ScriptError(ReasonCode.SCRIPT_TIMEOUT, "over its memory limit", line, discard=True)
        return ScriptError(ReasonCode.SCRIPT_FAULT, first, line, discard="InternalError" in text)
