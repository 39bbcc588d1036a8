"""Carries a plan out, and measures how long it takes until all is well again."""

import asyncio
import contextlib
import errno
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import asyncpg

from soak import fleet, poison
from soak.faults import BY_NAME, Fault, Lane
from soak.fleet import Fleet
from soak.world import Member, World, signal_tree, wipe

#: Stores are asked this often how far they are.
LOOK_S: Final = 0.5


@dataclass(slots=True)
class Done:
    """One fault as it was injected. Seconds since the load began."""

    fault: Fault
    at_s: float
    over_s: float = 0.0  #: it was over: healed, or started again
    recovered_s: float | None = None  #: from then until every steady device has a newer reading in both stores
    skipped: str = ""  #: why it was not injected

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **self.fault.document(), "began_s": round(self.at_s, 2), "over_s": round(self.over_s, 2),
            "recovered_s": None if self.recovered_s is None else round(self.recovered_s, 2), "skipped": self.skipped,
        }  # fmt: skip


@dataclass(slots=True)
class Watched:
    """What was seen while it ran."""

    rss_bytes: dict[str, int] = field(default_factory=dict)  #: the most, of each worker

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class Injector:
    """One run's.

    Args:
        world: running.
        load: the fleet.
        say: tells people something in one line.
    """

    def __init__(self, world: World, load: Fleet, say: Callable[[str], None]) -> None:
        self.world = world
        self.load = load
        self.say = say
        self.done: list[Done] = []
        self.poisons: dict[tuple[int, int], str] = {}  #: coordinates in the raw topic -> detail
        self.watched = Watched()
        self.registered: list[str] = []
        self._began = time.monotonic()
        self._until_s = 0.0
        self._bursts: set[asyncio.Task[None]] = set()
        #: store -> the instant up to which every steady device's readings are there, µs
        self._reached: dict[str, int] = {}

    @property
    def elapsed_s(self) -> float:
        """Since the load began."""
        return time.monotonic() - self._began

    async def run(self, faults: list[Fault], seconds: float, *, alone_s: float = 0.0) -> None:
        """Carry them out; returns when each is over.

        Args:
            faults: of each lane in the order of their time.
            seconds: none begins later; what a lane that is behind has left is left.
            alone_s: each waits until the one before is recovered from, at most so long; 0: lanes go on side by side.
        """
        self._began = time.monotonic()
        self._until_s = seconds
        if alone_s:
            for fault in faults:
                await self._lane([fault])
                await self.recovered(alone_s)
            return
        lanes: dict[tuple[str, str], list[Fault]] = {}
        for fault in faults:
            lanes.setdefault((BY_NAME[fault.kind].lane, fault.target), []).append(fault)
        await asyncio.gather(*(self._lane(of) for of in lanes.values()))
        if self._bursts:
            await asyncio.wait(self._bursts)

    async def recovered(self, within_s: float) -> None:
        """Return when every fault is recovered from, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while any(one.recovered_s is None and not one.skipped for one in self.done):
                    await asyncio.sleep(0.2)

    async def _lane(self, faults: list[Fault]) -> None:
        for fault in faults:
            await asyncio.sleep(fault.at_s - self.elapsed_s)
            if self.elapsed_s > self._until_s:
                return
            kind = BY_NAME[fault.kind]
            done = Done(fault, self.elapsed_s)
            member = self._member(fault)
            if member is not None and kind.ready and not await member.until_ready():
                done.skipped = "the worker was not ready in time"
                self.say(f"{fault.target} was not ready in time for {fault.kind}")
            elif self.elapsed_s > self._until_s:
                return
            else:
                done.at_s = self.elapsed_s
                try:
                    if member is not None and kind.lane is Lane.WORKER:
                        async with member.lock:
                            done.skipped = await self._worker(fault, member) or ""
                    elif member is not None:
                        await self._link(fault, member)
                    else:
                        await self._other(fault)
                except (OSError, asyncpg.PostgresError, RuntimeError) as e:
                    # A database that another fault has stopped cannot be told to end connections.
                    done.skipped = f"{type(e).__name__}: {e}"[:200]
            done.over_s = self.elapsed_s
            self.done.append(done)
            if not done.skipped:
                asyncio.get_running_loop().create_task(self._recovery(done, time.time_ns() // 1000))

    def _member(self, fault: Fault) -> Member | None:
        if not fault.target.startswith("worker-"):
            return None
        return self.world.members[int(fault.target.removeprefix("worker-"))]

    def _burst(self, heals_in_s: float) -> None:
        task = asyncio.create_task(self.load.burst(heals_in_s))
        self._bursts.add(task)
        task.add_done_callback(self._bursts.discard)

    # --- workers

    async def _worker(self, fault: Fault, member: Member) -> str | None:
        draw = random.Random(fault.seed)
        match fault.kind:
            case "kill":
                await self._ended(member)
            case "state lost":
                await self._ended(member, lambda: wipe(member.state))
            case "state damaged":
                await self._ended(member, lambda: damage(member.state, fault.detail, draw))
            case "term":
                await asyncio.to_thread(member.stop)
                await self.world.restart(member)
            case "cut":
                link = member.links["kafka"]
                link.cut()
                self._burst(fault.for_s)
                await asyncio.sleep(fault.for_s)
                link.heal()
            case "freeze":
                member.signal_all(signal.SIGSTOP)
                self._burst(fault.for_s)
                await asyncio.sleep(fault.for_s)
                member.signal_all(signal.SIGCONT)
            case "disk full":
                if not member.state.is_mount():
                    return "the state directory has no file system of its own"
                with filled(member.state):
                    await asyncio.sleep(fault.for_s)
            case "clock":
                clock = self.world.clocks[member.name]
                clock.write_text(f"{fault.detail}\n")
                await asyncio.sleep(fault.for_s)
                clock.write_text("0\n")
            case _:
                raise AssertionError(fault.kind)
        return None

    async def _ended(self, member: Member, then: Callable[[], object] = lambda: None) -> None:
        self._burst(1.0)
        await asyncio.to_thread(member.kill)
        await asyncio.to_thread(then)
        await self.world.restart(member)

    # --- links of a worker

    async def _link(self, fault: Fault, member: Member) -> None:
        link = member.links[fault.detail]
        match fault.kind:
            case "short cut" | "store cut":
                link.cut()
                self._burst(fault.for_s)
                await asyncio.sleep(fault.for_s)
                link.heal()
            case "slow":
                link.delay_s = 0.25
                await asyncio.sleep(fault.for_s)
                link.delay_s = 0.0
            case "reset":
                link.reset()
            case "reply swallowed":
                self._burst(0.3)
                await link.swallow(0.5)
            case _:
                raise AssertionError(fault.kind)

    # --- what all workers share

    async def _other(self, fault: Fault) -> None:
        world = self.world
        match fault.kind:
            case "broker killed":
                await asyncio.to_thread(world.kafka.kill)
                await asyncio.to_thread(world.kafka.start)
            case "broker restarted":
                await asyncio.to_thread(world.kafka.stop)
                await asyncio.to_thread(world.kafka.start)
            case "broker frozen":
                signal_tree(world.kafka.pid, signal.SIGSTOP)
                await asyncio.sleep(fault.for_s)
                signal_tree(world.kafka.pid, signal.SIGCONT)
            case "backends terminated":
                await world.query(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                    " AND backend_type = 'client backend'"
                )
            case "postgres frozen":
                signal_tree(world.postgres.pid, signal.SIGSTOP)
                await asyncio.sleep(fault.for_s)
                signal_tree(world.postgres.pid, signal.SIGCONT)
            case "postgres killed":
                await asyncio.to_thread(world.postgres.kill)
                await asyncio.sleep(fault.for_s)
                await asyncio.to_thread(world.postgres.start)
            case "postgres down":
                await asyncio.to_thread(world.postgres.stop)
                await asyncio.sleep(fault.for_s)
                await asyncio.to_thread(world.postgres.start)
            case "clickhouse frozen":
                signal_tree(world.clickhouse.pid, signal.SIGSTOP)
                await asyncio.sleep(fault.for_s)
                signal_tree(world.clickhouse.pid, signal.SIGCONT)
            case "clickhouse killed":
                await asyncio.to_thread(world.clickhouse.kill)
                await asyncio.sleep(fault.for_s)
                await asyncio.to_thread(world.clickhouse.start)
            case "poison":
                one = poison.make(fault.detail, random.Random(fault.seed), self.load.devices)
                self.poisons[await self.load.poison(one.value, one.key, [])] = fault.detail
            case "registered in flight":
                address = self.load.next_new()
                await world.apply({"devices": [fleet.device(address)]})
                self.registered.append(address)
                for _ in range(4):
                    await self.load.send(address, fleet.COLD)
            case "registry changed":
                draw = random.Random(fault.seed)
                chosen = {fleet.steady(draw.randrange(self.load.devices)) for _ in range(5)}
                await world.apply({"devices": [fleet.device(address, f"{address} {fault.seed}") for address in chosen]})
            case "registry refused":
                bad = fleet.device(fleet.steady(0)) | {"type": "no such type"}
                code, said = await world.apply(
                    {"devices": [fleet.device(fleet.steady(1), "refused"), bad]}, check=False
                )
                if code == 0:
                    raise RuntimeError(f"a wrong registry was taken: {said}")
            case _:
                raise AssertionError(fault.kind)

    # --- what is seen meanwhile

    async def look(self) -> None:
        """How far the stores are and how large the workers, until cancelled."""
        like = fleet.steady(0).rstrip("0123456789") + "%"
        statements = {
            "postgres": "SELECT (extract(epoch FROM min(l.timestamp)) * 1e6)::bigint FROM latest l JOIN series s USING (series_id)"
            f" WHERE s.device_id LIKE '{like}' AND s.component_type = 'number'",
            "clickhouse": "SELECT toUnixTimestamp64Micro(min(at)) FROM (SELECT max(timestamp) AS at FROM latest_values"
            f" WHERE device_id LIKE '{like}' AND component_type = 'number' GROUP BY device_id)",
        }
        while True:
            await asyncio.sleep(LOOK_S)
            for member in self.world.members:
                with contextlib.suppress(Exception):  # a process that is killed meanwhile
                    before = self.watched.rss_bytes.get(member.name, 0)
                    self.watched.rss_bytes[member.name] = max(before, member.rss_bytes())
            for store, ask in (("postgres", self.world.query), ("clickhouse", self.world.query_clickhouse)):
                # Whatever the driver makes of a server that is killed: without this look, nothing would count as recovered any more.
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(5):
                        ((at_us,),) = await ask(statements[store])
                        self._reached[store] = int(at_us or 0)

    async def _recovery(self, done: Done, over_us: int) -> None:
        while min(self._reached.get("postgres", 0), self._reached.get("clickhouse", 0)) < over_us:
            await asyncio.sleep(0.1)
        done.recovered_s = time.time_ns() / 1e9 - over_us / 1e6


def damage(state: Path, how: str, draw: random.Random) -> int:
    """Damage RocksDB's files; how many."""
    files = [file for file in sorted(state.rglob("*")) if file.is_file() and ".db" in str(file.parent)]
    kinds = [file for file in files if file.suffix in (".sst", ".log") or file.name.startswith(("MANIFEST", "CURRENT"))]
    chosen = draw.sample(kinds, min(len(kinds), 6))
    for file in chosen:
        size = file.stat().st_size
        match how:
            case "torn":
                os.truncate(file, size // 2)
            case "emptied":
                os.truncate(file, 0)
            case "missing":
                file.unlink()
            case "flipped":
                with file.open("r+b") as opened:
                    for _ in range(min(size, 16)):
                        opened.seek(draw.randrange(size))
                        opened.write(draw.randbytes(1))
    return len(chosen)


@contextlib.contextmanager
def filled(directory: Path) -> Any:
    """A file system without a free byte."""
    filler = directory / "filler"
    piece = b"\0" * 1_000_000
    try:
        with filler.open("wb", buffering=0) as file:
            while len(piece):
                try:
                    file.write(piece)
                except OSError as e:
                    if e.errno != errno.ENOSPC:
                        raise
                    piece = piece[: len(piece) // 2]
        yield
    finally:
        filler.unlink(missing_ok=True)
