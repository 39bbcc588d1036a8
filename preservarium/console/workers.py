"""All workers as they say they are: each sends its breakers, fuses and health to `worker_status`, and reads everybody's.

Whatever worker is asked can so show what is wrong with any of them, without a database and without reaching it over the
network. A worker that says nothing for `GONE_S` is marked as gone, and forgotten after an hour, as the topic does; one
that leaves cleanly says so and is forgotten at once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import monotonic
from typing import Any, Final

import orjson
import structlog
from mode import Service

from preservarium import topics
from preservarium.clock import Clock, ClockCheck
from preservarium.settings import LiveSettings
from preservarium.streaming.following import Follower, follow
from preservarium.streaming.stage import Send

log = structlog.get_logger(__name__)

#: A worker says this often how it is, and within a second when it changes: a page is looked at for longer than that.
SAID_EVERY_S: Final = 5.0
CHANGED_EVERY_S: Final = 1.0
#: Three words missed and some room: a rebalance or a long collection of garbage must not look like a death.
GONE_S: Final = 20.0
#: As long as the topic keeps a line; longer ago, a worker that is gone was replaced.
FORGOTTEN_S: Final = topics.HOUR_MS / 1_000
#: Workers shown; more than a topic has partitions have nothing to do.
WORKERS_MAX: Final = 200
#: A line has some 3 KiB with all stages; what is larger is none of ours.
LINE_BYTES_MAX: Final = 65_536
#: Reasons of one worker that are told: the first ones say what is wrong.
REASONS_MAX: Final = 5

#: Kafka's word for a record that has the time of its arrival at the broker, and not of its producer.
LOG_APPEND_TIME: Final = 1

#: The goodbye of a worker that stops.
GOODBYE_S: Final = 2.0

Publish = Callable[[Sequence[Send]], Awaitable[Any]]


class Workers:
    """What was heard last of each worker; fed line by line."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[int, dict[str, Any]]] = {}
        #: why what is here may be old; "" while it is followed
        self.trouble = "not read yet"

    def hear(self, value: bytes | None, heard_us: int) -> None:
        """Take a line of `worker_status`; `heard_us` is when it was said, by this worker's clock where it was heard live."""
        if value is None or len(value) > LINE_BYTES_MAX:
            return
        try:
            line = orjson.loads(value)
            worker, guards = line["worker"], line["guards"]
            usable = (
                isinstance(worker, str) and isinstance(guards["breakers"], dict) and isinstance(guards["fuses"], dict)
            )
        except (ValueError, TypeError, KeyError):
            usable = False
        if not usable:
            log.warning("worker_status_unusable", value=value[:200].decode(errors="replace"))
            return
        if line.get("leaving"):
            self._said.pop(worker, None)
        elif worker in self._said or len(self._said) < WORKERS_MAX:
            self._said[worker] = (heard_us, line)

    def all(self, now_us: int) -> list[dict[str, Any]]:
        """Every worker that is not forgotten, by name: its last line, `age_s`, and whether it is `gone`."""
        for worker, (heard_us, _) in [*self._said.items()]:
            if now_us - heard_us > FORGOTTEN_S * 1e6:
                del self._said[worker]
        found = []
        for _, (heard_us, line) in sorted(self._said.items()):
            age_s = max(0.0, (now_us - heard_us) / 1e6)
            found.append({**line, "age_s": round(age_s, 1), "gone": age_s > GONE_S})
        return found


class WorkersFollower(Follower):
    """Says how this worker is, and hears how the others are, while it runs.

    Args:
        workers: where it is kept.
        state: of this worker, as `Console.state` says.
        publish: to Kafka, acknowledged.
        live: settings.
        clock: for the times.
        check: is given how the clock compares with Kafka's.
    """

    what = "workers"

    def __init__(
        self,
        workers: Workers,
        state: Callable[[], Mapping[str, Any]],
        publish: Publish,
        live: LiveSettings,
        clock: Clock,
        check: ClockCheck | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._check = check
        #: what was said last of this worker, and when, s on the monotonic clock
        self._said: tuple[bytes, float] | None = None
        self._workers = workers
        self._state = state
        self._publish = publish
        self._live = live
        self._clock = clock
        self._leaving = False

    async def goodbye(self, _app: Any = None, **_kwargs: Any) -> None:
        """Say that this worker stops, if Kafka is there to hear it; while the publisher still works."""
        if self._workers.trouble:
            return
        self._leaving = True
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._say({**self._state(), "leaving": True})
        except Exception as e:
            # The others will see that it is gone.
            log.info("worker_goodbye_not_said", error=f"{type(e).__name__}: {e}")

    async def _say(self, state: Mapping[str, Any]) -> None:
        line = {**state, "at": self._clock.now_us()}
        value = orjson.dumps(line)
        self._said = value, self._clock.monotonic_s()
        await self._publish([Send(topics.WORKER_STATUS, line["worker"].encode(), value)])

    def _compare(self, record: Any) -> None:
        """Where a record is what this worker said last, compare its clock with the broker's."""
        if self._check is None or self._said is None or record.timestamp_type != LOG_APPEND_TIME:
            return
        value, said_s = self._said
        if record.value == value:
            self._check.compare(record.timestamp * 1_000, said_s)

    @Service.task
    async def _tell(self) -> None:
        if self._check is not None:
            self._check.expect()
        told: Any = None
        told_s = -SAID_EVERY_S
        failed = False
        while not self.should_stop and not self._leaving:
            # Only to a topic that is there: a producer that fails is thrown away, and stages share it.
            if not self._workers.trouble:
                try:
                    state = self._state()
                    if (key := _key(state)) != told or monotonic() - told_s >= SAID_EVERY_S:
                        await self._say(state)
                        told, told_s, failed = key, monotonic(), False
                except Exception as e:
                    # Whatever it is: a worker that cannot say how it is does its work all the same.
                    if not failed:
                        log.warning("worker_status_not_sent", error=f"{type(e).__name__}: {e}")
                    failed = True
            await self.sleep(CHANGED_EVERY_S)

    @property
    def current(self) -> bool:
        """Whether the others are heard."""
        return not self._workers.trouble

    def hindered(self, why: str) -> None:
        """What is known stays, and grows old."""
        self._workers.trouble = why

    async def read(self) -> None:
        """Hear everything that was said within the last hour, then whatever is said."""
        kafka, workers = self._live().kafka, self._workers

        def take(records: Sequence[Any], first: bool) -> None:
            now_us = self._clock.now_us()
            for record in records:
                self._compare(record)
                # The clocks of two machines differ; what is heard live was said now.
                workers.hear(record.value, min(now_us, record.timestamp * 1_000) if first else now_us)

        def caught_up() -> None:
            workers.trouble = ""

        since_ms = self._clock.now_us() // 1_000 - round(FORGOTTEN_S * 1_000)
        sources = {topics.WORKER_STATUS.full(kafka.topic_prefix): since_ms}
        await follow(kafka, sources, take, caught_up, client="preservarium-workers", stopped=lambda: self.should_stop)


def _key(state: Mapping[str, Any]) -> Any:
    """What everybody is to hear of at once when it changes."""
    breakers = {name: each["state"] for name, each in state["guards"]["breakers"].items()}
    fuses = {name: each["blown"] for name, each in state["guards"]["fuses"].items()}
    return breakers, fuses, state["alive"], state["ready"]
