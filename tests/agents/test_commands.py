"""The command stages: lines, uplinks, time and alarms in; events and downlinks out, one state."""

from typing import Any

import orjson
import pytest
from quality_support import S, T, World, batch, catalogue, errors, lines, live, message, offer, reading, record

from preservarium import topics
from preservarium.connectors.base import report_send
from preservarium.domain.commands.device import MEMORY_S, downlink_id
from preservarium.domain.commands.lines import LINE_BYTES_MAX
from preservarium.errors import Retry
from preservarium.operations.command_desk import CommandDesk
from preservarium.stages.commands import DOWNLINKS_A_TURN_MAX, PATIENCE_US, Commanding
from preservarium.streaming.publish import partition_of
from preservarium.streaming.stage import Tick

PARTITION = partition_of(b"dev-1", 12)
KIND: dict[str, Any] = {"name": "box", "manufacturer": "m", "parser": "p", "downlink": {"timeout_s": 60}}


class Table:
    name = "c"

    def __init__(self) -> None:
        self.rows: dict[tuple[int, bytes], bytes] = {}

    def get(self, partition: int, key: bytes) -> bytes | None:
        return self.rows.get((partition, key))

    def items(self, partition: int) -> Any:
        return [(key, value) for (p, key), value in self.rows.items() if p == partition]


class Stage:
    def __init__(self) -> None:
        self.world = World(catalogue(("type", KIND)))
        self.world.devices["dev-1"] = {"device_id": "dev-1", "rev": 1, "type": "box", "enabled": True}
        self.table = Table()
        self.asked: list[set[str]] = []
        self.restart()

    def restart(self) -> None:
        async def lookup(partition: int, devices: Any) -> None:
            self.asked.append(set(devices))

        world = self.world
        self.stage = Commanding(self.table, world.known, lookup, world.documents, live(), world.clock)

    def _carry(self, effects: Any, partition: int, crash: bool = False) -> list[Any]:
        self.effects = effects
        if not crash:
            for key, value in effects.puts.get("c", {}).items():
                if value is None:
                    self.table.rows.pop((partition, key), None)
                else:
                    self.table.rows[partition, key] = value
            for callback in effects.after:
                callback()
        return effects.sends

    def _at(self, rec: Any) -> Any:
        return type(rec)(rec.offset, rec.key, rec.value, rec.headers, self.world.clock.now_us() // 1_000)

    async def lines(self, *records: Any, crash: bool = False, partition: int = PARTITION) -> list[Any]:
        given = batch(topics.COMMANDS, *map(self._at, records), partition=partition)
        return self._carry(await self.stage.lines(given), partition, crash)

    async def uplinks(self, *records: Any, old_ms: int = 0) -> list[Any]:
        given = [self._at(r) for r in records]
        given = [type(r)(r.offset, r.key, r.value, r.headers, r.timestamp - old_ms) for r in given]
        return self._carry(await self.stage.uplinks(batch(topics.VALIDATED, *given, partition=PARTITION)), PARTITION)

    async def tick(self, after_s: float = 0, *, first: bool = False, behind: bool = False) -> list[Any]:
        self.world.clock.advance(after_s)
        tick = Tick(PARTITION, self.world.clock.now_us(), first, behind)
        return self._carry(await self.stage.tick(tick), PARTITION)

    async def calm(self) -> None:
        """Let the patience after taking a partition over pass."""
        await self.tick(first=True)
        await self.tick(PATIENCE_US / S + 1)


def request(name: str = "set", **fields: Any) -> dict[str, Any]:
    return {"device_id": "dev-1", "command": name, "actor": "ann", "fields": {"on": 1}, **fields}


def told(sends: list[Any]) -> list[tuple[str, str]]:
    return [(e["event"], e["state"]) for e in lines(sends, topics.COMMAND_EVENTS)]


def sent_report(downlink: dict[str, Any], word: str = "sent") -> dict[str, Any]:
    return {"kind": "report", "device_id": "dev-1", "downlink_id": downlink["downlink_id"], "report": word}


async def test_a_request_becomes_an_event_and_a_downlink_where_the_device_is():
    stage = Stage()
    sends = await stage.lines(record(1, request()))
    assert told(sends) == [("request", "queued"), ("hand_over", "queued")]
    (downlink,) = lines(sends, topics.DOWNLINKS)
    assert downlink["downlink_id"] == downlink_id(downlink["command_id"], 1)
    assert downlink["topic"] == "devices/dev-1/down"
    assert {(s.key, s.partition) for s in sends} == {(b"dev-1", PARTITION)}
    assert stage.asked == [{"dev-1"}]


async def test_a_crash_tells_the_same_again_and_a_rerun_nothing():
    stage = Stage()
    records = [record(1, request()), record(2, request(), request("other"))]
    first = await stage.lines(*records, crash=True)
    stage.restart()
    again = await stage.lines(*records)
    assert [s.value for s in first] == [s.value for s in again]
    assert await stage.lines(*records) == []


async def test_an_uplink_confirms():
    stage = Stage()
    sends = await stage.lines(record(1, request(confirm={"component_type": "relay", "equals": 1})))
    (downlink,) = lines(sends, topics.DOWNLINKS)
    assert told(await stage.lines(record(2, sent_report(downlink)))) == [("publish", "sent")]
    stage.world.clock.advance(1)
    now = stage.world.clock.now_us()
    up = message(7, reading(1, "relay"), received_at=now)
    assert told(await stage.uplinks(record(9, up))) == [("confirm", "successful")]
    assert await stage.uplinks(record(9, up)) == []


async def test_an_answer_confirms_also_where_the_hand_over_is_done_again_by_another_worker():
    stage = Stage()
    await stage.tick(first=True)
    asked = record(1, request(confirm={"component_type": "relay", "equals": 1}))
    stage.world.clock.advance(1)
    before = message(6, reading(1, "relay"), received_at=stage.world.clock.now_us() - S)
    first = await stage.lines(asked, crash=True)
    answer = message(7, reading(1, "relay"), received_at=stage.world.clock.now_us() + S // 10)
    # The one who takes over reads the request again, some seconds after the device has answered.
    stage.restart()
    asked = stage._at(asked)
    stage.world.clock.advance(5)
    stage._at = lambda rec: rec  # as they are in Kafka
    again = await stage.lines(asked)
    assert [s.value for s in again if s.topic is topics.DOWNLINKS] == [
        s.value for s in first if s.topic is topics.DOWNLINKS
    ]
    assert await stage.uplinks(record(8, before)) == []
    assert told(await stage.uplinks(record(9, answer))) == [("confirm", "successful")]


async def test_answers_wait_for_the_requests_that_a_worker_before_may_have_sent():
    stage = Stage()
    past = [False, True]
    stage.stage._past_backlog = lambda partition: past.pop(0)
    with pytest.raises(Retry):
        await stage.uplinks(record(1, message(1, reading(1))))
    assert await stage.uplinks(record(1, message(1, reading(1)))) == []


async def test_devices_without_commands_cost_no_state():
    stage = Stage()
    assert await stage.uplinks(record(1, message(1, reading(1)))) == []
    assert stage.effects.puts == {}


async def test_a_sleeping_device_is_sent_to_when_it_is_heard():
    stage = Stage()
    offer(stage.world.documents, "type", **{**KIND, "downlink": {"sleeps": True}})
    assert told(await stage.lines(record(1, request()))) == [("request", "queued")]
    await stage.calm()
    late = message(7, reading(1), received_at=stage.world.clock.now_us() - 31 * S)
    assert await stage.uplinks(record(8, late)) == []
    awake = message(8, reading(1), received_at=stage.world.clock.now_us())
    assert told(await stage.uplinks(record(9, awake))) == [("hand_over", "queued")]


async def test_a_device_that_fetches_is_handed_its_commands_when_it_asks_and_asking_alone_costs_no_state():
    stage = Stage()
    offer(stage.world.documents, "type", **{**KIND, "downlink": {"format": "http"}})
    wake = {"kind": "wake", "device_id": "dev-1", "actor": "device"}
    assert await stage.lines(record(1, wake)) == []
    assert stage.effects.puts == {}
    assert told(await stage.lines(record(2, request()))) == [("request", "queued")]
    sends = await stage.lines(record(3, wake))
    assert told(sends) == [("hand_over", "queued")]
    (downlink,) = lines(sends, topics.DOWNLINKS)
    assert (downlink["format"], downlink["topic"]) == ("http", "dev-1")
    assert await stage.lines(record(3, wake)) == []


async def test_time_outs_wait_until_a_backlog_is_read():
    stage = Stage()
    sends = await stage.lines(record(1, request(confirm="uplink")))
    await stage.lines(record(2, sent_report(lines(sends, topics.DOWNLINKS)[0])))
    await stage.tick(61, first=True)  # a worker took over, and the time is over
    assert await stage.tick(5) == []
    assert await stage.tick(5, behind=True) == []
    assert await stage.tick(9) == []
    # A message of another device shows that the uplinks, too, are behind.
    assert await stage.uplinks(record(9, message(7, reading(1), device="other")), old_ms=60_000) == []
    assert await stage.tick(9) == []
    assert told(await stage.tick(2)) == [("time_out", "timeout")]


async def test_a_tick_whose_effects_were_not_carried_out_is_made_up_for():
    stage = Stage()
    await stage.calm()
    offer(stage.world.documents, "type", **{**KIND, "downlink": {"sleeps": True}})
    await stage.lines(record(1, request(expires_s=5)))
    stage.world.clock.advance(6)
    tick = Tick(PARTITION, stage.world.clock.now_us(), False, False)
    assert told((await stage.stage.tick(tick)).sends) == [("expire", "expired")]  # and Kafka does not take it
    assert told(await stage.tick(1)) == [("expire", "expired")]
    assert await stage.tick(1) == []


async def test_state_is_forgotten_when_nothing_is_left_to_know():
    stage = Stage()
    sends = await stage.lines(record(1, request(expires_s=60)))
    await stage.lines(record(2, sent_report(lines(sends, topics.DOWNLINKS)[0])))
    assert stage.table.rows
    await stage.calm()
    await stage.tick(MEMORY_S - 60)
    assert stage.table.rows
    await stage.tick(61)
    assert stage.table.rows == {}


async def test_only_so_many_downlinks_leave_in_one_turn():
    stage = Stage()
    addresses = [a for n in range(5_000) if partition_of((a := f"d{n}").encode(), 12) == PARTITION][:150]
    for address in addresses:
        stage.world.devices[address] = {"device_id": address, "rev": 1, "type": "box", "enabled": True}
    records = [record(n, request(device_id=a), key=a.encode()) for n, a in enumerate(addresses)]
    sends = await stage.lines(*records)
    assert len(lines(sends, topics.DOWNLINKS)) == DOWNLINKS_A_TURN_MAX
    assert len(lines(await stage.tick(), topics.DOWNLINKS)) == 50
    assert await stage.tick() == []


async def test_lines_that_cannot_be_used_are_told():
    stage = Stage()
    sends = await stage.lines(
        record(1, b'{"torn'),
        record(2, b"x" * (LINE_BYTES_MAX + 1)),
        record(3, {"kind": "dance"}),
        record(4, {"kind": "cancel", "command_id": "none"}),
        record(5, b"\n \n"),
    )
    found = errors(sends)
    assert [code for code, _ in found] == [
        "envelope_not_json", "envelope_too_large", "command_invalid", "command_invalid",
    ]  # fmt: skip
    assert found[3][1] == "cancel of none is refused: the device has no such command that has not ended"


async def test_a_line_that_is_keyed_wrongly_touches_no_state():
    stage = Stage()
    other = (PARTITION + 1) % 12
    sends = await stage.lines(record(1, request(), key=b"other"), partition=other)
    assert [e[0] for e in errors(sends)] == ["command_invalid"]
    assert stage.table.rows == {}


EUI = "70b3d57ed0aa0001"


@pytest.mark.parametrize("registered", [EUI, "70B3D57ED0AA0001", "70-B3-D5-7E-D0-AA-00-01"])
@pytest.mark.parametrize("spelled", [EUI, "70B3D57ED0AA0001", "70:b3:d5:7e:d0:aa:00:01"])
async def test_a_report_finds_its_device_however_the_network_spells_it(registered, spelled):
    stage = Stage()
    for name in {registered, spelled, EUI}:
        stage.world.devices[name] = {"device_id": registered, "rev": 1, "type": "box", "enabled": True}
    home, by_address = partition_of(registered.encode(), 12), partition_of(EUI.encode(), 12)
    asked = request(device_id=registered)
    sends = await stage.lines(record(1, asked, key=registered.encode()), partition=home)
    (downlink,) = lines(sends, topics.DOWNLINKS)
    # As the connectors send it: by the canonical form of the address.
    report = report_send({**sent_report(downlink), "device_id": spelled})
    assert report.key == EUI.encode()
    sends = await stage.lines(record(2, orjson.loads(report.value), key=report.key), partition=by_address)
    if registered != EUI:
        (onward,) = sends
        assert (onward.topic, onward.key, onward.partition) == (topics.COMMANDS, registered.encode(), None)
        sends = await stage.lines(record(3, orjson.loads(onward.value), key=onward.key), partition=home)
    assert told(sends)[0] == ("publish", "sent")
    assert {e["device_id"] for e in lines(sends, topics.COMMAND_EVENTS)} == {registered}


@pytest.mark.parametrize("registered", [EUI, "70B3D57ED0AA0001"])
@pytest.mark.parametrize("spelled", [EUI, "70B3D57ED0AA0001", "70:b3:d5:7e:d0:aa:00:01"])
async def test_people_ask_a_device_however_they_spell_it(registered, spelled):
    stage = Stage()
    for name in {registered, spelled, EUI}:
        stage.world.devices[name] = {"device_id": registered, "rev": 1, "type": "box", "enabled": True}
    home, by_address = partition_of(registered.encode(), 12), partition_of(EUI.encode(), 12)
    sent: list[Any] = []

    async def publish(sends: Any) -> None:
        sent.extend(sends)

    made = await CommandDesk(publish, stage.world.clock).request(
        spelled, {"payload": {"x": 1}, "actor": "ann", "idempotency_key": "k"}
    )
    assert sent[0].key == EUI.encode()
    sends = await stage.lines(record(1, orjson.loads(sent[0].value), key=sent[0].key), partition=by_address)
    if registered != EUI:
        (onward,) = sends
        assert onward.key == registered.encode()
        sends = await stage.lines(record(2, orjson.loads(onward.value), key=onward.key), partition=home)
    assert told(sends)[0] == ("request", "queued")
    assert {(e["device_id"], e["command_id"]) for e in lines(sends, topics.COMMAND_EVENTS)} == {
        (registered, made["command_id"])
    }


async def test_reports_of_nothing_are_nobodys_fault():
    stage = Stage()
    assert await stage.lines(record(1, sent_report({"downlink_id": "x"}))) == []


async def test_an_unknown_device_fails_the_request_and_keeps_what_waits():
    stage = Stage()
    sends = await stage.lines(record(1, request()))
    await stage.lines(record(2, request()))
    stage.world.devices.clear()
    stage.stage.profiles.forget("dev-1")
    assert told(await stage.lines(record(3, request()))) == [("request", "queued"), ("fail", "failed")]
    assert told(await stage.lines(record(4, sent_report(lines(sends, topics.DOWNLINKS)[0])))) == [
        ("publish", "sent"),
        ("confirm", "successful"),
    ]
    assert await stage.tick() == []


async def test_alarms_ask_for_the_commands_of_their_rule():
    stage = Stage()
    rule = {"name": "hot", "component_type": "temp", "kind": "high", "severity": "major", "threshold": 30}
    offer(stage.world.documents, "rule", **rule, commands=[{"on": "raised", "command": "fan", "device_id": "fan-1"}])
    transition = {
        "transition_id": "t1", "transition": "raised", "device_id": "dev-1", "rule": "hot", "detected_at": T,
        "generation": 0,
    }  # fmt: skip
    given = batch(topics.ALERTS, record(1, transition, {**transition, "generation": 3}), partition=PARTITION)
    effects = await stage.stage.alarms(given)
    (line,) = lines(effects.sends, topics.COMMANDS)
    assert (effects.sends[0].key, effects.sends[0].partition) == (b"fan-1", None)
    assert (line["command"], line["cause"], line["at"], line["actor"]) == ("fan", "t1", T, "alarm hot")
    stage.world.devices["dev-1"]["rules"] = {"hot": {"commands": []}}
    assert (await stage.stage.alarms(given)).sends == []
    stage.world.devices["dev-1"]["rules"] = {"hot": {"commands": [{"on": "never"}]}}
    assert (await stage.stage.alarms(given)).sends == []
