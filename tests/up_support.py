"""A running `preservarium up`, for tests that need all of it."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from preservarium.embedded.kafka import find_java, resolve_jars
from preservarium.embedded.service import ServiceUnavailable, free_port


def data_directory(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """A directory for a real Kafka and all the others; skips where that cannot be had."""
    try:
        find_java()
        resolve_jars()
    except ServiceUnavailable as e:
        pytest.skip(f"missing: {e}")
    # Short: PostgreSQL's socket and Kafka's files have long names of their own.
    return tmp_path_factory.mktemp(name)


def plain_environment(**more: str) -> dict[str, str]:
    """Ours, without settings, and with those that are given."""
    return {**{k: v for k, v in os.environ.items() if not k.startswith("PRESERVARIUM_")}, **more}


class Run:
    """A running `preservarium up`."""

    def __init__(self, data_dir: Path, *arguments: str, **environment: str) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        self.errors = data_dir / "stderr.txt"
        data_dir.mkdir(exist_ok=True)
        (data_dir / ".preservarium-up").touch()
        self.environment = plain_environment(PRESERVARIUM_ENV_FILE=os.devnull, **environment)
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "preservarium", "up", f"--data-dir={data_dir}", f"--web-port={self.port}",
                    "--json", *arguments,
                ],
                stdout=subprocess.PIPE, stderr=errors, text=True, env=self.environment,
            )  # fmt: skip

    def until(self, what: Callable[[], Any], timeout_s: float = 120.0) -> Any:
        """What `what` gives, once it gives something."""
        deadline = time.monotonic() + timeout_s
        while not (found := what()):
            assert self.process.poll() is None, self.errors.read_text()
            assert time.monotonic() < deadline, self.errors.read_text()
            time.sleep(0.1)
        return found

    def said(self, text: str) -> None:
        """It has said `text` to whoever looks on."""
        self.until(lambda: text in self.errors.read_text())

    def get(self, path: str) -> Any:
        """The JSON of a view; None where it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2) as response:
                return json.load(response)
        except OSError:
            return None

    def shell(self, *arguments: str) -> str:
        """What a command says in a second shell."""
        done = subprocess.run(
            [sys.executable, "-m", "preservarium", *arguments], capture_output=True, text=True, timeout=120, check=True,
            cwd=self.data_dir.parent,
            env={**self.environment, "PRESERVARIUM_DATA_DIR": str(self.data_dir), "PYTHONPATH": os.getcwd()},
        )  # fmt: skip
        return done.stdout

    def worker(self) -> int:
        """Process id of the worker."""
        return json.loads((self.data_dir / "workers" / "0" / "worker-0.pid").read_text())["pid"]

    def end(self) -> tuple[int, Any]:
        """Exit code and facts, when it has ended."""
        out, _ = self.process.communicate(timeout=300)
        return self.process.returncode, json.loads(out) if out.strip() else None


def left_behind(data_dir):
    return [line for line in map(_cmdline, psutil.process_iter()) if any(str(data_dir) in a for a in line)]


def _cmdline(process):
    """Of a process that runs; nothing of one that has ended."""
    try:
        return [] if process.status() == psutil.STATUS_ZOMBIE else process.cmdline()
    except psutil.Error:
        return []
