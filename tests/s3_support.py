"""A server that speaks S3's protocol over HTTP: moto's. What it holds is in its memory.

It is made once per user, from the package index, in an environment of its own (tests/s3/requirements.txt).
"""

import fcntl
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from preservarium.embedded.kafka import cache_directory
from preservarium.embedded.service import Service, ServiceUnavailable, port_answers

REQUIREMENTS: Final = Path(__file__).with_name("s3") / "requirements.txt"
INSTALL_S: Final = 300.0
#: What clients log in with; moto takes anything.
ACCESS_KEY, SECRET_KEY = "archivist", "archivists-secret"


def environment() -> Path:
    """The environment with moto in it.

    Raises:
        ServiceUnavailable: it cannot be made.
    """
    text = REQUIREMENTS.read_text()
    folder = cache_directory("").with_name("test-s3-moto-5.2.5")
    folder.parent.mkdir(parents=True, exist_ok=True)
    marker = folder / "complete"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if marker.exists() and marker.read_text() == text:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        done = subprocess.run(
            [folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-input", "-r", REQUIREMENTS],
            capture_output=True, text=True, timeout=INSTALL_S, check=False,
        )  # fmt: skip
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            message = f"moto's S3 server cannot be installed: {done.stderr.strip().splitlines()[-1:]}"
            raise ServiceUnavailable(message)
        marker.write_text(text)
    return folder


class S3(Service):
    """One server; stopped, it has forgotten everything."""

    name = "s3"
    start_s = 30.0
    stop_s = 5.0

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        self.port = 0
        self._python = Path(sys.executable)

    @property
    def endpoint(self) -> str:
        """http://host:port."""
        return f"http://127.0.0.1:{self.port}"

    def prepare(self) -> None:
        """Install, and take a port."""
        self._python = environment() / "bin" / "python"
        self.port = self.remembered_port()

    def command(self) -> Sequence[str]:
        """The server."""
        return [str(self._python), "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    def environment(self) -> Mapping[str, str]:
        """Nothing of the project's."""
        return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}

    def healthy(self) -> bool:
        """Whether its port is open."""
        return port_answers(self.port)
