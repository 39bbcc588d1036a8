"""Changes to the file of users: one at a time, whole or not at all, for its owner alone."""

import fcntl
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson

from preservarium.errors import reason
from preservarium.serving.people import PeopleError, read

#: Random bytes of a secret and of a token: beyond guessing.
RANDOM_BYTES: Final = 32


@contextmanager
def edited(path: str | Path) -> Iterator[dict[str, Any]]:
    """The file's document, to be changed in place; what it is afterwards is written where it reads well.

    Others who edit wait. The file is replaced in one step, so whoever reads it reads the old one or the new one; its mode and owner
    stay, a new one is for its owner alone. Where the block raises, or nothing has changed, nothing is written.

    Raises:
        PeopleError: it cannot be read or written, or would not be right.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        message = f"{path}: {reason(e)}"
        raise PeopleError(message) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        read(path)  # says what is wrong in it
        text = path.read_bytes() if path.exists() else b"{}"
        document = orjson.loads(text)
        before = orjson.dumps(document)
        yield document
        if orjson.dumps(document) != before:
            document.setdefault("secret", secrets.token_urlsafe(RANDOM_BYTES))
            _replace(path, orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    except OSError as e:
        message = f"{path}: {reason(e)}"
        raise PeopleError(message) from None
    finally:
        os.close(lock)


def _replace(path: Path, text: bytes) -> None:
    file, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(file, "wb") as new:
            new.write(text)
            new.flush()
            os.fsync(new.fileno())
        read(name)
        if path.exists():
            status = path.stat()
            os.chmod(name, status.st_mode & 0o7777)
            if os.geteuid() == 0:
                os.chown(name, status.st_uid, status.st_gid)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def now() -> str:
    """This instant, as the file has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
