"""Finding a device by any spelling of its address, in the table and in the net behind it."""

from typing import Any

import orjson
import pytest

from preservarium.clock import Clock, ManualClock
from preservarium.domain.registry.changes import DELETED, device_keys
from preservarium.errors import Retry
from preservarium.registry.device_lookup import DeviceLookup
from preservarium.settings import load
from preservarium.stores.registry import Composite

EUI = "70b3d57ed0aa0001"
SPELLINGS = (EUI, "70B3D57ED0AA0001", "70-B3-D5-7E-D0-AA-00-01", "70b3.d57e.d0aa.0001")
PARTITION = 3


class Lookup(DeviceLookup):
    """With a database that answers from memory."""

    def __init__(
        self, table: dict[str, Any], registered: dict[str, Any] | None = None, *, clock: Clock | None = None
    ) -> None:
        self.table, self.registered, self.asked, self.is_down = table, registered or {}, 0, False
        super().__init__(self._row, load, clock=clock)

    def _row(self, partition: int, key: bytes) -> bytes | None:
        document = self.table.get(key.decode()) if partition == PARTITION else None
        return None if document is None else orjson.dumps(document)

    async def _fetch(self, device_ids: Any) -> dict[str, Composite]:
        self.asked += 1
        if self.is_down:
            message = "no database"
            raise Retry(message)
        by_key = {key: doc for device_id, doc in self.registered.items() for key in device_keys(device_id)}
        found = {i: by_key[k] for i in device_ids for k in device_keys(i) if k in by_key}
        return {i: Composite(doc, {}, None, [], [], []) for i, doc in found.items()}


def document(device_id: str, **more: Any) -> dict[str, Any]:
    return {"device_id": device_id, "rev": 1, "type": "t", "enabled": True, **more}


@pytest.mark.parametrize("registered", SPELLINGS)
@pytest.mark.parametrize("spelled", SPELLINGS)
async def test_no_spelling_causes_a_query(registered, spelled):
    table = {key: document(registered) for key in device_keys(registered)}
    lookup = Lookup(table)
    assert await lookup.lookup(PARTITION, spelled) == document(registered)
    assert lookup.known(PARTITION, spelled) == document(registered)
    assert lookup.asked == 0


async def test_a_removed_device_is_unknown_unless_it_is_there_in_another_spelling():
    removed = {"rev": 2, DELETED: True}
    lookup = Lookup({EUI: {"device_id": EUI, **removed}})
    assert await lookup.lookup(PARTITION, SPELLINGS[2]) is None
    lookup = Lookup({SPELLINGS[1]: {"device_id": SPELLINGS[1], **removed}, EUI: document(EUI)})
    assert await lookup.lookup(PARTITION, SPELLINGS[1]) == document(EUI)
    assert lookup.asked == 0


@pytest.mark.parametrize("registered", SPELLINGS)
async def test_the_database_is_asked_once_for_all_spellings(registered):
    lookup = Lookup({}, {registered: document(registered)})
    for spelled in SPELLINGS:
        assert await lookup.lookup(PARTITION, spelled) == document(registered)
    assert lookup.asked == 1
    heard: list[str] = []
    lookup.on_change(heard.append)
    lookup.changed(SPELLINGS[3])
    assert heard == [SPELLINGS[3]]
    await lookup.lookup(PARTITION, EUI)
    assert lookup.asked == 2
    assert await lookup.lookup(PARTITION, "Sensor-1") is None
    assert await lookup.lookup(PARTITION, "SENSOR-1") is None
    assert lookup.asked == 4  # other addresses are the text that they are


async def test_what_the_database_knows_is_known_until_the_table_has_it():
    """A device that was registered a moment ago: Kafka may be away while its record is on its way to the table."""
    clock = ManualClock(0)
    lookup = Lookup({}, {EUI: document(EUI)}, clock=clock)
    settings = load().normalize
    await lookup.lookup(PARTITION, EUI)
    clock.advance(settings.unknown_cache_ttl_s * 6)
    assert lookup.known(PARTITION, EUI) == document(EUI), "alarm asks no database, and would know no rules of it"
    lookup.table[EUI] = document(EUI, rev=2)
    lookup.changed(EUI)
    assert lookup.known(PARTITION, EUI) == document(EUI, rev=2)
    assert lookup.asked == 1


async def test_a_database_that_is_restarted_is_waited_for_and_one_that_stays_away_is_not():
    clock = ManualClock(0)
    lookup = Lookup({"known": document("known")}, {EUI: document(EUI)}, clock=clock)
    wait_s = load().normalize.registry_wait_s
    for _ in range(2):  # each time anew
        lookup.is_down = True
        for _ in range(4):
            with pytest.raises(Retry):
                await lookup.lookup_many(PARTITION, ["known", EUI])
            assert await lookup.lookup(PARTITION, "known") is not None, "who is known waits for nobody"
            clock.advance(wait_s / 4)
        assert await lookup.lookup_many(PARTITION, ["known", EUI]) == {"known": document("known")}
        clock.advance(wait_s * 3)
        assert await lookup.lookup(PARTITION, EUI) is None
        lookup.is_down = False
        clock.advance(load().breaker.open_max_s * 2)  # the breaker's own wait
        assert await lookup.lookup(PARTITION, EUI) == document(EUI)
        lookup.changed(EUI)


async def test_an_outage_long_ago_takes_nothing_from_the_patience_with_the_next_one():
    """Nobody need ask for a stranger between two outages, so no answer tells that the first one is over."""
    clock = ManualClock(0)
    lookup = Lookup({}, {EUI: document(EUI)}, clock=clock)
    lookup.is_down = True
    with pytest.raises(Retry):
        await lookup.lookup(PARTITION, EUI)
    clock.advance(load().normalize.registry_wait_s)
    assert await lookup.lookup(PARTITION, EUI) is None
    clock.advance(5 * 3_600)
    with pytest.raises(Retry):
        await lookup.lookup(PARTITION, EUI)
    lookup.is_down = False
    clock.advance(load().breaker.open_max_s * 2)
    assert await lookup.lookup(PARTITION, EUI) == document(EUI)


async def test_what_the_database_does_not_know_is_asked_for_again_soon():
    clock = ManualClock(0)
    lookup = Lookup({}, clock=clock)
    settings = load().normalize
    assert await lookup.lookup(PARTITION, EUI) is None
    lookup.registered[EUI] = document(EUI)
    clock.advance(settings.unknown_cache_ttl_s / 2)
    assert await lookup.lookup(PARTITION, EUI) is None
    clock.advance(settings.unknown_cache_ttl_s)
    assert await lookup.lookup(PARTITION, EUI) == document(EUI)


async def test_a_device_that_is_removed_is_known_no_longer_than_its_record_takes():
    lookup = Lookup({}, {EUI: document(EUI)})
    await lookup.lookup(PARTITION, EUI)
    lookup.table[EUI] = {"device_id": EUI, "rev": 2, DELETED: True}
    lookup.changed(EUI)
    assert lookup.known(PARTITION, EUI) is None
    assert await lookup.lookup(PARTITION, EUI) is None
    assert lookup.asked == 1
