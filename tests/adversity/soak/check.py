"""What the stores hold, beside what they should."""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import aiohttp
from aiokafka import AIOKafkaConsumer, TopicPartition

from preservarium import topics
from preservarium.topics import Topic
from soak import fleet
from soak.expected import COMPONENTS, US, Expected, Verdict, compare, expect
from soak.world import WINDOWS_S, World

#: Nothing new for so long: what is not there by now will not come. More than a silence, its settling and a rebalance.
STALL_S: Final = 75.0


def us(at: datetime) -> int:
    """Whole microseconds since the epoch."""
    return round((at - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * US)


async def read(world: World, topic: Topic) -> AsyncIterator[Any]:
    """Every committed record of a topic."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=world.kafka.bootstrap_servers, auto_offset_reset="earliest",
        isolation_level="read_committed", max_partition_fetch_bytes=4 << 20,
    )  # fmt: skip
    await consumer.start()
    try:
        name = topic.full(world.prefix)
        while not (found := consumer.partitions_for_topic(name)):
            await consumer._client.force_metadata_update()
            await asyncio.sleep(0.1)
        partitions = [TopicPartition(name, p) for p in found]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        left = {tp for tp in partitions if ends[tp] > 0}
        while left:
            for records in (await consumer.getmany(*left, timeout_ms=500)).values():
                for record in records:
                    yield record
            for tp in list(left):
                if await consumer.position(tp) >= ends[tp]:
                    left.discard(tp)
    finally:
        await consumer.stop()


@dataclass(slots=True)
class Result:
    """Of a run."""

    produced: int = 0  #: messages in the raw topic
    unacknowledged: int = 0  #: of them, those whose acknowledgement did not come
    gone: int = 0  #: acknowledged by Kafka and not in the raw topic: the broker's loss
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    counted: int = 0  #: transitions of alarms that a notice had no room for: it says how many, and not which
    mails: int = 0
    mails_again: int = 0  #: copies of a mail that was sent before: told once more after a crash, with the same id

    @property
    def good(self) -> bool:
        """Whether everything is as it should be."""
        return not self.gone and all(verdict.good for verdict in self.verdicts.values())

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "good": self.good}


class Check:
    """Of one run, after the load has ended and every fault is over."""

    def __init__(
        self, world: World, load: fleet.Fleet, poisons: dict[tuple[int, int], str], say: Callable[[str], None]
    ):
        self.world = world
        self.load = load
        self.poisons = poisons
        self.say = say
        self.result = Result()
        self.expected = Expected()

    async def run(self) -> Result:
        """Wait until the stores have what they should, or nothing more comes; then compare."""
        await self._expect()
        await self._settled()
        verdicts = self.result.verdicts
        for name, judge in (
            ("readings in PostgreSQL", self._readings_postgres),
            ("readings in ClickHouse", self._readings_clickhouse),
            ("rows of days in ClickHouse", self._days),
            ("windows in PostgreSQL", self._windows_postgres),
            ("windows in ClickHouse", self._windows_clickhouse),
            ("transitions in PostgreSQL", self._transitions_postgres),
            ("transitions in ClickHouse", self._transitions_clickhouse),
            ("transitions in Kafka", self._transitions_kafka),
            ("standing alarms", self._standing),
            ("notices", self._notices),
            ("commands", self._commands),
            ("poison in iot_errors", self._errors),
        ):
            verdicts[name] = await judge()
        await self._counted()
        await self._mails()
        return self.result

    async def _expect(self) -> None:
        said: list[tuple[str, int, int, float]] = []
        numbers: set[int] = set()
        async for record in read(self.world, topics.RAW):
            if record.value is not None and (message := fleet.parse(record.value)) is not None:
                said.append(message)
                numbers.add(message[2])
        self.result.produced = len(said)
        self.result.unacknowledged = sum(1 for number in numbers if not self.load.acknowledged[number])
        self.result.gone = sum(
            1 for number, told in enumerate(self.load.acknowledged) if told and number not in numbers
        )
        self.expected = expect(said, WINDOWS_S, fleet.THRESHOLD, fleet.SILENT_S)

    async def _settled(self) -> None:
        raised = sum(1 for t in self.expected.transitions if t[1] == "hot")
        wanted = (
            len(self.expected.readings) * len(COMPONENTS), len(self.expected.windows), len(self.expected.transitions), raised,
        )  # fmt: skip
        statement = (
            "SELECT (SELECT count(*) FROM measurements), (SELECT count(*) FROM aggregates), (SELECT count(*) FROM"
            " alarm_events), (SELECT coalesce(sum(jsonb_array_length(transitions)), 0) FROM notice_deliveries)"
        )
        in_clickhouse = (
            "SELECT (SELECT count() FROM measurements FINAL), (SELECT count() FROM aggregates FINAL),"
            " (SELECT count() FROM alarm_events FINAL)"
        )
        last: object = None
        since = shown = time.monotonic()
        while True:
            (row,) = await self.world.query(statement)
            (other,) = await self.world.query_clickhouse(in_clickhouse)
            found = (tuple(int(n) for n in row), tuple(int(n) for n in other))
            if all(n >= m for n, m in zip(found[0], wanted, strict=True)) and all(
                n >= m for n, m in zip(found[1], wanted, strict=False)
            ):
                return
            now = time.monotonic()
            if found != last:
                last, since = found, now
            if now - since > STALL_S:
                self.say(f"nothing new for {STALL_S:.0f} s: readings, windows, transitions, told {found} of {wanted}")
                await self._keep_what_workers_say()
                return
            if now - shown > 10:
                shown = now
                self.say(f"  waiting: readings, windows, transitions, told {found} of {wanted}")
            await asyncio.sleep(1)

    async def _keep_what_workers_say(self) -> None:
        """Into the directory of the run: where something is missing, this says who waits for what."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as http:
            for member in self.world.members:
                for page in ("api/status", "ready", "metrics"):
                    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                        async with http.get(f"{member.url}/{page}") as response:
                            name = f"{member.name}-{page.replace('/', '-')}"
                            (self.world.directory / name).write_bytes(await response.read())

    # --- readings

    def _values(self) -> dict[tuple[str, str, int], float]:
        return {
            (device, component, at_us): value
            for (device, at_us), values in self.expected.readings.items()
            for component, value in zip(COMPONENTS, values, strict=True)
        }

    async def _readings_postgres(self) -> Verdict:
        rows = await self.world.query("SELECT device_id, component_type, timestamp, value FROM iot_measurements")
        return compare(self._values(), (((r[0], r[1], us(r[2])), r[3]) for r in rows))

    async def _readings_clickhouse(self) -> Verdict:
        # Without FINAL: the tokens of the inserts alone are to keep doubles out.
        rows = await self.world.query_clickhouse(
            "SELECT device_id, component_type, toUnixTimestamp64Micro(timestamp), value FROM measurements"
        )
        return compare(self._values(), (((r[0], r[1], r[2]), r[3]) for r in rows))

    async def _days(self) -> Verdict:
        expected: Counter[str] = Counter()
        for device, _ in self.expected.readings:
            expected[device] += len(COMPONENTS)
        rows = await self.world.query_clickhouse("SELECT device_id, sum(rows) FROM measurement_days GROUP BY device_id")
        return compare(expected, ((r[0], r[1]) for r in rows))

    # --- windows

    async def _windows_postgres(self) -> Verdict:
        rows = await self.world.query(
            "SELECT device_id, component_type, size_s, window_start, count, sum, min, max, last, last_at FROM aggregates"
        )
        found = (((r[0], r[1], r[2], us(r[3]) // US), (*r[4:9], us(r[9]))) for r in map(tuple, rows))
        return compare(self.expected.windows, found)

    async def _windows_clickhouse(self) -> Verdict:
        rows = await self.world.query_clickhouse(
            "SELECT device_id, component_type, size_s, toUnixTimestamp64Micro(window_start), count, sum, min, max, last,"
            " toUnixTimestamp64Micro(last_at) FROM aggregates FINAL"
        )
        found = (((r[0], r[1], r[2], r[3] // US), tuple(r[4:10])) for r in rows)
        return compare(self.expected.windows, found)

    # --- alarms

    def _compare_transitions(self, rows: Iterable[tuple[str, str, str, int]]) -> Verdict:
        return compare(dict.fromkeys(self.expected.transitions), ((row, None) for row in rows))

    async def _transitions_postgres(self) -> Verdict:
        rows = await self.world.query(
            "SELECT device_id, rule, transition, (detail->>'transition_at')::bigint FROM alarm_events"
        )
        return self._compare_transitions((r[0], r[1], r[2], r[3]) for r in rows)

    async def _transitions_clickhouse(self) -> Verdict:
        rows = await self.world.query_clickhouse(
            "SELECT device_id, rule, transition, toUnixTimestamp64Micro(transition_at) FROM alarm_events FINAL"
        )
        return self._compare_transitions((r[0], r[1], r[2], r[3]) for r in rows)

    async def _transitions_kafka(self) -> Verdict:
        # A crash may say the same once more, with the same id.
        ids: dict[str, tuple[str, str, str, int]] = {}
        async for record in read(self.world, topics.ALERTS):
            for line in map(json.loads, record.value.splitlines()):
                ids[line["transition_id"]] = (
                    line["device_id"],
                    line["rule"],
                    line["transition"],
                    line["transition_at"],
                )
        return self._compare_transitions(ids.values())

    async def _standing(self) -> Verdict:
        rows = await self.world.query("SELECT device_id, rule FROM alarms WHERE cleared_at IS NULL")
        return compare(dict.fromkeys(self.expected.standing), (((r[0], r[1]), None) for r in rows))

    # --- notices and commands

    async def _notices(self) -> Verdict:
        rows = await self.world.query(
            "SELECT e.device_id, e.rule, e.transition, (e.detail->>'transition_at')::bigint FROM notice_deliveries n"
            " CROSS JOIN LATERAL jsonb_array_elements_text(n.transitions) t(id) JOIN alarm_events e ON e.transition_id = t.id"
            " WHERE n.outcome = 'sent'"
        )
        expected = {transition: None for transition in self.expected.transitions if transition[1] == "hot"}
        return compare(expected, (((r[0], r[1], r[2], r[3]), None) for r in rows))

    async def _counted(self) -> None:
        found: dict[str, int] = {}
        async for record in read(self.world, topics.NOTICES):
            notice = json.loads(record.value)
            found[notice["delivery_id"]] = sum(notice["more"].values())
        self.result.counted = sum(found.values())

    async def _mails(self) -> None:
        await asyncio.sleep(1)
        ids: Counter[str] = Counter()
        for file in self.world.mail.directory.glob("*.eml"):
            for line in file.read_text(errors="replace").splitlines():
                if line.lower().startswith("message-id:"):
                    ids[line.partition(":")[2].strip()] += 1
                    break
        self.result.mails = self.world.mail.taken
        self.result.mails_again = sum(ids.values()) - len(ids)

    async def _commands(self) -> Verdict:
        expected = Counter(t[0] for t in self.expected.transitions if t[1] == "hot" and t[2] == "raised")
        rows = await self.world.query("SELECT device_id, count(*) FROM device_commands GROUP BY device_id")
        return compare(expected, ((r[0], r[1]) for r in rows))

    # --- poison

    async def _errors(self) -> Verdict:
        named: set[tuple[int, int]] = set()
        other: list[str] = []
        async for record in read(self.world, topics.ERRORS):
            for line in map(json.loads, record.value.splitlines()):
                at = (line.get("raw_partition"), line.get("raw_offset"))
                if at in self.poisons:
                    named.add(at)
                else:
                    other.append(f"{line.get('stage')} {line.get('code')}: {str(line.get('message'))[:120]}")
        verdict = compare(self.poisons, ((at, self.poisons[at]) for at in named))
        # A good message must never become an error.
        verdict.wrong += len(other)
        for text in other:
            verdict.say(text)
        return verdict


def lines_of(result: Result) -> Iterator[str]:
    """For people."""
    yield f"  {'messages produced':<28} {result.produced:>11,}"
    for name, verdict in result.verdicts.items():
        yield (
            f"  {name:<28} {verdict.expected:>11,}  lost {verdict.lost:,}  doubled {verdict.doubled:,}"
            f"  wrong {verdict.wrong:,}"
        )
        for example in verdict.examples[:5]:
            yield f"      {example}"
    yield f"  {'told by number alone':<28} {result.counted:>11,}"
    yield f"  {'mails':<28} {result.mails:>11,}  sent again {result.mails_again:,}"


Judge = Callable[[], Awaitable[Verdict]]
