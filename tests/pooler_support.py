"""A real PgBouncer."""

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from preservarium.embedded.service import free_port

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@contextmanager
def pgbouncer(folder: Path, dsn: str, mode: str, **settings: Any) -> Iterator[str]:
    """DSN of a PgBouncer before the database of `dsn`."""
    if PROGRAM is None:
        pytest.skip("missing: pgbouncer")
    u, port = urlsplit(dsn), free_port()
    name, user = u.path[1:], unquote(u.username or "")
    target = f"host={u.hostname} port={u.port or 5432} dbname={name} user={user} password='{unquote(u.password or '')}'"
    lines = {
        "listen_addr": "127.0.0.1", "listen_port": port, "auth_type": "any", "unix_socket_dir": "", "pool_mode": mode,
        "default_pool_size": 4, "max_client_conn": 100, **settings,
    }  # fmt: skip
    file = folder / f"pgbouncer-{port}.ini"
    file.write_text(
        f"[databases]\n{name} = {target}\n[pgbouncer]\n" + "".join(f"{k} = {v}\n" for k, v in lines.items())
    )
    for one in (file, folder):
        one.chmod(0o755)
    # It does not run as root.
    as_user = {"user": pwd.getpwnam("nobody").pw_uid} if os.geteuid() == 0 else {}
    readable = folder
    while as_user and readable != readable.parent:
        if not readable.stat().st_mode & 0o001:
            readable.chmod(readable.stat().st_mode | 0o011)
        readable = readable.parent
    process = subprocess.Popen([PROGRAM, "-q", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **as_user)
    try:
        address = f"postgresql://{user}:x@127.0.0.1:{port}/{name}"
        _until_up(process, port)
        yield address
    finally:
        process.terminate()
        process.wait(10)
        assert process.stderr is not None
        process.stderr.close()


def _until_up(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.terminate()
                assert process.stderr is not None
                raise AssertionError(process.stderr.read().decode()) from None
            time.sleep(0.05)
