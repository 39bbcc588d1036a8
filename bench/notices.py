"""What grouping costs: transitions heard a second, and what a tick takes, by how many recipients share the load.

    python bench/notices.py [EVENTS]

One core, the group stage's handler over a table in memory: parsing, the recipient's document read and written once a batch
of 1,000 events, and ticks until everything is told. No Kafka.
"""

import asyncio
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests")]

import orjson  # noqa: E402
from notice_support import GroupStage, event, transition  # noqa: E402
from quality_support import batch, record  # noqa: E402

from preservarium import topics  # noqa: E402

BATCH = 1_000


async def run(recipients: int, alarms_each: int, events: int) -> None:
    stage = GroupStage(settings={"limit_notices": 1_000})
    lines = []
    for number in range(events):
        of = number % recipients
        line = transition(number // recipients % alarms_each, transition_id=f"{number:032x}")
        if number // recipients // alarms_each % 2:
            line |= {"transition": "cleared", "state": "normal"}
        lines.append({**event(line, number), "recipient": f"r{of}"})
    batches = [
        batch(topics.NOTICE_EVENTS, *(record(i, orjson.dumps(x)) for i, x in enumerate(lines[n : n + BATCH])))
        for n in range(0, events, BATCH)
    ]
    started = time.perf_counter()
    for each in batches:
        stage.carry_out(await stage.stage(each))
    heard_s = time.perf_counter() - started
    size = max(len(value) for value in stage.world.tables.values())
    ticks: list[float] = []
    for _ in range(100):
        stage.advance(1)
        started = time.perf_counter()
        await stage.tick()
        ticks.append(time.perf_counter() - started)
    print(
        f"{recipients:>6} recipients × {alarms_each:>3} alarms: {events / heard_s:>8,.0f} events/s, ticks: median "
        f"{sorted(ticks)[50] * 1e3:.2f} ms, worst {max(ticks) * 1e3:.1f} ms, largest document {size / 1024:.0f} KiB, "
        f"{len(stage.sent)} notices"
    )


async def main() -> None:
    events = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    for recipients, alarms_each in ((1, 1), (1, 300), (20, 50), (1_000, 5)):
        await run(recipients, alarms_each, events)


if __name__ == "__main__":
    asyncio.run(main())
