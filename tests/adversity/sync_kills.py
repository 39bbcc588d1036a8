"""Lives of sync's readings stage that end by kill -9 between an insert and its acknowledgement; run by test_sync_kills.py.

    python sync_kills.py '{"groups": [...], "kills": 25, "ends": [500, …], "prefix": "…", "clickhouse": "…", "seed": 1}'

Each group reads the whole topic, whose partitions end at `ends`, into a database of its own. A life is a fork of this
process, which has imported everything and started no thread: it runs the real feed on the real stage and ends itself with
SIGKILL. After its share of kills a group has one more life, which goes on to the end. Prints how many were killed and at
which moment.
"""

import asyncio
import json
import os
import random
import signal
import sys
from collections import Counter
from typing import Any

from preservarium import topics
from preservarium.clock import SystemClock
from preservarium.settings import LiveSettings, load
from preservarium.stages.sync import ReadingSync
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.streaming.feeds import GroupFeed
from preservarium.streaming.runner import Runner

#: The least that a broker takes by default: the next life waits until the group has given up the one before.
SESSION_S = 6.0
#: Exit code of a life that came to the end of the topic.
DONE = 17
#: Where a life ends: after the insert's answer, or somewhere while it is under way.
MOMENTS = ("answered", "answered", "answered", "under way")


class Silent:
    """Publishes what the stage refuses: nothing, or the test fails."""

    async def publish(self, sends: Any) -> dict[str, int]:
        assert not sends, sends
        return {}


class Mortal(ClickHouseStore):
    """Ends the process at an insert."""

    inserts_left = -1
    moment = "answered"

    async def insert(self, *args: Any, **kwargs: Any) -> None:
        self.inserts_left -= 1
        if self.inserts_left == 0 and self.moment == "under way":
            asyncio.get_running_loop().call_later(random.uniform(0, 0.03), os.kill, os.getpid(), signal.SIGKILL)
        await super().insert(*args, **kwargs)
        if self.inserts_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


async def live_once(plan: dict[str, Any], group: str, inserts: int, moment: str, records_max: int) -> None:
    settings = LiveSettings(
        load(
            kafka={
                "bootstrap_servers": plan["kafka"], "topic_prefix": plan["prefix"], "session_timeout_s": SESSION_S,
                "commit_interval_s": 0.3,
            },
            clickhouse={"url": plan["clickhouse"], "database": group},
            agents={"backoff_s": 0.05, "backoff_max_s": 0.5},
        )
    )  # fmt: skip
    clock = SystemClock()
    store = Mortal(settings, clock=clock)
    store.inserts_left, store.moment = inserts, moment
    stage = ReadingSync(store, settings, clock=clock)

    async def handler(batches: Any) -> Any:
        await feed.record_plan(batches)
        return await stage(batches)

    async def put_state(*_: Any) -> None:
        raise AssertionError

    runner = Runner("sync", handler, publisher=Silent(), put_state=put_state, live=settings, clock=clock)
    feed = GroupFeed(
        "sync", topics.VALIDATED.name, kafka_topic=topics.VALIDATED.full(plan["prefix"]), group=f"{plan['prefix']}{group}",
        runner=runner, live=settings, records_max=lambda: records_max, linger_s=lambda: 0.0, flights=1, on_assigned=None,
        planned=True, memory=stage,
    )  # fmt: skip
    task = asyncio.create_task(feed.run())
    while True:
        await asyncio.sleep(0.2)
        if task.done():
            task.result()
        lanes = [lane for lane in feed.lanes.values() if lane.known]
        if len(lanes) == len(plan["ends"]) and all(
            (lane.position if lane.position is not None else lane.committed or 0) >= plan["ends"][lane.partition]
            for lane in lanes
        ):
            break
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await store.close()


def life(plan: dict[str, Any], group: str, seed: int, last: bool) -> None:
    random.seed(seed)
    moment = "none" if last else random.choice(MOMENTS)
    inserts = -1 if last else random.randint(1, 2)
    asyncio.run(live_once(plan, group, inserts, moment, 500 if last else plan["records_max"]))
    os._exit(DONE)


def main() -> None:
    plan = json.loads(sys.argv[1])
    kills = dict.fromkeys(plan["groups"], 0)
    ended: Counter[str] = Counter()
    running: dict[int, str] = {}

    def start(group: str) -> None:
        last = kills[group] >= plan["kills"]
        pid = os.fork()
        if pid == 0:
            try:
                life(plan, group, hash((plan["seed"], group, kills[group])), last)
            except BaseException as e:
                print(f"{group}: {e!r}", file=sys.stderr, flush=True)
            os._exit(1)
        running[pid] = group

    for group in plan["groups"]:
        start(group)
    while running:
        pid, status = os.wait()
        group = running.pop(pid)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            kills[group] += 1
            ended["killed"] += 1
            start(group)
        elif os.WIFEXITED(status) and os.WEXITSTATUS(status) == DONE:
            ended["early" if kills[group] < plan["kills"] else "done"] += 1
        else:
            ended["failed"] += 1
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
