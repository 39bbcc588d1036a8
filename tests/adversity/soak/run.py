"""One run: a world, a fleet, a plan, and the check."""

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from soak.check import Check, lines_of
from soak.expected import COMPONENTS
from soak.faults import Fault, plan, singles
from soak.fleet import BURSTING, Fleet, steady
from soak.inject import Injector
from soak.world import World


@dataclass(frozen=True, slots=True)
class Options:
    """Of a run."""

    seed: int = 1
    seconds: float = 600.0  #: faults are injected so long
    workers: int = 3
    devices: int = 60  #: steady ones
    bursting: int = BURSTING  #: devices that burst
    proxied: bool = (
        True  #: workers reach everything through proxies: without, nothing can be cut, and nothing is spent on it
    )
    rate: float = 100.0  #: messages a second
    alone: bool = False  #: each kind once, one after the other: how long each takes to recover from
    share: float = 0.0  #: instead: of what the workers can do, measured before the faults
    pace: float = 1.0
    only: tuple[str, ...] = ()
    #: the load goes on until the last fault is recovered from, and no longer than this
    recover_s: float = 60.0


async def run(
    options: Options, directory: Path, say: Callable[[str], None], faults: list[Fault] | None = None
) -> dict[str, Any]:
    """Run.

    Args:
        options: what to do.
        directory: for everything.
        say: tells people something in one line.
        faults: instead of the plan that the seed makes.

    Returns:
        The report, as JSON.
    """
    if faults is None:
        if options.alone:
            faults = singles(options.seed, options.workers, options.only)
        else:
            faults = plan(options.seed, options.seconds, options.workers, options.only, options.pace)
    world = World(directory, options.workers, options.devices, bursting=options.bursting, proxied=options.proxied)
    load = Fleet("", world.prefix, options.devices, options.rate, options.seed)
    started_at = time.time()
    try:
        await world.start()
        say(f"the system started in {time.time() - started_at:.1f} s")
        load = Fleet(world.kafka.bootstrap_servers, world.prefix, options.devices, options.rate, options.seed)
        await load.start()
        rebalances = [await member.rebalances() for member in world.members]
        capacity = 0.0
        if options.share:
            capacity = await measure(world, load)
            load.rate = options.share * capacity
            say(f"the workers store {capacity:,.0f} messages/s; devices send {load.rate:,.0f}")
        injector = Injector(world, load, say)
        say(f"{options.workers} workers are ready; {len(faults)} faults are planned")
        looking = asyncio.create_task(injector.look())
        telling = asyncio.create_task(_tell(injector, say))
        stop = asyncio.Event()
        sending = asyncio.create_task(load.run(stop))
        try:
            await injector.run(faults, options.seconds, alone_s=options.recover_s if options.alone else 0.0)
            await injector.recovered(options.recover_s)
            stop.set()
            await sending
            await load.settle()
            for member in world.members:
                if not await member.until_ready():
                    say(f"{member.name} is not ready in the end{member.log_tail()}")
            check = Check(world, load, injector.poisons, say)
            say(f"all faults are over; {load.sent:,} messages sent; checking")
            result = await check.run()
        finally:
            for task in (telling, looking, sending):
                task.cancel()
        for line in lines_of(result):
            say(line)
        return {
            "options": asdict(options),
            "started_at": round(started_at),
            "took_s": round(time.time() - started_at),
            "cores": os.cpu_count(),
            "planned": len(faults),
            "faults": [done.document() for done in injector.done],
            "capacity": round(capacity),
            "rate": round(load.rate, 1),
            "rebalances": [await member.rebalances() - n for member, n in zip(world.members, rebalances, strict=True)],
            "watched": injector.watched.document(),
            "deaths": {member.name: [text[-2_000:] for text in member.deaths] for member in world.members},
            "result": result.document(),
        }
    finally:
        await load.stop()
        await world.stop()


async def measure(world: World, load: Fleet, messages: int = 20_000) -> float:
    """Messages a second that a backlog is stored with, in the slower of both stores."""
    began = time.monotonic()
    for n in range(messages):
        await load.send(steady(n % load.devices))
    await load.settle()
    wanted = messages * len(COMPONENTS)
    while True:
        ((rows,),) = await world.query("SELECT count(*) FROM measurements")
        ((others,),) = await world.query_clickhouse("SELECT count() FROM measurements")
        if min(int(rows), int(others)) >= wanted:
            return messages / (time.monotonic() - began)
        await asyncio.sleep(0.1)


async def _tell(injector: Injector, say: Callable[[str], None]) -> None:
    while True:
        await asyncio.sleep(10)
        done = [one for one in injector.done if not one.skipped]
        alive = sum(member.alive for member in injector.world.members)
        rss = max(injector.watched.rss_bytes.values(), default=0) / 2**20
        waiting = sum(one.recovered_s is None for one in done)
        say(
            f"faults {len(done)} (not recovered yet {waiting}, skipped {len(injector.done) - len(done)})"
            f"  sent {injector.load.sent:,}  workers {alive}  largest {rss:.0f} MiB"
        )
