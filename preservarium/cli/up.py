"""`preservarium up`: the whole system on this machine, from an empty directory to devices on a page."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import click
import orjson

from preservarium.cli.output import print_json
from preservarium.settings import PREFIX, Settings, load

if TYPE_CHECKING:
    from preservarium.accounting import Account, Window
    from preservarium.connectors.simulator import Catalogue
    from preservarium.embedded.service import Service
    from preservarium.supervise import Progress, Workers

#: Sample registry and payloads, in the checkout.
REGISTRY: Final = Path(__file__).resolve().parents[2] / "examples" / "registry.yaml"
#: The fleet's values are drawn from it: the same at each start.
SEED: Final = 1
#: Written into a data directory that we made, so that --fresh deletes nothing else.
MARKER: Final = ".preservarium-up"
DATABASE: Final = "preservarium"
#: A worker that is killed is missed after this time; production waits longer, for slow networks.
SESSION_TIMEOUT_S: Final = 10.0
#: A line of progress this often; on a terminal it is one line that changes.
LINE_S: Final = 1.0
PLAIN_LINE_S: Final = 5.0
#: Longest wait for the pipeline to finish after the simulator has stopped. Plus the time that the run took: a machine
#: that was behind all the time needs it.
DRAIN_S: Final = 60.0
#: Workers should hold partitions within this time; the run goes on without them.
READY_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for on the command line."""

    seconds: float | None
    devices: int
    rate: float
    workers: int
    data_dir: Path
    web_port: int
    simulator: bool
    as_json: bool
    fresh: bool


class Screen:
    """Lines for people, and one line that changes: on a terminal in its place, elsewhere now and then."""

    def __init__(self, *, to_stderr: bool) -> None:
        from rich.console import Console

        self._console = Console(stderr=to_stderr, highlight=False)
        self._live: Any = None
        self._shown_s = 0.0

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False, soft_wrap=True)

    def change(self, line: str) -> None:
        """The line that changes."""
        if self._console.is_terminal:
            from rich.live import Live
            from rich.text import Text

            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=4)
                self._live.start()
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
        elif monotonic() - self._shown_s >= PLAIN_LINE_S:
            self._shown_s = monotonic()
            self.say(line)

    def close(self) -> None:
        """Leave the changing line as it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None


class Up:
    """One run."""

    def __init__(self, options: Options, screen: Screen) -> None:
        self._options = options
        self._screen = screen
        self._stop = asyncio.Event()
        # A worker's working directory is its own, so a relative .env would not be found.
        env_file = Path(os.environ.get(f"{PREFIX}ENV_FILE", ".env")).absolute()
        self._environment = {f"{PREFIX}ENV_FILE": str(env_file)}

        self._catalogue: Catalogue | None = None
        self._fleet: list[dict[str, Any]] = []

    async def run(self) -> tuple[int, dict[str, Any]]:
        """From the first service to the last one stopped; exit code and facts."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._asked_to_stop)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._screen.close)
            await self._prepare_directory(stack)
            settings = await self._services(stack)
            await self._schema(settings)
            window = await self._window(settings)
            workers = await self._workers(stack, settings)
            if workers is None:
                return 130, {}
            return await self._work(settings, window, workers)

    def _asked_to_stop(self) -> None:
        if self._stop.is_set():
            # Guards notice that we are gone and stop what they guard.
            self._screen.close()
            os._exit(130)
        self._stop.set()
        self._screen.say("stopping … (Ctrl-C again to force)")

    # --- what it stands on ---

    async def _prepare_directory(self, stack: contextlib.AsyncExitStack) -> None:
        from preservarium.supervise import port_taken

        directory = self._options.data_dir
        if port_taken("127.0.0.1", self._options.web_port):
            message = f"port {self._options.web_port} is taken; choose another with --web-port"
            raise click.ClickException(message)
        if self._options.fresh and directory.exists():
            if any(directory.iterdir()) and not (directory / MARKER).exists():
                message = f"{directory} was not made by `preservarium up`: it is not deleted"
                raise click.ClickException(message)
            await asyncio.to_thread(shutil.rmtree, directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MARKER).touch()

    async def _services(self, stack: contextlib.AsyncExitStack) -> Settings:
        """Start what the settings do not name; the settings with the addresses of what was started."""
        from preservarium.embedded.clickhouse import ClickHouse
        from preservarium.embedded.kafka import MockKafka, kafka_for
        from preservarium.embedded.postgres import Postgres

        given = load()
        directory = self._options.data_dir
        starting: list[asyncio.Task[None]] = []

        async def started(service: "Service", variables: Callable[[], dict[str, str]]) -> None:
            await asyncio.to_thread(service.start)
            self._environment |= variables()
            self._screen.say(f"  {service.name:<11} started in {service.started_s or 0:.1f} s")

        # Cleaned up in the opposite order, so Kafka goes last: workers and stores speak to it until the end.
        if "bootstrap_servers" not in given.kafka.model_fields_set:
            if given.kafka.security_protocol != "PLAINTEXT":
                message = (
                    f"{PREFIX}KAFKA__SECURITY_PROTOCOL is {given.kafka.security_protocol}, but no "
                    f"{PREFIX}KAFKA__BOOTSTRAP_SERVERS are given: a broker of our own is not secured"
                )
                raise click.ClickException(message)
            kafka, notice = await asyncio.to_thread(kafka_for, directory)
            if notice:
                self._screen.say(notice)
            if isinstance(kafka, MockKafka):
                # Its offsets begin at 0 each time: whatever remembers offsets of another run must be new as well.
                directory = directory / "volatile"
                await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
                self._environment[f"{PREFIX}KAFKA__PARTITIONS"] = str(MockKafka.partitions)
            self._stopping(stack, kafka)
            starting.append(
                asyncio.create_task(
                    started(kafka, lambda: {f"{PREFIX}KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers})
                )
            )
        if not given.postgres.model_fields_set & {"url", "host"}:
            postgres = Postgres(directory / "postgres")
            self._stopping(stack, postgres)

            async def postgres_with_database() -> None:
                await started(postgres, dict)
                await _create_database(postgres.dsn(), DATABASE)
                self._environment[f"{PREFIX}POSTGRES__URL"] = postgres.dsn(DATABASE)

            starting.append(asyncio.create_task(postgres_with_database()))
        if given.clickhouse.enabled and "url" not in given.clickhouse.model_fields_set:
            clickhouse = ClickHouse(directory / "clickhouse")
            self._stopping(stack, clickhouse)
            starting.append(
                asyncio.create_task(started(clickhouse, lambda: {f"{PREFIX}CLICKHOUSE__URL": clickhouse.url}))
            )
        # All of them end before anything is stopped, also where one fails: a thread cannot be cancelled.
        results = await asyncio.gather(*starting, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        self._environment[f"{PREFIX}DATA_DIR"] = str(directory / "state")
        if "session_timeout_s" not in given.kafka.model_fields_set:
            self._environment[f"{PREFIX}KAFKA__SESSION_TIMEOUT_S"] = str(SESSION_TIMEOUT_S)
        os.environ.update(self._environment)
        return load()

    def _stopping(self, stack: contextlib.AsyncExitStack, service: "Service") -> None:
        async def stop() -> None:
            await asyncio.to_thread(service.stop)

        stack.push_async_callback(stop)

    async def _schema(self, settings: Settings) -> None:
        from preservarium import topics_admin
        from preservarium.registry import apply
        from preservarium.stores.migrate import migrate_all

        reports = await migrate_all(settings, wait_s=30.0)
        comparison = await topics_admin.create(settings, wait_s=30.0)
        applied = await apply(settings, REGISTRY, actor="preservarium up")
        counts = applied.plan.counts()
        if self._options.devices or self._options.simulator:
            from preservarium.connectors import simulator

            self._catalogue = simulator.Catalogue(applied.file.documents)
            if self._options.devices:
                self._fleet = simulator.fleet(self._catalogue, self._options.devices)
                path = self._options.data_dir / "fleet.yaml"
                # JSON is YAML, and fast to write.
                await asyncio.to_thread(path.write_bytes, orjson.dumps({"devices": self._fleet}))
                applied = await apply(settings, path, actor="preservarium up")
                for name, n in applied.plan.counts().items():
                    counts[name] += n
        layout = next((r.layout for r in reports if r.store == "postgres"), "")
        self._screen.say(
            f"  schema      PostgreSQL ({layout}){', ClickHouse' if settings.clickhouse.enabled else ''}, {len(comparison.topics)} topics;"
            f" registry: {counts['create'] + counts['change']} documents new or changed, {counts['unchanged']} as they were"
        )

    async def _window(self, settings: Settings) -> "Window":
        from preservarium.accounting import open_window

        return await open_window(settings.kafka)

    async def _workers(self, stack: contextlib.AsyncExitStack, settings: Settings) -> "Workers | None":
        from preservarium.embedded.service import free_port
        from preservarium.supervise import Worker, Workers

        ports = [self._options.web_port, *(free_port() for _ in range(self._options.workers - 1))]
        directory = self._options.data_dir / "workers"
        workers = Workers(
            [Worker(directory / str(n), n, port, self._environment) for n, port in enumerate(ports)], self._screen.say
        )
        stack.push_async_callback(workers.stop)
        begun = monotonic()
        await workers.start()
        self._screen.say(
            f"  {'worker' if len(ports) == 1 else f'{len(ports)} workers':<11} started in {monotonic() - begun:.1f} s"
        )
        self._screen.say(f"\nConsole: http://{settings.web.host}:{self._options.web_port}\n")
        return None if self._stop.is_set() else workers

    # --- the run ---

    async def _work(self, settings: Settings, window: "Window", workers: "Workers") -> tuple[int, dict[str, Any]]:
        import aiohttp

        async with aiohttp.ClientSession() as http, _background(workers.watch(), self._stop) as watching:
            await self._until_ready(workers, http)
            begun = monotonic()
            async with self._simulating(settings) as sent:
                while not self._stop.is_set() and (
                    self._options.seconds is None or monotonic() - begun < self._options.seconds
                ):
                    self._screen.change(_line(monotonic() - begun, sent(), await workers.progress(http)))
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._stop.wait(), LINE_S)
            messages = sent()
            run_s = monotonic() - begun
            drained, lag = True, 0
            if self._options.seconds is not None and not watching.done():
                drained, lag = await self._drain(settings, workers, http, run_s, messages)
            progress = await workers.progress(http)
            self._screen.change(_line(monotonic() - begun, messages, progress))
            self._screen.close()
        if not watching.cancelled() and (error := watching.exception()) is not None:
            raise error
        facts: dict[str, Any] = {
            "seconds": round(run_s, 1),
            "messages_sent": messages,
            "worker_restarts": workers.restarts,
            "worker_rss_bytes": progress.rss_bytes,
            "drained": drained,
            "lag": lag,
        }
        if self._options.seconds is None:
            return 0, facts
        account = await self._account(settings, window)
        self._screen.say(f"\nAccounting of {run_s:.0f} s, from the topics and the stores:\n")
        for line in account.lines():
            self._screen.say(line)
        if not drained:
            self._screen.say(f"  {lag:,} records were still on their way when the wait was over")
        return (0 if account.adds_up and drained else 1), {**facts, **account.as_json()}

    async def _until_ready(self, workers: "Workers", http: Any) -> None:
        deadline = monotonic() + READY_S
        while monotonic() < deadline and not self._stop.is_set():
            statuses = await workers.statuses(http)
            if len(statuses) == len(workers.workers) and all(s["health"]["ready"] for s in statuses.values()):
                return
            await asyncio.sleep(0.2)

    @contextlib.asynccontextmanager
    async def _simulating(self, settings: Settings) -> AsyncIterator[Callable[[], int]]:
        """Run the simulated fleet; gives a function that tells how many messages it has sent."""
        if not self._options.simulator:
            yield lambda: 0
            return
        from preservarium.clock import SystemClock
        from preservarium.connectors import simulator
        from preservarium.connectors.base import Limits, RawProducer
        from preservarium.publish import Publisher
        from preservarium.settings import LiveSettings

        assert self._catalogue is not None, "the schema comes first"
        players = simulator.players(self._catalogue, [*self._catalogue.devices, *self._fleet], SEED)
        playing = simulator.Simulator(players, self._options.rate)
        self._screen.say(
            f"{len(players)} devices send {self._options.rate:g} messages a second. Ctrl-C stops everything.\n"
        )
        publisher = Publisher(LiveSettings(settings))
        await publisher.start()
        stop = asyncio.Event()
        run = playing.run(RawProducer(publisher, simulator.CONNECTOR), SystemClock(), Limits.of(settings), stop=stop)
        try:
            async with _background(run, self._stop) as task:
                yield lambda: playing.totals.messages
                # A batch under way is acknowledged before the publisher goes: only so is it counted.
                stop.set()
                await asyncio.wait([task])
        finally:
            await publisher.stop()
        task.result()

    async def _drain(
        self, settings: Settings, workers: "Workers", http: Any, run_s: float, messages: int
    ) -> tuple[bool, int]:
        """Wait until every group has committed everything; whether it came to that, and the lag."""
        from preservarium.accounting import group_lag

        begun = monotonic()
        lag = -1
        zeros = 0
        while monotonic() - begun < DRAIN_S + run_s:
            statuses = await workers.statuses(http)
            groups = {(stage["group"], stage["topic"]) for status in statuses.values() for stage in status["stages"]}
            lag = sum((await group_lag(settings, groups)).values()) if groups else -1
            zeros = zeros + 1 if lag == 0 else 0
            # Twice, because a stage that was read early may have been given work by one that was read late.
            if zeros == 2:
                return True, 0
            self._screen.change(_line(run_s + monotonic() - begun, messages, await workers.progress(http)))
            await asyncio.sleep(0.5)
        return False, lag

    async def _account(self, settings: Settings, window: "Window") -> "Account":
        from preservarium import accounting

        decode = await accounting.registry_decode(settings)
        ledger = accounting.Ledger(window, decode, scripts=decode, store_failed=settings.quality.store_failed)
        try:
            await accounting.read_topics(
                ledger,
                window,
                settings.kafka,
                payload_bytes_max=settings.normalize.payload_bytes_max,
            )
        finally:
            await decode.close()
        await accounting.read_postgres(ledger, settings.postgres.dsn)
        if settings.clickhouse.enabled:
            await accounting.read_clickhouse(ledger, settings)
        return ledger.account()


@contextlib.asynccontextmanager
async def _background(work: Any, stop: asyncio.Event) -> AsyncIterator["asyncio.Task[Any]"]:
    """Run `work` beside the block; when it fails, the block is asked to stop."""
    task: asyncio.Task[Any] = asyncio.create_task(work)
    task.add_done_callback(lambda t: None if t.cancelled() or t.exception() is None else stop.set())
    try:
        yield task
    finally:
        if not task.done():
            task.cancel()
        await asyncio.wait([task])


async def _create_database(dsn: str, name: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(dsn, timeout=10)
    try:
        if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", name):
            await connection.execute(f'CREATE DATABASE "{name}"')
    finally:
        await connection.close()


def _line(seconds: float, messages: int, p: "Progress") -> str:
    names = {"postgres": "PostgreSQL", "clickhouse": "ClickHouse"}
    stored = "".join(f"  {names.get(store, store)} {rows:,}" for store, rows in sorted(p.stored.items(), reverse=True))
    return (
        f"{seconds:5.0f} s  messages {messages:,}  standardized {p.standardized:,}  validated {p.validated:,}{stored}"
        f"  errors {p.errors:,}  lag {f'{p.lag:,}' if p.alive else '–'}  worker {p.rss_bytes / 2**20:.0f} MiB"
    )


@click.command()
@click.option(
    "--for", "seconds", type=click.FloatRange(1), help="Stop after SECONDS, wait for the rest, account for it."
)
@click.option(
    "--devices", type=click.IntRange(0, 1_000_000), default=0, help="Synthetic devices besides the sample fleet."
)
@click.option(
    "--rate", type=click.FloatRange(0.1, 1_000_000), default=50.0, show_default=True, help="Messages per second."
)
@click.option("--workers", type=click.IntRange(1, 16), default=1, show_default=True, help="Worker processes.")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where everything is kept.  [default: data_dir]",
)
@click.option("--web-port", type=click.IntRange(1, 65_535), help="Port of the console.  [default: web.port]")
@click.option("--no-simulator", is_flag=True, help="Send nothing: wait for your own readings.")
@click.option("--fresh/--keep", default=False, show_default=True, help="Begin with an empty data directory, or go on.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the facts as JSON at the end; lines for people go to stderr."
)
def up(
    seconds: float | None,
    devices: int,
    rate: float,
    workers: int,
    data_dir: Path | None,
    web_port: int | None,
    no_simulator: bool,
    fresh: bool,
    as_json: bool,
) -> None:
    """Run everything on this machine: services, schema, sample registry, workers, a simulated fleet.

    Ctrl-C stops all of it; the next start goes on where this one ended. A Kafka, PostgreSQL or ClickHouse that the
    settings name is used instead of an embedded one.
    """
    from preservarium import logs
    from preservarium.embedded.service import ServiceError

    settings = load()
    options = Options(
        seconds,
        devices,
        rate,
        workers,
        (data_dir or Path(settings.data_dir)).absolute(),
        web_port or settings.web.port,
        not no_simulator,
        as_json,
        fresh,
    )
    # People see what this prints; logs of the services and workers are in the data directory.
    logs.configure("WARNING", "auto")
    # A topic made a moment ago has no leader yet, and says so; it is tried again.
    logging.getLogger("aiokafka").setLevel(logging.ERROR)
    screen = Screen(to_stderr=as_json)
    try:
        code, facts = asyncio.run(_run(options, screen))
    except ServiceError as e:
        raise click.ClickException(str(e)) from e
    if as_json:
        print_json(facts)
    sys.exit(code)


async def _run(options: Options, screen: Screen) -> tuple[int, dict[str, Any]]:
    return await Up(options, screen).run()


commands: list[click.Command] = [up]
