"""Every kind of rule on one device: what readings, silence and the calendar make of it."""

from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import orjson
import pytest

from preservarium.domain.alarms.action import parse_action
from preservarium.domain.alarms.device import DeviceAlarms
from preservarium.domain.alarms.machine import Refusal
from preservarium.domain.alarms.observation import HELD_PER_DEVICE_MAX
from preservarium.domain.alarms.rule import DeviceRules
from preservarium.domain.alarms.rules import compile_rules
from preservarium.domain.alarms.schedule import compile_calendar
from preservarium.domain.alarms.turn import Outcome

S = 1_000_000
T = 1_700_000_000 * S
UNITS = {"temp": "°C", "hum": "%", "door": "", "wind": "°", "vane": "°"}
CIRCULAR = {"wind": 360, "vane": 360}


def _datatype(name: str) -> Any:
    circular = {"circular": CIRCULAR[name]} if name in CIRCULAR else {}
    return {"name": name, "rev": 1, "kind": "number", "unit": UNITS[name], **circular}


def rules(*docs: dict[str, Any], device: dict[str, Any] | None = None) -> DeviceRules:
    found: Any = {d["name"]: {"rev": 1, "component_type": "temp", "severity": "minor", **d} for d in docs}
    doc: Any = {"device_id": "d", "rev": 1, "type": "t", "enabled": True, "rules": {name: {} for name in found}}
    compiled = compile_rules({**doc, **(device or {})}, None, found.get, _datatype)
    assert compiled.problems == ()
    return compiled


class Device:
    """A device that tells the time in seconds since T; its state goes through JSON before each step."""

    def __init__(self, watched: DeviceRules) -> None:
        self.rules = watched
        self.document: Any = None
        self.offset = 0
        self.last = Outcome()
        self.size = 0

    def _step(self, do: Any) -> list[tuple[Any, ...]]:
        alarms = DeviceAlarms("d", self.document)
        self.last = do(alarms)
        raw = orjson.dumps(alarms.document())
        self.size = max(self.size, len(raw))
        self.document = orjson.loads(raw)
        return [(t["rule"], t["transition"], (t["transition_at"] - T) / S) for t in self.last.transitions]

    def reads(
        self, at: float, pin: str = "-1", received: float | None = None, **values: float
    ) -> list[tuple[Any, ...]]:
        self.offset += 1
        message = {
            "device_id": "d", "timestamp": T + round(at * S), "received_at": T + round((received or at) * S),
            "raw_partition": 0, "raw_offset": self.offset, "raw_index": 0, "generation": 0,
            "readings": [{"component_type": k, "pin_position": pin, "value": v} for k, v in values.items()],
        }  # fmt: skip
        return self._step(lambda alarms: alarms.observe(message, self.rules))

    def tick(self, at: float) -> list[tuple[Any, ...]]:
        return self._step(lambda alarms: alarms.tick(T + round(at * S), self.rules))

    def act(self, word: str, at: float, rule: str, **fields: Any) -> list[tuple[Any, ...]]:
        self.offset += 1
        action = parse_action(
            {"device_id": "d", "rule": rule, "action": word, "actor": "ann", "at": T + round(at * S), **fields}
        )
        return self._step(lambda alarms: alarms.act(action, self.rules, "a0", self.offset, 0))

    @property
    def due(self) -> float | None:
        due = self.document.get("due")
        return None if due is None else (due - T) / S

    def state(self, rule: str) -> str:
        return {p.rule: str(a.state) for p, a in DeviceAlarms("d", self.document).alarms()}[rule]


# --- levels

LEVELS = {
    "name": "hot",
    "kind": "high",
    "severity": "warning",
    "threshold": 30,
    "deadband": 1,
    "levels": [{"threshold": 40, "severity": "major"}, {"threshold": 50, "severity": "critical"}],
}


def severities(device: Device) -> list[tuple[str, str, float | None]]:
    return [(t["transition"], t["severity"], t["threshold"]) for t in device.last.transitions]


def test_one_alarm_whose_severity_rises_and_falls():
    device = Device(rules(LEVELS))
    told = []
    ids = set()
    for at, value in enumerate([31, 45, 55, 49.5, 45, 39.5, 38, 29]):
        device.reads(at, temp=value)
        told += severities(device)
        ids |= {t["alarm_id"] for t in device.last.transitions}
    assert told == [
        ("raised", "warning", 30),
        ("severity_raised", "major", 40),
        ("severity_raised", "critical", 50),
        ("severity_lowered", "major", 40),
        ("severity_lowered", "warning", 30),
        ("cleared", "warning", 30),
    ]
    assert len(ids) == 1


def test_a_jump_is_raised_at_once_with_the_gravest_severity_and_cleared_with_it():
    device = Device(rules(LEVELS))
    device.reads(0, temp=99)
    assert severities(device) == [("raised", "critical", 50)]
    assert device.last.transitions[0]["message"] == "d: temp is 99 °C, above 50 °C"
    device.reads(1, temp=0)
    assert severities(device) == [("cleared", "critical", 50)]


def test_a_graver_severity_asks_again_and_a_lower_one_does_not():
    device = Device(rules(LEVELS))
    device.reads(0, temp=31)
    device.act("acknowledge", 1, "hot")
    device.reads(2, temp=45)
    assert device.state("hot") == "unacknowledged"
    device.act("acknowledge", 3, "hot")
    device.reads(4, temp=31)
    assert device.state("hot") == "acknowledged"


def test_levels_have_the_delays_of_their_rule_each_from_its_own_beginning():
    device = Device(rules({**LEVELS, "on_delay_s": 10}))
    assert device.reads(0, temp=31) == []
    assert device.reads(5, temp=55) == []
    assert device.reads(20, temp=55) == [("hot", "raised", 10), ("hot", "severity_raised", 15)]
    assert [t["severity"] for t in device.last.transitions] == ["warning", "critical"]


def test_a_severity_that_changes_on_the_shelf_is_told_when_it_ends():
    device = Device(rules(LEVELS))
    device.reads(0, temp=31)
    device.act("shelve", 1, "hot", duration_s=60)
    assert device.reads(2, temp=55) == []
    assert device.tick(62) == [("hot", "unshelved", 61), ("hot", "raised", 61)]
    assert [(t["transition"], t["severity"]) for t in device.last.transitions] == [
        ("unshelved", "warning"),
        ("raised", "critical"),
    ]


# --- rate, deviation, expression, repeat


def test_a_rate_is_taken_over_its_window():
    device = Device(rules({"name": "r", "kind": "rate", "threshold": 5, "window_s": 600, "per_s": 3600, "deadband": 1}))
    told = []
    for i in range(60):  # a reading a minute; from minute 30 on it rises by 6 °C an hour
        told += device.reads(i * 60, temp=20 + max(0, i - 30) * 0.1)
    # After 9 of the window's 10 minutes the mean rate is 5.4 °C/h, after 8 of the 9 kept parts 4.8.
    ((rule, name, at),) = told
    assert (rule, name) == ("r", "raised")
    assert 30 * 60 + 500 <= at <= 30 * 60 + 660
    assert device.size < 1_024


def test_a_rate_tells_itself_and_its_direction_counts():
    falling = {"name": "r", "kind": "rate", "threshold": 5, "window_s": 60, "per_s": 60, "direction": "fall"}
    device = Device(rules(falling))
    assert device.reads(0, temp=20) == []
    assert device.reads(60, temp=30) == []
    assert device.reads(120, temp=20) == [("r", "raised", 120)]
    (line,) = device.last.transitions
    assert (line["value"], line["unit"], line["message"]) == (
        10, "°C/min", "d: temp changes by 10 °C/min, more than 5 °C/min",
    )  # fmt: skip
    assert Device(rules(falling)).reads(0, temp=-50) == []


def test_a_silence_leaves_no_rate():
    device = Device(
        rules(
            {"name": "r", "kind": "rate", "threshold": 5, "window_s": 60, "per_s": 60, "parameters": {"gap_max_s": 300}}
        )
    )
    device.reads(0, temp=20)
    assert device.reads(400, temp=99) == []


def test_a_deviation_from_a_setpoint():
    device = Device(rules({"name": "off", "kind": "deviation", "setpoint": 21, "threshold": 2, "deadband": 1}))
    told = [device.reads(i, temp=v) for i, v in enumerate([22, 23.5, 22.5, 22, 18.5])]
    assert told == [
        [],
        [("off", "raised", 1)],
        [],
        [("off", "cleared", 3)],
        [("off", "superseded", 4), ("off", "raised", 4)],
    ]
    assert device.last.transitions[-1]["value"] == 2.5


def test_a_deviation_from_another_series_in_whatever_messages_they_come():
    doc = {
        "name": "off",
        "kind": "deviation",
        "threshold": 2,
        "reference": {"component_type": "temp", "pin_position": "1"},
        "pin_position": "0",
        "inputs_max_age_s": 60,
    }
    device = Device(rules(doc))
    assert device.reads(0, pin="0", temp=20) == []
    assert device.reads(0, pin="1", temp=23) == [("off", "raised", 0)]
    assert device.last.transitions[0]["pin_position"] == "0"
    assert device.last.transitions[0]["value"] == 3
    # The other one has been silent for too long: nobody knows.
    assert device.reads(100, pin="0", temp=23) == []
    assert device.reads(110, pin="1", temp=23) == [("off", "cleared", 110)]


EXPRESSION = {
    "name": "dew",
    "kind": "expression",
    "expression": "value < 10 and h > 90",
    "inputs": {"h": {"component_type": "hum"}},
    "inputs_max_age_s": 60,
    "on_delay_s": 100,
}


def test_an_expression_over_several_series():
    device = Device(rules({**EXPRESSION, "on_delay_s": 0}))
    assert device.reads(0, temp=5, hum=80) == []
    assert device.reads(60, temp=5, hum=95) == [("dew", "raised", 60)]
    (line,) = device.last.transitions
    assert (line["value"], line["threshold"], line["message"], line["kind"]) == (5, None, "d: dew", "expression")
    assert device.reads(120, hum=80, temp=5) == [("dew", "cleared", 120)]


def test_old_inputs_decide_nothing_and_start_a_delay_anew():
    device = Device(rules(EXPRESSION))
    device.reads(0, temp=5, hum=95)
    assert device.reads(61, temp=5) == []  # undecided, so what was pending is over
    assert device.reads(62, hum=95) == []
    assert device.reads(120, temp=5, hum=95) == []
    assert device.reads(161, temp=5, hum=95) == []
    assert device.reads(162, temp=5, hum=95) == [("dew", "raised", 162)]
    # Undecided is not false: the alarm stays.
    assert device.reads(300, temp=50) == []
    assert device.state("dew") == "unacknowledged"


def test_an_expression_that_cannot_be_computed_is_undecided():
    doc = {"name": "x", "kind": "expression", "expression": "1 / value > 0.5"}
    device = Device(rules(doc))
    assert device.reads(0, temp=1) == [("x", "raised", 0)]
    assert device.reads(1, temp=0) == []
    assert device.reads(2, temp=4) == [("x", "cleared", 2)]


def test_an_expression_with_a_threshold_has_levels():
    doc = {
        "name": "x", "kind": "expression", "expression": "value - h", "inputs": {"h": {"component_type": "hum"}},
        "inputs_max_age_s": 60, "threshold": 10, "levels": [{"threshold": 20, "severity": "major"}],
    }  # fmt: skip
    device = Device(rules(doc))
    device.reads(0, temp=40, hum=25)
    assert severities(device) == [("raised", "minor", 10)]
    device.reads(1, temp=50, hum=25)
    assert severities(device) == [("severity_raised", "major", 20)]
    assert device.last.transitions[0]["value"] == 25


def test_a_repeat_counts_readings_within_its_window():
    device = Device(rules({"name": "r", "kind": "high", "threshold": 30, "repeat": {"count": 3, "within_s": 100}}))
    told = [device.reads(at, temp=v) for at, v in [(0, 31), (50, 31), (101, 20), (140, 31), (149, 31), (150, 20)]]
    assert told == [[], [], [], [], [("r", "raised", 149)], [("r", "cleared", 150)]]
    assert [device.reads(at, temp=31) for at in (151, 152, 152, 153)] == [
        [], [], [], [("r", "superseded", 153), ("r", "raised", 153)],
    ]  # fmt: skip


# --- silence

SILENT = {"name": "gone", "kind": "no_data", "no_data_s": 60}


def test_silence_is_told_at_its_deadline_by_a_tick_or_by_the_next_reading():
    live, replay = Device(rules(SILENT)), Device(rules(SILENT))
    for device in (live, replay):
        assert device.reads(0, temp=20) == []
        assert device.due == pytest.approx(60.000001)
    assert live.tick(60) == []
    assert live.tick(65) == [("gone", "raised", 60)]
    (line,) = live.last.transitions
    assert (line["value"], line["raw_offset"], line["threshold"], line["unit"]) == (None, None, 60, "s")
    assert line["message"] == "d: no temp for 60 s"
    assert line["detected_at"] == T + 65 * S
    assert live.tick(70) == []
    assert live.due is None
    assert live.reads(100, temp=20) == [("gone", "cleared", 100)]
    assert replay.reads(100, temp=20) == [("gone", "raised", 60), ("gone", "cleared", 100)]
    ids = [t["transition_id"] for t in replay.last.transitions]
    assert ids == [line["transition_id"], live.last.transitions[0]["transition_id"]]


def test_a_reading_at_the_deadline_is_in_time():
    device = Device(rules(SILENT))
    device.reads(0, temp=20)
    assert device.reads(60, temp=20) == []


def test_a_reading_that_comes_after_its_own_deadline_ends_the_silence_where_it_began():
    device = Device(rules(SILENT))
    device.reads(0, temp=20)
    device.tick(61)
    assert device.reads(30, temp=20, received=62) == [("gone", "cleared", 60)]


def test_what_a_gateway_had_buffered_raises_one_alarm_with_or_without_ticks():
    silent = {**SILENT, "parameters": {"acknowledge": "auto"}}
    live, replay = Device(rules(silent)), Device(rules(silent))
    for device in (live, replay):
        device.reads(0, temp=20)
    assert live.tick(500) == [("gone", "raised", 60)]
    assert live.reads(30, temp=20, received=502) == [("gone", "cleared", 60)]
    assert replay.reads(30, temp=20, received=502) == [("gone", "raised", 60), ("gone", "cleared", 60)]
    for device in (live, replay):
        assert device.due == pytest.approx(562.000001)  # it was heard of at 502
    assert live.tick(505) == []
    for device in (live, replay):
        assert device.reads(60, temp=20, received=506) == []
        assert device.reads(300, temp=20, received=507) == [("gone", "raised", 120), ("gone", "cleared", 300)]
    # Silent again: of the deadline of what was read last, told once nothing was received for so long.
    assert live.tick(567) == []
    assert live.tick(568) == [("gone", "raised", 360)]
    assert replay.reads(310, temp=20, received=600) == [("gone", "raised", 360), ("gone", "cleared", 360)]


def test_a_device_that_is_switched_off_is_not_missed():
    device = Device(rules(SILENT))
    device.reads(0, temp=20)
    device.rules = rules(SILENT, device={"enabled": False})
    assert device.tick(61) == []
    assert device.due is None


def test_each_pin_is_silent_on_its_own():
    device = Device(rules(SILENT))
    device.reads(0, pin="0", temp=20)
    device.reads(50, pin="1", temp=20)
    assert device.tick(70) == [("gone", "raised", 60)]
    assert device.last.transitions[0]["pin_position"] == "0"


def test_a_planned_outage_is_silent_and_the_wait_begins_after_it():
    outage = {"from": T + 50 * S, "to": T + 500 * S}
    for where in ("rule", "device"):
        doc = {**SILENT, **({"outages": [outage]} if where == "rule" else {})}
        device = Device(rules(doc, device={"outages": [outage]} if where == "device" else {}))
        device.reads(0, temp=20)
        assert device.due == pytest.approx(560.000001)
        assert device.tick(300) == []
        assert device.tick(561) == [("gone", "raised", 560)]


def test_silence_counts_in_the_hours_of_a_schedule_only():
    hours = {"time_zone": "Europe/Berlin", "hours": [{"days": ["mon", "tue"], "from": "08:00", "to": "18:00"}]}
    zone = ZoneInfo("Europe/Berlin")

    def local(day: int, hour: int) -> float:
        return datetime(2023, 11, day, hour, tzinfo=zone).timestamp() - T / S

    device = Device(rules({**SILENT, "no_data_s": 3600, "schedule": hours}))
    device.reads(local(14, 17) + 60, temp=20)  # Tuesday, 17:01: the hour is not over at 18:00
    assert device.due == pytest.approx(local(20, 9), abs=1)  # the Monday after, an hour on


# --- schedules of other rules


def test_outside_its_schedule_a_rule_is_inactive_and_its_alarm_returns_at_the_end():
    outage = {"from": T + 100 * S, "to": T + 200 * S}
    device = Device(rules({"name": "hot", "kind": "high", "threshold": 30, "outages": [outage]}))
    assert device.reads(50, temp=31) == [("hot", "raised", 50)]
    assert device.reads(150, temp=31) == [("hot", "cleared", 100)]
    assert device.reads(199, temp=31) == []
    assert device.reads(201, temp=31) == [("hot", "superseded", 201), ("hot", "raised", 201)]
    silent = Device(rules({"name": "hot", "kind": "high", "threshold": 30, "outages": [outage]}))
    silent.reads(50, temp=31)
    assert silent.reads(201, temp=31) == [("hot", "cleared", 100), ("hot", "superseded", 201), ("hot", "raised", 201)]


def test_a_calendar_follows_the_change_of_the_clock():
    night = {"time_zone": "Europe/Berlin", "hours": [{"days": ["sat"], "from": "22:00", "to": "06:00"}]}
    calendar = compile_calendar(night)
    assert calendar is not None
    zone = ZoneInfo("Europe/Berlin")
    begin = round(datetime(2024, 3, 30, 22, tzinfo=zone).timestamp()) * S
    # The night has seven hours: at two the clock is put to three.
    assert calendar.span(begin) == (True, begin + 7 * 3600 * S)
    assert calendar.span(begin - 1) == (False, begin)
    inside, end = calendar.span(begin + 7 * 3600 * S)
    assert (inside, end) == (False, begin + (7 * 24 - 1) * 3600 * S)


# --- shelves


def test_a_shelf_ends_by_a_tick():
    device = Device(rules({"name": "hot", "kind": "high", "threshold": 30}))
    device.reads(0, temp=31)
    device.act("shelve", 1, "hot", duration_s=60)
    assert device.due == 61
    assert device.tick(60) == []
    assert device.tick(61) == [("hot", "unshelved", 61), ("hot", "raised", 61)]
    assert device.due is None


# --- chattering, groups, first-out

HOT = {"name": "hot", "kind": "high", "threshold": 30, "parameters": {"acknowledge": "auto"}}


def test_an_alarm_that_is_raised_three_times_a_minute_chatters_until_it_is_quiet():
    device = Device(rules(HOT))
    flags = []
    for at in range(0, 60, 10):
        device.reads(at, temp=31 if at % 20 == 0 else 20)
        flags += [(t["transition"], t["chattering"]) for t in device.last.transitions]
    assert flags == [("raised", False), ("cleared", False)] * 2 + [("raised", True), ("cleared", True)]
    device.reads(640, temp=31)
    assert [t["chattering"] for t in device.last.transitions] == [True]
    device.reads(650, temp=20)
    device.reads(1300, temp=31)
    assert [t["chattering"] for t in device.last.transitions] == [False]


GROUP = (
    {"name": "power", "component_type": "door", "kind": "low", "threshold": 1, "group": "plant", "group_master": True},
    {"name": "hot", "kind": "high", "threshold": 30, "group": "plant"},
    {"name": "damp", "component_type": "hum", "kind": "high", "threshold": 90, "group": "plant"},
)


def test_a_master_suppresses_its_group_and_lets_it_come_back():
    device = Device(rules(*GROUP))
    assert device.reads(0, temp=31, hum=20, door=1) == [("hot", "raised", 0)]
    assert device.reads(10, door=0) == [("power", "raised", 10), ("hot", "suppressed", 10)]
    assert device.reads(20, temp=31, hum=95) == []
    assert device.state("damp") == "suppressed"
    assert device.reads(30, temp=20) == [("hot", "cleared", 30)]
    assert device.reads(40, door=1) == [
        ("power", "cleared", 40), ("hot", "unsuppressed", 40), ("damp", "raised", 40),
    ]  # fmt: skip
    assert device.last.transitions[-1]["occurred_at"] == T + 20 * S
    assert "s" not in device.document["g"]["0"]


def test_the_master_comes_first_whatever_the_order_within_a_message():
    device = Device(rules(*GROUP))
    assert device.reads(0, temp=31, hum=95, door=0) == [("power", "raised", 0)]


def test_what_an_operator_set_aside_stays_with_the_operator():
    device = Device(rules(*GROUP))
    device.reads(0, temp=31, door=1)
    device.act("suppress", 1, "hot")
    device.reads(2, door=0)
    assert device.reads(3, door=1) == [("power", "cleared", 3)]
    assert device.state("hot") == "suppressed"
    device.act("unsuppress", 4, "hot")
    device.act("shelve", 5, "hot", duration_s=60)
    device.reads(6, door=0)
    assert device.state("hot") == "shelved"
    # The shelf ends, and the group's suppression takes its place.
    assert device.tick(70) == [("hot", "suppressed", 65)]
    assert [t for t in device.reads(80, door=1) if t[0] == "hot"] == [
        ("hot", "unsuppressed", 80),
        ("hot", "raised", 80),
    ]


def test_a_master_out_of_service_suppresses_nothing():
    device = Device(rules(*GROUP))
    device.reads(0, door=0)
    device.reads(1, temp=31)
    assert device.act("out_of_service", 2, "power") == [("power", "out_of_service", 2), ("hot", "raised", 2)]
    assert device.act("return_to_service", 3, "power") == [
        ("power", "returned_to_service", 3), ("power", "raised", 3), ("hot", "suppressed", 3),
    ]  # fmt: skip


def test_a_group_whose_master_is_gone_comes_back():
    device = Device(rules(*GROUP))
    device.reads(0, door=0)
    device.reads(1, temp=31)
    device.rules = rules(*GROUP[1:])
    assert device.reads(2, temp=31) == [("power", "withdrawn", 0), ("hot", "raised", 2)]


def test_alarms_that_leave_their_group_come_back():
    device = Device(rules(*GROUP))
    device.reads(0, door=0)
    device.reads(1, temp=31)
    device.rules = rules(*({k: v for k, v in doc.items() if not k.startswith("group")} for doc in GROUP))
    assert device.reads(2, temp=31) == [("hot", "raised", 2)]
    assert device.last.transitions[0]["occurred_at"] == T + S


def test_a_refused_action_says_so_in_a_suppressed_group():
    device = Device(rules(*GROUP))
    device.reads(0, door=0)
    assert device.act("unshelve", 1, "hot") == []
    assert device.last.refusal is Refusal.NOT_SHELVED


def test_the_first_alarm_of_a_group_within_its_window_is_marked():
    docs = [{**HOT, "group": "g", "first_out_s": 30}, {**HOT, "name": "damp", "component_type": "hum", "group": "g"}]
    device = Device(rules(*docs))
    found = []
    for at, values in [(0, {"temp": 31.0}), (10, {"hum": 31.0}), (20, {"temp": 1.0, "hum": 1.0}), (70, {"hum": 31.0})]:
        device.reads(at, **values)
        found += [(t["rule"], t["transition"], t["first_out"]) for t in device.last.transitions]
    assert found == [
        ("hot", "raised", True),
        ("damp", "raised", False),
        ("hot", "cleared", True),
        ("damp", "cleared", False),
        ("damp", "raised", True),
    ]


# --- lateness


def test_readings_that_come_late_are_put_into_their_place():
    docs = {"name": "hot", "kind": "high", "threshold": 30, "on_delay_s": 10, "lateness_s": 30}
    sorted_run, shuffled = Device(rules(docs)), Device(rules(docs))
    readings = [(0, 31), (4, 20), (8, 31), (15, 31), (19, 31), (25, 20), (60, 20)]
    expected = [line for at, v in readings for line in sorted_run.reads(at, temp=v)]
    found = [line for i in (3, 0, 2, 1, 5, 4, 6) for line in shuffled.reads(readings[i][0], temp=readings[i][1])]
    assert found == expected == [("hot", "raised", 18), ("hot", "cleared", 25)]


def test_what_waits_is_told_by_a_tick_after_silence():
    device = Device(rules({**HOT, "lateness_s": 30}))
    assert device.reads(0, temp=31, received=2) == []
    assert device.due == 32
    assert device.tick(31) == []
    assert device.tick(32) == [("hot", "raised", 0)]
    assert device.due is None


def test_a_device_holds_a_limited_number_of_readings():
    device = Device(rules({**HOT, "lateness_s": 3600}))
    for i in range(HELD_PER_DEVICE_MAX):
        assert device.reads(i, temp=31) == []
    assert device.reads(HELD_PER_DEVICE_MAX, temp=31) == [("hot", "raised", 0)]


def test_silence_waits_for_late_readings_too():
    device = Device(rules({**SILENT, "lateness_s": 30}))
    device.reads(0, temp=20)
    device.tick(31)
    assert device.tick(90) == []
    assert device.tick(91) == [("gone", "raised", 60)]


@pytest.mark.parametrize("lateness_s", [0, 10, 60])
def test_what_waits_is_not_lost_when_the_rule_waits_otherwise(lateness_s: float):
    device = Device(rules({**HOT, "lateness_s": 30}))
    assert device.reads(0, temp=31) == []
    device.rules = rules({**HOT, "lateness_s": lateness_s})
    told = device.reads(20, temp=20) + device.tick(100)
    assert told == [("hot", "raised", 0), ("hot", "cleared", 20)]


def test_a_reading_that_waits_is_no_silence():
    device = Device(
        rules({**SILENT, "lateness_s": 30}, {**SILENT, "name": "damp", "component_type": "hum", "lateness_s": 30})
    )
    device.reads(0, temp=20, hum=50)
    device.reads(58, temp=20)
    # The temperature of second 58 waits; of the humidity, second 58 is not known yet.
    assert device.due == 88
    device.reads(85, temp=20)
    assert device.reads(95, temp=20) == []
    assert device.tick(95) == [("damp", "raised", 60)]
    assert device.tick(100) == []


# --- what cannot be


@pytest.mark.parametrize(
    ("doc", "text"),
    [
        ({"kind": "rate", "threshold": 1, "window_s": 60}, "'per_s' is missing"),
        (
            {"kind": "rate", "threshold": 1, "window_s": 60, "per_s": 7},
            "per_s: a rate is per 1, 60, 3600 or 86400 seconds",
        ),
        ({"kind": "rate", "threshold": -1, "window_s": 60, "per_s": 60}, "threshold is less than 0"),
        ({"kind": "high", "threshold": 1, "window_s": 60}, "window_s: a rule of kind high has none"),
        ({"kind": "no_data", "no_data_s": 60, "threshold": 1}, "threshold: a rule of kind no_data has none"),
        ({"kind": "no_data", "no_data_s": 0.5}, "no_data_s is less than 1"),
        ({"kind": "no_data", "no_data_s": 1e9}, "no_data_s is more than 31622400"),
        ({"kind": "deviation", "threshold": 1}, "a deviation is from a setpoint or from a reference"),
        (
            {"kind": "deviation", "threshold": 1, "reference": {"component_type": "hum"}},
            "'inputs_max_age_s' is missing",
        ),
        (
            {"kind": "deviation", "threshold": 1, "setpoint": 1, "direction": "up"},
            "direction is either, rise, fall, not 'up'",
        ),
        ({"kind": "expression"}, "'expression' is missing"),
        ({"kind": "high", "threshold": 1, "parameters": {"latch": True}}, "parameters: there is no 'latch'"),
        ({"kind": "high", "threshold": 1, "parameters": {"latching": "no"}}, "latching is true or false"),
        ({"kind": "expression", "expression": "value.real"}, "'value.real': Attribute is not allowed"),
        ({"kind": "expression", "expression": "value > h"}, "'value > h': h is not known here"),
        ({"kind": "expression", "expression": "value > 1", "deadband": 1}, "deadband: an expression that has one"),
        ({"kind": "high", "threshold": 1, "repeat": {"count": 1, "within_s": 1}}, "repeat: count is a whole number"),
        ({"kind": "high", "threshold": 1, "repeat": {"count": 2}}, "repeat: it has count and within_s"),
        (
            {"kind": "high", "threshold": 1, "levels": [{"threshold": 1, "severity": "major"}]},
            "levels: 1 is not beyond 1",
        ),
        (
            {"kind": "low", "threshold": 1, "levels": [{"threshold": 2, "severity": "major"}]},
            "levels: 2 is not beyond 1",
        ),
        (
            {"kind": "high", "threshold": 1, "levels": [{"threshold": 2, "severity": "warning"}]},
            "levels: 'warning' is not graver than 'minor'",
        ),
        ({"kind": "high", "threshold": 1, "group_master": True}, "group_master and first_out_s are of a rule that has"),
        (
            {"kind": "high", "threshold": 1, "schedule": {"time_zone": "Mars/Base", "hours": []}},
            "schedule: 'Mars/Base' is no",
        ),
        (
            {
                "kind": "high",
                "threshold": 1,
                "schedule": {"time_zone": "UTC", "hours": [{"from": "08:00", "to": "25:00"}]},
            },
            "schedule: '25:00' is no local time",
        ),
        (
            {
                "kind": "high",
                "threshold": 1,
                "schedule": {"time_zone": "UTC", "hours": [{"from": "00:00", "to": "24:00"}]},
            },
            "schedule: its hours cover the whole week",
        ),
        ({"kind": "high", "threshold": 1, "outages": [{"from": T, "to": T}]}, "outages: to is not after from"),
        ({"kind": "high", "threshold": 1, "lateness_s": 1e6}, "lateness_s is more than 604800"),
    ],
)
def test_a_rule_that_cannot_be_says_why(doc: dict[str, Any], text: str):
    full: Any = {"name": "x", "rev": 1, "component_type": "temp", "severity": "minor", **doc}
    device: Any = {"device_id": "d", "rev": 1, "type": "t", "enabled": True, "rules": {"x": {}}}
    found = compile_rules(device, None, {"x": full}.get, lambda _: None)
    assert found.by_name == {}
    assert found.problems[0].removeprefix("rule x: ").startswith(text)


# --- circular quantities


def test_a_deviation_of_a_direction_goes_by_the_shorter_way():
    off = {
        "name": "off",
        "component_type": "wind",
        "kind": "deviation",
        "setpoint": 350,
        "threshold": 30,
        "deadband": 5,
    }
    device = Device(rules(off))
    told = [device.reads(at, wind=value) for at, value in enumerate((10, 19, 21, 14, 321, 319, 350))]
    assert told == [
        [],
        [],
        [("off", "raised", 2)],
        [("off", "cleared", 3)],
        [],
        [("off", "superseded", 5), ("off", "raised", 5)],
        [("off", "cleared", 6)],
    ]
    right = Device(rules({**off, "direction": "rise"}))
    assert [right.reads(at, wind=value) for at, value in enumerate((319, 21))] == [[], [("off", "raised", 1)]]
    assert right.last.transitions[0]["value"] == 31


def test_a_deviation_of_two_directions_goes_by_the_shorter_way():
    apart = {
        "name": "apart", "component_type": "wind", "kind": "deviation", "reference": {"component_type": "vane"},
        "threshold": 10, "inputs_max_age_s": 60,
    }  # fmt: skip
    device = Device(rules(apart))
    assert device.reads(0, wind=2, vane=355) == []
    assert device.reads(1, wind=12, vane=355) == [("apart", "raised", 1)]


def test_a_rate_of_a_direction_goes_by_the_shorter_way():
    turns = {
        "name": "turns", "component_type": "wind", "kind": "rate", "threshold": 10, "per_s": 60, "window_s": 60, "direction": "rise"
    }  # fmt: skip
    device = Device(rules(turns))
    told = [device.reads(at * 60, wind=value) for at, value in enumerate((350, 355, 1, 8, 359, 12))]
    assert told == [[], [], [], [], [], [("turns", "raised", 300)]]
    assert device.last.transitions[0]["value"] == 13


def test_an_expression_may_ask_for_the_shorter_way():
    device = Device(
        rules(
            {
                "name": "against", "component_type": "wind", "kind": "expression", "threshold": 90,
                "expression": "abs(angle_diff(value, vane, 360))", "inputs": {"vane": {"component_type": "vane"}},
                "inputs_max_age_s": 60,
            }
        )
    )  # fmt: skip
    assert device.reads(0, wind=350, vane=70) == []
    assert device.reads(1, wind=300, vane=70) == [("against", "raised", 1)]


@pytest.mark.parametrize(
    ("of_type", "of_device", "period"),
    [
        ({}, {}, None), ({"circular": 360}, {}, 360), ({}, {"circular": 360}, 360), ({"circular": 24}, {"circular": 360}, 360),
        ({"circular": 360}, {"circular": None}, None), ({"unit": "rad"}, {"circular": 360}, 360),
    ],
)  # fmt: skip
def test_a_rule_is_of_the_datatype_as_it_is_for_the_device(of_type: Any, of_device: Any, period: float | None):
    plain = {"name": "heading", "rev": 1, "kind": "number", "unit": "°", "stale_after_s": 60}
    docs = {
        "off": {"name": "off", "rev": 1, "component_type": "heading", "kind": "deviation", "severity": "minor", "setpoint": 350, "threshold": 30},
        "fast": {"name": "fast", "rev": 1, "component_type": "heading", "kind": "rate", "severity": "minor", "threshold": 30, "per_s": 60, "window_s": 60},
    }  # fmt: skip
    device_type: Any = {
        "name": "t",
        "rev": 1,
        "rules": ["off"],
        "datatypes": {"heading": of_type, "speed": {"unit": "km/h"}},
    }
    device: Any = {
        "device_id": "d",
        "rev": 1,
        "type": "t",
        "enabled": True,
        "rules": {"fast": {}},
        "datatypes": {"heading": of_device},
    }
    found = compile_rules(device, device_type, docs.get, {"heading": plain}.get)
    assert found.problems == ()
    off, fast = found.by_name["off"], found.by_name["fast"]
    assert off.difference(10, 350) == fast.difference(10, 350) == (20 if period else -340)
    assert off.unit == of_type.get("unit", "°")
    assert off.gap_max_us == 60_000_000
    assert compile_rules({**device, "datatypes": {}}, None, docs.get, {}.get).by_name["fast"].unit == "/min"


def test_a_datatype_that_an_override_makes_impossible_is_a_problem_of_its_rule():
    plain = {"name": "heading", "rev": 1, "kind": "number", "unit": "°", "circular": 360}
    doc = {
        "name": "off",
        "rev": 1,
        "component_type": "heading",
        "kind": "deviation",
        "severity": "minor",
        "setpoint": 350,
        "threshold": 30,
    }
    device: Any = {
        "device_id": "d",
        "rev": 1,
        "type": "t",
        "enabled": True,
        "rules": {"off": {}},
        "datatypes": {"heading": {"counter": {}}},
    }
    found = compile_rules(device, None, {"off": doc}.get, {"heading": plain}.get)
    assert found.problems == ("rule off: a counter is not circular",)
