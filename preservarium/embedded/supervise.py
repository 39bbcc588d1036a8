"""Workers on one machine under one owner: started, watched, started again when they die, stopped.

Each worker is a process of its own (`faust -A preservarium worker`) behind a guard, like the embedded services: it ends
when its owner ends, however the owner ends. What a worker has done is read from its own console, so that what people see
and what this reports cannot differ.
"""

import asyncio
import signal
import socket
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from time import monotonic
from typing import Any, Final

import aiohttp
import psutil
import structlog

from preservarium.embedded.service import Interrupted, Service, ServiceError

log = structlog.get_logger(__name__)

#: A worker that dies so often within `DEATHS_WINDOW_S` will not live: its log says why.
DEATHS_MAX: Final = 5
DEATHS_WINDOW_S: Final = 120.0
#: A dead worker is started again after this time; its group needs a moment anyway.
RESTART_S: Final = 0.5
#: A worker is looked at this often.
WATCH_S: Final = 0.25
#: A worker's console answers within this time or is left out of this look.
ASK_S: Final = 2.0


def port_taken(host: str, port: int) -> bool:
    """Whether something listens there already."""
    with socket.socket() as s:
        s.settimeout(1.0)
        return s.connect_ex((host, port)) == 0


class Worker(Service):
    """One worker process.

    Args:
        directory: its log and pid file.
        number: among the workers of this machine.
        port: of its console.
        environment: PRESERVARIUM_ variables that differ from ours.
    """

    stop_signal = signal.SIGTERM
    #: importing, joining the group, restoring tables
    start_s = 120.0
    #: a batch under way may take the handler's time limit
    stop_s = 40.0

    def __init__(self, directory: str | Path, number: int, port: int, environment: Mapping[str, str]) -> None:
        super().__init__(directory)
        self.name = f"worker-{number}"
        self.log_file = self.directory / f"{self.name}.log"
        self.port = port
        self._environment = dict(environment)

    @property
    def url(self) -> str:
        """Of its console."""
        return f"http://127.0.0.1:{self.port}"

    def prepare(self) -> None:
        """Nothing to make ready: services, schema and topics stand before workers start."""

    def command(self) -> Sequence[str]:
        """The worker in the foreground."""
        return [sys.executable, "-m", "faust", "-A", "preservarium", "worker", f"--web-port={self.port}"]

    def environment(self) -> Mapping[str, str]:
        """Ours, with what the owner decides."""
        return {**self.python_environment(), **self._environment}

    def healthy(self) -> bool:
        """Whether its console answers, whatever it says."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=ASK_S)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status in (200, 503)
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def log_tail(self) -> str:
        """The last lines of its log."""
        return self._log_tail()


@dataclass(frozen=True, slots=True)
class Standing:
    """How the workers are."""

    lag: int = 0  #: records that no stage has committed yet
    rss_bytes: int = 0  #: of the largest worker
    alive: int = 0  #: workers whose console answers


class Workers:
    """Keeps workers running.

    Args:
        workers: not yet started.
        say: tells people something in one line.
        token: an operator's, where what the consoles say is for operators.
    """

    def __init__(self, workers: Sequence[Worker], say: Any, *, token: str = "") -> None:
        self.workers = list(workers)
        self.restarts = 0
        self._say = say
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._deaths: deque[float] = deque()
        self._stopping = False

    async def start(self) -> None:
        """Start all at the same time; returns when every console answers.

        Raises:
            ServiceError: one did not start.
        """
        # All have ended before one is stopped: a thread cannot be cancelled.
        starting = (asyncio.to_thread(worker.start) for worker in self.workers)
        for result in await asyncio.gather(*starting, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def watch(self) -> None:
        """Start again whoever dies, until cancelled.

        Raises:
            ServiceError: workers die too often to go on.
        """
        while not self._stopping:
            await asyncio.sleep(WATCH_S)
            for worker in self.workers:
                if worker.alive or self._stopping:
                    continue
                now_s = monotonic()
                self._deaths.append(now_s)
                while self._deaths and now_s - self._deaths[0] > DEATHS_WINDOW_S:
                    self._deaths.popleft()
                if len(self._deaths) > DEATHS_MAX:
                    message = f"{worker.name} keeps dying, {len(self._deaths)} times in {DEATHS_WINDOW_S:.0f} s"
                    raise ServiceError(message + worker.log_tail())
                self._say(f"{worker.name} (pid {worker.pid}) died; starting it again")
                self.restarts += 1
                await asyncio.sleep(RESTART_S)
                await asyncio.to_thread(worker.stop)  # lets go of the dead one
                try:
                    await asyncio.to_thread(worker.start)
                except Interrupted:
                    raise
                except ServiceError as e:
                    # One that dies while it starts is one more that died: the next look counts it.
                    log.warning("worker_did_not_start", worker=worker.name, error=str(e))

    def interrupt(self) -> None:
        """Have a start that is under way give up, also of one that died."""
        self._stopping = True
        for worker in self.workers:
            worker.interrupt()

    async def stop(self) -> None:
        """Stop all, in their own clean way, at the same time."""
        self._stopping = True
        await asyncio.gather(*(asyncio.to_thread(worker.stop) for worker in self.workers))

    async def statuses(self, http: aiohttp.ClientSession) -> dict[str, dict[str, Any]]:
        """/api/status of every worker that answers, by name."""

        async def ask(worker: Worker) -> tuple[str, dict[str, Any] | None]:
            try:
                timeout = aiohttp.ClientTimeout(total=ASK_S)
                async with http.get(f"{worker.url}/api/status", timeout=timeout, headers=self._headers) as response:
                    return worker.name, await response.json() if response.status == HTTPStatus.OK else None
            except (aiohttp.ClientError, TimeoutError, ValueError):
                return worker.name, None

        found = await asyncio.gather(*(ask(worker) for worker in self.workers if worker.alive))
        return {name: status for name, status in found if status is not None}

    async def standing(self, http: aiohttp.ClientSession) -> Standing:
        """How the workers are."""
        statuses = await self.statuses(http)
        return Standing(
            lag=sum(int(status["lag"]) for status in statuses.values()),
            rss_bytes=max((_rss_bytes(worker.pid) for worker in self.workers), default=0),
            alive=len(statuses),
        )


def _rss_bytes(pid: int | None) -> int:
    if pid is None:
        return 0
    try:
        process = psutil.Process(pid)
        return int(process.memory_info().rss) + sum(int(c.memory_info().rss) for c in process.children(recursive=True))
    except psutil.Error:
        return 0
