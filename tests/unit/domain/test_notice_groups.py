"""When a recipient is told of which alarms: the intervals, what holds back, and that nothing is lost or told twice."""

import asyncio
from collections import Counter
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from notice_support import US, GroupStage, S, event, transition

from preservarium.domain import notices
from preservarium.domain.local_time import Hours
from preservarium.domain.notices import Policy, minute_of_day


def shown(deliveries: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Kind, and each line as device:status, + where it is new, × how often it was raised."""
    return [
        (
            d["kind"],
            [
                f"{'+' if x['new'] else ''}{x['device_id']}:{x['status']}"
                + (f"×{x['raised_count']}" if x["raised_count"] > 1 else "")
                for x in d["lines"]
            ],
        )
        for d in deliveries
    ]


def cleared(number: int, transition_number: int, **fields: Any) -> dict[str, Any]:
    return transition(
        number, transition="cleared", state="normal", transition_id=f"{transition_number:032x}", cleared_at=US, **fields
    )


async def test_a_new_group_waits_then_each_interval_tells_what_is_new():
    stage = GroupStage()
    await stage.hear(event(transition(1), 1))
    assert await stage.run(20) == []
    await stage.hear(event(transition(2), 2))
    assert shown(await stage.run(9)) == []
    assert shown(await stage.run(3)) == [("alarms", ["+dev-1:raised", "+dev-2:raised"])]
    await stage.hear(event(transition(3), 3))
    assert await stage.run(290) == []
    # Alertmanager's notice of a group names all its alarms, the ones that stand too.
    assert shown(await stage.run(12)) == [("alarms", ["+dev-3:raised", "dev-1:raised", "dev-2:raised"])]
    assert await stage.run(3_600, 10) == []


async def test_what_stands_unanswered_is_told_again_until_it_is_acknowledged():
    stage = GroupStage({"repeat_interval_s": 3_600})
    await stage.hear(event(transition(1), 1))
    await stage.run(32)
    assert shown(await stage.run(3_590, 10)) == []
    assert shown(await stage.run(320, 10)) == [("repeat", ["dev-1:raised"])]
    await stage.hear(event(transition(1, transition="acknowledged", state="acknowledged"), 2))
    assert await stage.run(9_000, 10) == []
    await stage.hear(event(cleared(1, 9), 3))
    assert shown(await stage.run(310, 10)) == [("alarms", ["+dev-1:cleared"])]
    assert stage.document()["g"] == {}


async def test_groups_are_made_of_labels():
    stage = GroupStage({"group_by": ["area", "severity"]})
    await stage.hear(
        event(transition(1), 1, area="roof"),
        event(transition(2), 2, area="roof"),
        event(transition(3), 3, area="cellar"),
        event(transition(4, severity="minor"), 4, area="roof"),
    )
    told = await stage.run(32)
    assert [(d["group"], len(d["lines"])) for d in told] == [
        ({"area": "roof", "severity": "major"}, 2),
        ({"area": "cellar", "severity": "major"}, 1),
        ({"area": "roof", "severity": "minor"}, 1),
    ]


async def test_what_comes_and_goes_is_one_line():
    stage = GroupStage()
    for number in range(4):
        await stage.hear(event(transition(1, transition_id=f"{number}r"), 2 * number))
        await stage.hear(event(cleared(1, number), 2 * number + 1))
        stage.advance(1)
    (told,) = await stage.run(32)
    assert shown([told]) == [("alarms", ["+dev-1:cleared×4"])]
    assert told["lines"][0]["transitions_count"] == 8
    assert stage.document()["g"] == {}


async def test_a_chattering_alarm_gives_no_reason_for_a_further_notice():
    stage = GroupStage()
    await stage.hear(event(transition(1), 1))
    await stage.run(32)
    for number in range(20):
        await stage.hear(event(cleared(1, number, chattering=True), 2 + 2 * number))
        await stage.hear(event(transition(1, transition_id=f"{number}r", chattering=True), 3 + 2 * number))
        assert await stage.run(60, 10) == []
    assert shown(await stage.run(14_400, 60)) == [("alarms", ["+dev-1:raised×20"])]


async def test_what_was_acknowledged_in_time_is_not_told():
    stage = GroupStage()
    acknowledged = transition(1, transition="acknowledged", state="acknowledged")
    await stage.hear(event(transition(1), 1), event(acknowledged, 2))
    await stage.run(32)
    await stage.hear(event(cleared(1, 3), 3))
    assert await stage.run(400, 10) == []
    assert stage.document()["g"] == {}


@pytest.mark.parametrize("state", ["shelved", "suppressed", "out_of_service"])
async def test_what_is_silent_by_design_is_not_told(state: str):
    stage = GroupStage()
    await stage.hear(event(transition(1), 1), event(transition(1, transition=state, state=state), 2))
    await stage.hear(event(transition(1, transition="cleared", state=state), 3))
    assert await stage.run(400, 10) == []


async def test_escalation_comes_where_nobody_has_acknowledged():
    stage = GroupStage({"group_wait_s": 0})
    await stage.hear(event(transition(1), 1, after_s=600), event(transition(2), 2, after_s=600))
    assert await stage.run(500, 10) == []
    await stage.hear(event(transition(2, transition="acknowledged", state="acknowledged"), 3, after_s=600))
    assert await stage.run(90, 10) == []
    assert shown(await stage.run(20)) == [("alarms", ["+dev-1:raised"])]
    # Whoever was told hears that it is over; whoever was not hears nothing.
    await stage.hear(event(cleared(1, 8), 4, after_s=600), event(cleared(2, 9), 5, after_s=600))
    assert shown(await stage.run(310, 10)) == [("alarms", ["+dev-1:cleared"])]


async def test_what_is_over_before_the_escalation_does_not_escalate():
    stage = GroupStage({"group_wait_s": 0})
    await stage.hear(event(transition(1), 1, after_s=600))
    await stage.run(500, 10)
    await stage.hear(event(cleared(1, 8), 2, after_s=600))
    assert await stage.run(900, 10) == []


async def test_nothing_is_escalated_or_repeated_while_events_wait_to_be_heard():
    stage = GroupStage({"group_wait_s": 0, "repeat_interval_s": 300})
    await stage.hear(event(transition(1), 1, after_s=60), event(transition(2), 2))
    await stage.run(3)
    for _ in range(100):
        stage.advance(10)
        await stage.tick(behind=True)
    assert shown(stage.sent) == [("alarms", ["+dev-2:raised"])]
    assert shown(await stage.run(320, 10)) == [("alarms", ["+dev-1:raised", "dev-2:raised"])]


async def test_an_alarm_that_becomes_graver_is_told_again():
    stage = GroupStage()
    await stage.hear(event(transition(1, severity="minor"), 1))
    await stage.run(32)
    await stage.hear(event(transition(1, transition="severity_raised", transition_id="g", severity="critical"), 2))
    (told,) = await stage.run(310, 10)
    assert shown([told]) == [("alarms", ["+dev-1:raised"])]
    assert (told["lines"][0]["severity"], told["lines"][0]["transitions"]) == ("critical", ["g"])
    await stage.hear(event(transition(1, transition="severity_lowered", severity="minor"), 3))
    assert await stage.run(310, 10) == []


async def test_whoever_is_told_of_some_severities_hears_the_end_of_what_was_told():
    stage = GroupStage()
    await stage.hear(event(transition(1, severity="critical"), 1))
    await stage.run(32)
    await stage.hear(event(cleared(1, 7, severity="minor"), 2, below=True), event(cleared(2, 8), 3, below=True))
    assert shown(await stage.run(310, 10)) == [("alarms", ["+dev-1:cleared"])]


def at(hours: float) -> int:
    """µs of an hour of Wednesday, 2023-11-15 (UTC)."""
    return 1_700_006_400 * S + round(hours * 3_600 * S)


async def test_quiet_hours_hold_back_into_one_digest():
    stage = GroupStage(
        {"quiet_hours": [{"since": "22:00", "until": "06:00"}], "timezone": "Europe/Berlin", "group_by": ["device"]}
    )
    stage.go_to(at(22))  # 23:00 in Berlin
    await stage.hear(event(transition(1), 1), event(transition(2, severity="critical"), 2))
    assert shown(await stage.run(60)) == [("alarms", ["+dev-2:raised"])]
    await stage.hear(event(transition(3), 3), event(cleared(1, 7), 4))
    await stage.hear(event(transition(2, transition="acknowledged", state="acknowledged"), 5))
    assert await stage.run(5 * 3_600, 60) == []
    stage.go_to(at(29) - 10 * S)  # shortly before six
    assert await stage.run(8) == []
    (told,) = await stage.run(90)
    assert shown([told]) == [("digest", ["+dev-3:raised", "+dev-1:cleared"])]
    assert (told["held"]["why"], told["held"]["notices"]) == ("quiet_hours", 2)
    assert stage.document()["held"] is None


async def test_a_daily_digest_tells_everything_at_its_time_but_what_is_critical():
    stage = GroupStage({"digest": {"every": "day", "at": "07:30"}, "repeat_interval_s": 3_600})
    stage.go_to(at(6))
    await stage.hear(event(transition(1), 1), event(transition(2, rule="wet"), 2))
    await stage.hear(event(transition(3, severity="critical", rule="fire"), 3))
    assert shown(await stage.run(60)) == [("alarms", ["+dev-3:raised"])]
    await stage.hear(event(transition(3, rule="fire", transition="acknowledged", state="acknowledged"), 4))
    assert await stage.run(5_300, 10) == []
    assert shown(await stage.run(120)) == [("digest", ["+dev-1:raised", "+dev-2:raised"])]
    assert await stage.run(23 * 3_600, 60) == [], "an empty digest says nothing"


async def test_beyond_the_limit_one_notice_says_how_many_were_held():
    stage = GroupStage({"limit": {"notices": 2, "window_s": 600}, "group_by": ["device"], "group_wait_s": 0})
    for number in range(6):
        await stage.hear(event(transition(number), number))
        await stage.run(4)
    assert len(stage.sent) == 2
    told = await stage.run(600, 5)
    assert shown(told)[0] == ("digest", [f"+dev-{n}:raised" for n in (2, 3, 4, 5)])
    assert told[0]["held"]["notices"] == 4


async def test_a_worker_whose_clock_is_behind_goes_on_numbering():
    stage = GroupStage({"group_by": ["alarm"], "group_wait_s": 0})
    stage.go_to(US + 500 * S)
    await stage.hear(event(transition(1), 1))
    await stage.run(3)
    stage.world.clock._now_us -= 100 * S
    stage.start()
    await stage.hear(event(transition(2), 2))
    await stage.run(3)
    one, two = stage.sent
    assert two["number"] == one["number"] + 1


async def test_a_recipient_whose_state_was_lost_is_told_under_new_numbers():
    stage = GroupStage({"group_by": ["alarm"], "group_wait_s": 0})
    await stage.hear(event(transition(1), 1))
    await stage.run(3)
    stage.world.tables.clear()
    stage.start()
    await stage.hear(event(transition(2), 2))
    await stage.run(3)
    one, two = stage.sent
    assert two["number"] > one["number"]


async def test_alarms_beyond_what_a_document_holds_are_counted():
    stage = GroupStage({"group_wait_s": 0})
    extra = 7
    events = [event(transition(n), n) for n in range(notices.ENTRIES_MAX + extra)]
    await stage.hear(*events)
    told = await stage.run(5)
    assert sum(len(d["lines"]) + sum(d["more"].values()) for d in told) == notices.ENTRIES_MAX + extra
    assert len(told[0]["lines"]) == notices.LINES_MAX
    # Room is made by forgetting what was told; new alarms are told in full again.
    await stage.hear(event(transition(9_999, severity="critical"), 10_000))
    (told_later,) = await stage.run(310, 5)
    assert told_later["lines"][0]["device_id"] == "dev-9999"
    assert len(orjson.dumps(stage.document())) < 800_000


async def test_a_document_of_the_longest_names_fits_into_a_record():
    stage = GroupStage({"group_wait_s": 0})
    long = {
        "device_name": "ß" * 300, "message": "ß" * 2_000, "rule": "r" * 120, "component_type": "c" * 120, "unit": "u" * 40,
        "alarm_id": "a" * 32, "chattering": True, "cleared_at": US,
    }  # fmt: skip
    await stage.hear(*(event(transition(n, **long, device_id=f"{n:0200}"), n) for n in range(notices.ENTRIES_MAX)))
    await stage.tick()
    stage.advance(1)
    await stage.tick()
    assert all(len(value) < 990_000 for value in stage.world.tables.values())


@pytest.mark.parametrize(
    ("quiet", "hour", "expected"),
    [
        (Hours(22 * 60, 6 * 60), 23, True),
        (Hours(22 * 60, 6 * 60), 5.9, True),
        (Hours(22 * 60, 6 * 60), 6, False),
        (Hours(12 * 60, 13 * 60), 12.5, True),
        (Hours(12 * 60, 13 * 60), 13, False),
        # It began on Tuesday, which is over at two on Wednesday all the same.
        (Hours(22 * 60, 6 * 60, frozenset({1})), 2, True),
        (Hours(22 * 60, 6 * 60, frozenset({2})), 2, False),
        (Hours(22 * 60, 6 * 60, frozenset({2})), 26, True),
        (Hours(0, 0, frozenset({2})), 23.9, True),
        (Hours(0, 0, frozenset({2})), 24.1, False),
    ],
)
def test_quiet_hours(quiet: Hours, hour: float, expected: bool):
    assert Policy(quiet=(quiet,)).is_quiet(at(hour)) is expected


@pytest.mark.parametrize("text", ["24:00", "7", "07:60", "a:b", "07:5", "-1:00", ""])
def test_what_is_no_time_of_day_is_refused(text: str):
    with pytest.raises(ValueError, match="no time of day"):
        minute_of_day(text)


# --- properties ------------------------------------------------------------------------------------------------------

POLICIES: list[dict[str, Any]] = [
    {},
    {"group_by": ["device"], "group_wait_s": 0, "limit": {"notices": 2, "window_s": 900}},
    {"group_by": [], "quiet_hours": [{"since": "22:00", "until": "23:00"}], "repeat_interval_s": 600},
    {"group_by": ["alarm"], "digest": {"every": "hour"}, "limit": {"notices": 1, "window_s": 300}},
    {"group_by": ["rule", "severity"], "cleared": False, "group_interval_s": 10, "repeat_interval_s": 60},
]

_point = st.integers(0, 3)
_operation = st.one_of(
    st.tuples(st.just("raise"), _point, st.sampled_from(["critical", "major", "minor"]), st.sampled_from([0, 0, 120])),
    st.tuples(st.sampled_from(["clear", "acknowledge", "shelve", "withdraw", "again"]), _point),
    st.tuples(st.just("wait"), st.sampled_from([1, 5, 31, 301, 1_000, 4_000])),
    st.tuples(st.just("crash"), st.sampled_from(["before", "sent", "between", "hear"]), st.sampled_from([1, 10, 100])),
)


class Plant:
    """Four alarms, and what happened to them."""

    def __init__(self, policy: dict[str, Any]) -> None:
        self.stage = GroupStage(policy)
        self.heard: list[Any] = []
        self.active: dict[int, str] = {}  #: point -> transition id of the raise
        self.after_s: dict[int, float] = {}
        self.open: dict[str, int] = {}  #: transition id of a raise that nobody answered and that is not over -> point
        self.numbers = 0

    async def happen(self, operation: tuple[Any, ...]) -> None:
        what, *rest = operation
        if what == "wait":
            for _ in range(10):
                self.stage.advance(rest[0] / 10)
                await self.stage.tick()
        elif what == "crash" and rest[0] == "hear":
            # The batch was handled, and its state not written: it comes again, after a part of the one before it.
            await self.stage.hear(*self.heard[-3:], crash=True)
            if self.heard:
                await self.stage.hear(*self.heard[-3:])
        elif what == "crash":
            for _ in range(40):
                self.stage.advance(rest[1])
                if await self.stage.tick(crash=rest[0]):
                    break
        elif what == "raise":
            await self._raise(*rest)
        else:
            await self._other(what, *rest)

    async def _raise(self, point: int, severity: str, after_s: float) -> None:
        if point in self.active:
            return
        self.after_s[point] = after_s
        self.active[point] = await self._hear(point, "raised", "unacknowledged", severity=severity)
        self.open[self.active[point]] = point

    async def _other(self, what: str, point: int) -> None:
        if what == "again":
            if self.heard:
                await self.stage.hear(*self.heard[-2:])
            return
        name, state = {
            "clear": ("cleared", "normal"),
            "acknowledge": ("acknowledged", "acknowledged"),
            "shelve": ("shelved", "shelved"),
            "withdraw": ("withdrawn", "normal"),
        }[what]
        if point not in self.active:
            return
        self.open.pop(self.active[point], None)
        if what != "acknowledge":
            del self.active[point]
        await self._hear(point, name, state)

    async def _hear(self, point: int, name: str, state: str, **fields: Any) -> str:
        self.numbers += 1
        line = transition(
            point,
            transition=name,
            state=state,
            transition_id=f"t{self.numbers}",
            detected_at=self.stage.now_us,
            **fields,
        )
        one = event(line, self.numbers, after_s=self.after_s[point])
        self.heard.append(one)
        await self.stage.hear(one)
        return f"t{self.numbers}"


async def check(policy: dict[str, Any], operations: list[tuple[Any, ...]]) -> None:
    plant = Plant(policy)
    for operation in operations:
        await plant.happen(operation)
    await plant.stage.run(2 * 4_000, 100)
    by_number: dict[int, list[dict[str, Any]]] = {}
    for delivery in plant.stage.sent:
        by_number.setdefault(delivery["number"], []).append(delivery)
    # What a crash made go out again is the same to the last byte.
    assert all(again == first for first, *others in by_number.values() for again in others)
    deliveries = plant.stage.deliveries()
    assert [d["number"] for d in deliveries] == sorted(by_number)
    assert len({d["delivery_id"] for d in deliveries}) == len(deliveries)
    told = Counter(t for d in deliveries for line in d["lines"] for t in line["transitions"])
    assert set(told.values()) <= {1}, "a transition is told in two notices"
    assert not [t for t in plant.open if t not in told], "nobody answered, and nobody was told"
    if limit := policy.get("limit"):
        times = [d["planned_at"] for d in deliveries]
        window_us = limit["window_s"] * S
        assert all(sum(t - window_us < u <= t for u in times) <= limit["notices"] for t in times)
    assert not [d for d in deliveries if not d["lines"]], "an empty notice"


@hypothesis_settings(max_examples=150, deadline=None)
@given(policy=st.sampled_from(POLICIES), operations=st.lists(_operation, max_size=25))
def test_nothing_is_lost_or_told_twice_whatever_crashes(policy: dict[str, Any], operations: list[tuple[Any, ...]]):
    asyncio.run(check(policy, operations))


@hypothesis_settings(max_examples=40, deadline=None)
@given(operations=st.lists(_operation.filter(lambda o: o[0] != "crash"), max_size=20), where=st.integers(0, 200))
def test_a_crash_at_any_tick_gives_the_same_notices(operations: list[tuple[Any, ...]], where: int):
    """The same history, once undisturbed and once cut off at a tick: what went out before it stays, nothing is doubled."""

    async def run(crash_at: int) -> list[dict[str, Any]]:
        plant = Plant({"group_wait_s": 10})
        ticks = 0
        original = plant.stage.tick

        async def tick(crash: str = "", behind: bool = False) -> bool:
            nonlocal ticks
            ticks += 1
            if ticks == crash_at:
                await original(crash="sent")
                ticks += 1
            return await original(crash, behind)

        plant.stage.tick = tick  # type: ignore[method-assign]
        for operation in operations:
            await plant.happen(operation)
        await plant.stage.run(4_000, 100)
        return plant.stage.deliveries()

    assert asyncio.run(run(where)) == asyncio.run(run(-1))


# --- the reference ---------------------------------------------------------------------------------------------------


class Alertmanager:
    """Alertmanager's dispatching and de-duplication for one group, written from its documentation: the oracle.

    A new group is flushed after group_wait, then every group_interval. A flush notifies where an alert fires that the last
    notification did not name as firing, where one was resolved since it was named, or, of what still fires, when
    repeat_interval is over. Resolved alerts leave with the flush that tells of them; an empty group is gone.
    """

    def __init__(self, wait_s: int, interval_s: int, repeat_s: int) -> None:
        self.wait_s, self.interval_s, self.repeat_s = wait_s, interval_s, repeat_s
        self.alerts: dict[int, bool] = {}  #: whether it fires
        self.flush_s: int | None = None
        self.named: frozenset[int] = frozenset()
        self.notified_s: int | None = None
        self.notifications: list[tuple[int, frozenset[int], frozenset[int]]] = []

    def put(self, now_s: int, alert: int, firing: bool) -> None:
        if not self.alerts:
            self.flush_s, self.named, self.notified_s = now_s + self.wait_s, frozenset(), None
        self.alerts[alert] = firing

    def advance(self, now_s: int) -> None:
        if self.flush_s is None or now_s < self.flush_s:
            return
        firing = frozenset(a for a, fires in self.alerts.items() if fires)
        resolved = frozenset(self.alerts) - firing
        is_repeat = self.notified_s is not None and firing and now_s - self.notified_s >= self.repeat_s
        if firing - self.named or resolved & self.named or is_repeat:
            self.notifications.append((now_s, firing, resolved))
            self.named, self.notified_s = firing, now_s
        self.alerts = dict.fromkeys(firing, True)
        self.flush_s = now_s + self.interval_s if self.alerts else None


_life = st.tuples(st.integers(0, 700), st.none() | st.integers(0, 700))


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    lives=st.lists(_life, min_size=1, max_size=6),
    wait_s=st.sampled_from([0, 10, 30]),
    interval_s=st.sampled_from([20, 60, 300]),
    repeat_s=st.sampled_from([60, 290, 900]),
)
def test_the_intervals_are_alertmanagers(
    lives: list[tuple[int, int | None]], wait_s: int, interval_s: int, repeat_s: int
):
    """Alarms that are told before they are over: what was over before is where we differ, and say so."""
    happenings: dict[int, list[tuple[int, bool]]] = {}
    for number, (raised_s, lasted_s) in enumerate(lives):
        happenings.setdefault(raised_s, []).append((number, True))
        if lasted_s is not None:
            over_s = raised_s + wait_s + interval_s + 1 + lasted_s
            happenings.setdefault(over_s, []).append((number, False))

    async def ours() -> tuple[list[Any], list[Any]]:
        intervals = {"group_wait_s": wait_s, "group_interval_s": interval_s, "repeat_interval_s": repeat_s}
        stage = GroupStage({**intervals, "limit": {"notices": 1_000, "window_s": 3_600}})
        oracle = Alertmanager(wait_s, interval_s, repeat_s)
        offset = 0
        for now_s in range(2_200):
            for number, firing in happenings.get(now_s, ()):
                offset += 1
                oracle.put(now_s, number, firing)
                await stage.hear(event(transition(number) if firing else cleared(number, offset), offset))
            await stage.tick()
            oracle.advance(now_s)
            stage.advance(1)
        await stage.tick()
        told = [
            (
                (d["planned_at"] - US) // S,
                frozenset(int(x["device_id"][4:]) for x in d["lines"] if x["status"] == "raised"),
                frozenset(int(x["device_id"][4:]) for x in d["lines"] if x["status"] == "cleared"),
            )
            for d in stage.sent
        ]
        return told, oracle.notifications

    told, expected = asyncio.run(ours())
    assert told == expected
