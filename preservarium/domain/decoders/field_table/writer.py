"""The function that a table becomes, while it is being written."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from preservarium.domain import expressions
from preservarium.domain.decoders.base import ParserError
from preservarium.domain.decoders.field_table.language import DEPTH_MAX, TEMPLATE
from preservarium.domain.decoders.field_table.runtime import NAMESPACE, Parse
from preservarium.domain.expressions import ExpressionError, Name
from preservarium.domain.readings import json_text


class Writer:
    """Lines of source, constants, names in scope, and where the cursor is. `where` names an item for messages."""

    def __init__(self, parameters: Mapping[str, float]) -> None:
        self.lines: list[str] = []
        self.level = 1
        self.constants: dict[str, Any] = dict(NAMESPACE)
        self.counter = 0
        self.depth = 0
        self.scope: dict[str, Name] = {}
        self.pending: list[str] = []  # tuples that wait for one `out +=`
        self.position: int | None = 0  # known offset of the cursor, or None where `p` holds it
        for name, value in parameters.items():
            self.scope[name] = Name(f"({value!r})", bits=value.bit_length() if isinstance(value, int) else 0)

    def line(self, text: str) -> None:
        """Write a line at the level of now."""
        self.lines.append("    " * self.level + text)

    def fresh(self, prefix: str) -> str:
        """A name that is not in use."""
        self.counter += 1
        return f"{prefix}{self.counter}"

    def constant(self, value: Any, prefix: str = "c") -> str:
        """The name of a value that the function is given."""
        name = self.fresh(prefix)
        self.constants[name] = value
        return name

    def flush(self) -> None:
        """Write the fields that wait: before what may fail, or what is not done every time."""
        if self.pending:
            self.line(f"out += ({', '.join(self.pending)},)")
            self.pending = []

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        """An indented block with a scope of its own: what may not be defined is not known outside.

        Raises:
            ParserError: it is the level that is too many.
        """
        self.flush()
        self.dynamic()
        self.depth += 1
        if self.depth > DEPTH_MAX:
            message = f"more than {DEPTH_MAX} levels"
            raise ParserError(message)
        self.line(header)
        self.level += 1
        outer = dict(self.scope)
        before = len(self.lines)
        yield
        self.flush()
        if len(self.lines) == before:
            self.line("pass")
        self.scope = outer
        self.level -= 1
        self.depth -= 1

    def dynamic(self) -> None:
        """From here on the cursor is a variable."""
        if self.position is not None:
            self.line(f"p = {self.position}")
            self.position = None

    def take(self, size: int) -> str:
        """Check that `size` bytes are there and return the source of their offset; the cursor moves on."""
        if self.position is not None:
            at = self.position
            self.line(f"if n < {at + size}: raise short({size}, {at}, n)")
            self.position = at + size
            return str(at)
        self.dynamic()
        self.line(f"if n < p + {size}: raise short({size}, p, n)")
        self.line(f"p += {size}")
        return f"p - {size}"

    def check(self, text: Any, where: str, extra: Mapping[str, Name] | None = None) -> expressions.Expression:
        """An expression over what is in scope, and `extra`.

        Raises:
            ParserError: it is none.
        """
        if isinstance(text, bool) or not isinstance(text, str | int | float):
            message = f"{where}: an expression is text or a number, not {json_text.kind_of(text)}"
            raise ParserError(message)
        try:
            return expressions.check(text, {**self.scope, **(extra or {})})
        except ExpressionError as e:
            message = f"{where}: {e}"
            raise ParserError(message) from None

    def evaluate(self, checked: expressions.Expression, prefix: str, fallback: str | None) -> Name:
        """Assign an expression to a variable; where it has no answer: `fallback`, or (None) the payload is refused."""
        name = self.fresh(prefix)
        source, bits = checked.source, checked.bits
        if bits > expressions.FIELD_BITS_MAX:
            source, bits = f"float({source})", 0
        if (checked.risky or source != checked.source) and fallback is not None:
            self.line(f"try: {name} = {source}")
            self.line(f"except ERRORS: {name} = {fallback}")
        else:
            self.line(f"{name} = {source}")
        return Name(name, checked.kind, bits)

    def template(self, text: str, where: str) -> str:
        """Source of a text whose {names} are filled in.

        Raises:
            ParserError: a name is not in scope.
        """
        parts: list[str] = []
        end = 0
        for match in TEMPLATE.finditer(text):
            known = self.scope.get(match[1])
            if known is None:
                message = f"{where}: {match[0]} is not known here"
                raise ParserError(message)
            if match.start() > end:
                parts.append(repr(text[end : match.start()]))
            parts.append(f"str({known.source})")
            end = match.end()
        if end < len(text) or not parts:
            parts.append(repr(text[end:]))
        return " + ".join(parts)

    def finished(self) -> tuple[str, Parse]:
        """The source, and the function that it is."""
        text = "def parse(b, port, base):\n" + "\n".join(self.lines) + "\n"
        namespace = dict(self.constants)
        # Every name in it was made here, every constant is repr() of a number or text: see the package's docstring.
        exec(compile(text, "<field table>", "exec"), namespace)
        parse: Parse = namespace["parse"]
        return text, parse
