"""`preservarium up`: the whole system on this machine, from an empty directory to devices on a page."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
import orjson

from preservarium.cli.output import print_json
from preservarium.cli.system import shown
from preservarium.cli.up_screen import Screen, address_lines, progress_line
from preservarium.settings import PREFIX, Settings, load

if TYPE_CHECKING:
    from preservarium.connectors.simulator import Catalogue
    from preservarium.embedded.ensemble import Ensemble
    from preservarium.embedded.running import Running
    from preservarium.embedded.supervise import Workers
    from preservarium.operations.accounting import Account, Window

T = TypeVar("T")

#: Sample registry and payloads, in the checkout.
REGISTRY: Final = Path(__file__).resolve().parents[2] / "examples" / "registry.yaml"
#: The fleet's values are drawn from it: the same at each start.
SEED: Final = 1
#: Written into a data directory that we made, so that --fresh deletes nothing else.
MARKER: Final = ".preservarium-up"
#: Beside it, once the sample registry was applied there.
SAMPLE_MARKER: Final = ".preservarium-sample"
#: What one machine has otherwise than production, where nobody says anything else: a worker that is killed is missed sooner
#: (production waits longer, for slow networks), every stage runs, and a window closes while somebody looks on.
#: Corrections of windows end sooner, too, because each series keeps what it may have to correct.
DEFAULTS: Final = {
    "kafka": {"session_timeout_s": "10"},
    "anomaly": {"enabled": "true"},
    "aggregate": {"windows": "30s,1h,24h", "lateness_s": "5", "horizon_s": "600"},
}
#: A line of progress this often; on a terminal it is one line that changes.
LINE_S: Final = 1.0
#: Longest wait for the pipeline to finish after the simulator has stopped. Plus the time that the run took: a machine
#: that was behind all the time needs it.
DRAIN_S: Final = 60.0
#: Workers should hold partitions within this time; the run goes on without them.
READY_S: Final = 60.0
#: Exit code of a run that a signal ended before it was ready, or before its time: 128 and the signal's number.
EXIT_SIGNAL: Final = 128


class Stopped(Exception):
    """A signal asks for the end."""


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
    sample: bool
    registries: tuple[Path, ...]
    mqtt: bool
    as_json: bool
    fresh: bool
    restore: Path | None = None  #: directory of a back-up


class Up:
    """One run."""

    def __init__(self, options: Options, screen: Screen) -> None:
        self._options = options
        self._screen = screen
        self._stop = asyncio.Event()
        self._signal = signal.SIGTERM
        # A worker's working directory is its own, so a relative .env would not be found.
        env_file = Path(os.environ.get(f"{PREFIX}ENV_FILE", ".env")).absolute()
        self._environment = {f"{PREFIX}ENV_FILE": str(env_file)}
        #: called when a signal asks for the end: what waits in threads gives up
        self._interrupts: list[Callable[[], None]] = []

        self._catalogue: Catalogue | None = None
        self._played: list[dict[str, Any]] = []

    async def run(self) -> tuple[int, dict[str, Any]]:
        """From the first service to the last one stopped; exit code and facts."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._asked_to_stop, number)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._screen.close)
            try:
                note = await self._prepare_directory(stack)
                ensemble = await self._services(stack)
                settings = load()
                if self._options.restore is not None:
                    await self._unless_stopped(self._restore(settings, self._options.restore))
                await self._unless_stopped(self._schema(settings))
                window = await self._unless_stopped(self._window(settings))
                workers = await self._workers(stack, settings)
            except Exception:
                # A start that is given up fails somewhere; what counts is that it was asked to.
                if self._stop.is_set():
                    return EXIT_SIGNAL + self._signal, {}
                raise
            note = note.serving(settings, ensemble.reach)
            self._announce(stack, note, ensemble)
            return await self._work(settings, window, workers)

    def _asked_to_stop(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            # Guards notice that we are gone and stop what they guard.
            self._screen.close()
            os._exit(EXIT_SIGNAL + number)
        self._signal = number
        self._stop.set()
        self._screen.say("stopping … (Ctrl-C again to force)")
        for interrupt in self._interrupts:
            interrupt()

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """What the work gives; a signal ends it.

        Raises:
            Stopped: a signal asked for the end.
        """
        task = asyncio.create_task(work)
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait([task, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
            raise Stopped
        return task.result()

    # --- what it stands on ---

    async def _prepare_directory(self, stack: contextlib.AsyncExitStack) -> "Running":
        from preservarium.embedded.running import Running, find
        from preservarium.embedded.supervise import port_taken

        directory = self._options.data_dir
        if (other := find(directory)) is not None:
            message = f"a system is {other.state} in {shown(directory)} already: {other.web} (pid {other.pid})"
            raise click.ClickException(message)
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
        note = Running.ours(directory, f"http://127.0.0.1:{self._options.web_port}")
        note.write()
        stack.callback(note.remove)
        return note

    async def _services(self, stack: contextlib.AsyncExitStack) -> "Ensemble":
        """Start what the settings do not name; from then on the environment says where everything is."""
        from preservarium.embedded.ensemble import Ensemble

        given = load()
        ensemble = Ensemble(self._options.data_dir, self._screen.say)
        self._interrupts.append(ensemble.interrupt)
        stack.push_async_callback(ensemble.stop)
        await ensemble.start(given, mqtt=self._options.mqtt)
        self._environment |= ensemble.variables
        self._environment[f"{PREFIX}DATA_DIR"] = str(ensemble.directory / "state")
        for section, values in DEFAULTS.items():
            if not getattr(given, section).model_fields_set & values.keys():
                self._environment |= {f"{PREFIX}{section}__{name}".upper(): value for name, value in values.items()}
        os.environ.update(self._environment)
        return ensemble

    async def _restore(self, settings: Settings, directory: Path) -> None:
        from preservarium.cli.backup import told
        from preservarium.operations.backup.restore import restore

        for line in told(await restore(settings, directory, lambda done, total, what: None)):
            self._screen.say(f"  {line}")

    async def _schema(self, settings: Settings) -> None:
        from preservarium.connectors.simulator import Catalogue, fleet
        from preservarium.registry.apply import Applied, apply
        from preservarium.stores.migrate import migrate_all
        from preservarium.streaming import topics_admin

        counts: dict[str, int] = {}

        async def bring(path: Path) -> Applied:
            applied = await apply(settings, path, actor="preservarium up")
            for name, n in applied.plan.counts().items():
                counts[name] = counts.get(name, 0) + n
            return applied

        reports = await migrate_all(settings, wait_s=30.0)
        comparison = await topics_admin.create(settings, wait_s=30.0)
        options = self._options
        documents: dict[str, list[Any]] = {}
        sample = options.data_dir / SAMPLE_MARKER
        if options.sample:
            sample.touch()
        elif sample.exists():
            self._screen.say("  The sample registry is here from an earlier start; --fresh begins without it.")
        for path in ((REGISTRY,) if options.sample else ()) + options.registries:
            applied = await bring(path)
            for kind, found in applied.file.documents.items():
                documents.setdefault(kind, []).extend(found)
            if path == REGISTRY:
                self._played = [*documents.get("device", ())]
        self._catalogue = Catalogue(documents)
        if options.devices:
            synthetic = fleet(self._catalogue, options.devices)
            self._played += synthetic
            path = options.data_dir / "fleet.yaml"
            # JSON is YAML, and fast to write.
            await asyncio.to_thread(path.write_bytes, orjson.dumps({"devices": synthetic}))
            await bring(path)
        layout = next((r.layout for r in reports if r.store == "postgres"), "")
        registry = (
            f"{counts['create'] + counts['change']} documents new or changed, {counts['unchanged']} as they were"
            if counts
            else "left as it is"
        )
        self._screen.say(
            f"  schema      PostgreSQL ({layout}){', ClickHouse' if settings.clickhouse.enabled else ''}, "
            f"{len(comparison.topics)} topics; registry: {registry}"
        )

    async def _window(self, settings: Settings) -> "Window":
        from preservarium.operations.accounting_facts import open_window

        return await open_window(settings.kafka)

    async def _workers(self, stack: contextlib.AsyncExitStack, settings: Settings) -> "Workers":
        from preservarium.embedded.service import free_port
        from preservarium.embedded.supervise import Worker, Workers

        ports = [self._options.web_port, *(free_port() for _ in range(self._options.workers - 1))]
        directory = self._options.data_dir / "workers"
        # A broker takes one connector of a name: the second one would drive out the first, again and again.
        others = {**self._environment, f"{PREFIX}MQTT__ENABLED": "false"}
        workers = Workers(
            [Worker(directory / str(n), n, port, others if n else self._environment) for n, port in enumerate(ports)],
            self._screen.say,
            token=settings.web.any_token,
        )
        self._interrupts.append(workers.interrupt)
        stack.push_async_callback(workers.stop)
        begun = monotonic()
        if self._stop.is_set():
            raise Stopped
        await workers.start()
        self._screen.say(
            f"  {'worker' if len(ports) == 1 else f'{len(ports)} workers':<11} started in {monotonic() - begun:.1f} s"
        )
        return workers

    def _announce(self, stack: contextlib.AsyncExitStack, note: "Running", ensemble: "Ensemble") -> None:
        """Tell people, and commands in other shells, where everything is."""
        note.write()
        # The first thing that a stop does: nobody is to begin with what is about to end.
        stack.callback(replace(note, state="stopping").write)
        mail = shown(ensemble.mail.directory) if ensemble.mail is not None else ""
        self._screen.say("")
        program = (
            "preservarium" if shutil.which("preservarium") else shown(Path(sys.executable).with_name("preservarium"))
        )
        for line in address_lines(note, shown(self._options.data_dir), mail, program):
            self._screen.say(line)
        self._screen.say("")

    # --- the run ---

    async def _work(self, settings: Settings, window: "Window", workers: "Workers") -> tuple[int, dict[str, Any]]:
        import aiohttp

        from preservarium.operations.accounting_live import counting

        timed = self._options.seconds is not None
        async with (
            aiohttp.ClientSession() as http,
            counting(settings, window) as count,
            _background(workers.watch(), self._stop) as watching,
        ):
            await self._until_ready(workers, http)
            begun = monotonic()

            async def show() -> None:
                self._screen.change(progress_line(monotonic() - begun, await count(), await workers.standing(http)))

            async with self._simulating(settings) as sent:
                while not self._stop.is_set() and (not timed or monotonic() - begun < (self._options.seconds or 0)):
                    await show()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._stop.wait(), LINE_S)
            run_s = monotonic() - begun
            drained, lag = True, 0
            if timed and not self._stop.is_set():
                drained, lag = await self._drain(settings, workers, http, run_s, show)
            if not self._stop.is_set():
                await show()
            self._screen.close()
            if not watching.cancelled() and watching.done() and (error := watching.exception()) is not None:
                raise error
            standing = await workers.standing(http) if not self._stop.is_set() else None
        facts: dict[str, Any] = {
            "seconds": round(run_s, 1),
            "messages_sent": sent(),
            "worker_restarts": workers.restarts,
            "worker_rss_bytes": standing.rss_bytes if standing else None,
            "drained": drained,
            "lag": lag,
        }
        if not timed:
            return 0, facts
        try:
            account = await self._unless_stopped(self._account(settings, window))
        except Stopped:
            self._screen.say("ended before its time: it is not accounted for")
            return EXIT_SIGNAL + self._signal, facts
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
        if not self._options.simulator or not self._played or self._stop.is_set():
            yield lambda: 0
            return
        from preservarium.clock import SystemClock
        from preservarium.connectors import simulator
        from preservarium.connectors.base import Limits, RawProducer
        from preservarium.settings import LiveSettings
        from preservarium.streaming.publish import Publisher

        assert self._catalogue is not None, "the schema comes first"
        players = simulator.players(self._catalogue, self._played, SEED)
        playing = simulator.Simulator(players, self._options.rate)
        web = f"http://127.0.0.1:{self._options.web_port}"
        obedient = simulator.obedient(self._catalogue, players, web, settings.http.token.get_secret_value())
        self._screen.say(
            f"{len(players)} devices send {self._options.rate:g} messages a second. Ctrl-C stops everything.\n"
        )
        publisher = Publisher(LiveSettings(settings))
        await publisher.start()
        clock, stop = SystemClock(), asyncio.Event()
        run = playing.run(RawProducer(publisher, simulator.CONNECTOR), clock, Limits.of(settings), stop=stop)
        try:
            async with contextlib.AsyncExitStack() as stack:
                work = [run, *(device.run(clock, stop) for device in (obedient if settings.http.enabled else ()))]
                tasks = [await stack.enter_async_context(_background(each, self._stop)) for each in work]
                yield lambda: playing.totals.messages
                # A batch under way is acknowledged before the publisher goes: only so is it counted.
                stop.set()
                await asyncio.wait(tasks)
        finally:
            await publisher.stop()
        for task in tasks:
            task.result()

    async def _drain(
        self,
        settings: Settings,
        workers: "Workers",
        http: Any,
        run_s: float,
        show: Callable[[], Coroutine[Any, Any, None]],
    ) -> tuple[bool, int]:
        """Wait until every group has committed everything; whether it came to that, and the lag."""
        from preservarium.operations.accounting_facts import group_lag

        begun = monotonic()
        lag = -1
        zeros = 0
        while monotonic() - begun < DRAIN_S + run_s and not self._stop.is_set():
            statuses = await workers.statuses(http)
            groups = {(stage["group"], stage["topic"]) for status in statuses.values() for stage in status["stages"]}
            lag = sum((await group_lag(settings, groups)).values()) if groups else -1
            zeros = zeros + 1 if lag == 0 else 0
            # Twice, because a stage that was read early may have been given work by one that was read late.
            if zeros == 2:
                return True, 0
            await show()
            await asyncio.sleep(0.5)
        return False, lag

    async def _account(self, settings: Settings, window: "Window") -> "Account":
        from preservarium.operations import accounting, accounting_facts
        from preservarium.operations.accounting_decode import registry_decode

        decode = await registry_decode(settings)
        ledger = accounting.Ledger(window, decode, scripts=decode, store_failed=settings.quality.store_failed)
        try:
            await accounting_facts.read_topics(
                ledger,
                window,
                settings.kafka,
                payload_bytes_max=settings.normalize.payload_bytes_max,
            )
        finally:
            await decode.close()
        await accounting_facts.read_postgres(ledger, settings.postgres.session_dsn)
        if settings.clickhouse.enabled:
            await accounting_facts.read_clickhouse(ledger, settings)
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
@click.option(
    "--registry",
    "registries",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Apply this registry file, too; may be repeated.",
)
@click.option("--no-sample", is_flag=True, help="Leave out the sample fleet and its registry: begin with your own.")
@click.option("--no-simulator", is_flag=True, help="Send nothing: wait for your own readings.")
@click.option("--mqtt", is_flag=True, help="Start Mosquitto, too, and take what devices publish there.")
@click.option(
    "--restore",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Begin with a back-up (`preservarium backup create`), in an empty data directory.",
)
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
    registries: tuple[Path, ...],
    no_sample: bool,
    no_simulator: bool,
    mqtt: bool,
    restore: Path | None,
    fresh: bool,
    as_json: bool,
) -> None:
    """Run everything on this machine: services, schema, sample registry, workers, a simulated fleet.

    Ctrl-C stops all of it; the next start goes on where this one ended. A Kafka, PostgreSQL, ClickHouse, MQTT or mail
    server that the settings name is used instead of an embedded one. Commands in other shells find what runs here by
    the data directory.
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
        not no_sample,
        registries,
        mqtt,
        as_json,
        fresh,
        restore.absolute() if restore else None,
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
