"""The one Faust app: stages, state tables, watchdog, settings.

`faust -A preservarium worker` runs it. Agents and tables import `app` from here; nothing here imports them
(preservarium/__init__.py does, so that the direction of imports stays agents → tables → app).

It is one file because it is one class, Faust's App: what it declares, starts, stops and watches shares its fields.
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
from functools import partial
from pathlib import Path
from time import monotonic
from typing import IO, Any, Final, NoReturn, Protocol, TypeVar
from uuid import UUID, uuid4

import faust
import structlog
import uvloop
from aiokafka.errors import IllegalStateError, KafkaError
from faust.exceptions import AlreadyConfiguredWarning
from faust.types import TP
from mode import Service
from mode.supervisors import CrashingSupervisor
from yarl import URL

from preservarium import logs, memory, metrics, topics
from preservarium.breaker import breakers
from preservarium.clock import Clock, ClockCheck, SystemClock
from preservarium.errors import Fatal, Retry
from preservarium.settings import LiveSettings, SettingsError, load
from preservarium.streaming import faust_parts, kafka_clients, reports, topics_admin
from preservarium.streaming.feeds import GroupFeed, Memory, OnAssigned
from preservarium.streaming.following import read_span
from preservarium.streaming.kafka_watch import KafkaWatch
from preservarium.streaming.lanes import TICK_S, Stage, Stages
from preservarium.streaming.local_tables import Table
from preservarium.streaming.probing import Prober
from preservarium.streaming.publish import BATCH_BYTES_MAX, SESSION_SHARE, Publisher
from preservarium.streaming.restoring import FencedTables
from preservarium.streaming.runner import PATIENCE_S, Runner
from preservarium.streaming.stage import (
    PLANNED,
    STORED,
    Batch,
    Declaration,
    Effects,
    GroupHandler,
    Handler,
    Send,
    TickHandler,
)
from preservarium.streaming.state import SharedMemory, StateTable
from preservarium.streaming.transport import METADATA_AGE_S  # and makes the batch:// scheme known to Faust
from preservarium.topics import TOPICS, Topic
from preservarium.waiting import in_line

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
#: Freed memory is given back to the system this often.
MEMORY_S: Final = 10.0
#: A start waits so long for Kafka before it goes on without having looked at the changelogs.
CHANGELOGS_WAIT_S: Final = 30.0
#: Changelogs are looked at this often; well within their `min.compaction.lag.ms` (topics.py).
CHANGELOGS_S: Final = 60.0
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


class DeclaredPublisher:
    """The publisher of one stage: it sends to the topics that the stage has declared."""

    def __init__(self, declared: Declaration, publisher: Publisher) -> None:
        self._declared = declared
        self._publisher = publisher

    async def publish(self, sends: Sequence[Send]) -> dict[str, int]:
        """Return when every record is acknowledged; the records by topic name.

        Raises:
            Fatal: a record is for a topic that the stage does not declare; then none is sent.
        """
        self._declared.check_sends(sends)
        return await self._publisher.publish(sends)


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
        self.clock_check = ClockCheck(self.clock, lambda: live().agents.clock_skew_max_s)
        self.stages = Stages()
        #: stage -> what it declared, in the order of declaration
        self.declared: dict[str, Declaration] = {}
        self.group_feeds: dict[str, GroupFeed] = {}
        self.state_tables: dict[str, StateTable] = {}
        self.publisher = Publisher(live)
        self.kafka_watch = KafkaWatch(live, self._assigned_partitions, self._counted_topics, self._topic_found)
        self.prober = Prober()
        #: (table, partition) -> whose turn it is among the stages that share the table
        self._turns: dict[tuple[str, int], asyncio.Lock] = {}
        self._resources: list[Closable] = []
        self._stop_timer: threading.Timer | None = None
        self._is_process = False
        self._slot: IO[bytes] | None = None
        self._gauges: set[tuple[str, ...]] = set()
        #: topic of the shared feed -> partitions that it has, where that is not what is declared
        self._misfits: dict[str, int] = {}
        self._started_s = self._beat_s = monotonic()
        self._taking_over = reports.TakingOver()
        self._suspect_until_s = 0.0
        #: Faust's command line gives --datadir in the environment, and it wins.
        self._datadir_given = bool(os.environ.get("F_DATADIR"))
        bind = settings.web.host
        super().__init__(
            id=kafka.group,
            broker=[
                URL(f"batch://{server.strip()}") for server in kafka.bootstrap_servers.split(",") if server.strip()
            ],
            broker_credentials=faust_parts.credentials(kafka),
            autodiscover=False,
            origin="preservarium",
            version=1,  # never changed: it would give every changelog another name
            datadir=os.environ.get("F_DATADIR") or settings.data_dir,
            store="state://",  # local_store.py
            TableManager=FencedTables,
            PartitionAssignor=faust_parts.Assignor,
            consumer_metadata_max_age_ms=round(METADATA_AGE_S * 1000),
            Topic=faust_parts.Topic,
            Table=Table,
            Worker=faust_parts.Worker,
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
        writes: Sequence[Topic] = (),
        state: StateTable | None = None,
        on_tick: TickHandler | None = None,
        tick_s: Callable[[], float] = lambda: TICK_S,
        after: Sequence[Topic] = (),
        patience_s: Callable[[], float] = lambda: PATIENCE_S,
    ) -> Callable[[Handler], Handler]:
        """Declare a stage on the shared feed: it works on one partition at a time and may have state.

        Its handler raises Retry, Fatal or, for a defect, anything else (preservarium/streaming/runner.py has the table).
        Partitions run concurrently, each in order. Stages with the same state read different topics: of one partition,
        one of them works at a time, from reading the state to writing it.

        Args:
            topic: what it reads.
            name: of the stage.
            writes: the topics that its effects may write to, besides iot_errors.
            state: the one table that its effects may put to.
            on_tick: called every `tick_s` for each assigned partition, between its batches, whether records come or not;
                its effects are carried out like a batch's. A tick that fails is not repeated: the next one comes.
            tick_s: seconds between two ticks.
            after: the topics whose stages write, one after the other, what comes here: while records wait there, a tick
                says `behind`.
            patience_s: a handler that gives no sign of life (preservarium.waiting.alive) for longer is stuck, and so is
                the worker.
        """

        def declare(handler: Handler) -> Handler:
            async def one(batches: Any) -> Effects:
                return await handler(batches[0])

            def turn(partition: int) -> AbstractAsyncContextManager[Any]:
                if state is None:
                    return nullcontext()
                return in_line(self._turns.setdefault((state.name, partition), asyncio.Lock()))

            declared = Declaration(name, topic, tuple(writes), state=None if state is None else state.name)
            runner = self._runner(declared, one, patience_s, turn=turn)
            full = topic.full(self.live().kafka.topic_prefix)
            stage = Stage(
                name,
                topic.name,
                runner,
                self.live,
                topic_full=full,
                on_tick=on_tick,
                tick_s=tick_s,
                after=[one.full(self.live().kafka.topic_prefix) for one in after],
            )
            stage.on_abandon = self.publisher.drop_orphans
            stage.on_gap = self.kafka_watch.gap_of(name, topic.name, full)
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
        writes: Sequence[Topic | str] = (),
        records_max: Callable[[], int] = lambda: 5_000,
        linger_s: Callable[[], float] = lambda: 0.1,
        flights: int = 1,
        on_assigned: OnAssigned | None = None,
        kafka_topic: str | None = None,
        planned: bool = False,
        memory: Memory | None = None,
        patience_s: Callable[[], float] = lambda: PATIENCE_S,
    ) -> Callable[[GroupHandler], GroupHandler]:
        """Declare a stage with a consumer group of its own, `<kafka.group>-<group>`: it works on several partitions.

        Args:
            topic: what it reads.
            name: of the stage.
            group: suffix of the consumer group; two stages must not share one.
            writes: the topics that its effects may write to, besides iot_errors; and in words what it writes to outside of
                Kafka, as `PostgreSQL: measurements`.
            records_max: most records handed over at once.
            linger_s: a smaller batch waits this long for company.
            flights: batches under way at once; a partition is in one of them.
            on_assigned: says, for partitions just assigned and before each retry, the offset to start from. What it
                says wins over Kafka's commit.
            kafka_topic: name in the cluster where it is not the declared one (another system's topic).
            planned: each batch's bounds are committed before the handler sees it, and it comes again with the same
                bounds after a crash (preservarium/streaming/feeds.py); not together with `on_assigned`.
            memory: of a planned stage, kept beside the offset.
            patience_s: as of `stage`.
        """

        def declare(handler: GroupHandler) -> GroupHandler:
            settings = self.live().kafka
            remembers = PLANNED if planned else STORED if on_assigned is not None else ""
            declared = Declaration(name, topic, tuple(writes), group=group, remembers=remembers)

            async def with_plan(batches: Sequence[Batch]) -> Effects:
                await self.group_feeds[name].record_plan(batches)
                return await handler(batches)

            feed = GroupFeed(
                name,
                topic.name,
                kafka_topic=kafka_topic or topic.full(settings.topic_prefix),
                group=f"{settings.group}-{group}",
                runner=self._runner(declared, with_plan if planned else handler, patience_s),
                live=self.live,
                records_max=records_max,
                linger_s=linger_s,
                flights=flights,
                on_assigned=on_assigned,
                planned=planned,
                memory=memory,
            )
            feed.on_gap = self.kafka_watch.gap_of(name, topic.name, feed.kafka_topic)
            self.group_feeds[name] = feed

            async def run(stream: Any) -> None:
                await feed.run()

            run.__doc__ = _first_line(handler)
            self.agent(faust_parts.GroupChannel(self, topic=feed.kafka_topic), name=name)(run)
            return handler

        return declare

    def _runner(
        self,
        declared: Declaration,
        handler: GroupHandler,
        patience_s: Callable[[], float],
        *,
        turn: Callable[[int], AbstractAsyncContextManager[Any]] = lambda _: nullcontext(),
    ) -> Runner:
        name = declared.name
        if name in self.agents:
            message = f"stage {name} is declared twice"
            raise ValueError(message)
        self.declared[name] = declared

        async def put_state(table: str, partition: int, items: Mapping[bytes, bytes | None]) -> None:
            declared.check_put(table)
            self._check_thawed()
            await self.state_tables[table].put_many(partition, items)

        async def prove(table: str, partition: int) -> None:
            await self.state_tables[table].prove(partition)

        return Runner(
            name,
            handler,
            publisher=DeclaredPublisher(declared, self.publisher),
            put_state=put_state,
            live=self.live,
            clock=self.clock,
            turn=turn,
            prove=prove,
            clock_is_sound=self.clock_check.is_sound,
            patience_s=patience_s,
        )

    def state_table(self, name: str, *, key: str = "", help: str = "") -> StateTable:
        """Declare a state table: bytes by bytes, co-partitioned with the topics, restored from its changelog.

        Args:
            name: of the table.
            key: what the key is, for the documentation.
            help: what it holds, for `faust tables` and the documentation.
        """
        table = StateTable(
            self.Table(
                name,
                key_type=bytes,
                value_type=bytes,
                partitions=self.live().kafka.partitions,
                help=help,
            ),
            self.publisher,
            partial(read_span, self.live),
            key=key,
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
        return [self.publisher, self.kafka_watch, self.prober, *super().on_init_dependencies()]

    async def on_first_start(self) -> None:
        """Take a data directory, and set a limit to the tables' memory, before they open theirs."""
        self._take_slot()
        self._take_name()
        self._share_memory()
        await self._make_changelogs()
        await super().on_first_start()

    def _take_name(self) -> None:
        """The worker's name in its groups, where it is to be known again: kept where its tables are."""
        if not self.live().kafka.static_membership:
            return
        path = Path(self.conf.datadir) / "instance"
        try:
            name = str(UUID(path.read_text(encoding="ascii").strip()))
        except (OSError, ValueError):
            name = str(uuid4())
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name + "\n", encoding="ascii")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AlreadyConfiguredWarning)
            self.conf.consumer_group_instance_id = name
        for feed in self.group_feeds.values():
            feed.instance = name
        log.info("member_named", instance=name, action="a worker that is gone for good is replaced after its session")

    async def _make_changelogs(self) -> None:
        """Before this worker joins the group: its leader assigns the partitions of topics that it knows, and no others."""
        if not self.state_tables:
            return
        try:
            made = await topics_admin.create_changelogs(self.live(), self.state_tables, wait_s=CHANGELOGS_WAIT_S)
        except topics_admin.TopicsError as e:
            log.warning(
                "changelogs_unknown", error=str(e), action="going on; stages wait until their tables are restored"
            )
            return
        for difference in made.differences():
            log.warning("changelog_differs", difference=difference, action="see `preservarium topics`")

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

    def _assigned_partitions(self) -> set[TP]:
        """Every partition that this worker reads."""
        found = {TP(feed.kafka_topic, partition) for feed in self.group_feeds.values() for partition in feed.lanes}
        if reports.connected(self._consumer) and not self.rebalancing:
            found |= {tp for tp in self._consumer.assignment() if self.stages.of(tp.topic)}
        return found

    def _counted_topics(self) -> set[str]:
        """Topics whose partitions are to be as declared, and those that group feeds read, whatever they have."""
        return {*self._declared_topics(), *(feed.kafka_topic for feed in self.group_feeds.values())}

    def _declared_topics(self) -> set[str]:
        prefix, decoded = self.live().kafka.topic_prefix, topics.DECODED
        return {t.full(prefix) for t in TOPICS if t is not decoded} | {t.changelog for t in self.state_tables.values()}

    def _topic_found(self, topic: str, count: int) -> None:
        """A topic has so many partitions, and did not have them at the last look."""
        for feed in self.group_feeds.values():
            if feed.kafka_topic == topic and feed.lanes:
                feed.topic_changed(count)
        if topic not in self._declared_topics():
            return
        declared = self.live().kafka.partitions
        shared = bool(self.stages.of(topic))
        if shared:
            metrics.PARTITIONS_UNREAD.labels(topic).set(max(0, count - declared))
        self._misfits.pop(topic, None)
        if count == declared:
            return
        if shared:
            self._misfits[topic] = count
        (log.error if shared else log.warning)(
            "topic_has_other_partitions",
            topic=topic,
            partitions=count,
            declared=declared,
            action=(
                "what is written to added partitions is not read: see docs/OPERATING.md, Partitions"
                if shared
                else "keys have other places than before: see docs/OPERATING.md, Partitions"
            ),
        )

    @Service.task
    async def _watch_changelogs(self) -> None:
        """Find what a stale worker has written into changelogs of ours, also where nothing of ours follows it."""
        while not self.should_stop:
            await self.sleep(CHANGELOGS_S)
            consumer = self._consumer
            if consumer is None or getattr(consumer._thread, "_consumer", None) is None or self.rebalancing:
                continue
            tables = {TP(t.changelog, p): t for t in self.state_tables.values() for p in t.owned()}
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    ends = await consumer.highwaters(*tables) if tables else {}
            except (KafkaError, TimeoutError, IllegalStateError) as e:
                log.warning("changelogs_not_looked_at", error=repr(e))
                continue
            for tp, end in ends.items():
                if tp in tables and end is not None:
                    try:
                        await tables[tp].look(tp.partition, end)
                    except Retry as e:
                        log.warning("changelog_not_looked_at", topic=tp.topic, partition=tp.partition, error=str(e))

    @Service.task
    async def _give_memory_back(self) -> None:
        while not self.should_stop:
            await self.sleep(MEMORY_S)
            await asyncio.to_thread(memory.give_back)

    @Service.task
    async def _refresh_gauges(self) -> None:
        while not self.should_stop:
            await self.sleep(GAUGES_S)
            try:
                self._set_gauges()
                self._taking_s()
            except Exception:
                log.exception("gauges_failed")

    def _taking_s(self) -> float:
        """For how long partitions have been taken over without a step forward; while Kafka is away that says nothing."""
        busy = bool(self.rebalancing) or bool(getattr(self, "in_recovery", False))
        step = None
        if busy and self.kafka_watch.state != "down":
            recovery = self.tables.recovery
            step = self.consumer_generation_id, len(recovery.active_tps), sum(recovery.active_offsets.values())
        return self._taking_over.look(step, monotonic())

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
        """How every stage stands; see `reports.stage_reports`."""
        return reports.stage_reports(
            self.stages,
            self.group_feeds,
            self._consumer,
            self.kafka_watch.ends,
            group=self.conf.id,
            clock_s=self.clock.monotonic_s(),
        )

    def health_report(self) -> dict[str, Any]:
        """Everything that a judgement of this worker's health needs.

        `ok` and `problems` ask only for what a restart could mend; a dependency that is down pauses partitions, which
        `stages` and `breakers` show, and is no fault of the worker.
        """
        stages = self.stage_reports()
        assignment = reports.assignment_of(self._consumer)
        problems = reports.problems_of(
            stages,
            self.group_feeds,
            self._consumer,
            assigned=bool(assignment),
            kafka_answers=self.kafka_watch.state != "down",
            taking_s=self._taking_s(),
        )
        declared = self.live().kafka.partitions
        return {
            "ok": not problems,
            "problems": problems,
            "uptime_s": monotonic() - self._started_s,
            "rebalancing": bool(self.rebalancing),
            "recovering": bool(getattr(self, "in_recovery", False)),
            "clock": self.clock_check.problem,
            "assignment": assignment,
            "stages": stages,
            "kafka": {"state": self.kafka_watch.state, "detail": self.kafka_watch.silence},
            "topics": [
                f"{t} has {n} partitions, and {declared} are declared" for t, n in sorted(self._misfits.items())
            ],
            "breakers": {breaker.name: breaker.state.name.lower() for breaker in breakers()},
        }


def _first_line(handler: Any) -> str:
    """What `faust agents` shows of a stage."""
    return (inspect.getdoc(handler) or "").partition("\n")[0]


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
