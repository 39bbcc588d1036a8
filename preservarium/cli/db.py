"""`preservarium db`: SQL on the databases of the system, with the right address and credentials.

PostgreSQL's own shell is used where there is one. Elsewhere, and for ClickHouse, statements are taken from -c, from standard
input, or from a prompt: what a look needs, and no more.
"""

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import click

from preservarium.cli.output import console, print_json
from preservarium.cli.system import load
from preservarium.errors import PreservariumError, reason
from preservarium.settings import Settings

#: A statement may run for so long; a look that takes longer is better made with the database's own shell.
STATEMENT_S: Final = 600.0


class DatabaseRefuses(PreservariumError):
    """The database cannot be reached, or does not take the statement."""


@click.group("db")
def db() -> None:
    """Ask PostgreSQL or ClickHouse in SQL."""


_sql = click.option(
    "-c", "sql", metavar="SQL", help="Run this and end; several statements are separated by semicolons."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON, an object each.")


@db.command()
@_sql
@_json
def postgres(sql: str | None, as_json: bool) -> None:
    """Open psql on the system's PostgreSQL, or run SQL there: -c, or standard input.

    Where there is no psql, rows are printed by the driver.
    """
    settings = load()
    program = None if as_json else _psql()
    if program is not None:
        _become_psql(program, settings, sql)
    _serve("postgres", sql, lambda statement: _postgres_rows(settings, statement), as_json)


@db.command()
@_sql
@_json
def clickhouse(sql: str | None, as_json: bool) -> None:
    """Run SQL on the system's ClickHouse over HTTP: -c, standard input, or a prompt (a semicolon ends a statement)."""
    settings = load()
    if not settings.clickhouse.enabled:
        message = "ClickHouse is not enabled (PRESERVARIUM_CLICKHOUSE__ENABLED)"
        raise click.UsageError(message)
    _serve("clickhouse", sql, lambda statement: _clickhouse_rows(settings, statement), as_json)


# --- statements


#: Names of the columns and the rows; no columns: the statement has no answer.
Answer = tuple[Sequence[str], Sequence[Sequence[Any]]]


def _serve(name: str, sql: str | None, ask: Callable[[str], Answer], as_json: bool) -> None:
    """Run what -c, standard input or somebody at a prompt says.

    Raises:
        DatabaseRefuses: a statement failed; at a prompt it is said, and the next one is asked for.
    """
    if sql is None and sys.stdin.isatty():
        for text in _prompted(name):
            try:
                _run(name, text, ask, as_json)
            except PreservariumError as e:
                click.echo(f"preservarium: {e}", err=True)
        return
    _run(name, sys.stdin.read() if sql is None else sql, ask, as_json)


def _run(name: str, text: str, ask: Callable[[str], Answer], as_json: bool) -> None:
    from preservarium.stores.migrate import split

    for statement in split(text, backslash_escapes=name == "clickhouse"):
        _show(ask(statement.sql), as_json)


def _prompted(name: str) -> Iterator[str]:
    """What somebody types, up to each semicolon at the end of a line, until the input ends or a line says so."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() a history
    lines: list[str] = []
    while True:
        try:
            line = input(f"{name}> " if not lines else f"{'':>{len(name)}}> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            lines = []
            continue
        if not lines and line.strip().lower().rstrip(";") in ("", "exit", "quit", "\\q"):
            if line.strip().strip(";"):
                return
            continue
        lines.append(line)
        if line.rstrip().endswith(";"):
            yield "\n".join(lines)
            lines = []


def _show(answer: Answer, as_json: bool) -> None:
    columns, rows = answer
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    if not columns:
        click.echo("done", err=True)
        return
    if not sys.stdout.isatty():
        # For another program: columns by tabs, as psql's and ClickHouse's own are.
        for row in (columns, *rows):
            click.echo("\t".join(_cell(value) for value in row))
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(escape(str(column)), overflow="fold")
    for row in rows:
        table.add_row(*(escape(_cell(value)) for value in row))
    console().print(table)
    click.echo(f"({len(rows):,} row{'' if len(rows) == 1 else 's'})")


def _cell(value: Any) -> str:
    text = "" if value is None else value if isinstance(value, str) else str(value)
    return text.replace("\t", "\\t").replace("\n", "\\n")


# --- PostgreSQL


def _psql() -> str | None:
    """Psql of the machine, or the one beside the embedded server."""
    if found := shutil.which("psql"):
        return found
    from preservarium.embedded.postgres import find_binaries

    beside = [b.directory / "psql" for b in find_binaries()]
    return next((str(path) for path in beside if os.access(path, os.X_OK)), None)


def _become_psql(program: str, settings: Settings, sql: str | None) -> None:
    """Go on as psql; the password is in the environment, where no list of processes shows it."""
    u = urlsplit(settings.postgres.dsn)
    query = dict(parse_qsl(u.query))
    password = unquote(u.password or "") or query.pop("password", "")
    user = f"{u.username}@" if u.username else ""
    where = f"{u.hostname}:{u.port or 5432}" if u.hostname else ""
    uri = f"{u.scheme}://{user}{where}{u.path}" + (f"?{urlencode(query)}" if query else "")
    # PG variables of the caller would change where psql looks; what the terminal looks like is psql's own business.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")} | {"PGAPPNAME": "preservarium db"}
    if password:
        environment["PGPASSWORD"] = password
    arguments = [program, "-v", "ON_ERROR_STOP=1", *(["-c", sql] if sql is not None else []), uri]
    sys.stdout.flush()
    os.execve(program, arguments, environment)


def _postgres_rows(settings: Settings, statement: str) -> Answer:
    return asyncio.run(_asked(settings, statement))


async def _asked(settings: Settings, statement: str) -> Answer:
    import asyncpg

    from preservarium.stores import connections

    try:
        connection = await connections.session(
            settings.postgres, "a statement of your own", command_timeout=STATEMENT_S
        )
        try:
            prepared = await connection.prepare(statement)
            columns = [attribute.name for attribute in prepared.get_attributes()]
            rows = await prepared.fetch()
        finally:
            await connection.close(timeout=5)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as e:
        message = f"PostgreSQL: {reason(e)}"
        raise DatabaseRefuses(message) from e
    return columns, [tuple(row) for row in rows]


# --- ClickHouse


def _clickhouse_rows(settings: Settings, statement: str) -> Answer:
    """Over HTTP; the rows come as JSON, whatever the statement is."""
    import ssl
    from http.client import HTTPConnection, HTTPException, HTTPSConnection

    import orjson

    host, port, user, password, secure = settings.clickhouse.parts
    if secure:
        context = ssl.create_default_context()
        if settings.clickhouse.ssl_ca_file:
            context.load_verify_locations(settings.clickhouse.ssl_ca_file)
        connection: HTTPConnection = HTTPSConnection(host, port, timeout=STATEMENT_S, context=context)
    else:
        connection = HTTPConnection(host, port, timeout=STATEMENT_S)
    query = urlencode({"database": settings.clickhouse.database, "default_format": "JSONCompact"})
    try:
        connection.request(
            "POST",
            f"/?{query}",
            body=statement.encode(),
            headers={"X-ClickHouse-User": user, "X-ClickHouse-Key": password},
        )
        response = connection.getresponse()
        body = response.read()
    except (OSError, HTTPException) as e:
        message = f"ClickHouse cannot be reached at {host}:{port}: {reason(e)}"
        raise DatabaseRefuses(message) from e
    finally:
        connection.close()
    if response.status != 200:
        message = f"ClickHouse: {' '.join(body.decode('utf-8', 'replace').split())[:1_000]}"
        raise DatabaseRefuses(message)
    try:
        found = orjson.loads(body)
        return [column["name"] for column in found["meta"]], found["data"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        # The statement asks for a format of its own, or has no answer.
        text = body.decode("utf-8", "replace")
        return (("answer",), [(line,) for line in text.splitlines()]) if text.strip() else ((), ())


commands: list[click.Command] = [db]
