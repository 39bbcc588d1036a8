"""The alarm stage: readings and actions in, transitions out, one state."""

from typing import Any

import orjson
import pytest
from quality_support import (
    S,
    StateTable,
    T,
    World,
    batch,
    catalogue,
    errors,
    lines,
    live,
    message,
    offer,
    reading,
    record,
)

from preservarium import metrics, topics
from preservarium.operations.alarm_board import Board, Desk
from preservarium.stages.alarm import (
    ACTION_BYTES_MAX,
    CHECKED_A_TICK_MAX,
    DUE_A_TICK_MAX,
    GONE_AFTER_S,
    TICK_S,
    Alarming,
)
from preservarium.streaming.publish import partition_of
from preservarium.streaming.stage import Tick

TEMP: dict[str, Any] = {"name": "temp", "kind": "number", "unit": "°C"}
HOT: dict[str, Any] = {"name": "hot", "component_type": "temp", "kind": "high", "severity": "major", "threshold": 30}
PARTITION = partition_of(b"dev-1", 12)


class Stage:
    def __init__(self) -> None:
        self.world = World(catalogue(("datatype", TEMP), ("rule", HOT)))
        self.world.devices["dev-1"] = {
            "device_id": "dev-1", "rev": 1, "type": "box", "enabled": True, "rules": {"hot": {}},
        }  # fmt: skip
        self.alarming = Alarming(
            StateTable(self.world, "a"), self.world.known, self.world.documents, live(), self.world.clock
        )

    async def readings(self, *records: Any, crash: bool = False) -> list[Any]:
        self.effects = await self.alarming.observe(batch(topics.VALIDATED, *records, partition=PARTITION))
        return self.effects.sends if crash else self.world.carry_out(self.effects, PARTITION)

    async def actions(self, *records: Any, partition: int = PARTITION) -> list[Any]:
        # Whoever acts has the right time.
        at = max((x.get("at", T) for r in records for x in _objects(r.value)), default=T)
        self.world.clock.advance(max(0, min(at, T + 3_600 * S) - self.world.clock.now_us()) / 1e6)
        self.effects = await self.alarming.act(batch(topics.ALARM_ACTIONS, *records, partition=partition))
        return self.world.carry_out(self.effects, partition)


def _objects(value: bytes) -> list[dict[str, Any]]:
    found = []
    for line in value.split(b"\n"):
        try:
            found.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            continue
    return [x for x in found if isinstance(x, dict) and isinstance(x.get("at"), int)]


def value(offset: int, number: float, **fields: Any) -> Any:
    return message(offset, {**reading(number), "quality": 1}, **fields)


def action(word: str = "acknowledge", **fields: Any) -> dict[str, Any]:
    return {"device_id": "dev-1", "rule": "hot", "action": word, "actor": "ann", "at": T + 500 * S, **fields}


def told(sends: list[Any]) -> list[tuple[str, str]]:
    return [(x["transition"], x["state"]) for x in lines(sends, topics.ALERTS)]


async def test_transitions_go_where_the_device_is():
    stage = Stage()
    sends = await stage.readings(record(1, value(1, 31), trace=b"00"), record(2, value(2, 20)))
    assert told(sends) == [("raised", "unacknowledged"), ("cleared", "returned_unacknowledged")]
    assert {(s.topic.name, s.key, s.partition) for s in sends} == {
        ("iot_alerts", b"dev-1", PARTITION),
        ("alarm_standing", b'["dev-1","hot","-1"]', PARTITION),
    }
    assert sends[0].headers == (("trace", b"00"),)


async def test_a_crash_tells_the_same_again_and_a_rerun_nothing():
    stage = Stage()
    records = [record(i, value(i, 31 if i % 2 else 20)) for i in range(6)]
    first = await stage.readings(*records, crash=True)
    again = await stage.readings(*records)
    assert [s.value for s in first] == [s.value for s in again]
    assert len(first) > 3
    assert await stage.readings(*records) == []


async def test_people_act_through_the_topic():
    stage = Stage()
    await stage.readings(record(1, value(1, 31)))
    assert told(await stage.actions(record(1, action(), action("comment", comment="fan is off")))) == [
        ("acknowledged", "acknowledged"),
        ("commented", "acknowledged"),
    ]
    assert told(await stage.readings(record(2, value(2, 20)))) == [("cleared", "normal")]
    assert await stage.actions(record(1, action())) == []


async def test_an_action_that_cannot_be_is_told():
    stage = Stage()
    await stage.readings(record(1, value(1, 20)))
    sends = await stage.actions(
        record(1, action()),
        record(2, b'{"torn'),
        record(3, b"[]"),
        record(4, action("explode")),
        record(5, b"x" * (ACTION_BYTES_MAX + 1)),
        record(6, action(rule="cold")),
        record(7, b"\n \n"),
    )
    assert errors(sends) == [
        ("action_invalid", "acknowledge of rule 'hot' is refused: the alarm is normal"),
        ("envelope_not_json", errors(sends)[1][1]),
        ("action_invalid", "an action is a JSON object"),
        ("action_invalid", "there is no action 'explode'"),
        ("envelope_too_large", f"an action of {ACTION_BYTES_MAX + 1} bytes; it may have {ACTION_BYTES_MAX}"),
        ("action_invalid", "acknowledge of rule 'cold' is refused: no such rule watches the device"),
    ]
    assert stage.effects.refused == {"action_invalid": 4, "envelope_not_json": 1, "envelope_too_large": 1}


async def test_an_action_that_is_keyed_wrongly_touches_no_state():
    stage = Stage()
    other = (PARTITION + 1) % 12
    sends = await stage.actions(record(1, action(), key=b"other"), partition=other)
    assert [e[0] for e in errors(sends)] == ["action_invalid"]
    assert stage.effects.puts == {}


EUI = "70b3d57ed0aa0001"


@pytest.mark.parametrize("registered", [EUI, "70B3D57ED0AA0001", "70-b3-D5-7e-d0-aa-00-01"])
@pytest.mark.parametrize("spelled", [EUI, "70B3D57ED0AA0001", "70:b3:d5:7e:d0:aa:00:01"])
async def test_people_act_on_a_device_however_they_spell_it(registered: str, spelled: str):
    stage = Stage()
    for name in {registered, spelled, EUI}:  # as the look-up finds it
        stage.world.devices[name] = {**stage.world.devices["dev-1"], "device_id": registered}
    sent: list[Any] = []

    async def publish(sends: Any) -> None:
        sent.extend(sends)

    home, by_address = (partition_of(name.encode(), 12) for name in (registered, EUI))

    async def act(record: Any, partition: int) -> list[Any]:
        return stage.world.carry_out(
            await stage.alarming.act(batch(topics.ALARM_ACTIONS, record, partition=partition)), partition
        )

    raised = batch(
        topics.VALIDATED, record(1, value(1, 31, device=registered), key=registered.encode()), partition=home
    )
    stage.world.carry_out(await stage.alarming.observe(raised), home)
    desk = Desk(Board(), publish, stage.world.clock)
    action_id = await desk.act({k: v for k, v in action(device_id=spelled).items() if k != "at"})
    (first,) = sent
    assert first.key == EUI.encode()
    sends = await act(record(1, orjson.loads(first.value), key=first.key), by_address)
    if registered != EUI:
        (onward,) = sends
        assert (onward.topic, onward.key, onward.partition) == (topics.ALARM_ACTIONS, registered.encode(), None)
        line = orjson.loads(onward.value)
        sends = await act(record(2, line, key=onward.key), home)
        # What a crash has sent on twice is done once.
        assert await act(record(3, line, key=onward.key), home) == []
    assert told(sends) == [("acknowledged", "acknowledged")]
    (answer,) = lines(sends, topics.ALARM_ANSWERS)
    assert (answer["action_id"], answer["device_id"], answer["outcome"]) == (action_id, registered, "done")
    assert [x["device_id"] for x in standing(sends)] == [registered]


async def test_an_alarm_of_a_device_that_is_gone_can_be_acted_on_by_any_spelling():
    stage = Stage()
    upper = EUI.upper()
    stage.world.devices[upper] = {**stage.world.devices["dev-1"], "device_id": upper}
    home, by_address = partition_of(upper.encode(), 12), partition_of(EUI.encode(), 12)
    raised = batch(topics.VALIDATED, record(1, value(1, 31, device=upper), key=upper.encode()), partition=home)
    stage.world.carry_out(await stage.alarming.observe(raised), home)
    stage.world.devices.clear()
    stage.alarming.changed(upper)
    given = record(1, action("comment", device_id=upper, comment="where is it?"), key=EUI.encode())
    (onward,) = (await stage.alarming.act(batch(topics.ALARM_ACTIONS, given, partition=by_address))).sends
    assert onward.key == upper.encode()
    there = batch(topics.ALARM_ACTIONS, record(2, orjson.loads(onward.value), key=onward.key), partition=home)
    sends = (await stage.alarming.act(there)).sends
    assert lines(sends, topics.ALARM_ANSWERS)[0]["outcome"] == "done"


async def test_an_action_on_a_device_without_rules_is_refused_and_leaves_nothing():
    stage = Stage()
    stage.world.devices.clear()
    assert [e[0] for e in errors(await stage.actions(record(1, action())))] == ["action_invalid"]
    assert stage.world.tables == {}


async def test_a_device_without_rules_has_no_state():
    stage = Stage()
    stage.world.devices["dev-1"]["rules"] = {}
    assert await stage.readings(record(1, value(1, 99))) == []
    assert stage.world.tables == {}


async def test_a_rule_that_is_withdrawn_ends_its_alarm():
    stage = Stage()
    await stage.readings(record(1, value(1, 31)))
    offer(stage.world.documents, "rule", **{**HOT, "enabled": False})
    assert told(await stage.readings(record(2, value(2, 31)))) == [("withdrawn", "normal")]


async def test_a_changed_rule_counts_from_the_next_batch():
    stage = Stage()
    assert told(await stage.readings(record(1, value(1, 29)))) == []
    offer(stage.world.documents, "rule", **{**HOT, "threshold": 25})
    sends = await stage.readings(record(2, value(2, 29)))
    assert told(sends) == [("raised", "unacknowledged")]
    assert lines(sends, topics.ALERTS)[0]["threshold"] == 25


async def test_a_device_whose_datatype_is_another_one_is_watched_by_that():
    stage = Stage()
    off = {
        "name": "off",
        "component_type": "temp",
        "kind": "deviation",
        "severity": "minor",
        "setpoint": 350,
        "threshold": 30,
    }
    offer(stage.world.documents, "rule", **off)
    other = partition_of(b"dev-2", 12)
    for name, more in (("dev-1", {"datatypes": {"temp": {"circular": 360}}}), ("dev-2", {})):
        stage.world.devices[name] = {
            "device_id": name,
            "rev": 1,
            "type": "box",
            "enabled": True,
            "rules": {"off": {}},
            **more,
        }
    assert told(await stage.readings(record(1, value(1, 10)))) == []
    straight = batch(topics.VALIDATED, record(1, value(1, 10, device="dev-2"), key=b"dev-2"), partition=other)
    assert told((await stage.alarming.observe(straight)).sends) == [("raised", "unacknowledged")]


async def test_the_state_says_where_the_alarm_stands():
    stage = Stage()
    await stage.readings(record(1, value(1, 31)))
    state = orjson.loads(stage.world.tables["a", PARTITION, b"dev-1"])
    assert state["g"]["0"]["m"] == {"3": [1, 0]}
    assert state["g"]["0"]["a"]["hot"]["-1"][3] == "unacknowledged"


def standing(sends: list[Any]) -> list[Any]:
    return [s.value and orjson.loads(s.value) for s in sends if s.topic is topics.ALARM_STANDING]


async def test_what_is_not_normal_stands_on_a_topic_and_leaves_it_when_it_is():
    stage = Stage()
    (raised,) = standing(await stage.readings(record(1, value(1, 20)), record(2, value(2, 31))))
    assert (raised["state"], raised["active"], raised["value"], raised["threshold"]) == ("unacknowledged", True, 31, 30)
    assert standing(await stage.readings(record(3, value(3, 32)))) == []  # nothing changed
    (acknowledged,) = standing(await stage.actions(record(1, action(comment="seen"))))
    assert (acknowledged["state"], acknowledged["actor"], acknowledged["comment"]) == ("acknowledged", "ann", "seen")
    # Several changes in a batch are one: the last.
    assert standing(
        await stage.readings(record(4, value(4, 20)), record(5, value(5, 33)), record(6, value(6, 20)))
    ) == [{**standing(stage.effects.sends)[0], "state": "returned_unacknowledged", "active": False}]
    assert standing(await stage.actions(record(2, action()))) == [None]


async def test_a_normal_alarm_that_is_shelved_stands_too():
    stage = Stage()
    await stage.readings(record(1, value(1, 20)))
    sends = await stage.actions(record(1, action("shelve", duration_s=60)))
    assert told(sends) == []
    (shelved,) = standing(sends)
    assert (shelved["state"], shelved["alarm_id"], shelved["severity"]) == ("shelved", "", "major")
    assert shelved["shelved_until"] == T + 560 * S
    later = message(9, {**reading(20), "quality": 1}, received_at=T + 561 * S)
    assert standing(await stage.readings(record(9, later))) == [None]


@pytest.mark.parametrize("done", ["shelve", "out_of_service", "suppress"])
async def test_what_a_rule_says_of_its_condition_is_not_said_of_a_normal_alarm(done: str):
    stage = Stage()
    hot = "temp at {value} {unit}, above {threshold}"
    offer(stage.world.documents, "rule", **{**HOT, "message": hot})
    more = {"duration_s": 3_000} if done == "shelve" else {}
    (aside,) = standing(await stage.actions(record(1, action(done, **more))))
    (over,) = standing(await stage.readings(record(1, value(1, 31))))  # nobody is told, and it holds
    (under,) = standing(await stage.readings(record(2, value(2, 20))))
    assert [one["message"] for one in (aside, over, under)] == ["", "temp at 31 °C, above 30", ""]
    assert (aside["value"], over["value"]) == (None, 31)


async def test_a_shelved_alarm_whose_rule_goes_stands_no_more():
    stage = Stage()
    await stage.readings(record(1, value(1, 20)))
    await stage.actions(record(1, action("out_of_service")))
    offer(stage.world.documents, "rule", **{**HOT, "enabled": False})
    assert standing(await stage.readings(record(2, value(2, 20)))) == [None]


async def test_a_replay_changes_nothing_of_what_stands():
    stage = Stage()
    assert standing(await stage.readings(record(1, value(1, 31, generation=1)))) == []


async def test_every_action_is_answered():
    stage = Stage()
    await stage.readings(record(1, value(1, 31)))
    sends = await stage.actions(
        record(1, action(action_id="one", comment="seen")),
        record(2, action(action_id="two")),
        record(3, action("shelve", duration_s=60)),
        record(4, action("explode", action_id="three", actor=7)),
        record(5, action(rule="cold", action_id="four")),
        record(6, b'{"torn'),
    )
    answers = lines(sends, topics.ALARM_ANSWERS)
    assert [(a["action"], a["outcome"], a["code"], a["state"], a["actor"]) for a in answers] == [
        ("acknowledge", "done", "", "acknowledged", "ann"),
        ("acknowledge", "refused", "already_acknowledged", "acknowledged", "ann"),
        ("shelve", "done", "", "shelved", "ann"),
        ("explode", "refused", "action_invalid", "", ""),
        ("acknowledge", "refused", "unknown_alarm", "", "ann"),
    ]
    assert [a["action_id"] for a in answers[:2]] == ["one", "two"]
    assert len({a["action_id"] for a in answers}) == 5
    (raised,) = {a["alarm_id"] for a in answers[:3]}
    transitions = lines(sends, topics.ALERTS)
    assert answers[0]["transitions"] == [transitions[0]["transition_id"]]
    assert transitions[0]["alarm_id"] == raised
    assert answers[1]["reason"] == "the alarm is acknowledged already"
    assert answers[2]["until"] == T + 560 * S


async def test_answers_are_counted_with_their_time():
    def counted(outcome: str) -> float:
        return metrics.ALARM_ACTIONS.labels("acknowledge", outcome)._value.get()

    stage = Stage()
    await stage.readings(record(1, value(1, 31)))
    before = counted("done"), counted("refused"), metrics.ALARM_ANSWER_SECONDS._sum.get()
    stage.world.clock.advance((T + 502 * S - stage.world.clock.now_us()) / S)
    await stage.actions(record(1, action(), action()))
    assert (counted("done"), counted("refused")) == (before[0] + 1, before[1] + 1)
    assert metrics.ALARM_ANSWER_SECONDS._sum.get() == pytest.approx(before[2] + 4)


async def test_an_action_that_is_sent_twice_is_done_once_and_answered_once():
    stage = Stage()
    await stage.readings(record(1, value(1, 31)))
    first = await stage.actions(record(1, action("comment", comment="x", action_id="one")))
    assert (len(told(first)), len(lines(first, topics.ALARM_ANSWERS))) == (1, 1)
    assert await stage.actions(record(2, action("comment", comment="x", action_id="one"))) == []
    many = [action("comment", comment=str(n), action_id=f"more-{n}") for n in range(50)]
    await stage.actions(record(3, *many))
    state = orjson.loads(stage.world.tables["a", PARTITION, b"dev-1"])
    assert len(state["g"]["0"]["acts"]) == 16


# --- time


GONE: dict[str, Any] = {
    "name": "gone",
    "component_type": "temp",
    "kind": "no_data",
    "severity": "minor",
    "no_data_s": 60,
}


class Silent(Stage):
    """A stage whose device is also watched for silence; its clock starts at T."""

    def __init__(self, settle_s: float = 30.0) -> None:
        super().__init__()
        offer(self.world.documents, "rule", **GONE)
        self.world.devices["dev-1"]["rules"]["gone"] = {}
        self.settle_s = settle_s
        self.restart()

    def restart(self) -> None:
        self.alarming = Alarming(
            StateTable(self.world, "a"),
            self.world.known,
            self.world.documents,
            live(alarm={"settle_s": self.settle_s}),
            self.world.clock,
        )
        self.first = True

    async def tick(self, at: float, *, behind: bool = False, crash: bool = False) -> list[Any]:
        effects = await self.alarming.tick(Tick(PARTITION, T + round(at * S), self.first, behind))
        self.first = False
        return effects.sends if crash else self.world.carry_out(effects, PARTITION)


async def test_silence_is_told_within_a_tick_of_its_deadline():
    stage = Silent()
    assert told(await stage.tick(0)) == []
    await stage.readings(record(1, value(1, 20)))  # at T + 1 s
    assert told(await stage.tick(60)) == []
    sends = await stage.tick(65)
    assert told(sends) == [("raised", "unacknowledged")]
    assert {(s.key, s.partition) for s in sends if s.topic is topics.ALERTS} == {(b"dev-1", PARTITION)}
    assert lines(sends, topics.ALERTS)[0]["occurred_at"] == T + 61 * S
    assert told(await stage.tick(70)) == []
    assert told(await stage.readings(record(2, value(2, 20, timestamp=T + 80 * S)))) == [
        ("cleared", "returned_unacknowledged")
    ]


async def test_a_tick_that_crashes_is_told_again_with_the_same_ids():
    stage = Silent()
    await stage.tick(0)
    await stage.readings(record(1, value(1, 20)))
    first = await stage.tick(65, crash=True)
    again = await stage.tick(65)
    assert [s.value for s in first] == [s.value for s in again]
    assert told(again) == [("raised", "unacknowledged")]
    assert await stage.tick(66) == []


async def test_a_worker_that_takes_over_finds_the_deadlines_and_waits_for_what_may_be_on_its_way():
    stage = Silent()
    await stage.readings(record(1, value(1, 20)))
    stage.restart()
    assert told(await stage.tick(100)) == []
    assert told(await stage.tick(129)) == []
    assert told(await stage.tick(130, behind=True)) == []
    assert told(await stage.tick(131)) == [("raised", "unacknowledged")]
    assert lines_of(stage) == [T + 61 * S]


async def test_nothing_is_silent_while_a_backlog_is_worked_off():
    stage = Silent()
    await stage.tick(0)
    stage.world.clock.advance(1_000.0)
    clock_s = (stage.world.clock.now_us() - T) / S
    await stage.readings(record(1, value(1, 20)))  # received a thousand seconds ago
    assert told(await stage.tick(clock_s + 5)) == []
    assert told(await stage.tick(clock_s + 31)) == [("raised", "unacknowledged")]


async def test_a_device_that_is_not_known_now_is_left_alone():
    stage = Silent()
    await stage.tick(0)
    await stage.readings(record(1, value(1, 20)))
    stage.world.devices.clear()
    stage.alarming.rules.forget("dev-1")
    assert await stage.tick(65) == []


async def test_many_silent_devices_are_seen_to_in_ticks_that_follow_at_once():
    stage = Silent()
    assert stage.alarming.tick_s() == TICK_S
    await stage.tick(0)
    names = [f"many-{i}" for i in range(DUE_A_TICK_MAX + 5)]
    for name in names:
        stage.world.devices[name] = {**stage.world.devices["dev-1"], "device_id": name}
    await stage.readings(*(record(i, value(i, 20, at=1, device=name)) for i, name in enumerate(names)))
    first = told(await stage.tick(65))
    assert len(first) == DUE_A_TICK_MAX
    assert stage.alarming.tick_s() < 1
    assert len(told(await stage.tick(66))) == 5
    stage.world.clock.advance(TICK_S)
    assert stage.alarming.tick_s() == TICK_S


async def test_ticks_cost_nothing_where_nothing_is_due():
    stage = Silent()
    await stage.tick(0)
    for i in range(1, 400):
        await stage.readings(record(i, value(i, 20)))
    index = stage.alarming._deadlines[PARTITION]
    assert len(index._queue) == 1
    assert index._at == {"dev-1": T + (399 + 60) * S + 1}
    effects = await stage.alarming.tick(Tick(PARTITION, T + 400 * S, False, False))
    assert (effects.sends, effects.puts) == ([], {})


def lines_of(stage: Silent) -> list[int]:
    state = orjson.loads(stage.world.tables["a", PARTITION, b"dev-1"])
    return [row[7] for rule, pins in state["g"]["0"]["a"].items() if rule == "gone" for row in pins.values()]


async def test_a_shelf_that_ends_without_a_message_leaves_what_stands():
    stage = Silent()
    await stage.tick(0)
    await stage.readings(record(1, value(1, 20)))
    (shelved,) = standing(await stage.actions(record(1, action("shelve", duration_s=30, at=T + 10 * S))))
    assert shelved["state"] == "shelved"
    assert standing(await stage.tick(39)) == []
    assert standing(await stage.tick(50)) == [None]
    assert standing(await stage.tick(51)) == []


# --- clocks that are wrong


@pytest.mark.parametrize("ahead_s", [3_600.0, 20 * 86_400.0])
async def test_a_clock_that_was_ahead_for_a_moment_holds_up_no_deadline(ahead_s: float):
    stage = Silent()
    await stage.tick(0)
    stage.world.clock.jump(ahead_s)
    await stage.readings(record(1, value(1, 20)))
    await stage.tick(ahead_s + 1)
    stage.world.clock.jump(-ahead_s)
    sends = [x for at in range(65, 200, 5) for x in told(await stage.tick(at))]
    assert sends == [("raised", "unacknowledged")]


async def test_a_shelf_ends_after_its_duration_whatever_clock_the_operator_has():
    stage = Stage()
    await stage.readings(record(1, value(1, 31)))
    ahead = action("shelve", duration_s=60, at=stage.world.clock.now_us() + 20 * 86_400 * S)
    effects = await stage.alarming.act(batch(topics.ALARM_ACTIONS, record(1, ahead), partition=PARTITION))
    (shelved,) = standing(stage.world.carry_out(effects, PARTITION))
    assert shelved["shelved_until"] == stage.world.clock.now_us() + 60 * S


# --- what nothing watches any more


class Watched(Silent):
    """A stage with an alarm that stands; ticks pass on both of its clocks."""

    removed: set[str]

    def restart(self) -> None:
        self.removed = getattr(self, "removed", set())
        self.alarming = Alarming(
            StateTable(self.world, "a"),
            self.world.known,
            self.world.documents,
            live(alarm={"settle_s": self.settle_s}),
            self.world.clock,
            removed=lambda _partition, device_id: device_id in self.removed,
        )
        self.first = True

    async def pass_time(self, seconds: float, *, behind: bool = False) -> list[Any]:
        """Ticks of five seconds; what was sent."""
        sends = []
        for _ in range(round(seconds / 5)):
            self.world.clock.advance(5)
            sends += await self.tick((self.world.clock.now_us() - T) / S, behind=behind)
        return sends

    async def raise_alarm(self, device: str = "dev-1") -> None:
        sends = await self.readings(record(1, value(1, 31, device=device), key=device.encode()))
        assert ("raised", "unacknowledged") in told(sends)

    def change(self, what: str) -> None:
        device, documents = self.world.devices["dev-1"], self.world.documents
        if what == "device_disabled":
            self.world.devices["dev-1"] = {**device, "enabled": False}
        elif what == "device_removed":
            del self.world.devices["dev-1"]
            self.removed.add("dev-1")
        elif what == "moved to another type":
            offer(documents, "type", name="other", rules=[])
            self.world.devices["dev-1"] = {**device, "type": "other", "rules": {}}
        elif what == "rule_disabled":
            offer(documents, "rule", **{**HOT, "enabled": False})
        elif what == "rule_moved":
            offer(documents, "rule", **{**HOT, "component_type": "humidity"})
        else:
            offer(documents, "rule", **{**HOT, "severity": "awful"})
        if not what.startswith("rule"):
            self.alarming.changed("dev-1")


def ended(sends: list[Any]) -> list[tuple[str, str]]:
    return [(x["transition"], x.get("reason", "")) for x in lines(sends, topics.ALERTS) if x["rule"] == "hot"]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("device_disabled", "device_disabled"),
        ("device_removed", "device_removed"),
        ("moved to another type", "rule_removed"),
        ("rule_disabled", "rule_disabled"),
        ("rule_moved", "rule_moved"),
        ("rule_unusable", "rule_unusable"),
    ],
)
@pytest.mark.parametrize("restarts", [False, True])
async def test_an_alarm_ends_by_itself_when_what_watched_it_is_gone(what: str, reason: str, restarts: bool):
    stage = Watched()
    await stage.tick(0)
    await stage.raise_alarm()
    stage.change(what)
    if restarts:
        stage.restart()
    early = await stage.pass_time(GONE_AFTER_S - 5)
    assert ended(early) == []
    sends = await stage.pass_time(20)
    assert ended(sends) == [("withdrawn", reason)]
    assert None in standing(sends)
    assert ended(await stage.pass_time(60)) == []


async def test_a_device_that_is_registered_again_within_seconds_keeps_its_alarm():
    stage = Watched()
    await stage.tick(0)
    await stage.raise_alarm()
    document = stage.world.devices["dev-1"]
    stage.change("device_removed")
    await stage.pass_time(20)
    stage.world.devices["dev-1"] = document
    stage.removed.clear()
    stage.alarming.changed("dev-1")
    assert ended(await stage.pass_time(120)) == []
    assert told(await stage.readings(record(2, value(2, 20))))[-1] == ("cleared", "returned_unacknowledged")


async def test_a_device_that_is_merely_not_known_keeps_its_alarm_and_people_can_act_on_it():
    stage = Watched()
    await stage.tick(0)
    await stage.raise_alarm()
    del stage.world.devices["dev-1"]
    stage.alarming.changed("dev-1")
    assert ended(await stage.pass_time(120)) == []
    assert told(await stage.actions(record(1, action()))) == [("acknowledged", "acknowledged")]
    assert told(await stage.actions(record(2, action("clear")))) == [("withdrawn", "normal")]


async def test_a_tick_that_crashes_ends_the_alarm_again_with_the_same_id():
    stage = Watched()
    await stage.tick(0)
    await stage.raise_alarm()
    stage.change("device_disabled")
    await stage.pass_time(GONE_AFTER_S)
    stage.world.clock.advance(5)
    at = (stage.world.clock.now_us() - T) / S
    first = lines(await stage.tick(at, crash=True), topics.ALERTS)
    again = lines(await stage.tick(at), topics.ALERTS)
    assert [x["transition"] for x in first] == ["withdrawn"]
    assert first == again


async def test_a_changed_rule_of_many_devices_is_seen_to_in_ticks_that_follow_at_once():
    stage = Watched()
    await stage.tick(0)
    names = [f"many-{i}" for i in range(2 * CHECKED_A_TICK_MAX + 5)]
    for name in names:
        stage.world.devices[name] = {**stage.world.devices["dev-1"], "device_id": name}
    await stage.readings(*(record(i, value(i, 31, at=1, device=name)) for i, name in enumerate(names)))
    await stage.pass_time(30)
    stage.change("rule_disabled")
    counts = []
    for _ in range(4):
        effects = await stage.alarming.tick(Tick(PARTITION, stage.world.clock.now_us(), False, True))
        stage.world.carry_out(effects, PARTITION)
        counts.append(stage.alarming.tick_s() < 1)
    assert counts[:2] == [True, True]
    stage.world.clock.advance(GONE_AFTER_S)
    found = []
    for _ in range(4):
        effects = await stage.alarming.tick(Tick(PARTITION, stage.world.clock.now_us(), False, True))
        found.append(len(lines(stage.world.carry_out(effects, PARTITION), topics.ALERTS)))
    assert found == [CHECKED_A_TICK_MAX, CHECKED_A_TICK_MAX, 5, 0]


async def test_an_action_on_what_is_listed_and_nothing_is_known_of_takes_it_off_the_list():
    stage = Stage()
    stage.world.devices.clear()
    sends = await stage.actions(record(1, action(alarm_id="f" * 32)))
    assert errors(sends) == [
        (
            "action_invalid",
            "acknowledge of rule 'hot' is refused: the occurrence is over, or another one has taken its place",
        )
    ]
    assert standing(sends) == [None]
