"""What every embedded service has in common: a data directory, a port, a guard, health, start and stop."""

import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import structlog

from preservarium.embedded import guard

log = structlog.get_logger(__name__)

#: Below Linux' range for outgoing connections (32768…60999): a port that is remembered for the next start must not be
#: taken meanwhile by chance.
PORTS = range(20_000, 32_000)
LOG_BYTES_MAX = 5_000_000  #: a log larger than this is moved aside at the next start; one old file is kept
HEALTH_POLL_S = 0.05
#: What waits for a guard or a tool looks this often whether it is still wanted.
INTERRUPT_POLL_S = 0.2


class ServiceError(Exception):
    """A service did not start, or is not to be had on this machine. The message says what to do."""


class ServiceUnavailable(ServiceError):
    """Something the service needs is not installed: a caller may fall back, a test may skip."""


class Interrupted(ServiceError):
    """Nobody wants the service any more."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the start of {name} was given up")


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket() as s:
        # Without this a port that a killed server held would count as taken while old connections fade out.
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A loopback port that nobody listens on."""
    for _ in range(200):
        port = random.choice(PORTS)
        if port_is_free(port):
            return port
    message = f"no free loopback port between {PORTS.start} and {PORTS.stop}"
    raise ServiceError(message)


def port_answers(port: int, timeout_s: float = 1.0) -> bool:
    """Whether something accepts TCP connections on this loopback port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_s):
            return True
    except OSError:
        return False


def run_tool(
    name: str, command: Sequence[Any], *, timeout_s: float, interrupted: threading.Event | None = None, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run a program that makes something ready, and give what it printed.

    Args:
        name: what it is for, for people.
        command: program and arguments.
        timeout_s: then it is killed.
        interrupted: once set, it is killed, too, within a moment.
        options: of `subprocess.Popen`.

    Raises:
        Interrupted: nobody wants it any more.
        ServiceError: it took too long.
        OSError: it cannot be started.
    """
    deadline = time.monotonic() + timeout_s
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A Ctrl-C on the owner's terminal is the owner's to handle.
        start_new_session=True,
        **options,
    ) as process:
        while True:
            try:
                out, err = process.communicate(timeout=INTERRUPT_POLL_S)
            except subprocess.TimeoutExpired:
                given_up = interrupted is not None and interrupted.is_set()
                if not given_up and time.monotonic() < deadline:
                    continue
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                if given_up:
                    raise Interrupted(name) from None
                message = f"{name}: no end within {timeout_s:g} s"
                raise ServiceError(message) from None
            return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class Service(ABC):
    """One service in a data directory.

    `start` may be called again after `stop`, `kill`, or the death of a former owner: the data and, where they are
    still free, the ports are the same. A second owner of the same directory is refused as long as the first lives.
    Not thread-safe, but for `interrupt`: one thread at a time.

    Attributes:
        directory: everything the service writes.
        log_file: what the service printed.
    """

    name: str = "service"
    stop_signal: signal.Signals = signal.SIGTERM
    start_s: float = 60.0  #: a start that shows no progress for so long has failed
    start_max_s: float = 600.0  #: a start that takes longer has failed, whatever it shows
    stop_s: float = 20.0  #: a stop that takes longer is a kill
    busy_wait_s: float = 25.0  #: longer than stop_s: a killed owner's guard may still be stopping the service

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).absolute()
        self.log_file = self.directory / f"{self.name}.log"
        self.pid: int | None = None
        self.started_s: float | None = None  #: seconds the last start took
        self._guard: subprocess.Popen[str] | None = None
        self._interrupted = threading.Event()

    @abstractmethod
    def prepare(self) -> None:
        """Make the data directory ready; called before every start.

        Raises:
            ServiceUnavailable: something is not installed.
            ServiceError: it cannot be made ready.
        """

    @abstractmethod
    def command(self) -> Sequence[str]:
        """The command line of the service, after `prepare`."""

    @abstractmethod
    def healthy(self) -> bool:
        """Whether the service answers now; waits a second or two at most, never raises."""

    def environment(self) -> Mapping[str, str]:
        """The environment of the service."""
        return os.environ

    def progress(self) -> object:
        """Something that differs from what it was before where a start has come further: how long its logs are."""
        return [file.stat().st_size for file in sorted(self.directory.glob("*.log")) if file.exists()]

    @staticmethod
    def python_environment() -> dict[str, str]:
        """An environment in which a child's `-m preservarium…` finds this very package from any directory."""
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._guard is not None and self._guard.poll() is None

    def start(self) -> Self:
        """Start and wait until it answers. A service that already runs is left alone.

        A busy machine may need minutes: as long as the log moves it is waited for.

        Raises:
            ServiceUnavailable: something is not installed.
            Interrupted: nobody wants it any more.
            ServiceError: it did not start; the message holds the last lines of its log.
        """
        if self._guard is not None and self._guard.poll() is None:
            return self
        self._release()
        begun = time.monotonic()
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        self.prepare()
        if self.log_file.exists() and self.log_file.stat().st_size > LOG_BYTES_MAX:
            self.log_file.replace(self.log_file.with_suffix(".log.1"))
        self._check_wanted()
        self._launch()
        moved_at, shown = time.monotonic(), self.progress()
        while not self.healthy():
            if not self.alive:
                message = f"{self.name} ended while starting (exit {self._guard and self._guard.returncode})"
                self._release()
                raise ServiceError(message + self._log_tail())
            now = time.monotonic()
            if (new := self.progress()) != shown:
                moved_at, shown = now, new
            if now - moved_at > self.start_s or now - begun > self.start_max_s:
                self.stop()
                still = f", and showed no progress for {self.start_s:g} s" if now - begun <= self.start_max_s else ""
                message = f"{self.name} did not answer within {now - begun:.0f} s{still}"
                raise ServiceError(message + self._log_tail())
            self._check_wanted()
            time.sleep(HEALTH_POLL_S)
        self.started_s = time.monotonic() - begun
        log.debug("service started", service=self.name, pid=self.pid, seconds=round(self.started_s, 2))
        return self

    def interrupt(self) -> None:
        """Have a `start` that another thread is in give up, and every later one. For an owner that ends; may be called any time."""
        self._interrupted.set()

    def _check_wanted(self) -> None:
        if self._interrupted.is_set():
            self.stop()
            raise Interrupted(self.name)

    def stop(self) -> None:
        """Stop cleanly and wait for the end. No error where it does not run."""
        if self._guard is not None:
            if self._guard.stdin is not None:
                self._guard.stdin.close()
            try:
                # The guard itself goes from the clean stop to the hard one; this is the net below it.
                self._guard.wait(self.stop_s + 15.0)
            except subprocess.TimeoutExpired:
                self._guard.kill()
        self._release()

    def kill(self) -> None:
        """Kill the service with -9, as a crash would: for tests of what survives."""
        if self._guard is not None and self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            self._guard.wait(10.0)
        self._release()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def remembered_port(self, role: str = "port") -> int:
        """The port of the last start where it is still free, so that clients find the service again; else a new one."""
        file = self.directory / role
        try:
            port = int(file.read_text())
        except (OSError, ValueError):
            port = 0
        if port in PORTS and port_is_free(port):
            return port
        port = free_port()
        file.write_text(f"{port}\n")
        return port

    def _launch(self) -> None:
        spec = {
            "command": list(self.command()),
            "cwd": str(self.directory),
            "log": str(self.log_file),
            "pid_file": str(self.directory / f"{self.name}.pid"),
            "lock_file": str(self.directory / f"{self.name}.lock"),
            "stop_signal": int(self.stop_signal),
            "stop_s": self.stop_s,
            "busy_wait_s": self.busy_wait_s,
        }
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, json.dumps(spec)],
            # Not in `spec`: everybody on the machine can read a command line, and passwords stand in environments.
            env=dict(self.environment()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        said = self._guard_says(self.busy_wait_s + self.stop_s + 20.0)
        self._check_wanted()
        if said.startswith("started "):
            self.pid = int(said.removeprefix("started "))
            return
        self.stop()
        if said == "busy":
            message = f"{self.directory} is in use: another Preservarium runs its {self.name} there"
        else:
            message = f"{self.name} could not be started: {said or 'its guard ended'}"
        raise ServiceError(message)

    def _guard_says(self, timeout_s: float) -> str:
        """The guard's first line, or "" where it ended or kept silent."""
        pipe = self._guard.stdout if self._guard is not None else None
        if pipe is None:
            return ""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            deadline = time.monotonic() + timeout_s
            while time.monotonic() < deadline and not self._interrupted.is_set():
                if selector.select(INTERRUPT_POLL_S):
                    return pipe.readline().strip()
        return ""

    def _release(self) -> None:
        if self._guard is not None:
            for pipe in (self._guard.stdin, self._guard.stdout):
                if pipe is not None:
                    pipe.close()
            self._guard.wait(10.0)
        self._guard = None
        self.pid = None

    def _log_tail(self, lines_max: int = 15) -> str:
        try:
            lines = self.log_file.read_text(errors="replace").splitlines()[-lines_max:]
        except OSError:
            return ""
        return "".join(f"\n  | {line}" for line in lines) + f"\n(log: {self.log_file})"
