"""What workers say of themselves: what is kept, when one is gone, and when it is said."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from preservarium.clock import ClockCheck, ManualClock
from preservarium.console.workers import (
    FORGOTTEN_S,
    GONE_S,
    LINE_BYTES_MAX,
    LOG_APPEND_TIME,
    WORKERS_MAX,
    Workers,
    WorkersFollower,
)
from preservarium.errors import Retry

T = 1_760_000_000_000_000
S = 1_000_000


def line(worker: str = "a:1", state: str = "closed", **fields: Any) -> dict[str, Any]:
    guards = {"breakers": {"postgres": {"state": state}}, "fuses": {"sink": {"blown": False}}}
    return {"worker": worker, "alive": True, "ready": True, "guards": guards, "at": T, **fields}


def heard(workers: Workers, at_s: float = 0, **fields: Any) -> None:
    workers.hear(orjson.dumps(line(**fields)), T + round(at_s * S))


def shown(workers: Workers, at_s: float) -> list[tuple[str, float, bool]]:
    return [(w["worker"], w["age_s"], w["gone"]) for w in workers.all(T + round(at_s * S))]


def test_the_last_word_of_each_worker_is_kept_with_its_age():
    workers = Workers()
    heard(workers, worker="b:2")
    heard(workers, 2, worker="a:1", state="open")
    heard(workers, 4, worker="b:2", ready=False)
    assert shown(workers, 5) == [("a:1", 3.0, False), ("b:2", 1.0, False)]
    assert [w["ready"] for w in workers.all(T)] == [True, False]
    # A clock that went back makes nothing younger than now.
    assert shown(workers, 0) == [("a:1", 0.0, False), ("b:2", 0.0, False)]


def test_one_that_is_silent_is_gone_then_forgotten_and_one_that_leaves_at_once():
    workers = Workers()
    heard(workers, worker="a:1")
    heard(workers, worker="b:2")
    assert shown(workers, GONE_S) == [("a:1", GONE_S, False), ("b:2", GONE_S, False)]
    heard(workers, GONE_S, worker="b:2")
    assert shown(workers, GONE_S + 1) == [("a:1", GONE_S + 1, True), ("b:2", 1.0, False)]
    heard(workers, GONE_S + 2, worker="b:2", leaving=True)
    assert shown(workers, FORGOTTEN_S) == [("a:1", FORGOTTEN_S, True)]
    assert shown(workers, FORGOTTEN_S + 1) == []
    heard(workers, FORGOTTEN_S + 2, worker="a:1")
    assert shown(workers, FORGOTTEN_S + 2) == [("a:1", 0.0, False)]


@pytest.mark.parametrize(
    "value",
    [None, b"", b"{", b"[]", b"null", b'{"worker": 1, "guards": {"breakers": {}, "fuses": {}}}', b'{"worker": "a"}', b'{"worker": "a", "guards": 5}',
     b'{"worker": "a", "guards": {"breakers": [], "fuses": {}}}', b" " * LINE_BYTES_MAX + orjson.dumps(line())],
)  # fmt: skip
def test_what_is_no_line_of_ours_is_left_out(value):
    workers = Workers()
    workers.hear(value, T)
    assert workers.all(T) == []


def test_workers_are_limited():
    workers = Workers()
    for n in range(WORKERS_MAX + 5):
        heard(workers, worker=f"w:{n}")
    heard(workers, 1, worker="w:0")
    assert len(workers.all(T + S)) == WORKERS_MAX
    assert workers.all(T + S)[0]["age_s"] == 0.0


@pytest.fixture
def stand() -> Iterator[Any]:
    stand = SimpleNamespace(state=line(), sent=[], fails=None)
    workers = Workers()

    async def publish(sends: Any) -> None:
        if stand.fails:
            raise stand.fails
        stand.sent += [orjson.loads(send.value) for send in sends]

    kafka = SimpleNamespace(
        topic_prefix="", bootstrap_servers="127.0.0.1:1", security_protocol="PLAINTEXT", tls=False, sasl=False
    )
    live = SimpleNamespace(kafka=kafka)
    stand.workers = workers
    stand.clock = ManualClock()
    stand.check = ClockCheck(stand.clock, lambda: 60)
    stand.follower = WorkersFollower(workers, lambda: stand.state, publish, lambda: live, stand.clock, stand.check)
    return stand


async def eventually(holds: Any) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.02)


async def test_nothing_is_sent_while_the_topic_is_not_there_and_that_is_said(stand):
    await stand.follower.start()
    await eventually(lambda: stand.workers.trouble.startswith("Kafka: "))
    await stand.follower.stop()
    assert stand.sent == []


async def test_what_changes_is_said_within_a_second_and_whatever_fails_takes_nobody_with_it(stand, monkeypatch):
    async def followed(self: Any) -> None:
        stand.workers.trouble = ""
        await self.sleep(60)

    monkeypatch.setattr(WorkersFollower, "read", followed)
    stand.fails = Retry("Kafka: gone")
    await stand.follower.start()
    await eventually(lambda: stand.workers.trouble == "")
    stand.fails = None
    await eventually(lambda: len(stand.sent) == 1)
    stand.state = line(state="open")
    await eventually(lambda: len(stand.sent) == 2)
    assert stand.sent[1]["guards"]["breakers"]["postgres"]["state"] == "open"
    stand.state = None
    await asyncio.sleep(0)
    stand.state = line()
    await eventually(lambda: len(stand.sent) == 3)
    await stand.follower.goodbye()
    await stand.follower.stop()
    assert [each.get("leaving", False) for each in stand.sent] == [False, False, False, True]


@pytest.mark.parametrize(
    ("kind", "own", "expected"), [(LOG_APPEND_TIME, True, 3_600.0), (0, True, None), (LOG_APPEND_TIME, False, None)]
)
async def test_a_worker_compares_its_clock_with_the_brokers_by_what_it_said_itself(stand, kind, own, expected):
    right_us = stand.clock.now_us()
    stand.clock.jump(3_600)
    await stand.follower._say(stand.state)
    stand.clock.advance(1)
    value = orjson.dumps(stand.sent[0] if own else {**stand.sent[0], "worker": "another"})
    stand.follower._compare(SimpleNamespace(value=value, timestamp=right_us // 1_000 + 500, timestamp_type=kind))
    assert stand.check.skew_s == (None if expected is None else pytest.approx(expected, abs=0.01))
    assert stand.check.is_sound() is (expected is None)
