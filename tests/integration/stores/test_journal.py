"""What operators did in a real PostgreSQL: once in the chain, whatever is repeated; and all that is not normal."""

from typing import Any

import asyncpg
import pytest
from sink_support import NOW_US, SECOND_US, execute, fetch, live

from preservarium.errors import ReasonCode
from preservarium.stores import events
from preservarium.stores.base import Move
from preservarium.stores.event_tables import EventStore
from preservarium.stores.journal import ALARM_OPERATIONS, Journal, stream_of
from preservarium.stores.tables import ALARM_EVENTS
from preservarium.stores.views import Views

TOPIC = ("alarm_answers", 0)


@pytest.fixture
async def journal(dsn):
    made = Journal(ALARM_OPERATIONS, live(postgres={"url": dsn}), sink="sink-actions")
    yield made
    await made.close()


@pytest.fixture
async def connection(dsn):
    made = await asyncpg.connect(dsn)
    yield made
    await made.close()


def answer(n: int, **fields: Any) -> dict[str, Any]:
    return {
        "action_id": f"x{n}", "device_id": "dev-1", "rule": "hot", "pin_position": "-1", "alarm_id": "a1", "action": "acknowledge",
        "actor": "ann", "comment": "", "at": NOW_US + n * SECOND_US, "until": None, "one_shot": False, "outcome": "done", "code": "",
        "reason": "", "state": "acknowledged", "transitions": ["t1"], "answered_at": NOW_US + n * SECOND_US + 5,
    } | fields  # fmt: skip


def transition(n: int, what: str, state: str, **fields: Any) -> dict[str, Any]:
    return {
        "alarm_id": "a1", "transition_id": f"t{n}", "sequence": n, "device_id": "dev-1", "rule": "hot", "pin_position": "-1",
        "severity": "major", "transition": what, "state": state, "occurred_at": NOW_US, "detected_at": NOW_US + n * SECOND_US,
        "cleared_at": None, "value": 41.0, "unit": "°C", "threshold": 40.0, "message": "hot", "generation": 0, "component_type": "temp",
        "actor": None, "comment": None,
    } | fields  # fmt: skip


async def test_each_action_is_one_event_of_the_chain_whatever_is_repeated(dsn, journal, connection):
    lines = [
        answer(1),
        answer(2, device_id="dev-2"),
        answer(3, outcome="refused", code="already_acknowledged", reason="is already"),
    ]
    first = await journal.write(lines, {TOPIC: Move(None, 3)})
    assert (first.accepted, first.duplicates, first.rejected) == (3, 0, [])
    # The topic is read from its beginning once more, with one line in it twice.
    await execute(dsn, "UPDATE sink_offsets SET next_offset = 0 WHERE sink = 'sink-actions'")
    again = await journal.write([*lines, answer(4, comment="late"), answer(4, comment="late")], {TOPIC: Move(0, 5)})
    assert (again.accepted, again.duplicates) == (1, 4)
    chain = await events.read(connection, stream_of("dev-1"))
    assert [(e.version, e.type, e.actor, e.data["action_id"]) for e in chain] == [
        (1, "action_done", "ann", "x1"),
        (2, "action_refused", "ann", "x3"),
        (3, "action_done", "ann", "x4"),
    ]
    assert (chain[0].at_us, chain[2].data["comment"]) == (NOW_US + SECOND_US, "late")
    assert len(await fetch(dsn, "SELECT FROM alarm_operations")) == 4
    found = await events.verify(connection)
    assert (found.streams, found.events, found.faults) == (2, 4, [])


async def test_events_and_offset_are_one_transaction(dsn, journal, connection):
    async def fail(_rejected: Any) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await journal.write([answer(1)], {TOPIC: Move(None, 1)}, before_commit=fail)
    assert await events.read(connection, stream_of("dev-1")) == []
    assert await journal.offsets("alarm_answers", [0]) == {0: None}


async def test_one_that_cannot_be_stored_does_not_hold_up_the_others(journal, connection):
    lines = [answer(1), answer(2, device_id="d" * 500), answer(3, outcome="perhaps"), answer(4, actor=7), answer(5)]
    result = await journal.write(lines, {TOPIC: Move(None, 5)})
    assert [(r.message, r.code) for r in result.rejected] == [(n, ReasonCode.STORE_REJECTED) for n in (1, 2, 3)]
    assert [e.data["action_id"] for e in await events.read(connection, stream_of("dev-1"))] == ["x1", "x5"]


async def test_a_long_chain_is_written_on(journal, connection):
    for start in range(0, 120, 40):
        await journal.write([answer(n) for n in range(start, start + 40)], {TOPIC: Move(start or None, start + 40)})
    assert [e.version for e in await events.read(connection, stream_of("dev-1"))] == [*range(1, 121)]
    assert (await events.verify(connection)).faults == []


@pytest.fixture
async def stored(dsn, journal):
    """One raised and returned, one shelved, two that are over, one that was never raised and is shelved, one unshelved."""
    alarms = EventStore(ALARM_EVENTS, live(postgres={"url": dsn}), sink="sink-alarms")
    far = NOW_US + 10**12 * 365
    await alarms.write(
        [
            transition(1, "raised", "unacknowledged"), transition(2, "cleared", "returned_unacknowledged", cleared_at=NOW_US + 2),
            transition(3, "raised", "unacknowledged", alarm_id="a2", device_id="dev-2"),
            transition(4, "shelved", "shelved", alarm_id="a2", device_id="dev-2", actor="ann", comment="noisy"),
            transition(5, "raised", "unacknowledged", alarm_id="a3", device_id="dev-3"),
            transition(6, "cleared", "normal", alarm_id="a3", device_id="dev-3", cleared_at=NOW_US + 9),
            transition(7, "raised", "unacknowledged", alarm_id="a4", device_id="dev-4", generation=7),
        ],
        {("iot_alerts", 0): Move(None, 7)},
    )  # fmt: skip
    shelve = {"action": "shelve", "state": "shelved"}
    await journal.write(
        [
            answer(1, device_id="dev-2", alarm_id="a2", until=far, **shelve),
            answer(2, device_id="dev-5", alarm_id="", until=far, **shelve),
            answer(3, device_id="dev-6", alarm_id="", until=far, **shelve),
            answer(4, device_id="dev-6", alarm_id="", action="unshelve", state="normal"),
            answer(5, device_id="dev-7", alarm_id="", until=NOW_US + 1, **shelve),
            answer(6, device_id="dev-8", alarm_id="", action="out_of_service", state="out_of_service"),
            answer(
                7,
                outcome="refused",
                code="still_raised",
                reason="still true",
                action="clear",
                state="returned_unacknowledged",
            ),
        ],
        {TOPIC: Move(None, 7)},
    )
    await alarms.close()
    return far


async def test_all_that_is_not_normal_shows(dsn, stored):
    rows = await fetch(
        dsn, "SELECT device_id, alarm_id, state, active, shelved_until FROM active_alarms ORDER BY device_id"
    )
    assert [(r[0], r[1], r[2], r[3]) for r in rows] == [
        ("dev-1", "a1", "returned_unacknowledged", False),
        ("dev-2", "a2", "shelved", True),
        ("dev-5", "", "shelved", False),
        ("dev-8", "", "out_of_service", False),
    ]
    assert [events.microseconds(r[4]) if r[4] else None for r in rows] == [None, stored, stored, None]


async def test_views_show_what_stands_and_its_history(dsn, stored):
    views = Views(lambda: live(postgres={"url": dsn})().postgres)
    standing = {a["device_id"]: a for a in await views.standing(10)}
    assert set(standing) == {"dev-1", "dev-2", "dev-5", "dev-8"}
    assert (standing["dev-2"]["shelved_until"], standing["dev-1"]["occurred_at"]) == (stored, NOW_US)
    assert len(await views.standing(2)) == 2
    history = await views.alarm_history(device_id="dev-1", rule="hot", pin_position="-1", limit=10)
    assert [(h["what"], h["name"], h["reason"]) for h in history] == [
        ("action", "clear", "still true"),
        ("transition", "cleared", None),
        ("transition", "raised", None),
    ]
    noisy = await views.alarm_history(device_id="dev-2", rule="hot", pin_position="-1", limit=10)
    assert [(h["name"], h["actor"], h["comment"]) for h in noisy] == [
        ("shelved", "ann", "noisy"),
        ("raised", None, None),
    ]
    never = await views.alarm_history(device_id="dev-5", rule="hot", pin_position="-1", limit=10)
    assert [(h["what"], h["name"]) for h in never] == [("action", "shelve")]
    await views.close()
