"""A source, the ledger and Kafka, with an extractor between them: what the tests of the extract share."""

from typing import Any

import asyncpg
import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from sink_support import live

from preservarium import topics
from preservarium.domain.tasks import employee_row, event_order, task_rows
from preservarium.extract.ledger import Ledger
from preservarium.extract.service import Extractor, source_of
from preservarium.streaming.publish import Publisher


class World:
    """A source, the ledger, Kafka, and an extractor between them; `dsn` is the ledger's database, and the source's by default."""

    def __init__(self, dsn: str, kafka: str, prefix: str, url: str = "") -> None:
        self.dsn = dsn
        self.extract: dict[str, Any] = {"url": url or dsn, "interval_min_s": 0.05, "overlap_s": 5}
        self._kafka = {"bootstrap_servers": kafka, "topic_prefix": prefix, "group": f"{prefix}g", "partitions": 2}
        self.publisher = Publisher(self.settings)
        self.db: Any = None
        self._ours: list[Any] = []

    @property
    def settings(self) -> Any:
        return live(postgres={"url": self.dsn}, kafka=self._kafka, extract=self.extract)

    async def start(self) -> None:
        self.db = await asyncpg.connect(self.dsn, timeout=10)
        admin = AIOKafkaAdminClient(bootstrap_servers=self._kafka["bootstrap_servers"])
        await admin.start()
        prefix = self._kafka["topic_prefix"]
        await admin.create_topics([NewTopic(prefix + t.name, 2, 1) for t in (topics.TASK_EVENTS, topics.EMPLOYEES)])
        await admin.close()

    async def stop(self) -> None:
        for each in self._ours:
            await each.close()
        await self.db.close()
        await self.publisher.stop()
        await self.publisher.on_stop()

    async def extractor(self, publish: Any = None) -> Extractor:
        """One as after a restart: it knows what is recorded."""
        source = source_of(lambda: self.settings())
        self._ours.append(source)
        await source.open()
        connection = await asyncpg.connect(self.dsn, timeout=10)
        self._ours.append(connection)
        return Extractor(source, Ledger(connection), publish or self.publisher.publish, partitions=2)

    async def events(self, topic: Any = topics.TASK_EVENTS) -> list[tuple[bytes | None, dict[str, Any]]]:
        """Every record of the topic; each is taken by the stage that reads it."""
        consumer = AIOKafkaConsumer(bootstrap_servers=self._kafka["bootstrap_servers"], enable_auto_commit=False)
        await consumer.start()
        found = []
        try:
            tps = [TopicPartition(self._kafka["topic_prefix"] + topic.name, p) for p in range(2)]
            consumer.assign(tps)
            await consumer.seek_to_beginning(*tps)
            ends = await consumer.end_offsets(tps)
            for tp in tps:
                while await consumer.position(tp) < ends[tp]:
                    for record in (await consumer.getone(tp),):
                        line = orjson.loads(record.value)
                        parse = task_rows if topic is topics.TASK_EVENTS else employee_row
                        assert parse(record.key, line, offset=record.offset, index=0, recorded_at=1_800_000_000_000_000)
                        found.append((record.key, line))
        finally:
            await consumer.stop()
        return found

    async def state(self) -> dict[str, tuple[Any, ...]]:
        """What the topic says of each task: the newest event of its file and id."""
        newest: dict[tuple[str, bytes | None], dict[str, Any]] = {}
        for key, line in await self.events():
            before = newest.get((line["task_id"], key))
            if before is None or event_order(line["event_id"]) >= event_order(before["event_id"]):
                newest[line["task_id"], key] = line
        return {
            id: (line["file_id"], line["stage"], line["status"], line.get("employee_code"), line["assigned_at"])
            for (id, _), line in newest.items()
            if not line.get("deleted")
        }
