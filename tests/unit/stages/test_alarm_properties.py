"""One story of alarms: live, on replay, after a crash at any record, however late or often the data came."""

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st
from quality_support import StateTable, World, batch, catalogue, live, offer, record

from preservarium import topics
from preservarium.domain.alarms.action import parse_action
from preservarium.domain.alarms.device import DeviceAlarms
from preservarium.domain.alarms.rule import DeviceRules
from preservarium.domain.alarms.rules import _rule_set, compile_rules
from preservarium.stages.alarm import Alarming
from preservarium.streaming.publish import partition_of
from preservarium.streaming.stage import Effects, Tick

S = 1_000_000
T = 1_700_000_000 * S
WEEK_S = 7 * 86_400
MINUTES = 10  # the usual pace of the recorded week, in minutes
DATATYPES: Any = {
    name: {"name": name, "rev": 1, "kind": "number", "unit": unit} for name, unit in [("temp", "°C"), ("hum", "%")]
}
#: Every kind, delays and counts, levels, schedules, a group with a master that is itself a silence.
DOCS: list[dict[str, Any]] = [
    {"name": "hot", "kind": "high", "threshold": 30, "deadband": 1, "on_delay_s": 1_200, "off_delay_s": 600},
    {"name": "levels", "kind": "high", "threshold": 28, "levels": [{"threshold": 33, "severity": "critical"}]},
    {"name": "often", "kind": "low", "threshold": 12, "repeat": {"count": 3, "within_s": 7_200}, "group": "g"},
    {"name": "fast", "kind": "rate", "threshold": 20, "window_s": 1_800, "per_s": 3_600},
    {"name": "off", "kind": "deviation", "setpoint": 20, "threshold": 9, "parameters": {"latching": True}},
    {
        "name": "both", "kind": "expression", "expression": "value > 25 and h > 60", "on_delay_s": 600,
        "inputs": {"h": {"component_type": "hum"}}, "inputs_max_age_s": 1_500,
    },
    {"name": "apart", "kind": "deviation", "reference": {"component_type": "hum"}, "threshold": 30, "inputs_max_age_s": 900},
    {"name": "gone", "kind": "no_data", "no_data_s": 3_000, "parameters": {"acknowledge": "auto"}},
    {"name": "dry", "component_type": "hum", "kind": "low", "threshold": 40, "group": "g", "first_out_s": 3_600},
    {"name": "mute", "component_type": "hum", "kind": "no_data", "no_data_s": 2_000, "group": "g", "group_master": True},
    {
        "name": "office", "kind": "high", "threshold": 27,
        "schedule": {"time_zone": "Europe/Berlin", "hours": [{"days": ["wed", "thu"], "from": "08:00", "to": "18:00"}]},
        "outages": [{"from": T + 40_000 * S, "to": T + 60_000 * S}],
    },
]  # fmt: skip
RULES = {d["name"]: {"rev": 1, "component_type": "temp", "severity": "minor", **d} for d in DOCS}


def compiled(lateness_s: float = 0.0) -> DeviceRules:
    docs: Any = {name: {**doc, "lateness_s": lateness_s} for name, doc in RULES.items()}
    device: Any = {"device_id": "dev-1", "rev": 1, "type": "t", "enabled": True, "rules": {name: {} for name in docs}}
    found = compile_rules(device, None, docs.get, DATATYPES.get)
    assert found.problems == ()
    assert len(found.by_name) == len(DOCS)
    return found


NOW = compiled()


@dataclass(frozen=True)
class Sent:
    """A message as the device means it."""

    at_s: int
    values: tuple[tuple[str, str, float], ...]


#: (gap in minutes, which series it tells of, two values): mostly a steady pace, now and then a silence.
STEPS = st.lists(
    st.tuples(
        st.sampled_from([MINUTES] * 8 + [1, 25, 60, 400]),
        st.sampled_from(["both"] * 4 + ["temp", "hum"]),
        st.sampled_from([5.0, 11.0, 20.0, 26.0, 29.0, 31.0, 34.0]),
        st.sampled_from([20.0, 39.0, 50.0, 65.0, 90.0]),
        st.sampled_from(["-1"] * 5 + ["1"]),
    ),
    min_size=1,
    max_size=60,
)


def week(steps: list[tuple[Any, ...]]) -> list[Sent]:
    at = 0
    found = []
    for gap, which, temp, hum, pin in steps:
        at += gap * 60
        readings = [("temp", pin, temp)] if which != "hum" else []
        readings += [("hum", pin, hum)] if which != "temp" else []
        found.append(Sent(at, tuple(readings)))
    return found


def message(offset: int, sent: Sent, received_s: float | None = None) -> dict[str, Any]:
    at = T + sent.at_s * S
    return {
        "device_id": "dev-1", "connector_mode": "MQTT", "topic": "", "timestamp": at, "parser": "p@1", "config_rev": 1,
        "received_at": at if received_s is None else T + round(received_s * S),
        "raw_partition": 3, "raw_offset": offset, "raw_index": 0, "generation": 0,
        "readings": [
            {"component_type": c, "pin_position": p, "value": v, "unit": DATATYPES[c]["unit"], "quality": 1}
            for c, p, v in sent.values
        ],
    }  # fmt: skip


def run(messages: list[dict[str, Any]], watched: DeviceRules, end_s: float | None = None) -> list[Any]:
    alarms = DeviceAlarms("dev-1")
    told = [t for m in messages for t in alarms.observe(m, watched).transitions]
    if end_s is not None:
        told += alarms.tick(T + round(end_s * S), watched).transitions
    return told


def stories(told: list[Any], *, event_time_only: bool = False) -> dict[tuple[str, str], list[Any]]:
    """The transitions of each alarm, without what only the way of arrival can say."""
    left_out = {"detected_at", "raw_partition", "raw_offset", "raw_index"} if event_time_only else {"detected_at"}
    found: dict[tuple[str, str], list[Any]] = {}
    for line in told:
        found.setdefault((line["rule"], line["pin_position"]), []).append(
            {k: v for k, v in line.items() if k not in left_out}
        )
    return found


# --- the same live and on replay


@given(
    STEPS, st.randoms(use_true_random=False), st.lists(st.integers(1, 7), min_size=1), st.sampled_from([0.0, 1_800.0])
)
@settings(max_examples=60, deadline=None)
def test_late_shuffled_and_duplicated_data_have_one_history_however_batches_are_cut(
    steps: list[tuple[Any, ...]], rng: Any, cuts: list[int], lateness_s: float
) -> None:
    watched = compiled(lateness_s) if lateness_s else NOW
    sent = week(steps)
    # As a network delivers them: some late, some twice (the second time as a message of its own), some out of order.
    arriving = sorted(sent + rng.sample(sent, len(sent) // 4), key=lambda s: s.at_s + rng.choice([0, 0, 0, 700, 9_000]))
    messages = [message(i, s, s.at_s + 1) for i, s in enumerate(arriving)]
    expected = run(messages, watched)
    document: Any = None
    told: list[Any] = []
    start, sizes = 0, iter(cuts * len(messages))
    while start < len(messages):
        part = messages[start : start + next(sizes)]
        for crashes in (True, False):  # a batch that dies before its state is written runs again on the old state
            alarms = DeviceAlarms("dev-1", orjson.loads(orjson.dumps(document)) if document else None)
            lines = [t for m in part for t in alarms.observe(m, watched).transitions]
            if not crashes:
                told += lines
                document = orjson.loads(orjson.dumps(alarms.document()))
        again = DeviceAlarms("dev-1", orjson.loads(orjson.dumps(document)))
        assert [t for m in part for t in again.observe(m, watched).transitions] == []
        start += len(part)
    assert told == expected
    ids = [t["transition_id"] for t in told]
    assert len(set(ids)) == len(ids)


@given(STEPS, st.lists(st.integers(1, 40_000), max_size=40), st.sampled_from([0.0, 1_800.0]))
@settings(max_examples=80, deadline=None)
def test_ticks_tell_what_the_next_readings_would_tell(
    steps: list[tuple[Any, ...]], gaps: list[int], lateness_s: float
) -> None:
    watched = compiled(lateness_s) if lateness_s else NOW
    messages = [message(i, s) for i, s in enumerate(week(steps))]
    end_s = (messages[-1]["timestamp"] - T) / S + WEEK_S
    replayed = run(messages, watched, end_s)
    at, ticks = 0, []
    for gap in gaps:
        at += gap
        ticks.append(at)
    document: Any = None
    told: list[Any] = []
    inputs: list[tuple[float, Any]] = [((m["received_at"] - T) / S, m) for m in messages]
    inputs += [(float(t) + 0.5, None) for t in ticks if t < end_s]
    for at_s, what in [*sorted(inputs, key=lambda one: one[0]), (end_s, None)]:
        alarms = DeviceAlarms("dev-1", document)  # every one with another worker
        outcome = alarms.tick(T + round(at_s * S), watched) if what is None else alarms.observe(what, watched)
        told += outcome.transitions
        document = orjson.loads(orjson.dumps(alarms.document()))
    assert stories(told, event_time_only=True) == stories(replayed, event_time_only=True)


#: What befalls a partition: records wait for so many seconds, then so many of those that came are handled, or time is told.
PAUSES = st.lists(
    st.tuples(st.sampled_from([0, 3, 700, 2_500, 9_000]), st.sampled_from(["handle", "tick"]), st.integers(1, 9)),
    max_size=80,
)


@given(STEPS, st.randoms(use_true_random=False), PAUSES)
@settings(max_examples=100, deadline=None)
def test_backlogs_pauses_and_ticks_leave_the_history_of_a_replay(
    steps: list[tuple[Any, ...]], rng: Any, pauses: list[tuple[int, str, int]]
) -> None:
    """Also of data that are late, doubled and out of order when they are received."""
    sent = week(steps)
    # Buffered by a gateway, some of it, and some of it twice.
    late = sorted(
        (s.at_s + rng.choice([1, 1, 1, 700, 9_000]), i, s) for i, s in enumerate(sent + sent[: len(sent) // 4])
    )
    messages = [message(i, s, received) for i, (received, _, s) in enumerate(late)]
    end_s = late[-1][0] + WEEK_S
    replayed = run(messages, NOW, end_s)

    async def lives() -> list[Any]:
        log, waiting, at_s = Log(), list(messages), 0.0
        for pause_s, what, count in [*pauses, (0, "rest", 0), (0, "end", 0)]:
            at_s = end_s + 1.0 if what == "end" else at_s + pause_s
            received = [m for m in waiting if m["received_at"] <= T + round(at_s * S)]
            if what == "tick" or what == "end":
                await log.do(at_s, "", behind=bool(received))
            else:
                part = received[:count] if what == "handle" else list(waiting)
                if part:
                    await log.do(part, "")
                del waiting[: len(part)]
            if rng.random() < 0.2:
                log.restart()
        return [{**orjson.loads(line), "rule_rev": 1} for line in log.sent]

    told = asyncio.run(lives())
    assert stories(told, event_time_only=True) == stories(replayed, event_time_only=True)


@given(STEPS, st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_shuffles_within_the_lateness_have_the_history_of_the_sorted_data(
    steps: list[tuple[Any, ...]], rng: Any
) -> None:
    lateness_s = 3_600
    watched = compiled(lateness_s)
    sent = week(steps)
    end_s = sent[-1].at_s + WEEK_S
    shuffled = sorted(sent + rng.sample(sent, len(sent) // 4), key=lambda s: s.at_s + rng.random() * (lateness_s - 1))
    received = [max(s.at_s for s in shuffled[: i + 1]) for i in range(len(shuffled))]
    in_order = run([message(i, s) for i, s in enumerate(sent)], watched, end_s)
    out_of_order = run(
        [message(i, s, at) for i, (s, at) in enumerate(zip(shuffled, received, strict=True))], watched, end_s
    )
    assert stories(out_of_order, event_time_only=True) == stories(in_order, event_time_only=True)


@given(STEPS, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_short_way_of_plain_rules_ends_where_the_long_one_does(steps: list[tuple[Any, ...]], rng: Any) -> None:
    assert {rule.name for rule in NOW.by_name.values() if rule.plain} == {"hot", "both", "apart", "dry"}
    slow = {name: replace(rule, plain=False, everywhere=False) for name, rule in NOW.by_name.items()}
    rule_set = _rule_set(0, list(slow.values()))
    long_way = replace(NOW, by_name=slow, by_type=rule_set.by_type, sets=(rule_set,))
    sent = week(steps)
    arriving = sorted(sent, key=lambda s: s.at_s + rng.choice([0, 0, 0, 700, 9_000]))
    messages = [message(i, s, s.at_s + 1) for i, s in enumerate(arriving)]
    assert run(messages, NOW) == run(messages, long_way)


# --- durations


@given(
    st.sampled_from(["hot", "both", "often", "fast"]),
    st.integers(0, WEEK_S),
    st.floats(-100, 100),
    st.lists(st.integers(0, 2 * WEEK_S), max_size=10),
    st.sampled_from([0.0, 60.0]),
)
@settings(deadline=None)
def test_one_old_sample_never_satisfies_a_duration(
    rule: str, at_s: int, value: float, ticks: list[int], lateness_s: float
) -> None:
    watched = compiled(lateness_s) if lateness_s else NOW
    alarms = DeviceAlarms("dev-1")
    readings = (("temp", "-1", value), ("hum", "-1", 90.0))
    told = list(alarms.observe(message(1, Sent(at_s, readings), 2 * WEEK_S), watched).transitions)
    # The same sample again, as a message of its own, and any time that passes.
    told += alarms.observe(message(2, Sent(at_s, readings), 2 * WEEK_S), watched).transitions
    for tick in sorted(ticks):
        told += alarms.tick(T + 2 * WEEK_S * S + tick * S, watched).transitions
    assert [t for t in told if t["rule"] == rule] == []


# --- crashes, as the runner orders effects


PARTITION = partition_of(b"dev-1", 12)


class Log:
    """The stage in a worker that may die: sends, then state, then the acknowledgement; what was sent stays sent."""

    def __init__(self) -> None:
        documents = [("datatype", d) for d in DATATYPES.values()] + [("rule", d) for d in RULES.values()]
        self.world = World(catalogue(*documents))
        offer(self.world.documents, "rule", **RULES["hot"])
        self.world.devices["dev-1"] = {
            "device_id": "dev-1", "rev": 1, "type": "t", "enabled": True, "rules": {name: {} for name in RULES},
        }  # fmt: skip
        self.sent: list[bytes] = []
        self.restart()

    def restart(self) -> None:
        world = self.world
        self.stage = Alarming(
            StateTable(world, "a"), world.known, world.documents, live(alarm={"settle_s": 0}), world.clock,
        )  # fmt: skip
        self.first = True

    async def do(self, work: Any, crash: str, *, behind: bool = False) -> None:
        """One batch or tick, until it is acknowledged; a tick that crashes comes again."""
        while True:
            if isinstance(work, float):
                effects: Effects = await self.stage.tick(Tick(PARTITION, T + round(work * S), self.first, behind))
                self.first = False
            elif isinstance(work[0], dict) and "action" in work[0]:
                records = [record(line["n"], {k: v for k, v in line.items() if k != "n"}) for line in work]
                effects = await self.stage.act(batch(topics.ALARM_ACTIONS, *records, partition=PARTITION))
            else:
                records = [record(m["raw_offset"], m) for m in work]
                effects = await self.stage.observe(batch(topics.VALIDATED, *records, partition=PARTITION))
            if crash != "before":
                alerts = [s for s in effects.sends if s.topic is topics.ALERTS]
                self.sent += [s.value or b"" for s in (alerts[: len(alerts) // 2] if crash == "sending" else alerts)]
            if crash in ("written", ""):
                self.world.carry_out(effects, PARTITION)
            if not crash:
                return
            crash = ""
            self.restart()


WORDS = ["acknowledge", "shelve", "unshelve", "suppress", "unsuppress", "out_of_service", "return_to_service"]
WORK = st.lists(
    st.tuples(
        st.sampled_from(["messages"] * 4 + ["tick", "action"]),
        st.sampled_from(["", "", "before", "sending", "sent", "written"]),
        st.sampled_from(list(RULES)),
        st.sampled_from(WORDS),
    ),
    max_size=25,
)


@given(STEPS, WORK)
@settings(max_examples=60, deadline=None)
def test_no_crash_loses_or_doubles_an_alarm(
    steps: list[tuple[Any, ...]], work: list[tuple[str, str, str, str]]
) -> None:
    sent = week(steps)
    plan: list[tuple[Any, str]] = []
    start, at = 0, 0.0
    for number, (kind, crash, rule, word) in enumerate(work):
        if kind == "messages":
            part = [message(start + i, s) for i, s in enumerate(sent[start : start + 5])]
            start += len(part)
            at = max([at, *((m["received_at"] - T) / S for m in part)])
            if part:
                plan.append((part, crash))
        elif kind == "tick":
            at += 1_000
            plan.append((at, crash))
        else:
            line = {
                "n": number,
                "device_id": "dev-1",
                "rule": rule,
                "action": word,
                "actor": "ann",
                "at": T + round(at * S),
            }
            parse_action(line)
            plan.append(([line], crash))

    async def both() -> tuple[Log, Log]:
        calm, crashing = Log(), Log()
        for one, crash in plan:
            await calm.do(one, "")
            await crashing.do(one, crash)
        return calm, crashing

    calm, crashing = asyncio.run(both())
    told = [orjson.loads(line) for line in calm.sent]
    # At least once: what was told again is the same, to the byte; who knows an id already has the same history.
    assert list(dict.fromkeys(crashing.sent)) == calm.sent
    assert len({line["transition_id"] for line in told}) == len(told)
    assert crashing.world.tables == calm.world.tables
