"""Commands to devices: the machine, one device's queue, and what may happen to both."""

import copy
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quality_support import S, T, message, reading

from preservarium.domain.commands.alarm_requests import alarm_requests, check_rule_commands
from preservarium.domain.commands.confirm import check_confirm, is_confirmed
from preservarium.domain.commands.device import (
    LOST_AFTER_S,
    MEMORY_S,
    OPEN_MAX,
    DeviceCommands,
    Turn,
    command_id,
    downlink_id,
)
from preservarium.domain.commands.lines import EXPIRES_S_MAX, LINE_BYTES_MAX, parse_line
from preservarium.domain.commands.machine import OVER, TRANSITIONS, Event, Refusal, State, step
from preservarium.domain.commands.profile import Profile, check_downlink, compile_profile
from preservarium.errors import Reject

AWAKE = Profile(format="plain", topic="devices/dev-1/down", parser="p")
SLEEPY = Profile(format="plain", topic="devices/dev-1/down", parser="p", sleeps=True)
DAY = 86_400


def test_every_state_takes_or_refuses_every_event():
    assert set(TRANSITIONS) == set(State)
    for row in TRANSITIONS.values():
        assert set(row) == set(Event)
        assert all(isinstance(target, State | Refusal) for target in row.values())
    assert all(set(TRANSITIONS[state].values()) == {Refusal.IS_OVER} for state in OVER)


@pytest.mark.parametrize("state", State)
def test_every_command_can_end_and_every_state_is_reached(state):
    reached = {State.QUEUED}
    while new := {t for s in reached for t in TRANSITIONS[s].values() if isinstance(t, State)} - reached:
        reached |= new
    assert state in reached


def test_a_queued_command_that_was_not_handed_over_cannot_be_reported_on():
    for event in (Event.PUBLISH, Event.DELIVER, Event.CONFIRM, Event.TIME_OUT):
        assert step(State.QUEUED, event, tries=0, handed_over=False) is Refusal.NOT_SENT
    assert step(State.QUEUED, Event.CANCEL, tries=1, handed_over=True) is Refusal.HANDED_OVER
    assert step(State.QUEUED, Event.CANCEL, tries=1, handed_over=False) is State.CANCELLED
    assert step(State.QUEUED, Event.PUBLISH, tries=1, handed_over=False) is Refusal.OTHER_TRY


# --- one device ------------------------------------------------------------------------------------------------------


class Device:
    """A device's commands with the state written and read again after each step."""

    def __init__(self, profile: Profile = AWAKE) -> None:
        self.profile = profile
        self.document: dict[str, Any] | None = None
        self.offset = 0
        self.now = T
        self.events: list[Any] = []
        self.downlinks: list[Any] = []

    def _do(self, work: Any) -> Any:
        one = DeviceCommands("dev-1", orjson.loads(orjson.dumps(self.document)) if self.document else None)
        outcome = work(one)
        self.document = one.document()
        self.events += outcome.events
        self.downlinks += outcome.downlinks
        self.due = one.due_us(self.profile)
        return outcome

    def line(self, *, again: bool = False, **fields: Any) -> Any:
        self.offset += not again
        parsed = parse_line(
            {"at": self.now, "actor": "ann", **fields}, device_id="dev-1", at=self.now, key=f"3:{self.offset}"
        )
        place = ("c3", self.offset, 0)
        return self._do(lambda one: getattr(one, parsed.kind)(parsed, self.profile, Turn(self.now), *place))

    def request(self, **fields: Any) -> Any:
        return self.line(**{"command": "set", "fields": {"on": 1}, **fields})

    def report(self, word: str, number: int = -1, **fields: Any) -> Any:
        return self.line(kind="report", report=word, downlink_id=self.downlinks[number]["downlink_id"], **fields)

    def uplink(self, *readings: Any, received_at: int | None = None, **fields: Any) -> Any:
        self.offset += 1
        at = self.now if received_at is None else received_at
        up = message(self.offset, *readings, received_at=at, **fields)
        return self._do(lambda one: one.uplink(up, self.profile, Turn(self.now), awake_us=30 * S))

    def tick(self, after_s: float = 0) -> Any:
        self.now += round(after_s * S)
        return self._do(lambda one: one.tick(self.profile, Turn(self.now)))

    def states(self, number: int = 0) -> list[str]:
        ids = list(dict.fromkeys(e["command_id"] for e in self.events))
        return [e["state"] for e in self.events if e["command_id"] == ids[number]]

    def story(self, number: int = 0) -> list[str]:
        ids = list(dict.fromkeys(e["command_id"] for e in self.events))
        return [e["event"] for e in self.events if e["command_id"] == ids[number]]


def test_a_command_goes_out_and_is_confirmed_by_its_uplink():
    device = Device()
    device.request(confirm={"component_type": "relay", "equals": 1})
    assert device.downlinks == [
        {
            "downlink_id": downlink_id(command_id("dev-1", "3:1"), 1),
            "command_id": command_id("dev-1", "3:1"),
            "device_id": "dev-1",
            "attempt": 1,
            "expires_at": T + DAY * S,
            "format": "plain",
            "topic": "devices/dev-1/down",
            "qos": 1,
            "parser": "p",
            "variables": {},
            "content": {"fields": {"on": 1}},
            "confirmed": False,
        }
    ]
    device.now += S
    device.report("sent")
    device.uplink(reading(0, "relay"))
    device.uplink(reading(1, "relay"))
    assert device.story() == ["request", "hand_over", "publish", "confirm"]
    assert device.states() == ["queued", "queued", "sent", "successful"]
    assert [e["sequence"] for e in device.events] == [1, 2, 3, 4]
    assert len({e["event_id"] for e in device.events}) == 4
    assert device.events[-1]["ended_at"] == device.now


def test_one_command_at_a_time_in_the_order_of_priority_and_arrival():
    device = Device()
    for name, priority in (("a", 0), ("b", 0), ("c", 5), ("d", 0)):
        device.request(command=name, priority=priority)
    sent = []
    while len(sent) < 4:
        assert len(device.downlinks) == len(sent) + 1
        sent.append(next(e["command"] for e in device.events if e["command_id"] == device.downlinks[-1]["command_id"]))
        device.report("sent")
    assert sent == ["a", "c", "b", "d"]


def test_the_same_key_is_the_same_command_also_when_it_has_ended():
    device = Device()
    device.request(idempotency_key="k")
    assert device.request(idempotency_key="k", fields={"on": 0}).repeated is State.QUEUED
    device.report("sent")
    assert device.request(idempotency_key="k").repeated is State.SUCCESSFUL
    assert len(device.downlinks) == 1
    device.tick(MEMORY_S + 1)
    assert device.document is None
    device.request(idempotency_key="k")
    assert len(device.downlinks) == 2


def test_a_key_is_remembered_as_long_as_its_command_could_still_be_sent():
    device = Device()
    device.request(idempotency_key="k", expires_s=EXPIRES_S_MAX)
    device.report("sent")
    device.tick(EXPIRES_S_MAX - 1)
    assert device.request(idempotency_key="k").repeated is State.SUCCESSFUL


def test_a_sleeping_device_is_sent_its_command_when_it_is_heard():
    device = Device(SLEEPY)
    device.request(confirm="uplink")
    device.tick(600)
    assert device.downlinks == []
    device.uplink(reading(1))
    assert len(device.downlinks) == 1
    device.report("sent")
    device.now += 60 * S
    device.uplink(reading(1))
    assert device.states()[-1] == "successful"


def test_an_uplink_out_of_a_backlog_wakes_nothing():
    device = Device(SLEEPY)
    device.request()
    device.uplink(reading(1), received_at=device.now - 31 * S)
    assert device.downlinks == []


def test_an_uplink_from_before_the_downlink_confirms_nothing():
    device = Device()
    device.request(confirm="uplink")
    device.report("sent")
    device.uplink(reading(1), received_at=T - 1)
    assert device.states()[-1] == "sent"


def test_an_answer_that_overtakes_the_report_counts():
    device = Device()
    device.request(confirm="uplink")
    device.now += S
    device.uplink(reading(1))
    assert device.states()[-1] == "successful"
    assert device.report("sent").refusal is Refusal.UNKNOWN


def test_a_replay_is_no_uplink():
    device = Device(SLEEPY)
    device.request()
    device.uplink(reading(1), generation=7)
    assert device.downlinks == []


def test_what_is_not_confirmed_is_tried_again_and_then_times_out():
    device = Device()
    device.request(confirm="uplink", timeout_s=10, tries=2)
    device.report("sent")
    assert device.due == device.now + 10 * S
    device.tick(10)
    assert [d["attempt"] for d in device.downlinks] == [1, 2]
    assert device.report("sent", 0).refusal is Refusal.OTHER_TRY
    device.report("sent")
    device.tick(10)
    assert device.story() == ["request", "hand_over", "publish", "retry", "hand_over", "publish", "time_out"]
    assert device.states()[-1] == "timeout"


def test_a_late_acknowledgement_of_an_earlier_try_counts():
    device = Device()
    device.request(confirm="delivered", timeout_s=10, tries=2)
    device.report("sent")
    device.tick(10)
    device.report("acknowledged", 0)
    assert device.states()[-2:] == ["delivered", "successful"]


def test_a_gateways_word_does_not_confirm_what_the_device_is_to_acknowledge():
    device = Device()
    device.request(confirm="delivered", confirmed=True)
    device.report("sent")
    device.report("transmitted")
    assert device.states()[-1] == "delivered"
    assert device.report("acknowledged").refusal is None
    assert device.states()[-1] == "successful"


def test_what_the_device_does_not_acknowledge_is_tried_again_and_then_fails():
    device = Device()
    device.request(confirm="delivered", confirmed=True, tries=2)
    device.report("sent")
    device.report("not_acknowledged", reason="no answer")
    device.report("sent")
    device.report("not_acknowledged", reason="no answer")
    assert device.story()[-4:] == ["retry", "hand_over", "publish", "fail"]
    assert device.events[-1]["reason"] == "no answer"


def test_a_command_expires_in_the_queue():
    device = Device(SLEEPY)
    device.request(expires_s=60)
    assert device.due == T + 60 * S
    device.tick(59)
    assert device.states()[-1] == "queued"
    device.tick(1)
    assert device.states()[-1] == "expired"


def test_a_request_that_is_older_than_its_expiry_is_not_sent():
    device = Device()
    device.request(at=T - 61 * S, expires_s=60)
    assert device.downlinks == []
    assert device.states() == ["queued", "expired"]


def test_what_was_handed_over_ends_by_the_downlink_stages_word():
    device = Device()
    device.request(expires_s=60)
    device.tick(120)
    assert device.states()[-1] == "queued"
    device.report("expired", reason="no broker")
    assert device.states()[-1] == "expired"
    other = Device()
    other.request(expires_s=60)
    other.tick(60 + LOST_AFTER_S)
    assert other.states()[-1] == "failed"


def test_an_instant_ahead_of_kafkas_lengthens_no_life():
    device = Device(SLEEPY)
    device.request(at=T + 10 * DAY * S, expires_s=60)
    assert device.due == T + 60 * S


def test_cancelling():
    device = Device(SLEEPY)
    device.request()
    identifier = device.events[0]["command_id"]
    assert device.line(kind="cancel", command_id="no").refusal is Refusal.UNKNOWN
    device.line(kind="cancel", command_id=identifier, actor="bob")
    assert (device.events[-1]["state"], device.events[-1]["actor"]) == ("cancelled", "bob")
    assert device.line(kind="cancel", command_id=identifier).refusal is Refusal.IS_OVER
    awake = Device()
    awake.request()
    identifier = awake.events[0]["command_id"]
    assert awake.line(kind="cancel", command_id=identifier).refusal is Refusal.HANDED_OVER


def test_a_request_that_cannot_be_is_a_command_that_failed():
    for profile, fields, reason in (
        (Profile("the device is switched off"), {}, "the device is switched off"),
        (AWAKE, {"command": "open", "fields": None}, "there is no command 'open' of the device's type, and no content"),
        (AWAKE, {"confirm": {"component_type": "x", "field": "off"}}, "the confirmation wants the field 'off'"),
    ):
        device = Device(profile)
        device.request(**fields)
        assert device.states() == ["queued", "failed"]
        assert reason in device.events[-1]["reason"]
        assert device.downlinks == []


def test_a_full_queue_refuses():
    device = Device(SLEEPY)
    for _ in range(OPEN_MAX + 1):
        device.request()
    assert [device.states(n)[-1] for n in (0, OPEN_MAX - 1, OPEN_MAX)] == ["queued", "queued", "failed"]


def test_the_largest_queue_fits_a_record():
    device = Device(SLEEPY)
    for _ in range(OPEN_MAX):
        device.request(fields=None, payload="x" * (LINE_BYTES_MAX - 200))
    assert len(orjson.dumps(device.document)) < 500_000


def test_a_device_that_was_switched_off_fails_what_waits():
    device = Device(SLEEPY)
    device.request()
    device.profile = Profile("the device is switched off")
    device.tick()
    assert device.states()[-1] == "failed"


def test_a_device_that_is_not_known_now_keeps_what_waits():
    device = Device(SLEEPY)
    device.request()
    device.profile = compile_profile(None, None, "x")
    device.tick()
    assert device.states()[-1] == "queued"
    device.profile = AWAKE
    device.tick()
    assert len(device.downlinks) == 1


def test_what_the_type_presets_holds_where_the_request_says_nothing():
    kind: Any = {
        "name": "valve", "rev": 1, "manufacturer": "m", "parser": "p",
        "downlink": {
            "lorawan_class": "A", "format": "chirpstack", "port": 10, "timeout_s": 60,
            "commands": {"open": {"fields": {"valve": 1, "speed": 2}, "tries": 3,
                                  "confirm": {"component_type": "valve", "field": "valve"}}},
        },
    }  # fmt: skip
    doc: Any = {
        "device_id": "dev-1", "rev": 1, "type": "valve", "enabled": True, "variables": {"application": "app-1"},
        "downlink": {"sleeps": False},
    }  # fmt: skip
    profile = compile_profile(doc, kind, "devices/{device}/down")
    assert (profile.problem, profile.sleeps) == ("", False)
    assert profile.topic == "application/app-1/device/dev-1/command/down"
    device = Device(profile)
    device.request(command="open", fields={"speed": 9})
    assert device.downlinks[0]["content"] == {"fields": {"valve": 1, "speed": 9}, "port": 10}
    assert device.events[0]["confirm"] == {"component_type": "valve", "equals": 1}
    device.report("sent")
    assert device.due == T + 60 * S


def test_profiles_that_can_send_nothing_say_why():
    kind: Any = {"name": "t", "rev": 1, "manufacturer": "m", "parser": "p", "downlink": {"format": "things_stack"}}
    doc: Any = {"device_id": "dev-1", "rev": 1, "type": "t", "enabled": True}
    assert "wants the variable 'application'" in compile_profile(doc, kind, "x").problem
    assert "switched off" in compile_profile({**doc, "enabled": False}, kind, "x").problem
    assert "no device type" in compile_profile(doc, None, "x").problem
    assert "not registered" in compile_profile(None, None, "x").problem
    assert "no topic" in compile_profile({**doc, "downlink": {"topic": "a/{device}/#"}}, kind, "x").problem
    assert compile_profile({**doc, "downlink": {"lorawan_class": "A"}}, kind, "x").sleeps
    assert compile_profile(doc, kind, "x").qos == 0
    assert compile_profile({**doc, "downlink": {"qos": 1}}, kind, "x").qos == 1


# --- confirmations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("confirm", "readings", "expected"),
    [
        ("uplink", [], True),
        ("published", [], False),
        ({"component_type": "t", "equals": 1.5}, [reading(1.5, "t")], True),
        ({"component_type": "t", "equals": True}, [reading(1, "t")], True),
        ({"component_type": "t", "equals": 1.5, "tolerance": 0.1}, [reading(1.55, "t")], True),
        ({"component_type": "t", "equals": 1.5}, [reading(1.55, "t")], False),
        ({"component_type": "t", "equals": "on"}, [{**reading(None, "t"), "value_text": "on"}], True),
        ({"component_type": "t", "min": 1, "max": 2}, [reading(3, "t"), reading(2, "t")], True),
        ({"component_type": "t", "min": 1}, [reading(0, "t")], False),
        ({"component_type": "t", "min": 1}, [{**reading(None, "t"), "value_text": "on"}], False),
        ({"component_type": "t", "equals": 1, "pin_position": "2"}, [reading(1, "t")], False),
        ({"component_type": "t", "equals": 1}, [reading(1, "t", quality=4)], False),
        ({"component_type": "t", "equals": 1}, [reading(1, "t", revised=True)], False),
        ({"expression": "t > 3 and abs(u) < 1"}, [reading(4, "t"), reading(0.5, "u")], True),
        ({"expression": "t > 3 and abs(u) < 1"}, [reading(4, "t")], False),
        ({"expression": "1 / t"}, [reading(0, "t")], False),
    ],
)
def test_what_confirms(confirm, readings, expected):
    assert is_confirmed(check_confirm(confirm), readings) is expected


@pytest.mark.parametrize(
    "confirm",
    [
        "soon", 3, {}, {"component_type": "t"}, {"component_type": "t", "equals": None}, {"component_type": 1, "min": 1},
        {"component_type": "t", "equals": 1, "max": 2}, {"component_type": "t", "min": float("nan")},
        {"expression": "__import__('os')"}, {"expression": "1 + 1"}, {"expression": "x.y"}, {"expression": 1},
        {"expression": "x", "equals": 1}, {"component_type": "t", "equals": 1, "pin_position": 3},
        {"component_type": "t", "field": 1}, {"component_type": "t", "wish": 1},
    ],
)  # fmt: skip
def test_what_cannot_confirm_is_refused(confirm):
    with pytest.raises(ValueError, match=r"\w"):
        check_confirm(confirm)


@pytest.mark.parametrize(
    "line",
    [
        [], {"kind": "dance"}, {}, {"command": ""}, {"command": "x", "at": "now"}, {"command": "x", "at": 1},
        {"command": "x", "tries": 0}, {"command": "x", "tries": 1.5}, {"command": "x", "expires_s": 1e9},
        {"command": "x", "timeout_s": 0}, {"command": "x", "port": 256}, {"command": "x", "confirmed": 1},
        {"command": "x", "fields": []}, {"command": "x", "fields": {}, "payload": 1}, {"command": "x", "payload_b64": 1},
        {"command": "x\0"}, {"command": "x", "actor": 7}, {"command": "x", "confirm": "soon"},
        {"kind": "cancel"}, {"kind": "report", "downlink_id": "x", "report": "lost"}, {"kind": "report", "report": "sent"},
    ],
)  # fmt: skip
def test_lines_that_are_none_are_refused(line):
    with pytest.raises(Reject) as e:
        parse_line(line, device_id="dev-1", at=T, key="k")
    assert e.value.code == "command_invalid"


# --- alarms ----------------------------------------------------------------------------------------------------------


def test_alarms_ask_for_commands_once_and_only_live():
    transition = {
        "transition_id": "t1", "transition": "raised", "device_id": "dev-1", "rule": "hot", "detected_at": T,
        "generation": 0,
    }  # fmt: skip
    asked: Any = [
        {"on": "raised", "command": "fan", "fields": {"on": 1}, "device_id": "fan-1", "expires_s": 60},
        {"on": "cleared", "command": "fan", "fields": {"on": 0}},
    ]
    (line,) = alarm_requests(transition, asked)
    parsed = parse_line(line, device_id=None, at=T + S, key="k")
    assert (parsed.device_id, parsed.at, parsed.actor) == ("fan-1", T, "alarm hot")
    assert parsed.fields["idempotency_key"] == "t1/0"
    assert parsed.fields["cause"] == "t1"
    assert alarm_requests({**transition, "generation": 1}, asked) == []


# --- properties ------------------------------------------------------------------------------------------------------

#: A step of a story: what happens, and a number that says to which.
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["request", "request", "again", "cancel", "sent", "failed", "expired", "acknowledged",
                         "not_acknowledged", "uplink", "old_uplink", "tick", "tick"]),
        st.integers(0, 6),
    ),
    max_size=40,
)  # fmt: skip


def play(steps: list[tuple[str, int]], profile: Profile, crash_at: int = -1, repeat: bool = False) -> Device:
    """Play a story; at `crash_at` the state is lost after the effects went out, and the step runs again."""
    device = Device(profile)
    for number, (word, n) in enumerate(steps):
        before = copy.deepcopy(device.document), device.offset, device.now
        ids = tuple(dict.fromkeys(d["downlink_id"] for d in device.downlinks))
        known = tuple(dict.fromkeys(e["command_id"] for e in device.events))
        _one(device, word, n, ids, known)
        if number == crash_at:
            device.document, device.offset, device.now = before
            _one(device, word, n, ids, known)
        if repeat:  # Kafka gives the same record once more
            device.offset, now = before[1], device.now
            device.now = before[2]
            kept, downlinks = len(device.events), len(device.downlinks)
            if word != "tick":
                _one(device, word, n, ids, known)
                assert (len(device.events), len(device.downlinks)) == (kept, downlinks)
            device.offset, device.now = max(device.offset, before[1]), now
    return device


def _one(device: Device, word: str, n: int, ids: tuple[str, ...], known: tuple[str, ...]) -> None:
    confirm: Any = ("published", "delivered", "uplink", {"component_type": "temp", "equals": 1})[n % 4]
    match word:
        case "request":
            device.request(confirm=confirm, timeout_s=5, tries=1 + n % 3, expires_s=20, priority=n % 2)
        case "again":
            device.request(idempotency_key=f"3:{n + 1}")
        case "cancel":
            device.line(kind="cancel", command_id=known[n % len(known)] if known else "none")
        case "uplink":
            device.uplink(reading(n % 2))
        case "old_uplink":
            device.uplink(reading(1), received_at=device.now - 60 * S)
        case "tick":
            device.tick(n)
        case _:
            if ids:
                device.line(kind="report", report=word, downlink_id=ids[max(-len(ids), -1 - n % 3)])


def check(device: Device) -> None:
    ended: dict[str, str] = {}
    sequences: dict[str, int] = {}
    under_way: str | None = None
    for event in device.events:
        identifier = event["command_id"]
        assert identifier not in ended, "nothing happens to a command that has ended"
        assert event["sequence"] == sequences.get(identifier, 0) + 1
        sequences[identifier] = event["sequence"]
        if event["event"] == "hand_over":
            assert under_way in (None, identifier), "one command at a time"
            under_way = identifier
        if event["state"] in OVER:
            ended[identifier] = event["state"]
            under_way = None if under_way == identifier else under_way
    ids = [d["downlink_id"] for d in device.downlinks]
    assert len(ids) == len(set(ids)), "no try goes out twice"
    open_ids = {c.id for c in DeviceCommands("dev-1", device.document).open}
    assert open_ids == sequences.keys() - ended.keys(), "no command is lost"


@given(STEPS, st.sampled_from([AWAKE, SLEEPY]))
@settings(max_examples=300, deadline=None)
def test_order_and_idempotence_hold_for_every_story(steps, profile):
    check(play(steps, profile))


@given(STEPS, st.sampled_from([AWAKE, SLEEPY]))
@settings(max_examples=200, deadline=None)
def test_a_record_that_comes_again_does_nothing(steps, profile):
    check(play(steps, profile, repeat=True))


@given(STEPS, st.sampled_from([AWAKE, SLEEPY]), st.integers(0, 39))
@settings(max_examples=300, deadline=None)
def test_a_crash_repeats_ids_and_nothing_else(steps, profile, crash_at):
    whole, crashed = play(steps, profile), play(steps, profile, crash_at)
    assert whole.document == crashed.document
    assert {e["event_id"] for e in whole.events} == {e["event_id"] for e in crashed.events}
    assert {d["downlink_id"] for d in whole.downlinks} == {d["downlink_id"] for d in crashed.downlinks}
    seen: set[str] = set()
    first = [e for e in crashed.events if not (e["event_id"] in seen or seen.add(e["event_id"]))]  # type: ignore[func-returns-value]
    assert first == whole.events


@given(STEPS, st.sampled_from([AWAKE, SLEEPY]))
@settings(max_examples=200, deadline=None)
def test_every_command_ends(steps, profile):
    device = play(steps, profile)
    for _ in range(60):
        device.tick(30)
        if device.downlinks:
            device.report("expired")
    device.tick(MEMORY_S * 2)
    device.tick(MEMORY_S * 2)
    check_ended = {e["command_id"] for e in device.events if e["state"] in OVER}
    assert check_ended == {e["command_id"] for e in device.events}
    assert device.document is None


# --- the registry ----------------------------------------------------------------------------------------------------


def test_sections_of_the_registry_are_checked():
    good = {"format": "chirpstack", "port": 1, "tries": 2, "commands": {"on": {"fields": {"on": 1}, "timeout_s": 5}}}
    assert check_downlink(good) is good
    for wrong in (
        {"wish": 1}, {"format": "x"}, {"topic": 1}, {"qos": 2}, {"sleeps": 1}, {"lorawan_class": "D"}, {"tries": 0}, {"commands": []},
        {"commands": {"on": 1}}, {"commands": {"on": {"wish": 1}}}, {"commands": {"on": {"tries": 0}}},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"\w"):
            check_downlink(wrong)
    rules: Any = [{"on": "raised", "command": "fan", "device_id": "fan-1", "expires_s": 60}]
    assert check_rule_commands(rules) is rules
    for wrong_rule in ({"command": "x"}, {"on": "raised"}, {"on": "raised", "command": "x", "wish": 1},
                       {"on": "cleared", "command": "x", "tries": 0}):  # fmt: skip
        with pytest.raises(ValueError, match=r"\w"):
            check_rule_commands([wrong_rule])
    with pytest.raises(ValueError, match="list"):
        check_rule_commands({"on": "raised"})  # type: ignore[arg-type]
