"""Stages that share a state table take turns: no update of one is lost to the other."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from quality_support import Rec, live

from preservarium import topics
from preservarium.clock import ManualClock
from preservarium.streaming.runner import Runner
from preservarium.streaming.stage import Batch, Effects, Send

TABLE: dict[bytes, bytes] = {}


class Publisher:
    """Acknowledges after others had their chance to run."""

    async def publish(self, sends: Sequence[Send]) -> dict[str, int]:
        for _ in range(5):
            await asyncio.sleep(0)
        return {}


async def put_state(table: str, partition: int, items: Mapping[bytes, bytes | None]) -> None:
    await asyncio.sleep(0)
    TABLE.update({k: v for k, v in items.items() if v is not None})


async def count(batches: Sequence[Batch]) -> Effects:
    effects = Effects([Send(topics.ALERTS, b"k", b"v")])
    before = int(TABLE.get(b"n", b"0"))
    await asyncio.sleep(0)
    effects.put("t", b"n", b"%d" % (before + 1))
    return effects


async def run(**turn: Any) -> int:
    TABLE.clear()
    runners = [
        Runner(name, count, publisher=Publisher(), put_state=put_state, live=live(), clock=ManualClock(), **turn)
        for name in ("one", "two")
    ]
    batch = Batch(topics.VALIDATED.name, 3, [Rec(0, b"k", b"v")])

    async def work(runner: Runner) -> None:
        for _ in range(20):
            await runner.process([batch], lambda _: None)

    await asyncio.gather(*map(work, runners))
    return int(TABLE[b"n"])


async def test_stages_that_share_a_table_lose_no_update():
    locks: dict[int, asyncio.Lock] = {}
    assert await run(turn=lambda partition: locks.setdefault(partition, asyncio.Lock())) == 40


async def test_without_turns_they_would():
    assert await run() < 40
