"""Dashboards' parameters, and their cache: fresh for a moment, shared while asked, bounded."""

import asyncio
from typing import Any

import orjson
import pytest
from prometheus_client import REGISTRY

from preservarium.clock import ManualClock
from preservarium.errors import Retry
from preservarium.settings import load
from preservarium.stores.dashboards import (
    DASHBOARDS,
    LIMIT_MAX,
    ROWS_MAX,
    Dashboards,
    DashboardUnknown,
    ParameterInvalid,
    parse,
)


class Store:
    """Answers with what it was asked, as often as it was asked."""

    def __init__(self, rows: int = 1) -> None:
        self.asked: list[dict[str, Any]] = []
        self.rows = rows
        self.gate: asyncio.Event | None = None
        self.error: Exception | None = None

    async def select(self, text: str, parameters: dict[str, Any]) -> tuple[list[str], list[tuple[Any, ...]]]:
        self.asked.append(parameters)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return ["n"], [(len(self.asked),)] * self.rows


def made(store: Store, clock: ManualClock | None = None, **sync: Any) -> Dashboards:
    return Dashboards(store, lambda: load(sync=sync), clock=clock or ManualClock(0))  # type: ignore[arg-type]


def answers(name: str, origin: str) -> float:
    labels = {"dashboard": name, "origin": origin}
    return REGISTRY.get_sample_value("preservarium_dashboard_answers_total", labels) or 0.0


async def test_an_answer_is_given_again_until_it_is_too_old():
    store, clock = Store(), ManualClock(0)
    dashboards = made(store, clock, query_ttl_s=2)
    before = answers("files", "asked"), answers("files", "cached")
    first = await dashboards.answer("files", {"stage": "scan"})
    assert await dashboards.answer("files", {"stage": "scan", "limit": "50"}) == first
    assert await dashboards.answer("files", {"stage": "ocr"}) != first
    clock.advance(2.5)
    assert orjson.loads(await dashboards.answer("files", {"stage": "scan"}))["rows"] == [[3]]
    assert (answers("files", "asked") - before[0], answers("files", "cached") - before[1]) == (3, 1)


async def test_equal_questions_are_asked_once_and_one_who_leaves_takes_nothing_away():
    store = Store()
    store.gate = asyncio.Event()
    dashboards = made(store)
    waiting = [asyncio.ensure_future(dashboards.answer("stages", {})) for _ in range(5)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    store.gate.set()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert len(store.asked) == 1
    assert len(set(found[1:])) == 1


async def test_an_error_is_told_to_all_and_kept_by_none():
    store = Store()
    store.error = Retry("down")
    dashboards = made(store)
    found = await asyncio.gather(*(dashboards.answer("stages", {}) for _ in range(3)), return_exceptions=True)
    assert [type(e) for e in found] == [Retry] * 3
    store.error = None
    assert orjson.loads(await dashboards.answer("stages", {}))["rows"] == [[2]]


async def test_the_cache_is_bounded_by_bytes_and_rows():
    store = Store(rows=100)
    small = made(store, query_cache_rows_max=10)
    await small.answer("stages", {})
    await small.answer("stages", {})
    assert len(store.asked) == 2
    store = Store(rows=100)
    dashboards = made(store, query_cache_bytes_max=4_000)
    for i in range(50):
        await dashboards.answer("file", {"file_id": f"F{i}"})
    assert 0 < dashboards._cache.currsize <= 4_000
    assert len(store.asked) == 50


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [
        ("file", {}, "file_id is missing: the file"),
        ("files", {"colour": "red"}, "files has no parameter 'colour'"),
        ("files", {"limit": "0"}, f"limit is a whole number from 1 to {LIMIT_MAX}, not '0'"),
        ("files", {"limit": "1001"}, f"limit is a whole number from 1 to {LIMIT_MAX}, not '1001'"),
        ("files", {"limit": "1_0"}, f"limit is a whole number from 1 to {LIMIT_MAX}, not '1_0'"),
        ("files", {"limit": "-1"}, f"limit is a whole number from 1 to {LIMIT_MAX}, not '-1'"),
        ("files", {"stage": "x" * 256}, "stage is longer than 255 characters, or holds NUL"),
        ("throughput", {"days": "0"}, "days is a whole number from 1 to 3660, not '0'"),
        ("series", {"device": "d", "component": "c", "start": "5", "end": "5"}, "end is not after start"),
        ("series", {"device": "d", "component": "c", "start": "5"}, "end is missing: to before then"),
    ],
)
async def test_parameters_are_checked(name, given, text):
    store = Store()
    with pytest.raises(ParameterInvalid) as caught:
        await made(store).answer(name, given)
    assert str(caught.value) == text
    assert store.asked == []


async def test_an_unknown_dashboard_is_refused():
    with pytest.raises(DashboardUnknown, match="there is no dashboard 'sales'"):
        await made(Store()).answer("sales", {})


def test_every_query_is_limited_and_says_what_it_answers():
    assert len(DASHBOARDS) >= 14
    for dashboard in DASHBOARDS.values():
        assert dashboard.meaning
        last = dashboard.text.rstrip().rpartition("LIMIT")[2].strip()
        bounded = "LIMIT {limit:UInt32}" in dashboard.text or (last.isdigit() and int(last) <= ROWS_MAX)
        assert bounded, dashboard.name


def test_a_file_that_declares_other_parameters_than_it_uses_is_refused():
    text = "-- name: a\n-- What.\n-- param: b String: it\nSELECT {c:String} LIMIT 1;\n"
    with pytest.raises(ValueError, match="declared otherwise"):
        parse(text)
    with pytest.raises(ValueError, match="not of the form"):
        parse("-- name: a\nSELECT 1;\n")
