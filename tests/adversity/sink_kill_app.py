"""Stores a log of records and is killed (SIGKILL) at one statement after another; see test_sink_kills.py.

    python sink_kill_app.py DSN KILLS SEED

A fresh process each time (forked, so that 200 take seconds): it asks the store where it stands, goes on from there, and
kills itself before, while or after a statement chosen at random is executed. The last one is not killed and finishes.
Prints as JSON: `kills` by statement, `total`, the records of the log, `now_us`, the instant of the first, and `told`, what went
to `iot_errors`, each once: offset, line, code, device, words.
"""

import asyncio
import collections
import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from typing import Any

from asyncpg import Connection
from asyncpg.pool import PoolConnectionProxy
from sink_support import NOW_US, batch, live, message, record

from preservarium import logs, topics
from preservarium.errors import Retry
from preservarium.stages.sink import ReadingSink
from preservarium.stores.timescale import TimescaleStore
from preservarium.streaming.stage import Send

T = topics.VALIDATED.name
RECORDS_MAX = 10
#: More than a write holds, so that an earlier one has stored what comes again.
REPEATED_AFTER = 3 * RECORDS_MAX
SECOND_VALUE = 1e6
#: A life ends at the latest at this statement: some four transactions.
STATEMENTS_MAX = 40
#: Beyond this a life hangs.
LIFE_S = 60.0
#: Before what a life tells of an error line.
TOLD = "told "


def repeats(offset: int) -> int | None:
    """Which earlier record's instant the record at an offset has again, with another value: what is stored stays."""
    return offset - REPEATED_AFTER if offset % 11 == 10 and offset > REPEATED_AFTER else None


def second_value(offset: int) -> tuple[int, int, str, str, str] | None:
    """What is told of the record at an offset; nothing of a reading that a later verdict has overwritten."""
    before = repeats(offset)
    if before is None or (before + 1) % 5 == 4:
        return None
    return offset, 1, "same_instant", f"d{before % 7}", f"{float(before)} stands at this instant"


def messages(offset: int) -> list[Any]:
    """What the record at an offset holds: two new readings; at times a repeated one, or a verdict on one before."""
    device = f"d{offset % 7}"
    found = [message(device, float(offset), -float(offset), at=NOW_US + offset, offset=offset)]
    if (before := repeats(offset)) is not None:
        found.append(message(f"d{before % 7}", SECOND_VALUE, at=NOW_US + before, offset=offset))
    if offset % 5 == 4:
        verdict = {
            "value": float(offset - 1),
            "quality": 3,
            "flags": ["spike"],
            "timestamp": NOW_US + offset - 1,
            "revised": True,
        }
        found.append(message(f"d{(offset - 1) % 7}", verdict, at=NOW_US + offset, offset=offset))
    return found


async def run(dsn: str, total: int | None, kill_at: int, how: str, report: int) -> None:
    """Store records from where the store stands; up to `total`, or until killed."""
    count = 0

    async def watched(label: str, call: Any) -> Any:
        nonlocal count
        count += 1
        mine = total is None and count == kill_at

        def end() -> None:
            os.write(report, f"{label} {how}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

        if mine and how == "before":
            end()
        task = asyncio.ensure_future(call)
        if mine and how == "during":
            await asyncio.sleep(0)  # it is on its way; no answer was seen
            end()
        try:
            return await task
        finally:  # also where the database refuses it
            if mine:
                end()

    def watch(owner: type, name: str, label: Any) -> None:
        plain = getattr(owner, name)

        async def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
            return await watched(label(args), plain(self, *args, **kwargs))

        setattr(owner, name, replaced)

    def first_words(args: Any) -> str:
        words = args[0].split()
        return " ".join(words[:3] if words[0] in ("INSERT", "CREATE", "WITH", "UPDATE", "DELETE") else words[:1])

    # The pool's proxy kept the connection's methods as they were; BEGIN and COMMIT do not go through the proxy.
    for name in ("execute", "fetch", "fetchval"):
        watch(PoolConnectionProxy, name, first_words)
    watch(PoolConnectionProxy, "copy_to_table", lambda args: f"COPY {args[0]}")
    watch(Connection, "execute", first_words)

    async def publish(sends: Sequence[Send]) -> None:
        for send in sends:
            line = json.loads(send.value or b"")
            told = [line[name] for name in ("offset", "index", "code", "device_id", "message")]
            os.write(report, f"{TOLD}{json.dumps(told)}\n".encode())

    settings = live(postgres={"url": dsn}, breaker={"failures_max": 1000})
    store = TimescaleStore(settings)
    stage = ReadingSink("sink", T, store, publish, settings)
    while True:
        try:
            position = (await stage.on_assigned([0]))[0]
            while total is None or position < total:
                end = position + RECORDS_MAX if total is None else min(total, position + RECORDS_MAX)
                await stage([batch(T, 0, [record(o, *messages(o)) for o in range(position, end)])])
                position = end
            break
        except Retry:
            await asyncio.sleep(0.01)
    os.write(report, f"{position}\n".encode())
    await store.close()


def life(*args: Any) -> tuple[str, list[Any]]:
    """Run in a process of its own; how it ended, and what it told."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            asyncio.run(asyncio.wait_for(run(*args, writer), LIFE_S))
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    said = b""
    while chunk := os.read(reader, 4096):
        said += chunk
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL), status
    lines = said.decode().splitlines()
    return lines[-1], [json.loads(line.removeprefix(TOLD)) for line in lines[:-1]]


def main() -> None:
    dsn, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    logs.set_level("ERROR")
    rng = random.Random(seed)
    killed: collections.Counter[str] = collections.Counter()
    told: set[tuple[Any, ...]] = set()
    for n in range(kills):
        # One statement after the other first: what begins a log (names, its offset) happens once.
        statement = n // 3 + 1 if n < kills // 4 else rng.randrange(1, STATEMENTS_MAX)
        ended, lines = life(dsn, None, statement, ("before", "during", "after")[n % 3])
        killed[ended] += 1
        told.update(map(tuple, lines))  # some twice: a crash between Kafka's acknowledgement and the commit

    async def position() -> int:
        store = TimescaleStore(live(postgres={"url": dsn}))
        found = (await store.offsets(T, [0]))[0] or 0
        await store.close()
        return found

    total = asyncio.run(position()) + 50
    ended, lines = life(dsn, total, 0, "")
    assert ended == str(total)
    told.update(map(tuple, lines))
    print(json.dumps({"kills": killed, "total": total, "now_us": NOW_US, "told": sorted(told)}))


if __name__ == "__main__":
    main()
