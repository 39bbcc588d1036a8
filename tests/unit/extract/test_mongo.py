"""MongoDB's change streams, on a stand-in that does what PyMongo's documentation says.

`AsyncCollection.watch` and `AsyncChangeStream` (PyMongo 4.13 and newer): `try_next` gives a change or None after the server
has waited, `resume_token` is None until the first answer, and then of the last change given or of the server's last place;
`watch(resume_after=…)` goes on after it; a place that the log has no more is OperationFailure 286. The same over a network
is in tests/integration/extract/test_mongodb.py.
"""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from bson import ObjectId, Timestamp
from pymongo.errors import OperationFailure
from sink_support import live

from preservarium.extract.mongo import MongoSource
from preservarium.extract.named import SourceError
from preservarium.extract.source import STEP_ROWS, Step

AT = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
AT_US = 1_767_323_045_678_000


class Stream:
    def __init__(self, collection: "Collection", after: int | None) -> None:
        self._collection = collection
        self._at = len(collection.log) if after is None else after
        self.resume_token: dict[str, Any] | None = None if after is None else {"_data": str(after)}
        self.closed = False

    async def try_next(self) -> dict[str, Any] | None:
        assert not self.closed
        if self._collection.fail is not None:
            failure, self._collection.fail = self._collection.fail, None
            raise failure
        event = None
        if self._at < len(self._collection.log):
            event = dict(self._collection.log[self._at])
            self._at += 1
            if event["operationType"] in ("insert", "update", "replace"):
                event["fullDocument"] = self._collection.documents.get(event["documentKey"]["_id"])
        self.resume_token = {"_data": str(self._at)}
        return event

    async def close(self) -> None:
        self.closed = True


class Cursor:
    def __init__(self, documents: list[dict[str, Any]]) -> None:
        self._documents = documents

    def sort(self, key: str, direction: int) -> "Cursor":
        assert (key, direction) == ("_id", 1)
        self._documents.sort(key=lambda d: d["_id"])
        return self

    def batch_size(self, size: int) -> "Cursor":
        assert size <= STEP_ROWS
        return self

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        for document in self._documents:
            yield document


class Collection:
    def __init__(self) -> None:
        self.documents: dict[Any, dict[str, Any]] = {}
        self.log: list[dict[str, Any]] = []
        self.forgotten = 0  #: places of the log below this are no more
        self.fail: OperationFailure | None = None

    def _log(self, kind: str, id: Any = None) -> None:
        self.log.append(
            {"operationType": kind, "clusterTime": Timestamp(1_767_000_000, len(self.log) + 1)}
            | ({} if id is None else {"documentKey": {"_id": id}})
        )

    def put(self, id: Any, **fields: Any) -> None:
        self._log("update" if id in self.documents else "insert", id)
        self.documents[id] = {"_id": id, "file_id": "f", "stage": "s", "status": "x", "assigned_at": AT} | fields

    def delete(self, id: Any) -> None:
        self._log("delete", id)
        del self.documents[id]

    async def watch(self, *, resume_after: Any = None, full_document: str, **_: Any) -> Stream:
        assert full_document == "updateLookup"
        after = None if resume_after is None else int(resume_after["_data"])
        if after is not None and after < self.forgotten:
            raise OperationFailure("resume point may no longer be in the oplog", 286)
        return Stream(self, after)

    def find(self, where: dict[str, Any], _fields: Any = None) -> Cursor:
        condition = where.get("_id", {})
        return Cursor(
            [
                d
                for id, d in self.documents.items()
                if ("$gt" not in condition or id > condition["$gt"])
                and ("$in" not in condition or id in condition["$in"])
            ]
        )


class Client:
    def __init__(self, hello: dict[str, Any]) -> None:
        self.collections = {"tasks": Collection(), "employees": Collection()}
        self.admin = self
        self._hello = hello

    def __call__(self, url: str, **options: Any) -> "Client":
        assert url.startswith("mongodb://")
        assert options["tz_aware"]
        return self

    async def command(self, name: str) -> dict[str, Any]:
        assert name == "hello"
        return self._hello

    def get_default_database(self) -> dict[str, Collection]:
        return self.collections

    async def close(self) -> None:
        pass


@pytest.fixture
def client() -> Client:
    return Client({"setName": "rs0"})


@pytest.fixture
def tasks(client: Client) -> Collection:
    return client.collections["tasks"]


async def opened(client: Client, **extract: Any) -> MongoSource:
    settings = live(extract={"url": "mongodb://db/mission", "employees_table": ""} | extract)
    source = MongoSource(settings, client=client)
    await source.open()
    return source


async def steps(source: MongoSource, position: Any = None) -> list[Step]:
    return [step async for step in source.read("tasks", position)]


def told(found: list[Step]) -> tuple[list[str], list[str]]:
    return [c.id for s in found for c in s.changes], [i for s in found for i in s.gone]


async def test_a_single_server_is_refused(client: Client) -> None:
    with pytest.raises(SourceError, match="replica set"):
        await opened(Client({"isWritablePrimary": True}))
    await opened(Client({"msg": "isdbgrid"}))


async def test_fields_and_instants(client: Client, tasks: Collection) -> None:
    id = ObjectId()
    tasks.put(id, who=7, updated_at=AT, completed_at=None, note="not ours")
    (change,) = (await steps(await opened(client, tasks_columns="employee_code=who")))[0].changes
    assert (change.id, change.version[0]) == (str(id), AT_US)
    assert change.order > (0, 0)
    assert change.fields == {
        "file_id": "f", "stage": "s", "status": "x", "employee_code": 7, "assigned_at": AT_US, "completed_at": None,
    }  # fmt: skip


async def test_the_collection_first_and_then_its_changes(client: Client, tasks: Collection) -> None:
    for i in range(STEP_ROWS + 3):
        tasks.put(i)
    source = await opened(client)
    found = await steps(source)
    assert [len(s.changes) for s in found] == [STEP_ROWS, 3, 0]
    assert await steps(source, found[-1].position) == []
    tasks.put(7, status="done")
    tasks.put(9_000)
    tasks.delete(9_000)
    tasks.delete(8)
    (step,) = await steps(source, found[-1].position)
    assert ([c.id for c in step.changes], list(step.gone)) == (["7"], ["9000", "8"])
    assert step.changes[0].fields["status"] == "done"
    assert step.changes[0].version > (0, 0)


async def test_what_changes_while_the_collection_is_read_comes_after_it(client: Client, tasks: Collection) -> None:
    for i in range(3):
        tasks.put(i)
    source = await opened(client)
    changed = False
    ids: list[str] = []
    async for step in source.read("tasks", None):
        ids += [c.id for c in step.changes]
        if not changed:
            changed = True
            tasks.put(1, status="new")
    assert ids == ["0", "1", "2", "1"]


@pytest.mark.parametrize("at", range(4))
async def test_a_restart_goes_on_from_the_recorded_place(client: Client, tasks: Collection, at: int) -> None:
    for i in range(2 * STEP_ROWS):
        tasks.put(i)
    first = await opened(client)
    seen: set[str] = set()
    position = None
    for number, step in enumerate(await steps(first)):
        if number == at:
            break
        seen |= {c.id for c in step.changes}
        position = step.position
    tasks.put(3, status="meanwhile")
    tasks.delete(5)
    again = await steps(await opened(client), position)
    changes, gone = told(again)
    assert seen | set(changes) >= {str(i) for i in range(2 * STEP_ROWS) if i != 5}
    if position is not None:
        assert gone == ["5"]
        assert changes[-1] == "3"
    # Not from the beginning.
    assert len(changes) <= 2 * STEP_ROWS - len(seen) + 1


async def test_a_lost_place_reads_everything_again_and_compares(client: Client, tasks: Collection) -> None:
    tasks.put(1)
    tasks.put(2)
    position = (await steps(await opened(client)))[-1].position
    tasks.put(3)
    tasks.forgotten = 99
    source = await opened(client)
    (step,) = await steps(source, position)
    assert step == Step(position={"again": True})
    assert (await source.wait(0)).overflow
    assert not (await source.wait(0)).overflow
    assert told(await steps(source, step.position)) == (["1", "2", "3"], [])


async def test_a_collection_that_is_dropped_is_read_again(client: Client, tasks: Collection) -> None:
    tasks.put(1)
    source = await opened(client)
    position = (await steps(source))[-1].position
    tasks.put(2)
    tasks._log("drop")
    (step,) = await steps(source, position)
    assert ([c.id for c in step.changes], step.position) == (["2"], {"again": True})
    assert (await source.wait(0)).overflow
    assert told(await steps(source, step.position))[0] == ["1", "2"]


async def test_another_failure_is_not_taken_for_a_lost_place(client: Client, tasks: Collection) -> None:
    source = await opened(client)
    tasks.fail = OperationFailure("not authorized", 13)
    with pytest.raises(OperationFailure):
        await steps(source)
    tasks.fail = OperationFailure("The $changeStream stage is only supported on replica sets", 40573)
    with pytest.raises(SourceError, match="change streams"):
        await steps(source)


async def test_waiting_ends_with_a_change_which_is_not_lost(client: Client, tasks: Collection) -> None:
    tasks.put(1)
    source = await opened(client)
    position = (await steps(source))[-1].position
    tasks.put(2)
    await source.wait(60)
    assert told(await steps(source, position)) == (["2"], [])


async def test_keys_of_every_kind_are_found_again(client: Client, tasks: Collection) -> None:
    ids = [ObjectId(), "name", 17]
    for id in ids:
        tasks.put(id)
    source = await opened(client)
    assert {c.id for c in await source.rows("tasks", [str(i) for i in ids] + ["gone"])} == {str(i) for i in ids}
    assert [i async for page in source.versions("tasks") for i in page] == [(str(i), None) for i in ids]
