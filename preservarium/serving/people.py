"""Who there is: people with a password and a role, programs with a token and scopes, operators of the settings.

The file is JSON, written by people_file.py and by hand:

    {"secret": "…", "users": {"ann": {"role": "operator", "password": "$argon2id$…", "created_at": "…"}},
     "tokens": {"grafana": {"scopes": ["read"], "sha256": "…", "created_at": "…", "expires_at": null}}}

It is looked at with every question, so a change counts at once. What cannot be read then changes nothing, and is said in the log:
a file that is half written must neither let everybody in nor lock everybody out.
"""

import functools
import hashlib
import hmac
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import argon2
import orjson
import structlog

from preservarium.errors import PreservariumError, reason
from preservarium.serving.rights import Right
from preservarium.settings import PREFIX, ROLES, SESSION_SECRET_CHARS_MIN, Web

log = structlog.get_logger(__name__)

#: Some thousand people; a file that is larger is another one.
FILE_BYTES_MAX: Final = 4_194_304
#: A name goes into the records of what it did. No sign of it means anything in an address, a shell or a page.
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9@._+-]{0,63}")
#: NIST SP 800-63B asks for 8 where there is more than a password, and 15 where there is not; most who guess are held up by the limits.
PASSWORD_CHARS_MIN: Final = 12
#: Argon2 takes any length; nobody is to make us hash a book.
PASSWORD_BYTES_MAX: Final = 1_024
#: What a token begins with, so that scanners of repositories find one that was lost.
TOKEN_PREFIX: Final = "pvt_"

#: Scope of a token -> right. A token has those that it names and no others.
SCOPES: Final = MappingProxyType(
    {right.value: right for right in (Right.READ, Right.OPERATE, Right.ENGINEER, Right.ADMIN, Right.SENDER)}
)
_LADDER: Final = (Right.READ, Right.OPERATE, Right.ENGINEER, Right.ADMIN)
#: Role -> its rights: each has all that those before it have.
RIGHTS: Final = MappingProxyType({role: frozenset(_LADDER[: n + 1]) for n, role in enumerate(ROLES)})
#: What a token of `web.operators` opens: that of an operator, as ever.
OPERATOR_RIGHTS: Final = RIGHTS["operator"]

#: The second of the settings that OWASP calls equal (2024): 19 MiB, two passes. A worker has state in its memory, and
#: logging in must not cost it more than a batch does.
_HASHER: Final = argon2.PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)


class PeopleError(PreservariumError):
    """The file of users cannot be used."""


@dataclass(frozen=True, slots=True)
class User:
    """Somebody who logs in with a password."""

    name: str
    role: str  #: one of ROLES
    password: str  #: argon2id, in PHC's form
    created_at: str = ""
    changed_at: str = ""  #: of the password

    @property
    def mark(self) -> str:
        """Ends sessions where it changes: of the password's hash, which has a salt, so that the same password again changes it."""
        return hashlib.sha256(self.password.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Token:
    """A program."""

    name: str
    scopes: tuple[str, ...]  #: of SCOPES
    sha256: str  #: of the token, which is random: nothing slower is needed
    created_at: str = ""
    expires_at: str | None = None  #: ISO 8601 with its zone; None: never

    @property
    def rights(self) -> frozenset[Right]:
        """What it may."""
        return frozenset(SCOPES[scope] for scope in self.scopes)

    def expired(self, now_s: float) -> bool:
        """Whether it is too old. `now_s`: seconds since the epoch."""
        return self.expires_at is not None and datetime.fromisoformat(self.expires_at).timestamp() <= now_s


@dataclass(frozen=True, slots=True)
class Roll:
    """What the file says."""

    users: Mapping[str, User] = field(default_factory=dict)
    tokens: Mapping[str, Token] = field(default_factory=dict)
    secret: str = ""  #: signs sessions, where the settings have none
    digest: str = ""  #: of the file, hexadecimal; "" where there is none

    @property
    def sends(self) -> bool:
        """Whether a program has a token for sending: then senders must show one."""
        return any(Right.SENDER in token.rights for token in self.tokens.values())

    @property
    def anybody(self) -> bool:
        """Whether somebody or something may ask this port for more than to send."""
        return bool(self.users) or any(token.rights - {Right.SENDER} for token in self.tokens.values())


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as far as it is proven."""

    name: str  #: "" where none is proven: with `web.operator_token`, or from this machine without a log-in
    rights: frozenset[Right]
    how: str  #: password, oidc, token, machine (it is this one), supervisor, worker (another one, for a value)
    role: str = ""
    csrf: str = ""  #: what a session's requests that change something must bring along


def read(path: str | Path) -> Roll:
    """Read a file.

    Raises:
        PeopleError: one line: it cannot be read, or what is wrong in it, without any secret. FileNotFoundError is none of these:
            a file that is not there yet has nobody in it.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return Roll()
    except (OSError, ValueError) as e:
        message = f"{path}: {reason(e)}"
        raise PeopleError(message) from None
    if len(text) > FILE_BYTES_MAX:
        message = f"{path}: more than {FILE_BYTES_MAX} bytes"
        raise PeopleError(message)
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as e:
        message = f"{path}: is no JSON: line {e.lineno}, column {e.colno}"
        raise PeopleError(message) from None
    try:
        return _roll(found, hashlib.sha256(text).hexdigest())
    except ValueError as e:
        message = f"{path}: {e}"
        raise PeopleError(message) from None


def _roll(found: Any, digest: str) -> Roll:
    if not isinstance(found, dict):
        message = "is a JSON object with `users` and `tokens`"
        raise ValueError(message)
    if unknown := sorted(found.keys() - {"secret", "users", "tokens"}):
        message = f"there is no {unknown[0][:40]!r}: `users`, `tokens` and `secret` there are"
        raise ValueError(message)
    secret = found.get("secret", "")
    if not isinstance(secret, str) or 0 < len(secret) < SESSION_SECRET_CHARS_MIN:
        message = f"`secret` is a text of {SESSION_SECRET_CHARS_MIN} characters or more"
        raise ValueError(message)
    users = {name: _user(name, each) for name, each in _named(found, "users")}
    tokens = {name: _token(name, each) for name, each in _named(found, "tokens")}
    if both := sorted(users.keys() & tokens.keys()):
        message = f"{both[0]} is a user and a token: what is recorded under that name must be of one of them"
        raise ValueError(message)
    return Roll(users, tokens, secret, digest)


def _named(found: Mapping[str, Any], what: str) -> list[tuple[str, dict[str, Any]]]:
    entries = found.get(what, {})
    if not isinstance(entries, dict):
        message = f"`{what}` is an object, by name"
        raise ValueError(message)
    for name, each in entries.items():
        check_name(name)
        if not isinstance(each, dict):
            message = f"{what}: {name} is an object"
            raise ValueError(message)
    return list(entries.items())


def _text(each: Mapping[str, Any], name: str) -> str:
    value = each.get(name, "")
    if not isinstance(value, str):
        message = f"`{name}` is a text"
        raise ValueError(message)
    return value


def _only(who: str, each: Mapping[str, Any], names: frozenset[str]) -> None:
    if unknown := sorted(each.keys() - names):
        message = f"{who} has no {unknown[0][:40]!r}: there are {', '.join(sorted(names))}"
        raise ValueError(message)


_USER: Final = frozenset(("role", "password", "created_at", "changed_at"))
_TOKEN: Final = frozenset(("scopes", "sha256", "created_at", "expires_at"))


def _user(name: str, each: Mapping[str, Any]) -> User:
    _only(name, each, _USER)
    role, password = _text(each, "role"), _text(each, "password")
    if role not in ROLES:
        message = f"{name}: `role` is one of {', '.join(ROLES)}"
        raise ValueError(message)
    if not password.startswith("$argon2id$"):
        message = f"{name}: `password` is a hash of argon2id, as `preservarium users passwd {name}` makes it"
        raise ValueError(message)
    return User(name, role, password, _text(each, "created_at"), _text(each, "changed_at"))


def _token(name: str, each: Mapping[str, Any]) -> Token:
    _only(name, each, _TOKEN)
    scopes, sha256, expires = each.get("scopes"), _text(each, "sha256"), each.get("expires_at")
    if (
        not isinstance(scopes, list)
        or not scopes
        or not all(scope in SCOPES for scope in scopes if isinstance(scope, str))
        or not all(isinstance(scope, str) for scope in scopes)
    ):
        message = f"{name}: `scopes` is a list of {', '.join(SCOPES)}"
        raise ValueError(message)
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        message = f"{name}: `sha256` is that of the token, hexadecimal"
        raise ValueError(message)
    if expires is not None:
        try:
            aware = isinstance(expires, str) and datetime.fromisoformat(expires).tzinfo is not None
        except ValueError:
            aware = False
        if not aware:
            message = f"{name}: `expires_at` is an instant with its zone, as 2027-01-31T00:00:00+00:00, or null"
            raise ValueError(message)
    return Token(name, tuple(scopes), sha256, _text(each, "created_at"), expires)


def check_name(name: str) -> None:
    """A name that somebody or something may have.

    Raises:
        ValueError: it may not.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        message = f"{name[:80]!r} is no name: 1 to 64 letters, digits and @ . _ + -, of which the first is a letter or a digit"
        raise ValueError(message)


# --- passwords and tokens -------------------------------------------------------------------------------------------


def check_password(name: str, password: str) -> None:
    """A password that may be chosen.

    Raises:
        ValueError: it may not.
    """
    if len(password) < PASSWORD_CHARS_MIN:
        message = f"a password has {PASSWORD_CHARS_MIN} characters or more"
        raise ValueError(message)
    if len(password.encode("utf-8", "surrogateescape")) > PASSWORD_BYTES_MAX:
        message = f"a password has at most {PASSWORD_BYTES_MAX} bytes"
        raise ValueError(message)
    if name.lower() in password.lower() and len(password) < len(name) + PASSWORD_CHARS_MIN:
        message = "a password is not made of the name"
        raise ValueError(message)
    if len(set(password)) < 5:
        message = "a password has five different characters or more"
        raise ValueError(message)


def hashed(password: str) -> str:
    """Argon2id of a password, with a salt of its own: some 20 ms and 19 MiB."""
    return _HASHER.hash(password.encode("utf-8", "surrogateescape"))


@functools.cache
def _nobodys() -> str:
    """Hash of a password that nobody has: a name that is not there must take as long as one that is."""
    return _HASHER.hash(os.urandom(16))


def verified(user: User | None, password: str) -> bool:
    """Whether it is the user's password. Blocks for some 20 ms, also where there is no user: call it in a thread."""
    given = password.encode("utf-8", "surrogateescape")
    if len(given) > PASSWORD_BYTES_MAX:
        given, user = b"", None
    nobodys = _nobodys()
    try:
        _HASHER.verify(user.password if user else nobodys, given)
    except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
        return False
    return user is not None


def token_hash(token: bytes) -> str:
    """How a token stands in the file."""
    return hashlib.sha256(token).hexdigest()


# --- who is configured, and whose a token is ------------------------------------------------------------------------


@dataclass(slots=True)
class _Kept:
    looked: tuple[int, int, int] | None
    roll: Roll
    fault: str = ""


_kept: dict[str, _Kept] = {}
_lock: Final = threading.Lock()


def current(web: Web) -> Roll:
    """What the file of the settings says now; nothing where there is none.

    Raises:
        PeopleError: it could not be read when it was looked at for the first time.
    """
    path = web.users_file
    if not path:
        return _EMPTY
    try:
        status = os.stat(path)
        looked = (status.st_mtime_ns, status.st_size, status.st_ino)
    except OSError:
        looked = None
    with _lock:
        kept = _kept.get(path)
        if kept is not None and kept.looked == looked:
            return kept.roll
        try:
            roll = read(path)
            if not roll.digest and kept is not None and kept.roll.digest:
                message = f"{path}: is gone"
                raise PeopleError(message)
        except PeopleError as e:
            if kept is None:
                raise
            log.error(
                "users_file_not_read", error=str(e), action="those whom it named last are let in until it can be read"
            )
            kept.looked, kept.fault = looked, str(e)
            return kept.roll
        if kept is not None:
            log.info("users_file_read", users=len(roll.users), tokens=len(roll.tokens))
        _kept[path] = _Kept(looked, roll)
        return roll


_EMPTY: Final = Roll()


def fault(web: Web) -> str:
    """Why the file could not be read at its last change; "" where it could."""
    kept = _kept.get(web.users_file)
    return kept.fault if kept else ""


def configured(web: Web) -> bool:
    """Whether there is anybody whom the port must know: where there is nobody, it is for this machine alone."""
    return bool(web.operator_token.get_secret_value() or web.operator_tokens or web.oidc_issuer or current(web).anybody)


def by_token(web: Web, given: bytes) -> Caller | None:
    """Whose token it is, the settings' and the file's; None where it is nobody's."""
    if not given:
        return None
    shared, supervisor = web.operator_token.get_secret_value(), web.supervisor_token.get_secret_value()
    named = [*web.operator_tokens.items(), *([("", shared)] if shared else [])]
    # compare_digest: the time it takes says nothing about how much of a token was right; each is compared, so that it
    # says nothing about which.
    found = [name for name, token in named if hmac.compare_digest(given, token.encode())]
    if found:
        return Caller(max(found), OPERATOR_RIGHTS, "token", "operator")
    if supervisor and hmac.compare_digest(given, supervisor.encode()):
        return Caller("", frozenset((Right.READ,)), "supervisor")
    digest = token_hash(given)
    for token in current(web).tokens.values():
        # Of hashes nothing can be learnt by their time.
        if token.sha256 == digest and not token.expired(time.time()):
            return Caller(token.name, token.rights, "token")
    return None


def who_to_name() -> str:
    """What to do where nobody is configured."""
    return (
        f"name somebody: set {PREFIX}WEB__USERS_FILE to a file and run `preservarium users add NAME --role admin`, "
        f"or set {PREFIX}WEB__OPERATORS, {PREFIX}WEB__OPERATOR_TOKEN or {PREFIX}WEB__OIDC_ISSUER"
    )
