"""Fences in changelogs: whoever does not own a partition any more cannot change what it holds."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP
from hypothesis import given, settings
from hypothesis import strategies as st

from preservarium.errors import Fatal, Retry
from preservarium.streaming.fencing import FENCE_HEADER, FENCE_KEY, Change, Kept
from preservarium.streaming.local_store import Store
from preservarium.streaming.state import StateTable


class Log:
    """A changelog partition: what Kafka holds, in order."""

    def __init__(self) -> None:
        self.records: list[Change] = []

    async def append(self, topic: str, partition: int, items: Any, headers: Any = ()) -> int:
        for key, value in items:
            fence = dict(headers).get(FENCE_HEADER)
            self.records.append(Change(len(self.records), key, value, None if fence is None else int(fence)))
        return len(self.records) - 1

    async def read(self, topic: str, partition: int, first: int, end: int | None) -> list[Change]:
        return self.records[first:end]


class _App:
    """What a Faust store asks of its app."""

    class conf:
        table_key_index_size = 10

    class assignor:
        @staticmethod
        def assigned_standbys() -> set[TP]:
            return set()

    consumer_generation_id = 1


class _Table:
    name = "t"
    changelog_topic_name = "g-t-changelog"

    def __init__(self, path: Any) -> None:
        app: Any = _App()
        app.conf = type("conf", (), {"table_key_index_size": 10, "tabledir": path})
        self.data = Store("state://", app, self, table_name="t")


class Worker:
    """A worker's side of one partition."""

    def __init__(self, log: Log, path: Any) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.table = StateTable(_Table(path), log, log.read)
        self.generation = 0

    async def take_over(self, generation: int, *, until: int | None = None) -> None:
        """Assigned: fence, restore, open."""
        self.generation = generation
        await self.table.fence(0, generation)
        self.restore(until)
        await self.table.restored(0)

    def restore(self, until: int | None = None) -> None:
        store = self.table.table.data
        store.take(0, self.log.records[store.kept(0).next : until])

    async def put(self, key: str, value: str) -> None:
        await self.table.put_many(0, {key.encode(): value.encode()})

    def holds(self) -> dict[str, str]:
        return {k.decode(): v.decode() for k, v in self.table.peek_items(0)}


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def make(log: Log, tmp_path: Any) -> Any:
    count = iter(range(1_000))
    return lambda: Worker(log, tmp_path / f"w{next(count)}")


async def test_what_a_stale_worker_writes_has_no_effect(make: Any) -> None:
    old, new = make(), make()
    await old.take_over(1)
    await old.put("a", "1")
    await new.take_over(2)
    with pytest.raises(Retry, match="not assigned"):
        await old.put("a", "stale")
    assert old.holds() == {"a": "1"}
    third = make()
    await third.take_over(3)
    assert third.holds() == {"a": "1"}


async def test_what_it_covered_is_written_once_more(make: Any, log: Log) -> None:
    """Compaction keeps the newest record of a key: that must be the right one."""
    old, new = make(), make()
    await old.take_over(1)
    await old.put("a", "1")
    await old.put("b", "1")
    await new.take_over(2)
    await new.put("b", "2")
    with pytest.raises(Retry):
        await old.put("a", "stale")
    await new.put("b", "3")
    newest = {change.key: change for change in log.records}
    assert newest[b"a"].value == b"1"
    assert newest[b"b"].value == b"3"
    assert new.holds() == {"a": "1", "b": "3"}


async def test_a_worker_that_is_idle_finds_it_too(make: Any, log: Log) -> None:
    old, new = make(), make()
    await old.take_over(1)
    await old.put("a", "1")
    await new.take_over(2)
    with pytest.raises(Retry):
        await old.put("a", "stale")
    await new.table.look(0, len(log.records))
    assert {change.key: change.value for change in log.records}[b"a"] == b"1"


async def test_what_is_restored_by_compaction_alone_is_right(make: Any, log: Log) -> None:
    old, new = make(), make()
    await old.take_over(1)
    await old.put("a", "1")
    await new.take_over(2)
    with pytest.raises(Retry):
        await old.put("a", "stale")
    await new.table.look(0, len(log.records))
    newest = {change.key: change.offset for change in log.records}
    kept = Kept()
    writes = kept.take(change for change in log.records if newest[change.key] == change.offset)
    assert writes[b"a"] == b"1"


async def test_a_fence_that_lands_late_is_answered(make: Any, log: Log) -> None:
    """A worker that lost the partition before its fence landed does not keep its successor out."""
    old, new = make(), make()
    await old.take_over(1)
    await new.take_over(2)
    await new.put("a", "1")
    await log.append("t", 0, [(FENCE_KEY, b"1")])
    await new.put("a", "2")
    await new.put("b", "3")
    third = make()
    third.restore()
    assert third.holds() == new.holds() == {"a": "2", "b": "3"}


@pytest.mark.parametrize("late", [1, 2])
async def test_a_fence_that_lands_while_the_table_is_restored_is_answered(make: Any, log: Log, late: int) -> None:
    """It comes with what recovery reads, so no write ever stands elsewhere than expected."""
    old, new, third = make(), make(), make()
    await old.take_over(1)
    await old.put("a", "1")
    await new.table.fence(0, 3)
    for _ in range(late):
        await log.append("", 0, [(FENCE_KEY, b"1")])
    new.restore()
    await new.table.restored(0)
    await new.put("a", "2")
    await new.put("b", "2")
    third.restore()
    assert third.holds() == {"a": "2", "b": "2"} == new.holds()
    await third.take_over(4)
    assert third.holds() == {"a": "2", "b": "2"}
    assert {change.key: change.value for change in log.records}[b"a"] == b"2"


async def test_so_is_one_that_comes_to_the_store_by_another_way(make: Any, log: Log) -> None:
    new, third = make(), make()
    await new.take_over(2)
    await new.put("a", "1")
    await log.append("", 0, [(FENCE_KEY, b"1")])
    new.restore()
    await new.put("a", "2")
    third.restore()
    assert third.holds() == {"a": "2"}


async def test_a_later_owner_that_comes_while_the_table_is_restored_keeps_it(make: Any, log: Log) -> None:
    new, later = make(), make()
    await new.table.fence(0, 3)
    await later.take_over(4)
    await later.put("a", "later")
    new.restore()
    with pytest.raises(Retry):
        await new.table.restored(0)
    with pytest.raises(Retry, match="not assigned"):
        await new.put("a", "stale")
    await later.put("b", "later")
    third = make()
    await third.take_over(5)
    assert third.holds() == {"a": "later", "b": "later"}


async def test_a_write_that_kafka_says_nothing_of_is_looked_for(make: Any, log: Log) -> None:
    worker = make()
    await worker.take_over(1)
    append = log.append

    async def silent(*args: Any) -> Any:
        await append(*args)
        return None

    log.append = silent  # type: ignore[method-assign]
    await worker.put("a", "1")
    log.append = append  # type: ignore[method-assign]
    await worker.put("a", "2")
    assert worker.holds() == {"a": "2"}
    assert [change.value for change in log.records if change.key == b"a"] == [b"1", b"2"]


async def test_nothing_is_read_or_written_before_the_table_is_restored(make: Any, log: Log) -> None:
    first = make()
    await first.take_over(1)
    await first.put("a", "1")
    second = make()
    with pytest.raises(Retry, match="partition 0 is not assigned"):
        second.table.get(0, b"a")
    await second.table.fence(0, 2)
    with pytest.raises(Retry, match="partition 0 is not restored yet"):
        second.table.get(0, b"a")
    with pytest.raises(Retry, match="not restored yet"):
        await second.put("a", "2")
    second.restore(2)  # as if the changelog's end had been taken from before the fence
    with pytest.raises(Retry, match="not to its fence"):
        await second.table.restored(0)
    second.restore()
    await second.table.restored(0)
    assert second.table.get(0, b"a") == b"1"
    second.table.revoked(0)
    with pytest.raises(Retry, match="not assigned"):
        list(second.table.items(0))


async def test_a_worker_proves_that_a_partition_is_its_own(make: Any) -> None:
    old, new = make(), make()
    await old.take_over(1)
    await old.table.prove(0)
    await old.put("a", "1")
    await new.take_over(2)
    with pytest.raises(Retry):
        await old.table.prove(0)
    await new.table.prove(0)
    await new.put("a", "2")
    third = make()
    third.restore()
    assert third.holds() == {"a": "2"}


async def test_records_of_a_release_without_fences_count(make: Any, log: Log) -> None:
    await log.append("t", 0, [(b"a", b"1")])
    worker = make()
    await worker.take_over(1)
    await log.append("t", 0, [(b"b", b"2")])
    await worker.put("c", "3")
    assert worker.holds() == {"a": "1", "b": "2", "c": "3"}


async def test_a_store_that_is_opened_again_knows_the_fence_and_what_is_stale(
    make: Any, log: Log, tmp_path: Any
) -> None:
    old, new = make(), make()
    await old.take_over(1)
    await old.put("a", "1")
    await new.take_over(2)
    with pytest.raises(Retry):
        await old.put("a", "stale")
    standby = Worker(log, tmp_path / "standby")
    standby.restore()
    await standby.table.table.data.stop()
    again = Worker(log, tmp_path / "standby")
    kept = again.table.table.data.kept(0)
    assert (kept.next, kept.stale) == (len(log.records), {b"a"})
    await again.take_over(3)
    assert {change.key: change.value for change in log.records}[b"a"] == b"1"
    assert again.holds() == {"a": "1"}


async def test_a_store_is_closed_when_it_goes_without_a_walk_through_everything(
    log: Log, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def walk(*_: Any) -> int:
        raise AssertionError("the cycle collector stops the event loop")

    monkeypatch.setattr("gc.collect", walk)
    worker = Worker(log, tmp_path / "w")
    await worker.take_over(1)
    await worker.put("a", "1")
    store = worker.table.table.data
    topic = worker.table.changelog
    table = SimpleNamespace(changelog_topic=SimpleNamespace(topics=[topic]))
    store.revoke_partitions(table, set())
    assert store._dbs
    store.revoke_partitions(table, {TP("another", 0), TP(topic, 0)})
    assert not store._dbs
    # Its lock is free: it can be opened again.
    assert store.get_value(0, b"a") == b"1"
    await store.stop()
    assert not store._dbs
    assert Worker(log, tmp_path / "w").table.table.data.get_value(0, b"a") == b"1"


@pytest.mark.parametrize("harm", ["CURRENT", "MANIFEST-000005", "*.sst", "offset"])
async def test_a_damaged_store_is_set_aside_and_restored(log: Log, tmp_path: Any, harm: str) -> None:
    path = tmp_path / "w"
    worker = Worker(log, path)
    await worker.take_over(1)
    for n in range(50):
        await worker.put(f"k{n}", "x" * 1_000)
    store = worker.table.table.data
    store._dbs[0].flush()
    folder = store.partition_path(0)
    if harm == "offset":
        store._dbs[0].put(store.offset_key, b"no number")
    await store.stop()
    for file in folder.glob(harm):
        file.write_bytes(b"\xff" * file.stat().st_size)
    again = Worker(log, path)
    try:
        again.restore()
        again.holds()
    except Fatal:  # found while it was in use
        again = Worker(log, path)
        again.restore()
    assert again.holds() == {f"k{n}": "x" * 1_000 for n in range(50)}
    if harm != "*.sst":
        assert [p.name.split(".")[-1].split("-")[0] for p in path.glob("*.damaged-*")] == ["damaged"]


@pytest.mark.parametrize("where", [0.0, 0.2, 0.4, 0.6, 0.8, 0.95, 0.999])
async def test_one_flipped_byte_is_never_taken_for_the_end_of_the_state(log: Log, tmp_path: Any, where: float) -> None:
    """Found at the start or in use; an iteration that ended at the damage would leave devices without their deadlines."""
    path = tmp_path / "w"
    worker = Worker(log, path)
    await worker.take_over(1)
    right = {f"k{n:03}": f"{n}" * 300 for n in range(300)}
    for key, value in right.items():
        await worker.put(key, value)
    store = worker.table.table.data
    store._dbs[0].flush()
    folder = store.partition_path(0)
    await store.stop()
    file = max(folder.glob("*.sst"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[int(where * (len(content) - 1))] ^= 0xFF
    file.write_bytes(content)
    for _ in range(2):
        again = Worker(log, path)
        try:
            again.restore()
            assert again.holds() == right
            return
        except Fatal:  # found while it was in use: the next start restores it
            await again.table.table.data.stop()
    pytest.fail("a second start is damaged, too")


async def test_a_store_that_another_has_open_is_not_set_aside(log: Log, tmp_path: Any) -> None:
    worker, other = Worker(log, tmp_path / "w"), Worker(log, tmp_path / "w")
    await worker.take_over(1)
    await worker.put("a", "1")
    with pytest.raises(Exception, match="lock"):
        other.table.table.data.kept(0)
    assert worker.holds() == {"a": "1"}
    assert not [*(tmp_path / "w").glob("*.damaged*")]


#: Which worker does what: takes over, writes, falls behind; the log decides who counts.
_STEPS = st.lists(
    st.tuples(
        st.integers(0, 2), st.sampled_from(["own", "put", "put", "put", "look", "late fence"]), st.sampled_from("abc")
    ),
    max_size=30,
)


@given(_STEPS)
@settings(max_examples=60, deadline=None)
def test_whatever_workers_do_the_owners_writes_stand_and_no_others(tmp_path_factory: Any, steps: Any) -> None:
    async def run() -> None:
        log = Log()
        workers = [Worker(log, tmp_path_factory.mktemp("w") / "db") for _ in range(3)]
        right: dict[str, str] = {}
        generation, owner = 0, None
        for number, (who, step, key) in enumerate(steps):
            worker = workers[who]
            if step == "own":
                generation += 1
                if key == "b" and owner not in (None, who):
                    # What the owner before has on its way lands while the table is restored.
                    await worker.table.fence(0, generation)
                    await log.append("t", 0, [(FENCE_KEY, b"%d" % (generation - 1))])
                    worker.restore()
                    await worker.table.restored(0)
                else:
                    await worker.take_over(generation)
                owner = who
                assert worker.holds() == right
            elif step == "late fence":
                if owner is not None and who != owner:
                    await log.append("t", 0, [(FENCE_KEY, b"%d" % max(0, generation - 1))])
            elif step == "look":
                try:
                    await worker.table.look(0, len(log.records))
                except Retry:
                    assert who != owner
            else:
                try:
                    await worker.put(key, str(number))
                except Retry:
                    assert who != owner
                else:
                    assert who == owner
                    right[key] = str(number)
            if owner is not None:
                assert workers[owner].holds() == right
        if owner is not None:
            await workers[owner].table.look(0, len(log.records))
        fresh = Worker(log, tmp_path_factory.mktemp("w") / "db")
        if log.records:
            await fresh.take_over(generation + 1)
        assert fresh.holds() == right

    asyncio.run(run())
