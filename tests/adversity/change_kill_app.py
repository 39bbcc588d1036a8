"""Carries a change out, or takes it back, and ends without a word after one step after the other; see test_changes.py.

    python change_kill_app.py CHANGE promote|rollback STEP,STEP,…

A fresh process for each step (forked): it goes on where the one before ended. The last one is not ended and finishes. Prints the exit codes as
JSON: 99 where the step was reached. Settings are those of the environment.
"""

import asyncio
import json
import os
import sys

from preservarium.operations.changes import promoting
from preservarium.settings import load
from preservarium.stores.connections import session
from preservarium.stores.maintenance import Maintenance


async def carry(change_id: int, what: str) -> None:
    settings = load()
    connection = await session(settings.postgres, "a test")
    clickhouse = Maintenance(settings)
    await clickhouse.connect()
    carrier = promoting.Carrier(settings, connection, clickhouse)
    do = carrier.promote if what == "promote" else carrier.rollback
    await do(change_id, actor="tester", reason="killed")
    await clickhouse.close()
    await connection.close()


def life(change_id: int, what: str, until: str) -> int:
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def reached(step: str) -> None:
        if step == until:
            os._exit(99)

    promoting._reached = reached
    try:
        asyncio.run(carry(change_id, what))
    except BaseException as e:
        print(f"{until}: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    change, doing, steps = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
    print(json.dumps([life(change, doing, step) for step in [*filter(None, steps), ""]]))
