"""`preservarium users` and `preservarium tokens`: who may log in, and which programs may ask; what was done at the door."""

import asyncio
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click

from preservarium.cli.output import console, print_json
from preservarium.cli.system import load
from preservarium.errors import PreservariumError
from preservarium.serving import people
from preservarium.serving.people import SCOPES, Roll
from preservarium.serving.people_file import RANDOM_BYTES, edited, now
from preservarium.settings import ROLES

#: A generated password: 120 bits, which nobody guesses and everybody can copy.
GENERATED_BYTES: Final = 15
EVENTS_MAX: Final = 10_000

_file = click.option(
    "--file", "path", help="The file of users; that of PRESERVARIUM_WEB__USERS_FILE where it is not given."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_role = click.option(
    "--role", type=click.Choice(ROLES), required=True, help="What they may; each may all that those before it may."
)
_stdin = click.option("--password-stdin", is_flag=True, help="Read the password from standard input, a line.")
_generate = click.option("--generate", is_flag=True, help="Make one up, and print it once.")


@click.group("users")
def users() -> None:
    """People who log in with a password: add, list, passwd, role, remove; events says what was done at the door.

    Workers see a change at once. A changed password, or a removed user, ends their sessions.
    """


@click.group("tokens")
def tokens() -> None:
    """Programs that show a token: add, list, remove. A token has the scopes that it was given, and no others."""


def _path(path: str | None) -> str:
    found = path or load().web.users_file
    if not found:
        message = "which file? Set PRESERVARIUM_WEB__USERS_FILE, for the workers too, or give --file"
        raise PreservariumError(message)
    return found


@contextmanager
def _changing(path: str | None) -> Iterator[dict[str, Any]]:
    """The file's document; a ValueError becomes the command's one line."""
    try:
        with edited(_path(path)) as document:
            yield document
    except ValueError as e:
        raise PreservariumError(str(e)) from None


def _entry(document: dict[str, Any], what: str, name: str) -> dict[str, Any]:
    found = document.get(what, {}).get(name)
    if found is None:
        message = f"there is no {what[:-1]} of the name {name!r}: there are {', '.join(sorted(document.get(what, {}))) or 'none'}"
        raise PreservariumError(message)
    return dict(found)


def _free(document: dict[str, Any], name: str) -> None:
    people.check_name(name)
    for what in ("users", "tokens"):
        if name in document.get(what, {}):
            message = f"{name} is a {what[:-1]} already"
            raise PreservariumError(message)


def _chosen(name: str, from_stdin: bool, generate: bool) -> tuple[str, bool]:
    """The password, and whether it was made up here."""
    if from_stdin and generate:
        message = "--password-stdin or --generate, not both"
        raise click.UsageError(message)
    if generate:
        return secrets.token_urlsafe(GENERATED_BYTES), True
    if from_stdin:
        password = sys.stdin.readline().rstrip("\r\n")
    elif not sys.stdin.isatty():
        message = "nobody is there to be asked for the password: give --password-stdin or --generate"
        raise PreservariumError(message)
    else:
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True)
    try:
        people.check_password(name, password)
    except ValueError as e:
        raise PreservariumError(str(e)) from None
    return password, False


def _told(said: dict[str, Any], text: str, as_json: bool) -> None:
    print_json(said) if as_json else click.echo(text)


@users.command("add")
@click.argument("name")
@_role
@_stdin
@_generate
@_file
@_json
def add_user(name: str, role: str, password_stdin: bool, generate: bool, path: str | None, as_json: bool) -> None:
    """Add somebody. Asks for the password twice, or takes it as an option says."""
    _path(path)
    try:
        people.check_name(name)
    except ValueError as e:
        raise PreservariumError(str(e)) from None
    password, made_up = _chosen(name, password_stdin, generate)
    hashed = people.hashed(password)
    with _changing(path) as document:
        _free(document, name)
        document.setdefault("users", {})[name] = {
            "role": role,
            "password": hashed,
            "created_at": now(),
            "changed_at": now(),
        }
    said = {"name": name, "role": role, **({"password": password} if made_up else {})}
    _told(
        said,
        f"{name} is {role}" + (f"; the password, which is not shown again: {password}" if made_up else ""),
        as_json,
    )


@users.command("passwd")
@click.argument("name")
@_stdin
@_generate
@_file
@_json
def change_password(name: str, password_stdin: bool, generate: bool, path: str | None, as_json: bool) -> None:
    """Change somebody's password; their sessions end."""
    _entry(_document(path), "users", name)
    password, made_up = _chosen(name, password_stdin, generate)
    hashed = people.hashed(password)
    with _changing(path) as document:
        document["users"][name] = {**_entry(document, "users", name), "password": hashed, "changed_at": now()}
    said = {"name": name, "changed": True, **({"password": password} if made_up else {})}
    _told(
        said,
        f"the password of {name} is changed" + (f"; it is not shown again: {password}" if made_up else ""),
        as_json,
    )


@users.command("role")
@click.argument("name")
@click.argument("role", type=click.Choice(ROLES))
@_file
@_json
def change_role(name: str, role: str, path: str | None, as_json: bool) -> None:
    """Change what somebody may; it counts for their sessions, too."""
    with _changing(path) as document:
        document["users"] = {**document.get("users", {}), name: {**_entry(document, "users", name), "role": role}}
    _told({"name": name, "role": role}, f"{name} is {role}", as_json)


@users.command("remove")
@click.argument("name")
@_file
@_json
def remove_user(name: str, path: str | None, as_json: bool) -> None:
    """Remove somebody; their sessions end."""
    _remove("users", name, path, as_json)


def _remove(what: str, name: str, path: str | None, as_json: bool) -> None:
    with _changing(path) as document:
        _entry(document, what, name)
        del document[what][name]
    _told({"name": name, "removed": True}, f"{name} is removed", as_json)


def _document(path: str | None) -> dict[str, Any]:
    """As of now, by name."""
    roll = people.read(_path(path))
    return {"users": {name: {} for name in roll.users}, "tokens": {name: {} for name in roll.tokens}}


@users.command("list")
@_file
@_json
def list_users(path: str | None, as_json: bool) -> None:
    """Who may log in with a password."""
    roll = people.read(_path(path))
    rows = [(u.name, u.role, u.created_at, u.changed_at) for u in sorted(roll.users.values(), key=lambda u: u.name)]
    _table(
        ("name", "role", "created_at", "password_changed_at"),
        rows,
        as_json,
        "nobody: `preservarium users add NAME --role admin`",
    )


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]], as_json: bool, nothing: str) -> None:
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    if not rows:
        click.echo(nothing)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(", ".join(each) if isinstance(each, list) else str(each or "") for each in row))
    console().print(table)


@users.command("events")
@click.option("--name", default="", help="Of this name alone; `?`: of names that nobody has.")
@click.option("--limit", type=click.IntRange(1, EVENTS_MAX), default=50, show_default=True)
@_json
def events(name: str, limit: int, as_json: bool) -> None:
    """What was done at the door, newest first: log-ins, refusals, changes of the file, fuses closed. Out of the event store."""
    found = asyncio.run(_events(name, limit))
    if as_json:
        print_json(found)
        return
    rows = [(_instant(e["at"]), e["event"], e["name"] or "(file of users)", _detail(e["detail"])) for e in found]
    _table(("at", "event", "name", "detail"), rows, False, "nothing was done yet")


async def _events(name: str, limit: int) -> list[dict[str, Any]]:
    from preservarium.stores.people_log import PeopleLog

    settings = load()
    log = PeopleLog(lambda: settings.postgres)
    try:
        return await log.newest(before=None, limit=limit, name=name)
    finally:
        await log.close()


def _instant(at_us: int) -> str:
    return datetime.fromtimestamp(at_us // 1_000_000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _detail(detail: dict[str, Any]) -> str:
    if "users" in detail:
        named = ", ".join(f"{name} {role}" for name, role in sorted(detail["users"].items()))
        return f"users: {named or 'none'}; tokens: {', '.join(sorted(detail.get('tokens', {}))) or 'none'}"
    return ", ".join(f"{name} {value}" for name, value in sorted(detail.items()) if value)


# --- programs -------------------------------------------------------------------------------------------------------


@tokens.command("add")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(tuple(SCOPES)),
    multiple=True,
    required=True,
    help="What it may; give it again for several.",
)
@click.option(
    "--days", type=click.IntRange(1, 3_650), help="It expires after so many days; never where it is not given."
)
@_file
@_json
def add_token(name: str, scopes: tuple[str, ...], days: int | None, path: str | None, as_json: bool) -> None:
    """Make a token for a program, and print it once: it is shown as `Authorization: Bearer TOKEN`.

    Scopes: read (what viewers see), operate (what operators do), engineer, admin, send (readings by HTTP; with the first such token, every
    sender must show one).
    """
    token = people.TOKEN_PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    expires_at = None if days is None else (datetime.now(UTC) + timedelta(days=days)).isoformat(timespec="seconds")
    entry = {
        "scopes": list(dict.fromkeys(scopes)),
        "sha256": people.token_hash(token.encode()),
        "created_at": now(),
        "expires_at": expires_at,
    }
    with _changing(path) as document:
        _free(document, name)
        document.setdefault("tokens", {})[name] = entry
    said = {"name": name, "scopes": entry["scopes"], "expires_at": expires_at, "token": token}
    _told(
        said,
        f"{token}\n\n{name} may {', '.join(scopes)}, {f'until {expires_at}' if expires_at else 'for ever'}; the token is not shown again",
        as_json,
    )


@tokens.command("list")
@_file
@_json
def list_tokens(path: str | None, as_json: bool) -> None:
    """Which programs have a token, and what they may."""
    roll: Roll = people.read(_path(path))
    rows = [
        (t.name, list(t.scopes), t.created_at, t.expires_at) for t in sorted(roll.tokens.values(), key=lambda t: t.name)
    ]
    _table(
        ("name", "scopes", "created_at", "expires_at"),
        rows,
        as_json,
        "none: `preservarium tokens add NAME --scope read`",
    )


@tokens.command("remove")
@click.argument("name")
@_file
@_json
def remove_token(name: str, path: str | None, as_json: bool) -> None:
    """Remove a program's token; it opens nothing any more."""
    _remove("tokens", name, path, as_json)


commands: list[click.Command] = [users, tokens]
