"""What is asked of Kafka beside the flow of records, over connections of its own: does it answer, where do logs begin and end.

The consumers' own connections are busy with fetches that the broker holds back, and what nobody asks is not noticed: a
broker that hangs, partitions that somebody has added, records that retention took before they were read.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from time import monotonic
from typing import Any, Final, NamedTuple, TypeVar

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.protocol.metadata import MetadataRequest
from faust.types import TP
from mode import Service

from preservarium import metrics
from preservarium.breaker import back
from preservarium.settings import LiveSettings
from preservarium.streaming import kafka_clients
from preservarium.streaming.lanes import skipped
from preservarium.streaming.positions import OnGap
from preservarium.waiting import one_line

log = structlog.get_logger(__name__)

T = TypeVar("T")

#: Where partitions end is asked this often: a fetch tells of it at once where there is one.
ASK_S: Final = 2.0
#: A broker that has not answered for so long is down for our purpose. With ASK_S it is told within 7 s.
ANSWER_S: Final = 5.0
#: Topics are looked at this often for partitions that were added.
TOPICS_S: Final = 30.0
#: Gaps are asked about together, and no more often.
GAPS_S: Final = 0.5
#: Gaps of one stage and partition that wait for an answer; transactions leave hundreds a second. Further ones are joined.
GAPS_MAX: Final = 100
#: For a client whose broker does not answer.
CUT_S: Final = 0.5


class Gap(NamedTuple):
    """Offsets that came without records: from `expected` to before `got`."""

    expected: int
    got: int


class KafkaWatch(Service):
    """Asks Kafka every two seconds.

    Args:
        live: where it is.
        assigned: the partitions that this worker reads.
        topics: full names of the topics whose partitions are counted. One that does not exist is not made by that.
        on_topic: told (topic, partitions) at the first look, and whenever there are others.
    """

    def __init__(
        self,
        live: LiveSettings,
        assigned: Callable[[], Iterable[TP]],
        topics: Callable[[], Iterable[str]],
        on_topic: Callable[[str, int], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._live = live
        self._assigned = assigned
        self._topics = topics
        self._on_topic = on_topic
        #: end of what may be read of each partition, as Kafka said last
        self.ends: dict[TP, int] = {}
        #: partitions of each topic that exists
        self.partitions: dict[str, int] = {}
        #: why Kafka does not answer; empty while it does
        self.silence = ""
        self.answered_s: float | None = None  #: monotonic time of its last answer
        self._gaps: dict[tuple[str, str, TP], list[Gap]] = defaultdict(list)
        self._gap_came = asyncio.Event()
        self._topics_at_s = 0.0

    @property
    def state(self) -> str:
        """up, down, or unknown: not asked yet."""
        return "down" if self.silence else "up" if self.answered_s is not None else "unknown"

    def gap_of(self, stage: str, topic: str, topic_full: str) -> OnGap:
        """What a stage's lanes tell of their gaps: whether records are lost is found out beside them."""
        return partial(self._on_gap, stage, topic, topic_full)

    def _on_gap(self, stage: str, topic: str, topic_full: str, partition: int, expected: int, got: int) -> None:
        gaps = self._gaps[stage, topic, TP(topic_full, partition)]
        if len(gaps) >= GAPS_MAX:
            expected = gaps.pop().expected
        gaps.append(Gap(expected, got))
        self._gap_came.set()

    @Service.task
    async def _watch(self) -> None:
        while not self.should_stop:
            try:
                await self._ask_until_it_fails()
            except Exception as e:
                self._hear_nothing(e)
            await self._pause()

    async def _ask_until_it_fails(self) -> None:
        consumer = await self._connect()
        try:
            while not self.should_stop:
                await self._ask(consumer)
                self._hear()
                await self._pause()
        finally:
            await kafka_clients.stop(consumer, CUT_S)

    async def _pause(self) -> None:
        began_s = monotonic()
        try:
            async with asyncio.timeout(ASK_S):
                await self._gap_came.wait()
        except TimeoutError:
            return
        await asyncio.sleep(max(0.0, GAPS_S - (monotonic() - began_s)))

    async def _connect(self) -> Any:
        consumer = AIOKafkaConsumer(
            **kafka_clients.reading(self._live().kafka),
            client_id=f"{self._live().kafka.group}-watch",
            group_id=None,
            enable_auto_commit=False,
            request_timeout_ms=round(ANSWER_S * 1000),
        )
        self._topics_at_s = 0.0
        try:
            await _in_time(consumer.start())
        except BaseException:
            await kafka_clients.stop(consumer, CUT_S)
            raise
        return consumer

    async def _ask(self, consumer: Any) -> None:
        if monotonic() >= self._topics_at_s:
            await _in_time(self._count_partitions(consumer))
            self._topics_at_s = monotonic() + TOPICS_S
        # Of a partition that does not exist (yet) nothing is asked: it would be asked again until the time is over.
        tps = [
            TopicPartition(tp.topic, tp.partition)
            for tp in {*self._assigned()}
            if tp.partition < self.partitions.get(tp.topic, 0)
        ]
        if tps:
            ends = await _in_time(consumer.end_offsets(tps))
            self.ends = {TP(tp.topic, tp.partition): end for tp, end in ends.items()}
        else:
            self.ends = {}
            await _in_time(self._request_topics(consumer, []))
        if self._gaps:
            await self._look_into_gaps(consumer)

    async def _count_partitions(self, consumer: Any) -> None:
        names = sorted({*self._topics()})
        answer = await self._request_topics(consumer, names)
        found = {name: len(partitions) for code, name, *_, partitions in answer.topics if not code}
        # Hook: what the client looks after by itself, as for a subscription.
        await consumer._client.set_topics([*found])
        before, self.partitions = self.partitions, found
        for name, count in found.items():
            if before.get(name) != count:
                self._on_topic(name, count)

    async def _request_topics(self, consumer: Any, names: list[str]) -> Any:
        # Hook: aiokafka's own requests make a topic that is missing, on brokers that do so on demand.
        client = consumer._client
        request = MetadataRequest(names, allow_auto_topic_creation=False)
        return await client.send(client.get_random_node(), request)

    async def _look_into_gaps(self, consumer: Any) -> None:
        gaps, self._gaps = self._gaps, defaultdict(list)
        self._gap_came.clear()
        wanted = {TopicPartition(tp.topic, tp.partition) for _, _, tp in gaps}
        try:
            begins = await _in_time(consumer.beginning_offsets([*wanted]))
        except BaseException:
            for key, later in self._gaps.items():
                gaps[key] += later
            self._gaps = gaps
            raise
        for (stage, topic, tp), found in gaps.items():
            begin = begins[TopicPartition(tp.topic, tp.partition)]
            for gap in found:
                # Otherwise the log goes back to where the stage was: there is no record, and there never was.
                if begin > gap.expected:
                    skipped(stage, topic, tp.partition, gap.expected, gap.got, begin)

    def _hear(self) -> None:
        self.answered_s = monotonic()
        metrics.DEPENDENCY_ANSWERS.labels("kafka").set(1)
        if self.silence:
            self.silence = ""
            log.info("kafka_answers_again")
            back.wake()

    def _hear_nothing(self, e: Exception) -> None:
        why = "no answer in time" if isinstance(e, TimeoutError) else one_line(e)
        if not self.silence:
            log.warning("kafka_does_not_answer", error=repr(e))
        self.silence = why
        metrics.DEPENDENCY_ANSWERS.labels("kafka").set(0)


async def _in_time(answer: Awaitable[T]) -> T:
    async with asyncio.timeout(ANSWER_S):
        return await answer
