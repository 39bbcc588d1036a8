"""Task events into ClickHouse's engine: the current row of each file, whatever order, repetition and cut the events come in."""

import random
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sink_support import DAY_US, NOW_US, FakeRecord, batch, live, record

from preservarium import topics
from preservarium.clock import ManualClock
from preservarium.stages.sync import EmployeeSync, TaskSync
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.migrate import migrate_clickhouse

T, E = topics.TASK_EVENTS.name, topics.EMPLOYEES.name


@pytest.fixture
async def store(clickhouse: str, clickhouse_database: str) -> AsyncIterator[ClickHouseStore]:
    settings = live(clickhouse={"url": clickhouse, "database": clickhouse_database}, breaker={"failures_max": 1000})
    await migrate_clickhouse(settings())
    made = ClickHouseStore(settings)
    yield made
    await made.close()


@pytest.fixture
def tasks(store: ClickHouseStore) -> TaskSync:
    return TaskSync(store, store._settings, clock=ManualClock(NOW_US))


@pytest.fixture
def employees(store: ClickHouseStore) -> EmployeeSync:
    return EmployeeSync(store, store._settings, clock=ManualClock(NOW_US))


def event(file_id: str, at: int, event_id: int | str, **fields: Any) -> dict[str, Any]:
    return {
        "file_id": file_id, "stage": "scan", "status": "assigned", "employee_code": "E1", "employee_name": "Ada",
        "assigned_at": at, "event_id": event_id,
    } | fields  # fmt: skip


def keyed(offset: int, key: str | None, value: bytes | None) -> FakeRecord:
    return FakeRecord(offset, value, None if key is None else key.encode())


async def state(store: ClickHouseStore) -> dict[str, tuple[Any, ...]]:
    rows = await store.query(
        "SELECT file_id, toUnixTimestamp64Micro(assigned_at), event_id, stage, status, employee_code FROM pipeline_state FINAL"
    )
    return {r[0]: tuple(r[1:]) for r in rows}


async def test_the_current_row_of_a_file(store, tasks):
    await tasks(
        [
            batch(
                T,
                0,
                [
                    record(0, event("F1", NOW_US, 1), event("F2", NOW_US, 2)),
                    record(1, event("F1", NOW_US + 5, 3, stage="ocr", employee_code="E2")),
                    # Late: it happened before what is known.
                    record(2, event("F1", NOW_US + 2, 4, stage="index")),
                    # At the same time, ids of one and two digits.
                    record(3, event("F2", NOW_US, 10, status="started"), event("F2", NOW_US, 9, status="held")),
                ],
            )
        ]
    )
    assert await state(store) == {
        "F1": (NOW_US + 5, "3", "ocr", "assigned", "E2"),
        "F2": (NOW_US, "10", "scan", "started", "E1"),
    }


async def test_deletions_hide_a_file_until_something_newer_comes(store, tasks):
    await tasks([batch(T, 0, [record(0, event("F1", NOW_US, 1)), record(1, event("F2", NOW_US, 2))])])
    await tasks([batch(T, 0, [keyed(2, "F1", None)])])
    assert set(await state(store)) == {"F2"}
    await tasks([batch(T, 0, [record(3, event("F1", NOW_US - 1, 4))])])
    assert set(await state(store)) == {"F2"}
    await tasks([batch(T, 0, [record(4, event("F1", NOW_US + DAY_US, 5))])])
    assert set(await state(store)) == {"F1", "F2"}


async def test_bad_lines_go_to_the_errors_with_their_reason_and_the_rest_is_stored(store, tasks):
    effects = await tasks(
        [
            batch(
                T,
                0,
                [
                    record(0, event("F1", NOW_US, 1), b"{torn", event("F2", NOW_US, 2)),
                    record(1, event("F3", "soon", 3)),
                    record(2, event("", NOW_US, 4)),
                    keyed(3, None, None),
                    FakeRecord(
                        4, b'{\n "file_id": "F4", "stage": "scan", "status": "x",\n "assigned_at": %d}' % NOW_US
                    ),
                ],
            )
        ]
    )
    assert set(await state(store)) == {"F1", "F2", "F4"}
    assert effects.refused == {"envelope_not_json": 1, "timestamp_invalid": 1, "envelope_invalid": 2}
    assert {s.topic for s in effects.sends} == {topics.ERRORS}


async def test_a_repeated_insert_changes_no_table_and_completes_one_that_broke_off(store, tasks):
    part = [
        batch(T, 0, [record(i, event(f"F{i % 7}", NOW_US + i, i, status="done")) for i in range(50)]),
        batch(T, 1, [record(i, event(f"G{i}", NOW_US - i * DAY_US, i)) for i in range(50)]),
    ]
    tables = ("task_events", "pipeline_state", "stage_completions")

    async def counts() -> list[int]:
        return [(await store.query(f"SELECT count() FROM {table}"))[0][0] for table in tables]

    await tasks(part)
    first = await counts()
    for _ in range(2):
        await tasks(part)
    assert await counts() == first
    # As after a crash between the table's part and its views': the part is there, and what the views make of it is not.
    for table in tables[1:]:
        await store._client.command(f"TRUNCATE TABLE {table}")
    await tasks(part)
    assert await counts() == first


async def test_employees_by_table_and_dictionary(store, employees, tasks):
    def employee(code: str, name: str, at: int) -> dict[str, Any]:
        return {"employee_code": code, "name": name, "updated_at": at, "department": "scan"}

    await employees([batch(E, 0, [record(0, employee("E1", "Ada", NOW_US)), record(1, employee("E2", "Bo", NOW_US))])])
    # A late one, a newer one, and one who left.
    await employees(
        [batch(E, 0, [record(2, employee("E1", "Old", NOW_US - 1)), record(3, employee("E1", "Ada L.", NOW_US + 1)), keyed(4, "E2", None)])]
    )  # fmt: skip
    assert [tuple(r) for r in await store.query("SELECT employee_code, name FROM employees FINAL")] == [
        ("E1", "Ada L.")
    ]
    await tasks(
        [batch(T, 0, [record(0, event("F1", NOW_US, 1)), record(1, event("F2", NOW_US, 1, employee_code="E7"))])]
    )
    rows = await store.query("SELECT file_id, employee_name FROM current_files ORDER BY file_id")
    assert [tuple(r) for r in rows] == [("F1", "Ada L."), ("F2", "Ada")]
    rows = await store.query(
        "SELECT dictGetOrDefault('employee_names', 'name', c, '?') FROM (SELECT arrayJoin(['E1', 'E9']) AS c)"
    )
    assert [r[0] for r in rows] == ["Ada L.", "?"]


async def test_the_views(store, tasks):
    hour = 3_600_000_000
    day = NOW_US // DAY_US * DAY_US - DAY_US
    await tasks(
        [
            batch(
                T,
                0,
                [
                    record(0, event("F1", day, 1), event("F1", day, 2, status="done", completed_at=day + hour)),
                    record(1, event("F2", day, 3, status="done", completed_at=day + 3 * hour, employee_code="E2")),
                    record(2, event("F2", day, 3, status="done", completed_at=day + 3 * hour, employee_code="E2")),
                    record(3, event("F2", day + 4 * hour, 5, stage="ocr", employee_code="E2")),
                    record(4, event("F3", day + 4 * hour, 6, stage="ocr", employee_code="E2")),
                ],
            )
        ]
    )
    assert sorted(map(tuple, await store.query("SELECT stage, status, files FROM files_per_stage"))) == [
        ("ocr", "assigned", 2),
        ("scan", "done", 1),
    ]
    assert [tuple(r) for r in await store.query("SELECT employee_code, files FROM employee_load")] == [("E2", 2)]
    assert [tuple(r) for r in await store.query("SELECT stage, files, employees FROM throughput_per_day")] == [
        ("scan", 2, 2)
    ]
    assert [tuple(r) for r in await store.query("SELECT stage, files, mean_s, median_s FROM time_in_stage")] == [
        ("scan", 2, 7200.0, 10800.0)
    ]


# --- the property

EVENTS = st.lists(
    st.tuples(
        st.integers(0, 5),  # file
        st.integers(0, 4),  # time: few, so that many are equal
        st.integers(0, 30),  # event id
        st.sampled_from(["scan", "ocr", "index"]),
        st.sampled_from(["assigned", "done", None]),  # None: deleted
    ),
    min_size=1,
    max_size=60,
    # What a source says of one event it says always.
    unique_by=lambda e: (e[0], e[1], e[2]),
)


def brute_force(events: Iterable[tuple[int, int, int, str, str | None]]) -> dict[str, tuple[Any, ...]]:
    """The newest event of each file by (assigned_at, event id), from all of them."""
    newest: dict[int, tuple[int, int, int, str, str | None]] = {}
    for e in sorted(events, key=lambda e: (e[1], e[2])):
        newest[e[0]] = e
    return {f"F{e[0]}": (NOW_US + e[1], str(e[2]), e[3], e[4], "E1") for e in newest.values() if e[4] is not None}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, rng=st.randoms(use_true_random=False))
async def test_the_state_equals_a_computation_from_all_events(store, tasks, events, rng: random.Random):
    """Shuffled, late, duplicated; cut into any batches of two partitions, some repeated as after a crash."""
    await store.query("SELECT 1")
    for table in ("task_events", "pipeline_state", "stage_completions"):
        await store._client.command(f"TRUNCATE TABLE {table}")
    stream = [*events, *rng.choices(events, k=len(events) // 2)]
    rng.shuffle(stream)
    offsets = [0, 0]
    while stream:
        size = rng.randint(1, len(stream))
        part, stream = stream[:size], stream[size:]
        batches = []
        for partition in (0, 1):
            records = []
            for e in (e for e in part if e[0] % 2 == partition):
                line = event(f"F{e[0]}", NOW_US + e[1], e[2], stage=e[3])
                line |= {"deleted": True} if e[4] is None else {"status": e[4]}
                records.append(record(offsets[partition], line))
                offsets[partition] += 1
            if records:
                batches.append(batch(T, partition, records))
        for _ in range(rng.choice([1, 1, 2])):
            await tasks(batches)
    expected = brute_force(events)
    assert await state(store) == expected
    kept = await store.query("SELECT count() FROM task_events FINAL")
    assert kept[0][0] == len(events)
    argmax = await store.query(
        "SELECT file_id, toUnixTimestamp64Micro(v.1), v.2 FROM (SELECT file_id, argMax((assigned_at, event_id, deleted), version) AS v"
        " FROM task_events GROUP BY file_id) WHERE NOT v.3"
    )
    assert {r[0]: tuple(r[1:]) for r in argmax} == {f: row[:2] for f, row in expected.items()}
