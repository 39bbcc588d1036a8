"""A migration's SQL: cut into statements, settings put in."""

import re
from dataclasses import dataclass
from typing import Any, Final

from pydantic import SecretStr

from preservarium.errors import PreservariumError
from preservarium.settings import Settings

_PLACEHOLDER: Final = re.compile(r"\{\{(.*?)\}\}")
_PLACEHOLDER_NAME: Final = re.compile(r"[a-z_]+(\.[a-z_]+)?")
#: What a substituted value may consist of: nothing that could end a literal or a statement.
_PLACEHOLDER_VALUE: Final = re.compile(r"[A-Za-z0-9_./:-]*")


class MigrationError(PreservariumError):
    """A migration cannot be applied."""


@dataclass(frozen=True, slots=True)
class Statement:
    """One SQL statement of a file."""

    number: int  #: 1 for the first
    line: int  #: line of its first word, 1 for the first
    sql: str


def split(text: str, *, backslash_escapes: bool = False) -> list[Statement]:
    """Cut SQL into statements at the semicolons that stand outside quotes, dollar quotes and comments.

    Args:
        text: the file.
        backslash_escapes: whether a backslash escapes in every '…' (ClickHouse) or only in E'…' (PostgreSQL).

    Raises:
        MigrationError: a quote or comment is not closed.
    """
    statements: list[Statement] = []
    start: int | None = None  # first character of the statement's first word
    i = 0

    def end(stop: int) -> None:
        nonlocal start
        if start is not None:
            sql = text[start:stop].rstrip()
            statements.append(Statement(len(statements) + 1, text.count("\n", 0, start) + 1, sql))
        start = None

    while i < len(text):
        c = text[i]
        if text.startswith("--", i):
            newline = text.find("\n", i)
            i = len(text) if newline < 0 else newline
        elif text.startswith("/*", i):
            i = _skip_comment(text, i)
        elif c == ";":
            end(i)
            i += 1
        elif c.isspace():
            i += 1
        else:
            if start is None:
                start = i
            if c in "'\"`":
                escapes = c == "'" and (backslash_escapes or (i > 0 and text[i - 1] in "eE" and not _word(text, i - 2)))
                i = _skip_quoted(text, i, escapes=escapes)
            elif c == "$" and (tag := re.compile(r"\$([A-Za-z_]\w*)?\$").match(text, i)) and not _word(text, i - 1):
                close = text.find(tag[0], tag.end())
                if close < 0:
                    raise _unclosed(text, i, tag[0])
                i = close + len(tag[0])
            else:
                i += 1
    end(len(text))
    return statements


def _word(text: str, i: int) -> bool:
    return i >= 0 and (text[i].isalnum() or text[i] == "_")


def _unclosed(text: str, i: int, what: str) -> MigrationError:
    line = text.count("\n", 0, i) + 1
    return MigrationError(f"line {line}: {what} is not closed")


def _skip_comment(text: str, i: int) -> int:
    depth = 0
    begin = i
    while i < len(text):
        if text.startswith("/*", i):
            depth += 1
            i += 2
        elif text.startswith("*/", i):
            depth -= 1
            i += 2
            if depth == 0:
                return i
        else:
            i += 1
    raise _unclosed(text, begin, "/*")


def _skip_quoted(text: str, i: int, *, escapes: bool) -> int:
    quote = text[i]
    begin = i
    i += 1
    while i < len(text):
        if escapes and text[i] == "\\":
            i += 2
        elif text[i] == quote:
            if text.startswith(quote, i + 1):
                i += 2
            else:
                return i + 1
        else:
            i += 1
    raise _unclosed(text, begin, quote)


#: Tokens that a table remembers, in blocks: an hour of twelve partitions' inserts at the rate of a busy worker, and a token
#: is only ever repeated for the last batch of a partition. A replicated table also forgets by time; a day is longer than any
#: batch waits for its worker.
DEDUP_BLOCKS: Final = 10_000
_DEDUP_PLAIN: Final = f"non_replicated_deduplication_window = {DEDUP_BLOCKS}"
_DEDUP_REPLICATED: Final = (
    f"replicated_deduplication_window = {DEDUP_BLOCKS}, replicated_deduplication_window_seconds = 86400"
)


def substitute(sql: str, settings: Settings, where: str) -> str:
    """Put settings in the place of {{section.field}}.

    Besides the settings there are three derived names for clusters: {{clickhouse.on_cluster}} (`ON CLUSTER 'name'` or
    nothing), {{clickhouse.replicated}} (`Replicated` or nothing, to stand before an engine's name; path and replica are
    the server's `default_replica_path` and `default_replica_name`), and {{clickhouse.dedup_window}} (the settings that make
    the engine remember the tokens of inserts: replicated tables have other names for them).

    Raises:
        MigrationError: no such setting, a secret, or a value with characters that are not allowed in SQL files.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        cluster = settings.clickhouse.cluster
        if name == "clickhouse.on_cluster":
            text = cluster
        elif name == "clickhouse.replicated":
            return "Replicated" if cluster else ""
        elif name == "clickhouse.dedup_window":
            return _DEDUP_REPLICATED if cluster else _DEDUP_PLAIN
        else:
            text = _setting(settings, name, where)
        if not _PLACEHOLDER_VALUE.fullmatch(text):
            message = f"{where}: the value of {name} has characters that may not stand in SQL: {text!r}"
            raise MigrationError(message)
        if name == "clickhouse.on_cluster":
            return f"ON CLUSTER '{text}'" if text else ""
        return text

    return _PLACEHOLDER.sub(value, sql)


def _setting(settings: Settings, name: str, where: str) -> str:
    value: Any = settings
    if not _PLACEHOLDER_NAME.fullmatch(name):
        message = f"{where}: {{{{{name}}}}} is not the name of a setting"
        raise MigrationError(message)
    for part in name.split("."):
        if part not in type(value).model_fields:
            message = f"{where}: there is no setting {name}"
            raise MigrationError(message)
        value = getattr(value, part)
    if isinstance(value, SecretStr) or not isinstance(value, str | int | float):
        message = f"{where}: {name} may not stand in SQL"
        raise MigrationError(message)
    return str(value).lower() if isinstance(value, bool) else str(value)
