"""Kafka, both stores, a mail server and workers on one machine, each worker behind proxies of its own."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final

import aiohttp
import asyncpg
import psutil

from preservarium.embedded.clickhouse import ClickHouse
from preservarium.embedded.kafka import Kafka
from preservarium.embedded.mail import MailDirectory
from preservarium.embedded.postgres import Postgres
from preservarium.embedded.service import free_port
from preservarium.embedded.supervise import Worker
from soak import fleet
from soak.faults import LINKS, SESSION_S
from soak.proxy import Proxy

#: A multiple of the workers: Faust gives each as many as the first, so of four among three the last has none.
PARTITIONS: Final = 6
DATABASE: Final = "soak"
WINDOWS_S: Final = (5, 20)
#: Gives a worker a clock that can be set wrong.
CLOCK: Final = Path(__file__).parent / "clock"
#: Size of the file system of a state directory.
STATE_BYTES: Final = 256 * 2**20
#: A worker that is not ready after this time is told of, and what was to happen to it is left out.
READY_S: Final = 180.0

SETTINGS: Final = {
    "KAFKA__PARTITIONS": str(PARTITIONS),
    "KAFKA__SESSION_TIMEOUT_S": str(SESSION_S),
    "AGGREGATE__WINDOWS": ",".join(f"{size_s}s" for size_s in WINDOWS_S),
    "AGGREGATE__LATENESS_S": "2",
    "AGGREGATE__SILENCE_S": "10",
    "AGGREGATE__HORIZON_S": "600",
    "ALARM__SETTLE_S": "8",
    # A picture of the last day costs more than all the rest of a notice.
    "NOTICES__PLOT_HOURS": "0",
    "BREAKER__OPEN_MAX_S": "5",
    "AGENTS__BACKOFF_MAX_S": "2",
    "LOG_FORMAT": "json",
    "ENV_FILE": os.devnull,
}


class ManyDoors(Kafka):
    """A broker with a listener for each worker, that says to whoever comes there that the worker's proxy is its address."""

    def __init__(self, directory: Path, doors: Sequence[int]) -> None:
        super().__init__(directory, java_options=("-XX:TieredStopAtLevel=1",))
        self.doors = list(doors)  #: ports of the proxies
        self.listeners: list[int] = []  #: of the broker, behind them

    def properties(self) -> str:
        """With the listeners."""
        self.listeners = [self.remembered_port(f"door_{n}_port") for n in range(len(self.doors))]
        controller = f"CONTROLLER://127.0.0.1:{self.remembered_port('controller_port')}"
        names = [f"W{n}" for n in range(len(self.doors))]
        behind = [f"{name}://127.0.0.1:{port}" for name, port in zip(names, self.listeners, strict=True)]
        before = [f"{name}://127.0.0.1:{port}" for name, port in zip(names, self.doors, strict=True)]
        plain = f"PLAINTEXT://127.0.0.1:{self.port}"
        lines = [
            f"listeners={','.join([plain, controller, *behind])}",
            f"advertised.listeners={','.join([plain, *before])}",
            "listener.security.protocol.map="
            + ",".join(f"{name}:PLAINTEXT" for name in ("PLAINTEXT", "CONTROLLER", *names)),
            "inter.broker.listener.name=PLAINTEXT",
        ]
        return super().properties() + "\n".join(lines) + "\n"


class Member(Worker):
    """A worker with a state directory and proxies of its own.

    Attributes:
        links: to what it depends on, by name.
        state: its `data_dir`.
    """

    def __init__(self, directory: Path, number: int, links: dict[str, Proxy], environment: dict[str, str]) -> None:
        super().__init__(directory, number, free_port(), environment)
        self.number = number
        self.links = links
        self.state = directory / "state"
        self.lock = asyncio.Lock()  #: held by whoever does something to it
        self.wanted = True  #: it is to run
        self.deaths: list[str] = []  #: the ends that nobody asked for: the last line of the log

    def ready(self) -> bool:
        """Whether it works on partitions and nothing is wrong with it."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=2.0)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    async def until_ready(self, within_s: float = READY_S) -> bool:
        """Whether it became ready."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not await asyncio.to_thread(self.ready):
                    await asyncio.sleep(0.3)
                return True
        return False

    async def rebalances(self) -> float:
        """How often its partitions were taken from it, of the process that runs now."""
        async with aiohttp.ClientSession() as http, http.get(f"{self.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("preservarium_rebalances_total"))

    def signal_all(self, which: signal.Signals) -> None:
        """The worker and its sandboxes."""
        signal_tree(self.pid, which)

    def rss_bytes(self) -> int:
        """Of the worker itself."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss) if self.pid is not None else 0
        except psutil.Error:
            return 0


def signal_tree(pid: int | None, which: signal.Signals) -> None:
    """A process and its children."""
    if pid is None:
        return
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                one.send_signal(which)


class World:
    """All of it.

    Args:
        directory: for everything.
        workers: how many.
        devices: of each kind, in the registry.
        bursting: devices that burst, in the registry.
        proxied: workers reach Kafka and the stores through proxies. Without, there is nothing to cut, and no cost of it.
        settings: of the workers, beside ours.
    """

    def __init__(
        self,
        directory: Path,
        workers: int,
        devices: int,
        *,
        proxied: bool = True,
        bursting: int = fleet.BURSTING,
        settings: dict[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.devices = devices
        self.prefix = ""
        doors = [free_port() for _ in range(workers)] if proxied else []
        self.kafka = ManyDoors(directory / "kafka", doors)
        self.postgres = Postgres(directory / "postgres", settings={"fsync": "off"})
        self.clickhouse = ClickHouse(directory / "clickhouse")
        self.mail = MailDirectory(directory / "mail")
        self.members: list[Member] = []
        self.clocks: dict[str, Path] = {}  #: worker -> the file that says how far its clock is off
        self._workers = workers
        self._proxied = proxied
        self._bursting = bursting
        self._settings = settings or {}
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Services, schema, topics, registry, workers; returns when every worker is ready."""
        await asyncio.gather(*(asyncio.to_thread(s.start) for s in (self.kafka, self.postgres, self.clickhouse)))
        await self.mail.start()
        connection = await asyncpg.connect(self.postgres.dsn())
        await connection.execute(f"CREATE DATABASE {DATABASE}")
        await connection.close()
        self.environment = self._environment(self.kafka.bootstrap_servers, self.postgres.port, self.clickhouse.port)
        await self.command("migrate")
        await self.apply(fleet.registry(self.devices, self._bursting))
        for number in range(self._workers):
            self.members.append(await self._member(number))
        await asyncio.gather(*(asyncio.to_thread(member.start) for member in self.members))
        for member in self.members:
            if not await member.until_ready():
                raise RuntimeError(f"{member.name} did not become ready{member.log_tail()}")
        self._watching = asyncio.create_task(self._watch())

    def _environment(self, kafka: str, postgres: int, clickhouse: int) -> dict[str, str]:
        given = {
            **SETTINGS,
            "KAFKA__BOOTSTRAP_SERVERS": kafka,
            "POSTGRES__URL": f"postgresql://preservarium:{self.postgres.password}@127.0.0.1:{postgres}/{DATABASE}",
            "CLICKHOUSE__URL": f"http://default:{self.clickhouse.password}@127.0.0.1:{clickhouse}",
            "MAIL__HOST": "127.0.0.1",
            "MAIL__PORT": str(self.mail.port),
            **self._settings,
        }
        return {f"PRESERVARIUM_{name}": value for name, value in given.items()}

    async def _member(self, number: int) -> Member:
        links: dict[str, Proxy] = {}
        environment = dict(self.environment)
        if self._proxied:
            behind = (self.kafka.listeners[number], self.postgres.port, self.clickhouse.port)
            before = (self.kafka.doors[number], free_port(), free_port())
            links = {name: Proxy(*ports) for name, *ports in zip(LINKS, before, behind, strict=True)}
            for link in links.values():
                await link.start()
            environment = self._environment(f"127.0.0.1:{before[0]}", before[1], before[2])
        directory = self.directory / f"worker-{number}"
        environment["PRESERVARIUM_DATA_DIR"] = str(directory / "state")
        environment["PRESERVARIUM_WEB__HOST"] = "127.0.0.1"
        clock = self.clocks[f"worker-{number}"] = self.directory / f"worker-{number}.clock"
        clock.write_text("0\n")
        environment["SOAK_CLOCK_FILE"] = str(clock)
        environment["PYTHONPATH"] = os.pathsep.join([str(CLOCK), Worker.python_environment()["PYTHONPATH"]])
        if self._proxied:
            mount_small(directory / "state")
        return Member(directory, number, links, environment)

    async def stop(self) -> None:
        """All of it; a worker that is frozen or cut off does not hold it up."""
        if self._watching is not None:
            self._watching.cancel()
        for member in self.members:
            member.wanted = False
            for link in member.links.values():
                link.heal()
        for service in (*self.members, self.kafka, self.clickhouse):
            signal_tree(service.pid, signal.SIGCONT)
        signal_tree(self.postgres.pid, signal.SIGCONT)
        await asyncio.gather(*(asyncio.to_thread(member.stop) for member in self.members))
        for member in self.members:
            for link in member.links.values():
                await link.stop()
            unmount(member.state)
        await self.mail.stop()
        await asyncio.gather(*(asyncio.to_thread(s.stop) for s in (self.kafka, self.postgres, self.clickhouse)))

    async def _watch(self) -> None:
        """Start again who died by itself, as whatever runs workers does."""
        while True:
            await asyncio.sleep(0.5)
            for member in self.members:
                if member.wanted and not member.alive and not member.lock.locked():
                    async with member.lock:
                        member.deaths.append(member.log_tail())
                        await self.restart(member)

    async def restart(self, member: Member) -> None:
        """Start one that ended, however often it takes."""
        while member.wanted:
            await asyncio.to_thread(member.stop)
            try:
                await asyncio.to_thread(member.start)
                return
            except Exception as e:
                member.deaths.append(str(e))
                await asyncio.sleep(1.0)

    async def command(self, *arguments: str, check: bool = True) -> tuple[int, str]:
        """A command of ours, by the direct way to everything; its exit code and what it said."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "preservarium", *arguments,
            env={**os.environ, **self.environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        said, _ = await process.communicate()
        if check and process.returncode != 0:
            raise RuntimeError(f"preservarium {' '.join(arguments)}: {said.decode()}")
        return process.returncode or 0, said.decode()

    async def apply(self, documents: dict[str, Any], *, check: bool = True) -> tuple[int, str]:
        """Apply a registry file."""
        file = self.directory / f"registry-{os.urandom(4).hex()}.yaml"
        file.write_text(json.dumps(documents), encoding="utf-8")  # JSON is YAML
        try:
            return await self.command("registry", "apply", str(file), check=check)
        finally:
            file.unlink()

    async def query(self, statement: str, *arguments: Any) -> list[Any]:
        """Rows of PostgreSQL, by the direct way."""
        connection = await asyncpg.connect(self.postgres.dsn(DATABASE), timeout=5)
        try:
            return list(await connection.fetch(statement, *arguments))
        finally:
            await connection.close()

    async def query_clickhouse(self, statement: str) -> list[list[Any]]:
        """Rows of ClickHouse, by the direct way."""
        timeout = aiohttp.ClientTimeout(total=120, sock_connect=5)
        url = f"http://127.0.0.1:{self.clickhouse.port}/"
        headers = {"X-ClickHouse-User": "default", "X-ClickHouse-Key": self.clickhouse.password}
        parameters = {"database": "preservarium", "output_format_json_quote_64bit_integers": "0"}
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers) as http,
            http.post(url, params=parameters, data=f"{statement} FORMAT JSONCompactEachRow") as response,
        ):
            text = await response.text()
            if response.status != 200:
                raise RuntimeError(text[:500])
            return [json.loads(line) for line in text.splitlines()]


def mount_small(directory: Path) -> bool:
    """Give a directory a small file system of its own, which can be filled; whether that was possible."""
    directory.mkdir(parents=True, exist_ok=True)
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        return False
    options = f"size={STATE_BYTES}"
    done = subprocess.run([mount, "-t", "tmpfs", "-o", options, "soak", directory], check=False, capture_output=True)
    return done.returncode == 0


def unmount(directory: Path) -> None:
    """Take it away."""
    if directory.is_mount():
        subprocess.run(["umount", "-l", directory], check=False)


def wipe(directory: Path) -> None:
    """Remove what is in a directory, and leave it: it may be a mount."""
    for path in directory.iterdir() if directory.exists() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
