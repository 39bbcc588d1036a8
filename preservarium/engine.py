"""The one Faust app: stages, state tables, watchdog, settings.

`faust -A preservarium worker` runs it. Agents and tables import `app` from here; nothing here imports them
(preservarium/__init__.py does, so that the direction of imports stays agents → tables → engine).
"""

import asyncio
import fcntl
import gc
import inspect
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from time import monotonic
from typing import IO, Any, Final, NoReturn, Protocol, TypeVar

import faust
import structlog
import uvloop
from aiokafka.errors import IllegalStateError, KafkaError
from faust.auth import Credentials, SASLCredentials, SSLCredentials
from faust.exceptions import AlreadyConfiguredWarning
from faust.types import TP
from mode import Service
from mode.supervisors import CrashingSupervisor
from yarl import URL

import preservarium.transport  # noqa: F401  # makes the batch:// scheme known to Faust
from preservarium import kafka_clients, logs, metrics
from preservarium.clock import Clock, SystemClock
from preservarium.domain.errors import Fatal, Retry
from preservarium.feeds import GroupFeed, Memory, OnAssigned
from preservarium.publish import BATCH_BYTES_MAX, SESSION_SHARE, Publisher
from preservarium.runner import Runner
from preservarium.settings import Kafka, LiveSettings, SettingsError, load
from preservarium.stage import Batch, Effects, GroupHandler, Handler, TickHandler
from preservarium.state import SharedMemory, StateTable
from preservarium.stores.breaker import breakers
from preservarium.topics import Topic
from preservarium.transport import TICK_S, Stage, Stages

log = structlog.get_logger(__name__)

H = TypeVar("H", bound=Callable[..., Awaitable[Effects]])

#: Exit code of a worker whose group membership cannot be healed; whoever supervises it starts it again.
EXIT_UNHEALTHY: Final = 70
#: An orderly stop takes a second or two, with flights under way up to some 10 s. Supervisors kill after 30 s, without a word why.
STOP_MAX_S: Final = 25.0
#: Tasks named where a stop hangs.
STACKS_MAX: Final = 200
#: The watchdog looks this often.
WATCH_S: Final = 5.0
#: Metrics of lanes and lag are refreshed this often; a scrape is no more frequent.
GAUGES_S: Final = 1.0
#: The ends of partitions are asked for this often; a fetch tells of them at once where there is one.
ENDS_S: Final = 2.0
#: A handler that works on one batch for so long, without waiting for a dependency, is stuck: no batch takes minutes.
STUCK_S: Final = 120.0
#: A fetch or poll loop that has not turned for so long is stuck; a turn takes a second, a rebalance up to a minute.
LOOP_STUCK_S: Final = 90.0
#: Requests to the broker; at least the session timeout, or Faust refuses to start.
REQUEST_TIMEOUT_S: Final = 60.0
#: A rebalance gives workers this long to finish what they have under way.
REBALANCE_TIMEOUT_S: Final = 60.0
#: Worker data directories on one machine; more workers than this on one is a mistake.
SLOTS_MAX: Final = 64


class Closable(Protocol):
    """Something that is closed when the worker stops."""

    async def close(self) -> None:
        """Give everything back."""
        ...


class _Topic(faust.Topic):
    """Faust's topic, which can also be made where the broker has no CreateTopics (librdkafka's in-memory broker)."""

    async def declare(self) -> None:
        try:
            await super().declare()
        except Exception as e:
            # Faust wraps whatever the broker said; what counts is whether the topic can be had another way.
            log.warning(
                "topic_not_created", topic=self.get_topic_name(), error=repr(e), action="asking for its metadata"
            )
            await self.app.publisher.ensure_topic(self.get_topic_name())


class _GroupChannel(faust.Channel):
    """The channel of a group stage's agent: nothing is sent to it, but `faust agents` lists it with its topic."""

    def __init__(self, app: Any, *, topic: str = "", **kwargs: Any) -> None:
        super().__init__(app, **kwargs)
        self.topic = topic

    def get_topic_name(self) -> str:
        return self.topic

    def _clone_args(self) -> Mapping[str, Any]:
        return {**super()._clone_args(), "topic": self.topic}


class _Worker(faust.Worker):
    """Faust's worker with our logging: no spinner, no banner of levels, standard output left alone."""

    def __init__(self, app: Any, *services: Any, **kwargs: Any) -> None:
        # The command line always asks for redirection, whatever the setting says; it would swallow our own log.
        kwargs["redirect_stdouts"] = False
        super().__init__(app, *services, **kwargs)
        self.spinner = None

    def _setup_logging(self) -> None:
        settings = self.app.live()
        given = str(self.loglevel or "").upper()
        # WARN is the command line's default, so it says nothing about what the operator wants.
        level = given if given in ("DEBUG", "INFO", "ERROR", "CRITICAL") else settings.log_level
        logs.configure(level, settings.log_format)


def calm_garbage_collection() -> None:
    """Make Python's cycle collector rare.

    Records are dictionaries without cycles, freed by their reference counts, but each thousand new ones starts a
    collection, and with a backlog in memory the collector walks hundreds of thousands for nothing: a fifth of the CPU in
    bench/e2e.py. What stands at the start (modules, tables) is never walked again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


class App(faust.App):
    """The app. Declares stages and tables; owns the publisher, the settings and the clock."""

    #: What Faust's base class says of starting and stopping goes with the rest of Faust's log.
    logger = logging.getLogger("faust.app")

    def __init__(self, live: LiveSettings, *, clock: Clock | None = None) -> None:
        settings = live()
        kafka = settings.kafka
        self.live = live
        self.clock: Clock = clock or SystemClock()
        self.stages = Stages()
        self.group_feeds: dict[str, GroupFeed] = {}
        self.state_tables: dict[str, StateTable] = {}
        self.publisher = Publisher(live)
        #: (table, partition) -> whose turn it is among the stages that share the table
        self._turns: dict[tuple[str, int], asyncio.Lock] = {}
        self._resources: list[Closable] = []
        self._stop_timer: threading.Timer | None = None
        self._is_process = False
        self._slot: IO[bytes] | None = None
        self._gauges: set[tuple[str, ...]] = set()
        #: (feed, partition) -> end offset as Kafka said last; fetches tell of it only while a partition is fetched
        self._ends: dict[tuple[str, int], int] = {}
        self._started_s = self._beat_s = monotonic()
        self._suspect_until_s = 0.0
        #: Faust's command line gives --datadir in the environment, and it wins.
        self._datadir_given = bool(os.environ.get("F_DATADIR"))
        bind = settings.web.host
        super().__init__(
            id=kafka.group,
            broker=[
                URL(f"batch://{server.strip()}") for server in kafka.bootstrap_servers.split(",") if server.strip()
            ],
            broker_credentials=_credentials(kafka),
            autodiscover=False,
            origin="preservarium",
            version=1,  # never changed: it would give every changelog another name
            datadir=os.environ.get("F_DATADIR") or settings.data_dir,
            store="rocksdb://",
            Topic=_Topic,
            Worker=_Worker,
            agent_supervisor=CrashingSupervisor,
            broker_commit_interval=kafka.commit_interval_s,
            broker_session_timeout=kafka.session_timeout_s,
            broker_heartbeat_interval=kafka.session_timeout_s / 6,
            broker_rebalance_timeout=REBALANCE_TIMEOUT_S,
            broker_request_timeout=max(REQUEST_TIMEOUT_S, kafka.session_timeout_s),
            broker_max_poll_records=settings.agents.records_max,
            consumer_max_fetch_size=kafka.fetch_bytes_max,
            consumer_auto_offset_reset="earliest",
            stream_wait_empty=True,
            producer_acks=-1,
            producer_linger=kafka.linger_ms / 1000,
            producer_max_batch_size=BATCH_BYTES_MAX,
            producer_max_request_size=kafka.record_bytes_max,
            producer_request_timeout=REQUEST_TIMEOUT_S,
            producer_compression_type=None if kafka.compression == "none" else kafka.compression,
            topic_partitions=kafka.partitions,
            topic_replication_factor=kafka.replication,
            topic_allow_declare=True,  # changelogs only: `preservarium migrate` makes the others
            topic_disable_leader=True,
            table_standby_replicas=1,
            web_bind=bind,
            web_host=socket.gethostname() if bind in ("", "0.0.0.0", "::") else bind,
            web_port=settings.web.port,
            web_tables_enabled=False,
        )

    # --- declaring ----------------------------------------------------------------------------------------------

    def stage(
        self,
        topic: Topic,
        *,
        name: str,
        shares: str | None = None,
        on_tick: TickHandler | None = None,
        tick_s: Callable[[], float] = lambda: TICK_S,
        after: Sequence[Topic] = (),
    ) -> Callable[[Handler], Handler]:
        """Declare a stage on the shared feed: it works on one partition at a time and may read and put state.

        Its handler raises Retry, Fatal or, for a defect, anything else (preservarium/runner.py has the table).
        Partitions run concurrently, each in order. Stages that write the same table read different topics and name
        the table in `shares`: of one partition, one of them works at a time, from reading the state to writing it.

        `on_tick` is called every `tick_s` for each assigned partition, between its batches, whether records come or
        not; its effects are carried out like a batch's. A tick that fails is not repeated: the next one comes.
        `after` are the topics whose stages write, one after the other, what comes here: while records wait there, a tick
        says `behind`.
        """

        def declare(handler: Handler) -> Handler:
            async def one(batches: Any) -> Effects:
                return await handler(batches[0])

            def turn(partition: int) -> AbstractAsyncContextManager[Any]:
                if shares is None:
                    return nullcontext()
                return self._turns.setdefault((shares, partition), asyncio.Lock())

            runner = self._runner(name, one, turn=turn)
            full = topic.full(self.live().kafka.topic_prefix)
            stage = Stage(
                name,
                topic.name,
                runner,
                self.live,
                topic_full=full,
                compacted=topic.compacted,
                on_tick=on_tick,
                tick_s=tick_s,
                after=[one.full(self.live().kafka.topic_prefix) for one in after],
            )
            stage.on_abandon = self.publisher.drop_orphans
            self.stages.add(full, stage)
            channel = self.topic(
                full,
                key_type=bytes,
                value_type=bytes,
                key_serializer="raw",
                value_serializer="raw",
                partitions=self.live().kafka.partitions,
            )

            async def run(stream: Any) -> None:
                await stage.run(stream)

            run.__doc__ = _first_line(handler)
            self.agent(channel, name=name)(run)
            return handler

        return declare

    def group_stage(
        self,
        topic: Topic,
        *,
        name: str,
        group: str,
        records_max: Callable[[], int] = lambda: 5_000,
        linger_s: Callable[[], float] = lambda: 0.1,
        flights: int = 1,
        on_assigned: OnAssigned | None = None,
        kafka_topic: str | None = None,
        planned: bool = False,
        memory: Memory | None = None,
    ) -> Callable[[GroupHandler], GroupHandler]:
        """Declare a stage with a consumer group of its own, `<kafka.group>-<group>`: it works on several partitions.

        Args:
            topic: what it reads.
            name: of the stage.
            group: suffix of the consumer group; two stages must not share one.
            records_max: most records handed over at once.
            linger_s: a smaller batch waits this long for company.
            flights: batches under way at once; a partition is in one of them.
            on_assigned: says, for partitions just assigned and before each retry, the offset to start from. What it
                says wins over Kafka's commit.
            kafka_topic: name in the cluster where it is not the declared one (another system's topic).
            planned: each batch's bounds are committed before the handler sees it, and it comes again with the same
                bounds after a crash (preservarium/feeds.py); not together with `on_assigned`.
            memory: of a planned stage, kept beside the offset.
        """

        def declare(handler: GroupHandler) -> GroupHandler:
            settings = self.live().kafka

            async def with_plan(batches: Sequence[Batch]) -> Effects:
                await self.group_feeds[name].record_plan(batches)
                return await handler(batches)

            feed = GroupFeed(
                name,
                topic.name,
                kafka_topic=kafka_topic or topic.full(settings.topic_prefix),
                group=f"{settings.group}-{group}",
                runner=self._runner(name, with_plan if planned else handler, owns_tables=False),
                live=self.live,
                records_max=records_max,
                linger_s=linger_s,
                flights=flights,
                on_assigned=on_assigned,
                planned=planned,
                memory=memory,
            )
            self.group_feeds[name] = feed

            async def run(stream: Any) -> None:
                await feed.run()

            run.__doc__ = _first_line(handler)
            self.agent(_GroupChannel(self, topic=feed.kafka_topic), name=name)(run)
            return handler

        return declare

    def _runner(
        self,
        name: str,
        handler: GroupHandler,
        *,
        owns_tables: bool = True,
        turn: Callable[[int], AbstractAsyncContextManager[Any]] = lambda _: nullcontext(),
    ) -> Runner:
        if name in self.agents:
            message = f"stage {name} is declared twice"
            raise ValueError(message)

        async def put_state(table: str, partition: int, items: Mapping[bytes, bytes | None]) -> None:
            if not owns_tables:
                message = f"stage {name} has a consumer group of its own and can write no table ({table})"
                raise Fatal(message)
            self._check_thawed()
            await self.state_tables[table].put_many(partition, items)

        return Runner(
            name, handler, publisher=self.publisher, put_state=put_state, live=self.live, clock=self.clock, turn=turn
        )

    def state_table(self, name: str, *, help: str = "") -> StateTable:
        """Declare a state table: bytes by bytes, co-partitioned with the topics, restored from its changelog."""
        table = StateTable(
            self.Table(
                name,
                key_type=bytes,
                value_type=bytes,
                partitions=self.live().kafka.partitions,
                help=help,
            ),
            self.publisher,
        )
        self.state_tables[name] = table
        return table

    def resource(self, closable: Any) -> Any:
        """Register something with `async close()`; closed, last first, when the worker has stopped its stages."""
        self._resources.append(closable)
        return closable

    # --- starting and stopping ----------------------------------------------------------------------------------

    def worker_init(self) -> None:
        """Use uvloop, also in the consumer's thread: called by Faust's command line before it makes a loop."""
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        super().worker_init()
        self._is_process = True

    def on_init_dependencies(self) -> Any:
        """The publisher before everything else, so that it also stops after everything else."""
        if not len(self.stages) and not self.tables and self.boot_strategy.enable_kafka_consumer is None:
            # Nothing to fetch with the shared group, and Faust cannot subscribe to nothing.
            self.boot_strategy.enable_kafka_consumer = False
        return [self.publisher, *super().on_init_dependencies()]

    async def on_first_start(self) -> None:
        """Take a data directory, and set a limit to the tables' memory, before they open theirs."""
        self._take_slot()
        self._share_memory()
        await super().on_first_start()

    def _share_memory(self) -> None:
        memory = SharedMemory()
        for table in self.state_tables.values():
            table.share(memory)

    def _take_slot(self) -> None:
        """Workers of one machine share `data_dir`: each takes a directory in it that no other has.

        Which one a worker gets does not matter: a local table that is behind, or of other partitions, is brought up
        from the changelog.
        """
        if self._datadir_given:
            return
        for number in range(SLOTS_MAX):
            slot = Path(self.live().data_dir) / f"worker-{number}"
            slot.mkdir(parents=True, exist_ok=True)
            lock = (slot / "lock").open("wb")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                continue
            self._slot = lock
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AlreadyConfiguredWarning)  # read so far for the banner only
                self.conf.datadir = slot
            return
        message = f"all {SLOTS_MAX} worker directories in {self.live().data_dir} are taken"
        raise Fatal(message)

    async def on_start(self) -> None:
        """Listen for SIGHUP."""
        await super().on_start()
        self._started_s = self._beat_s = monotonic()
        if danger := kafka_clients.insecurity(self.live().kafka):
            log.warning("kafka_connection_unsafe", reason=danger)
        if self.live().ingest_open:
            log.warning("ingest_open", action="anybody who reaches the web port may send readings: set http.token")
        try:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.reload_settings)
        except (NotImplementedError, RuntimeError, ValueError):
            log.info("no_reload_signal", reason="not in the main thread")

    async def on_started(self) -> None:
        """Say what runs: tables are restored by now."""
        await super().on_started()
        calm_garbage_collection()
        if not self.should_stop:
            log.info(
                "worker_ready",
                stages=sorted(self._runners()),
                partitions=len(self._assignment or ()),
                data_dir=str(self.conf.datadir),
                took_s=round(monotonic() - self._started_s, 1),
            )

    async def on_stop(self) -> None:
        """Stop as at a rebalance: finish what is under way, commit."""
        log.info("worker_stops")
        self._stop_timer = threading.Timer(STOP_MAX_S, self._stop_hangs, [asyncio.get_running_loop()])
        self._stop_timer.daemon = True
        self._stop_timer.start()
        await super().on_stop()

    async def on_shutdown(self) -> None:
        """Close resources: stages have stopped by now."""
        await super().on_shutdown()
        while self._resources:
            resource = self._resources.pop()
            try:
                await resource.close()
            except Exception:
                log.exception("close_failed", resource=type(resource).__name__)
        if self._slot is not None:
            self._slot.close()
            self._slot = None
        if self._stop_timer is not None and not self._is_process:
            self._stop_timer.cancel()

    def _stop_hangs(self, loop: asyncio.AbstractEventLoop) -> None:
        """From a thread of its own: the event loop may be what hangs."""
        # Kafka's consumer has a thread and a loop of its own.
        consumer_loop = getattr(getattr(self._consumer, "_thread", None), "thread_loop", None)
        tasks = sorted(
            f"{task.get_name()}: {_place(task)}"
            for each in (loop, consumer_loop)
            if each is not None
            for task in asyncio.all_tasks(each)
        )
        log.error("worker_stop_hangs", tasks=tasks[:STACKS_MAX])
        self._give_up(f"it did not stop within {STOP_MAX_S:g} s")

    def reload_settings(self) -> None:
        """Read the settings again (SIGHUP) and say what changed; a wrong value changes nothing."""
        try:
            changes = self.live.reload()
        except SettingsError as e:
            log.error("settings_not_reloaded", error=str(e))
            return
        for change in changes:
            write = log.info if change.applied else log.warning
            write(
                "setting_changed" if change.applied else "setting_needs_restart",
                variable=change.variable,
                old=change.old,
                new=change.new,
            )
        logs.set_level(self.live().log_level)
        log.info("settings_reloaded", changes=len(changes))

    def guards(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What keeps a fault from spreading: `breakers` by dependency and `fuses` by stage, each as its `report` says."""
        return {
            "breakers": {breaker.name: breaker.report() for breaker in breakers()},
            "fuses": {name: runner.fuse.report() for name, runner in self._runners().items()},
        }

    def reset_fuse(self, stage: str) -> bool:
        """Close a stage's fuse by hand; whether there is such a stage."""
        runner = self._runners().get(stage)
        if runner is None:
            return False
        log.warning("fuse_reset", stage=stage, was=runner.fuse.reason)
        runner.fuse.reset()
        return True

    def _runners(self) -> dict[str, Runner]:
        return {s.name: s.runner for s in self.stages} | {name: f.runner for name, f in self.group_feeds.items()}

    # --- watching -----------------------------------------------------------------------------------------------

    @Service.task
    async def _watch_group(self) -> None:
        """Heal or end a worker whose membership in the shared group died silently.

        aiokafka parks fatal group errors until someone calls `getmany`; Faust reads its fetcher directly and never does.
        """
        while not self.should_stop:
            await self.sleep(WATCH_S)
            # Hook: Faust's consumer thread, aiokafka's coordinator. tests/contract holds them.
            thread = getattr(self._consumer, "_thread", None)
            coordinator = getattr(getattr(thread, "_consumer", None), "_coordinator", None)
            task = getattr(coordinator, "_coordination_task", None)
            if coordinator is None or thread is None or task is None or self.should_stop:
                continue
            if coordinator._pending_exception is not None or task.done():
                try:
                    await thread.call_thread(_check_errors, coordinator)
                except Exception as e:
                    metrics.WATCHDOG.labels("healed").inc()
                    log.error("group_error", error=repr(e), action="un-parked: the worker joins again")
                if task.done() and not self.should_stop:
                    self._give_up("the group coordination task has ended")

    def _give_up(self, reason: str) -> NoReturn:
        metrics.WATCHDOG.labels("exit").inc()
        log.critical("worker_gives_up", reason=reason, exit_code=EXIT_UNHEALTHY)
        # Not sys.exit: an orderly stop would wait for what is broken. Un-acknowledged work is read again.
        os._exit(EXIT_UNHEALTHY)

    @Service.task
    async def _beat(self) -> None:
        """Notice that the process was frozen (stopped, swapped out, a paused virtual machine)."""
        while not self.should_stop:
            self._beat_s = monotonic()
            await self.sleep(GAUGES_S)
            frozen_s = monotonic() - self._beat_s
            if frozen_s > self._frozen_max_s:
                self._suspect_until_s = monotonic() + self.conf.broker_heartbeat_interval + GAUGES_S
                log.warning("worker_was_frozen", seconds=round(frozen_s, 1), action="membership is asked for first")

    @property
    def _frozen_max_s(self) -> float:
        return self.live().kafka.session_timeout_s * SESSION_SHARE

    def _check_thawed(self) -> None:
        """Write no state when another worker may own the partition by now: a heartbeat will tell.

        Raises:
            Retry: the process was frozen for so long that Kafka may have taken it for dead.
        """
        now_s = monotonic()
        if now_s - self._beat_s > self._frozen_max_s or now_s < self._suspect_until_s:
            message = "the worker was frozen: it is not certain that the partition is still its own"
            raise Retry(message)

    @Service.task
    async def _refresh_ends(self) -> None:
        """Ask for the partitions' ends: of a partition that is paused or full, no fetch says how it grows."""
        while not self.should_stop:
            await self.sleep(ENDS_S)
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    self._ends = await self._ask_ends()
            except (KafkaError, TimeoutError, IllegalStateError) as e:
                log.warning("ends_unknown", error=repr(e))

    async def _ask_ends(self) -> dict[tuple[str, int], int]:
        ends: dict[tuple[str, int], int] = {}
        consumer = self._consumer
        if consumer is not None and getattr(consumer._thread, "_consumer", None) is not None and not self.rebalancing:
            tps = [tp for tp in consumer.assignment() if self.stages.of(tp.topic)]
            found = await consumer.highwaters(*tps) if tps else {}
            for stage in self.stages:
                full = stage.topic_full
                ends.update({(stage.name, tp.partition): end for tp, end in found.items() if tp.topic == full})
        for feed in self.group_feeds.values():
            ends.update({(feed.name, partition): end for partition, end in (await feed.ends()).items()})
        return ends

    @Service.task
    async def _refresh_gauges(self) -> None:
        while not self.should_stop:
            await self.sleep(GAUGES_S)
            try:
                self._set_gauges()
            except Exception:
                log.exception("gauges_failed")

    def _set_gauges(self) -> None:
        seen: set[tuple[str, ...]] = set()
        for name, stage in self.stage_reports().items():
            metrics.PENDING_RECORDS.labels(name).set(stage["pending"])
            metrics.PARTITIONS_PAUSED.labels(name).set(len(stage["paused"]))
            metrics.COMMIT_AGE_SECONDS.labels(name).set(stage["commit_age_s"])
            for partition, lag in stage["lag_by_partition"].items():
                labels: tuple[str, ...] = (name, stage["topic"], str(partition))
                seen.add(labels)
                metrics.LAG_RECORDS.labels(*labels).set(lag)
        for labels in self._gauges - seen:
            metrics.LAG_RECORDS.remove(*labels)
        self._gauges = seen

    def stage_reports(self) -> dict[str, dict[str, Any]]:
        """How every stage stands: partitions, pending and lagging records, age of the last commit, what is paused."""
        now_s = monotonic()
        clock_s = self.clock.monotonic_s()
        reports: dict[str, dict[str, Any]] = {}
        consumer = self._consumer
        connected = consumer is not None and getattr(consumer._thread, "_consumer", None) is not None
        for stage in self.stages:
            highwaters: dict[int, int] = {}
            committed: dict[int, int] = {}
            if consumer is not None and connected:
                mine = [tp for tp in consumer.assignment() if tp.topic == stage.topic_full]
                for tp in mine:
                    end = self._ends.get((stage.name, tp.partition), 0)
                    highwaters[tp.partition] = max(consumer.highwater(tp) or 0, end)
                    committed[tp.partition] = consumer._committed_offset.get(tp) or 0
            reports[stage.name] = _report(
                "shared", stage.topic, self.conf.id, stage.runner, stage.lanes, highwaters, committed, now_s, clock_s
            )
        for feed in self.group_feeds.values():
            highwaters = {
                p: max(lane.highwater or 0, self._ends.get((feed.name, p), 0)) for p, lane in feed.lanes.items()
            }
            report = _report("group", feed.topic, feed.group, feed.runner, feed.lanes, highwaters, {}, now_s, clock_s)
            report["trouble"] = feed.trouble
            reports[feed.name] = report
        return reports

    def health_report(self) -> dict[str, Any]:
        """Everything that a judgement of this worker's health needs.

        `ok` and `problems` ask only for what a restart could mend; a dependency that is down pauses partitions, which
        `stages` and `breakers` show, and is no fault of the worker.
        """
        now_s = monotonic()
        stages = self.stage_reports()
        problems: list[str] = []
        for name, stage in stages.items():
            if stage["fuse"]["blown"]:
                problems.append(f"{name}: fuse blown: {stage['fuse']['reason']}")
            problems += [
                f"{name}: partition {p} works on one batch for {busy_s:.0f} s"
                for p, busy_s in stage["busy_s"].items()
                if busy_s > STUCK_S and p not in stage["paused"]
            ]
        consumer = self._consumer
        assignment: dict[str, list[int]] = {}
        if consumer is not None and getattr(consumer._thread, "_consumer", None) is not None:
            for tp in sorted(consumer.assignment()):
                assignment.setdefault(tp.topic, []).append(tp.partition)
            if consumer.flow_active and assignment and now_s - consumer.fetched_s > LOOP_STUCK_S:
                problems.append(f"the fetch loop stands still for {now_s - consumer.fetched_s:.0f} s")
        for name, feed in self.group_feeds.items():
            if feed.polled_s is not None and now_s - feed.polled_s > LOOP_STUCK_S:
                problems.append(f"{name}: the poll loop stands still for {now_s - feed.polled_s:.0f} s")
        return {
            "ok": not problems,
            "problems": problems,
            "uptime_s": now_s - self._started_s,
            "rebalancing": bool(self.rebalancing),
            "recovering": bool(getattr(self, "in_recovery", False)),
            "assignment": assignment,
            "stages": stages,
            "breakers": {breaker.name: breaker.state.name.lower() for breaker in breakers()},
        }


def _report(
    feed: str,
    topic: str,
    group: str,
    runner: Runner,
    lanes: Mapping[int, Any],
    highwaters: Mapping[int, int],
    committed: Mapping[int, int],
    now_s: float,
    clock_s: float,
) -> dict[str, Any]:
    lag: dict[int, int] = {}
    for partition in set(highwaters) | set(lanes):
        lane = lanes.get(partition)
        # Where the stage has not finished anything since the assignment, its commit says where it stands.
        position = None if lane is None else lane.position if lane.position is not None else lane.committed
        if position is None:
            position = committed.get(partition, 0)
        if partition in highwaters:
            lag[partition] = max(0, highwaters[partition] - position)
    busy = {p: clock_s - lane.progress.since_s for p, lane in lanes.items() if lane.progress.since_s is not None}
    return {
        "feed": feed,
        "topic": topic,
        "group": group,
        "partitions": sorted(set(highwaters) | set(lanes)),
        "pending": sum(lane.pending_records for lane in lanes.values()),
        "lag": sum(lag.values()),
        "lag_by_partition": lag,
        "commit_age_s": max((now_s - lane.committed_s for lane in lanes.values() if lane.busy), default=0.0),
        "busy_s": busy,
        "paused": {p: lane.progress.reason for p, lane in lanes.items() if lane.progress.paused},
        "fuse": runner.fuse.report(),
    }


def _first_line(handler: Any) -> str:
    """What `faust agents` shows of a stage."""
    return (inspect.getdoc(handler) or "").partition("\n")[0]


def _credentials(kafka: Kafka) -> Credentials | None:
    """The connection of our own clients in Faust's words: its consumer and its producer make their arguments of it."""
    arguments = kafka_clients.connection(kafka)
    context = arguments.get("ssl_context")
    if "sasl_mechanism" in arguments:
        return SASLCredentials(
            mechanism=arguments["sasl_mechanism"],
            username=arguments["sasl_plain_username"],
            password=arguments["sasl_plain_password"],
            ssl_context=context,
        )
    return None if context is None else SSLCredentials(context)


def _place(task: asyncio.Task[Any]) -> str:
    """Where a task waits: the coroutines that await one another, the outermost first, each with whose it is."""
    places: list[str] = []
    coroutine: Any = task.get_coro()
    while inspect.iscoroutine(coroutine):
        frame = coroutine.cr_frame
        owner = frame.f_locals.get("self") if frame else None
        of = f"{type(owner).__name__}." if owner is not None else ""
        places.append(f"{of}{coroutine.__name__}:{frame.f_lineno if frame else '?'}")
        coroutine = coroutine.cr_await
    return " > ".join(places) or str(coroutine)


async def _check_errors(coordinator: Any) -> None:
    coordinator.check_errors()


def _app() -> App:
    try:
        return App(LiveSettings(load()))
    except SettingsError as e:
        print(f"preservarium: {e}", file=sys.stderr)  # one line, before there is a log
        raise SystemExit(2) from None


#: The app of this process.
app = _app()

__all__ = ["TP", "App", "Batch", "app"]
