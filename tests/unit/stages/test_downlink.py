"""The downlink stage: what it sends, what it reports, and what it remembers while a broker is down."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson
import pytest
from quality_support import Rec, S, batch, catalogue, errors, lines, live, record

from preservarium import topics
from preservarium.clock import ManualClock
from preservarium.domain.commands.device import downlink_id
from preservarium.errors import Retry
from preservarium.sandbox.pool import Limits, SandboxPool
from preservarium.stages.downlink import REMEMBERED_MAX, Downlinks
from preservarium.streaming.stage import Send

CODEC = """
function decodeUplink(input) { return {data: {on: input.bytes[0]}}; }
function encodeDownlink(input) {
  if (input.data.on === undefined) return {errors: ['on is missing']};
  return {bytes: [input.data.on], fPort: 7};
}
"""
PYTHON = """
def decode(payload, context):
    return []
def encode(fields, context):
    return {"bytes": [fields["on"]], "port": 9}
"""


class FakeBroker:
    """Takes what it is told to take."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, bytes]] = []
        self.room = 1_000

    async def publish(self, messages: Sequence[tuple[str, bytes, int]]) -> tuple[list[bool], str]:
        acknowledged = []
        for topic, payload, qos in messages:
            assert qos == 1
            message = (topic, payload)
            acknowledged.append(self.room > 0)
            if self.room > 0:
                self.room -= 1
                self.taken.append(message)
        return acknowledged, "" if all(acknowledged) else "down"


class Stage:
    def __init__(self, sandbox: SandboxPool) -> None:
        self.broker, self.mailbox = FakeBroker(), FakeBroker()
        self.clock = ManualClock()
        self.told: list[Send] = []
        parser = {"version": 1, "status": "active", "hash": "h"}
        self.documents = catalogue(
            ("parser", {**parser, "name": "js", "kind": "javascript", "source": CODEC}),
            ("parser", {**parser, "name": "py", "kind": "python", "source": PYTHON}),
            ("parser", {**parser, "name": "plain", "kind": "json", "source": {}}),
        )
        self.sandbox = sandbox
        self.restart()

    def restart(self) -> None:
        async def publish(sends: Sequence[Send]) -> None:
            self.told += sends

        self.stage = Downlinks(self.documents, self.sandbox, self.broker, self.mailbox, publish, live(), self.clock)

    async def send(self, *records: Rec, crash: bool = False) -> list[dict[str, Any]]:
        self.effects = await self.stage([batch(topics.DOWNLINKS, *records)])
        if not crash:
            for callback in self.effects.after:
                callback()
        return lines(self.effects.sends, topics.COMMANDS)

    def downlink(self, number: int = 1, parser: str = "js", **fields: Any) -> dict[str, Any]:
        return {
            "downlink_id": downlink_id("c", number), "command_id": "c", "device_id": "dev-1", "attempt": number,
            "expires_at": self.clock.now_us() + 60 * S, "format": "plain", "topic": "devices/dev-1/down", "qos": 1,
            "parser": parser, "variables": {}, "content": {"fields": {"on": 1}}, "confirmed": False, **fields,
        }  # fmt: skip


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    sandbox = SandboxPool(Limits())
    yield Stage(sandbox)
    await sandbox.close()


async def test_codecs_make_the_bytes(stage: Stage) -> None:
    reports = await stage.send(
        record(1, stage.downlink(1)),
        record(2, stage.downlink(2, "py"), stage.downlink(3, "plain")),
        record(3, stage.downlink(4, content={"payload_b64": "AQI="})),
        record(4, stage.downlink(5, format="chirpstack")),
    )
    taken = sorted(data for _, data in stage.broker.taken)
    assert [*taken[:3], taken[4]] == [b"\x01", b"\x01", b"\x01\x02", b'{"on":1}']
    assert orjson.loads(taken[3])["fPort"] == 7
    assert [r["report"] for r in reports] == ["sent"] * 5
    assert [r["downlink_id"] for r in reports] == [downlink_id("c", n) for n in range(1, 6)]


async def test_what_cannot_be_made_is_reported_with_the_codecs_reason(stage: Stage) -> None:
    reports = await stage.send(
        record(1, stage.downlink(1, content={"fields": {}})),
        record(2, stage.downlink(2, "gone")),
        record(3, stage.downlink(3, content={"payload": 1}, format="chirpstack")),
        record(4, stage.downlink(4, "py", content={"fields": {"on": 300}})),
    )
    assert [(r["report"], r["reason"]) for r in reports] == [
        ("failed", "the codec reports: on is missing"),
        ("failed", "there is no active parser 'gone'"),
        ("failed", "neither the command, nor its type, nor the codec names a port"),
        ("failed", "the codec returned what is no byte, 0 to 255"),
    ]
    assert stage.broker.taken == []


async def test_a_broker_that_is_down_is_waited_for_and_nothing_goes_out_twice(stage: Stage) -> None:
    records = [record(n, stage.downlink(n, "plain")) for n in range(1, 4)]
    stage.broker.room = 1
    with pytest.raises(Retry, match="down"):
        await stage.send(*records)
    assert [r["downlink_id"] for r in lines(stage.told, topics.COMMANDS)] == [downlink_id("c", 1)]
    with pytest.raises(Retry):
        await stage.send(*records)
    assert len(stage.told) == 1
    stage.broker.room = 9
    reports = await stage.send(*records)
    assert [r["downlink_id"] for r in reports] == [downlink_id("c", 2), downlink_id("c", 3)]
    assert len(stage.broker.taken) == 3


async def test_what_expires_while_the_broker_is_down_is_reported_at_once(stage: Stage) -> None:
    stage.broker.room = 0
    records = [record(1, stage.downlink(1, expires_at=stage.clock.now_us() + S)), record(2, stage.downlink(2))]
    with pytest.raises(Retry):
        await stage.send(*records)
    assert stage.told == []
    stage.clock.advance(2)
    with pytest.raises(Retry):
        await stage.send(*records)
    assert [r["report"] for r in lines(stage.told, topics.COMMANDS)] == ["expired"]


async def test_reports_that_kafka_did_not_take_are_made_again_without_sending(stage: Stage) -> None:
    records = [record(1, stage.downlink(1))]
    assert len(await stage.send(*records, crash=True)) == 1
    assert len(await stage.send(*records)) == 1
    assert len(stage.broker.taken) == 1


async def test_a_downlink_that_comes_again_is_left_out_also_after_a_restart(stage: Stage) -> None:
    await stage.send(record(1, stage.downlink(1), stage.downlink(1)))
    assert await stage.send(record(2, stage.downlink(1))) == []
    kept = stage.stage.remember(3)
    stage.restart()
    stage.stage.recall(3, kept)
    assert await stage.send(record(2, stage.downlink(1))) == []
    assert len(stage.broker.taken) == 1


async def test_the_memory_fits_beside_an_offset(stage: Stage) -> None:
    await stage.send(*[record(n, stage.downlink(n, "plain")) for n in range(1, REMEMBERED_MAX + 50)])
    kept = stage.stage.remember(3)
    assert len(kept) <= 3_900
    stage.stage.recall(3, kept)
    assert stage.stage.remember(3) == kept
    assert await stage.send(record(9, stage.downlink(REMEMBERED_MAX + 49))) == []
    stage.stage.recall(3, "%")
    assert stage.stage.remember(3) == ""


async def test_lines_that_are_none_are_told(stage: Stage) -> None:
    await stage.send(
        record(1, b"torn"), record(2, {"downlink_id": "x"}), record(3, stage.downlink(1, downlink_id="no id")),
        record(4, stage.downlink(2, content={})),
    )  # fmt: skip
    assert [code for code, _ in errors(stage.effects.sends)] == ["envelope_not_json", *["command_invalid"] * 3]
    assert stage.effects.refused == {"envelope_not_json": 1, "command_invalid": 3}


async def test_what_is_fetched_goes_to_the_mailbox_also_while_the_broker_is_down(stage: Stage) -> None:
    """In the same batch: the one for the mailbox is settled and told, the other is tried again."""
    fetched = stage.downlink(1, format="http", topic="dev-1", content={"fields": {"on": 1}})
    stage.broker.room = 0
    with pytest.raises(Retry):
        await stage.send(record(0, fetched, stage.downlink(2)))
    assert [r["report"] for r in lines(stage.told, topics.COMMANDS)] == ["sent"]
    ((device, line),) = stage.mailbox.taken
    assert (device, orjson.loads(line)) == ("dev-1", {
        "id": fetched["downlink_id"], "command_id": "c", "attempt": 1, "port": 7, "payload_b64": "AQ==", "expires_at": fetched["expires_at"],
    })  # fmt: skip
    stage.broker.room = 9
    await stage.send(record(0, fetched, stage.downlink(2)))
    assert (len(stage.mailbox.taken), len(stage.broker.taken)) == (1, 1)
