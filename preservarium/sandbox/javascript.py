"""JavaScript codecs in QuickJS, where no run finds anything of the one before.

A codec's text is the body of a function, compiled once for each context and run for each payload, so its variables are new each
time. What it may leave elsewhere is kept from the next run in one of two ways:

- most codecs run in a context that is kept: its built-in objects are frozen, and variables that the codec did not declare
  are taken away after each call (hardening.js);
- one that writes to built-in objects (`String.prototype.x = …`) has a new context for each call, in which it may.

Which of the two a codec needs is seen at its first call, in a context of its own; and later, where a frozen object refused a write
that can be noticed, or a call failed in the kept context and does not in a new one.
"""

import re
from pathlib import Path
from typing import Any, Final

import orjson
import quickjs

from preservarium.domain.readings import json_text
from preservarium.errors import ReasonCode


def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


HARNESS: Final = _text("harness.js")
NODE: Final = _text("node.js")
HARDENING: Final = _text("hardening.js")
#: A codec keeps tables, not data: 32 MiB is a hundred times what the public ones use.
CONTEXT_BYTES_MAX: Final = 32 << 20
#: Deep enough for any recursive decoder, shallow enough that QuickJS notices before the C stack ends.
STACK_BYTES_MAX: Final = 512 << 10
#: Faults of a codec in its kept context that are tried again in a new one. By then it is the codec's own fault.
DOUBTS_MAX: Final = 8
#: What node.js defines. A new context for each call goes without where the codec names nothing of it: that is half of the time.
_NODE: Final = re.compile(r"\b(?:Buffer|require|atob|btoa|TextDecoder|TextEncoder)\b")
_EXPORT: Final = re.compile(
    r"^[ \t]*export\s+(?:(?:default\s+)?(?=function|class|const|let|var|async)|\{[^{}]*\}[ \t]*;?|(?P<object>default)(?=\s+\{))",
    re.MULTILINE,
)
_LINE: Final = re.compile(r"<input>:(\d+)")
#: QuickJS names every source "<input>"; a codec's lines are told from the harness's by starting further down.
_LINES_BEFORE: Final = 10_000
#: Functions that a codec may define; see `signatures` in the harness.
_NAMES: Final = (
    "decodeUplink", "decodeDownlink", "encodeDownlink", "Decoder", "Decode", "Encoder", "Encode",
)  # fmt: skip
#: The outer function gives `module` and `exports`, the inner one is the codec, which may declare these names itself.
_BEFORE: Final = "function (module, exports) {" + "\n" * _LINES_BEFORE + "return [(function () {"
_AFTER: Final = (
    "\n;return {"
    + ", ".join(f"{n}: typeof {n} === 'function' ? {n} : undefined" for n in _NAMES)
    + "};\n}).call(this), module, exports]; }"
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


class _Context:
    """One QuickJS context with the codec in it.

    Raises:
        quickjs.JSException: the source does not compile.
    """

    def __init__(self, source: str, cpu_s: float, *, kept: bool = False, watched: bool = False) -> None:
        self._context = quickjs.Context()
        self._context.set_memory_limit(CONTEXT_BYTES_MAX)
        self._context.set_max_stack_size(STACK_BYTES_MAX)
        self._door: Any = self._context.eval(HARNESS)
        self._hardening: Any = None
        if kept or watched or _NODE.search(source):
            self._context.eval(NODE)
        if kept or watched:
            self._hardening = self._context.eval(HARDENING)
        if kept:
            self._door("leaving", self._hardening("harden"))
        # Compiling a large codec may take longer than a call; ten calls' worth is still bounded.
        self._context.set_time_limit(cpu_s * 10)
        text = _BEFORE + source + _AFTER
        if not self._door("load", self._context.eval(f"({text})"), text):
            message = "SyntaxError: a brace too many"
            raise quickjs.JSException(message)
        if watched:
            self._context.set_time_limit(-1)  # ours, not the codec's
            self._hardening("watch")
        self._cpu_s = cpu_s

    def functions(self) -> list[str]:
        """Names of what the codec can do; runs it once."""
        found: list[str] = orjson.loads(self._door("functions"))
        return found

    def call(self, function: str, arguments: str) -> Any:
        """What the harness answers."""
        self._context.set_time_limit(self._cpu_s)
        return self._door("call", function, arguments)

    def touched(self) -> bool:
        """Of a watched context: whether built-in objects are not what they were."""
        self._context.set_time_limit(-1)
        return bool(self._hardening("touched"))

    def left(self) -> str:
        """How the last call left a kept context: "" where it is as before."""
        return str(self._door("left"))


class JavaScript:
    """One codec.

    Raises:
        ScriptError: the source does not compile, or defines none of the known functions.
    """

    def __init__(self, source: str, cpu_s: float) -> None:
        self._source = source
        self._cpu_s = cpu_s
        self._kept: _Context | None = None
        #: None until it was seen whether the codec writes to built-in objects
        self._alone: bool | None = None
        self._doubts = DOUBTS_MAX
        try:
            self.functions = self._compiled().functions()
        except quickjs.JSException as e:
            raise self._error(e) from None
        if not self.functions:
            raise ScriptError(ReasonCode.SCRIPT_FAULT, "the script defines none of decodeUplink, Decoder, Decode")

    def _compiled(self) -> _Context:
        try:
            return _Context(self._source, self._cpu_s)
        except quickjs.JSException as e:
            if "SyntaxError" not in str(e) or not _EXPORT.search(self._source):
                raise
            # A codec published as a module: the same functions, without the keyword.
            self._source = _EXPORT.sub(_plain, self._source)
            return _Context(self._source, self._cpu_s)

    def call(self, function: str, arguments: str, result_bytes_max: int) -> str:
        """Run `function` on the JSON text `arguments`; returns its result as JSON text, with NaN and Infinity where they are in it.

        Raises:
            ScriptError: it raised, went over its time, memory or stack, or returned more than `result_bytes_max`.
        """
        try:
            result = (
                self._in_new(function, arguments) if self._alone is not False else self._in_kept(function, arguments)
            )
        except quickjs.JSException as e:
            raise self._error(e) from None
        if not isinstance(result, str):
            raise ScriptError(ReasonCode.SCRIPT_FAULT, "the result is not JSON")
        if len(result) > result_bytes_max:
            raise ScriptError(
                ReasonCode.DECODE_LIMIT, f"the result has {len(result)} characters, more than {result_bytes_max}"
            )
        return json_text.unmarked(result)

    def _in_new(self, function: str, arguments: str) -> Any:
        watched = self._alone is None
        context = _Context(self._source, self._cpu_s, watched=watched)
        try:
            result = context.call(function, arguments)
        except quickjs.JSException as e:
            if watched and not self._error(e).discard:
                self._alone = context.touched()
            raise
        if watched:
            self._alone = context.touched()
        return result

    def _in_kept(self, function: str, arguments: str) -> Any:
        context = self._kept = self._kept or _Context(self._source, self._cpu_s, kept=True)
        try:
            result = context.call(function, arguments)
            # The harness says how the context was left before the result; what is no text has no place for it.
            left = context.left() if not isinstance(result, str) else result[0] if result[0] in "!~" else ""
        except quickjs.JSException as e:
            discard, left = self._error(e).discard, context.left()
            if discard or left:
                self._kept = None
            if discard or not (self._doubts or left == "!"):
                raise
            # Is it the codec's fault, or that of what is frozen?
            self._doubts = max(0, self._doubts - 1)
            result = self._in_new(function, arguments)
            self._alone = True
            return result
        if left:
            self._kept = None
        if left == "!":
            self._alone = True
            return self._in_new(function, arguments)
        return result[1:] if left and isinstance(result, str) else result

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
