"""Raw messages that become rows in this process: the stages' own code on real servers, without a worker."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import orjson
from worker_support import make_topics, read_all

from preservarium import topics
from preservarium.clock import SystemClock
from preservarium.domain.quality.checks import CheckCompiler
from preservarium.domain.quality.validation import Limits, new_state, validate
from preservarium.operations.replay import _Devices, _Registry
from preservarium.registry.apply import apply
from preservarium.sandbox.pool import Limits as SandboxLimits
from preservarium.sandbox.pool import SandboxPool
from preservarium.settings import LiveSettings, Settings, load
from preservarium.stages.normalize import Normalizer
from preservarium.stages.sync import ReadingSync
from preservarium.stores import registry
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.timescale import TimescaleStore
from preservarium.streaming.publish import Publisher
from preservarium.streaming.records import headers_of, message_error, pack
from preservarium.streaming.records.error_lines import error_send
from preservarium.streaming.stage import Batch, Send

PARTITIONS = 3
TOPICS = [topics.RAW, topics.STANDARDIZED, topics.VALIDATED, topics.ERRORS]


def environment(kafka: str, prefix: str, dsn: str, clickhouse: str, database: str) -> dict[str, str]:
    """Settings of the commands."""
    return {
        "PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS": kafka,
        "PRESERVARIUM_KAFKA__TOPIC_PREFIX": prefix,
        "PRESERVARIUM_KAFKA__GROUP": f"{prefix}g",
        "PRESERVARIUM_KAFKA__PARTITIONS": str(PARTITIONS),
        "PRESERVARIUM_POSTGRES__URL": dsn,
        "PRESERVARIUM_CLICKHOUSE__URL": clickhouse,
        "PRESERVARIUM_CLICKHOUSE__DATABASE": database,
        "PRESERVARIUM_CLICKHOUSE__ENABLED": "true",
    }


class Pipeline:
    """What workers would do, when it is told to."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self.settings = settings
        self._directory = directory
        self._read: dict[tuple[str, int], int] = {}
        #: generation -> device -> its state: a state of one device holds few generations, and tests open many
        self._states: dict[str, dict[str, Any]] = {}

    async def create(self) -> None:
        """Make the topics."""
        await make_topics(self.settings.kafka.bootstrap_servers, self.settings.kafka.topic_prefix, PARTITIONS, TOPICS)

    async def register(self, text: str) -> None:
        """Bring the registry to a file's text."""
        path = self._directory / "registry.yaml"
        path.write_text(text)
        await apply(self.settings, path)

    async def send(self, sends: Sequence[Send]) -> None:
        """Send records."""
        publisher = Publisher(LiveSettings(self.settings))
        try:
            await publisher.publish(sends)
        finally:
            await publisher.on_stop()

    async def fresh(self, topic: topics.Topic) -> dict[int, list[Any]]:
        """What has come to a topic since this was asked last, by partition."""
        kafka = self.settings.kafka
        found: dict[int, list[Any]] = {}
        for record in await read_all(kafka.bootstrap_servers, topic.full(kafka.topic_prefix), PARTITIONS):
            if record.offset >= self._read.get((topic.name, record.partition), 0):
                found.setdefault(record.partition, []).append(record)
        for partition, records in found.items():
            self._read[topic.name, partition] = records[-1].offset + 1
        return found

    async def run(self, *, store: bool = True) -> None:
        """Normalize, validate and store what has come."""
        connection = await asyncpg.connect(self.settings.postgres.dsn, timeout=10)
        sandbox = SandboxPool(SandboxLimits.of(self.settings))
        try:
            catalogue = _Registry()
            for kind, documents in (await registry.load(connection, ("datatype", "parser", "type"))).items():
                for one in documents.values():
                    if kind != "parser" or one.document["status"] == "active":
                        catalogue.offer(kind, {**one.document, "rev": one.rev})
            stage = Normalizer(_Devices(connection), catalogue, SystemClock(), LiveSettings(self.settings), sandbox)
            for partition, records in (await self.fresh(topics.RAW)).items():
                await self.send((await stage(Batch(topics.RAW.name, partition, records))).sends)
            await self._validate(connection, catalogue)
        finally:
            await sandbox.close()
            await connection.close()
        if store:
            await self.store(await self.fresh(topics.VALIDATED))

    async def _validate(self, connection: Any, catalogue: Any) -> None:
        limits = Limits(future_skew_us=300_000_000, store_failed=False, series_max=500)
        compiler = CheckCompiler(catalogue.datatype)
        for partition, records in (await self.fresh(topics.STANDARDIZED)).items():
            batch = Batch(topics.STANDARDIZED.name, partition, records)
            sends: list[Send] = []
            for record in records:
                lines: list[Mapping[str, Any]] = []
                for index, raw in enumerate((record.value or b"").split(b"\n")):
                    message = orjson.loads(raw)
                    found = await registry.composite(connection, [message["device_id"]])
                    known = found[message["device_id"]]
                    checks = compiler.device(known.device, known.type)  # type: ignore[arg-type]
                    state = self._states.setdefault(message["device_id"], new_state())
                    outcome = validate(message, checks, state, limits)
                    if outcome.duplicate:
                        continue
                    for failure in outcome.failures:
                        line = message_error(
                            "validate", failure.code, failure.text, batch, record, index, message,
                            raw=orjson.dumps({**message, "readings": [failure.reading]}), now_us=SystemClock().now_us(),
                        )  # fmt: skip
                        sends.append(error_send(line))
                    if message["readings"]:
                        lines.append(message)
                if lines:
                    sends.append(Send(topics.VALIDATED, record.key, pack(lines), partition, headers_of(record)))
            await self.send(sends)

    async def store(self, found: Mapping[int, Sequence[Any]]) -> None:
        """Into both databases."""
        live = LiveSettings(self.settings)
        timescale, clickhouse = TimescaleStore(live), ClickHouseStore(live)
        try:
            sync = ReadingSync(clickhouse, live)
            for partition, records in found.items():
                lines = [orjson.loads(line) for record in records for line in record.value.split(b"\n")]
                await timescale.write(lines, {})
                await sync([Batch(topics.VALIDATED.name, partition, records)])
        finally:
            await timescale.close()
            await clickhouse.close()


def pipeline(directory: Path) -> Pipeline:
    """One with the settings of the environment."""
    return Pipeline(load(), directory)


async def command(*arguments: str, code: int | None = 0) -> Any:
    """What a command prints as JSON; in a thread, because commands have an event loop of their own."""
    from click.testing import CliRunner

    from preservarium.__main__ import cli

    result = await asyncio.to_thread(CliRunner().invoke, cli, [*arguments])
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    assert code is None or result.exit_code == code, result.output
    return orjson.loads(result.stdout) if "--json" in arguments else result.output
