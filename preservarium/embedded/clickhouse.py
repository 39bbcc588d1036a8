"""ClickHouse on one machine: the chDB engine in one process of its own, behind ClickHouse's HTTP interface."""

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path

from preservarium.embedded.service import Service, ServiceUnavailable


class ClickHouse(Service):
    """The process that owns the engine; everyone else, this process included, is its HTTP client.

    Attributes:
        port: HTTP port on 127.0.0.1.
    """

    name = "clickhouse"
    start_s = 120.0  #: it logs nothing while its library of 500 MB is loaded, so there is no progress to be seen
    stop_s = 20.0

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        self.port = 0

    @property
    def password(self) -> str:
        """The password of the user `default`; readable by the owner of the directory only."""
        return (self.directory / "password").read_text(encoding="utf-8").strip()

    @property
    def url(self) -> str:
        """http://user:password@host:port, as `clickhouse.url` takes it."""
        return f"http://default:{self.password}@127.0.0.1:{self.port}"

    @property
    def url_file(self) -> Path:
        """Holds the URL, for whoever may read the password."""
        return self.directory / "url"

    def prepare(self) -> None:
        """Make the password once, remember the port, write both down as a URL."""
        if find_spec("chdb") is None:
            message = "chdb is not installed (pip install 'preservarium[embedded]')"
            raise ServiceUnavailable(message)
        password = self.directory / "password"
        if not password.exists():
            # The engine reads files by SQL with our rights: not everyone who can open a loopback port may ask it to.
            with os.fdopen(os.open(password, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
                f.write(secrets.token_hex(16) + "\n")
        self.port = self.remembered_port()
        self.url_file.unlink(missing_ok=True)
        with os.fdopen(os.open(self.url_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
            f.write(self.url + "\n")

    def command(self) -> Sequence[str]:
        """The server in the foreground."""
        return [
            sys.executable,
            "-m",
            "preservarium.embedded.clickhouse_server",
            f"--port={self.port}",
            f"--path={self.directory / 'data'}",
            f"--password-file={self.directory / 'password'}",
        ]

    def environment(self) -> Mapping[str, str]:
        """With this package importable, and the server's time zone fixed."""
        # The engine takes the process's time zone for columns that name none.
        return {**self.python_environment(), "TZ": "UTC"}

    def healthy(self) -> bool:
        """Whether it answers a ping."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=2.0)
        try:
            connection.request("GET", "/ping")
            return connection.getresponse().read() == b"Ok.\n"
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()
