"""Looking into the state tables of this worker: only the partitions that it holds, a page at a time."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

import orjson

from preservarium.domain.readings.address import same_address, spellings

#: Entries looked at for one answer. Reading 50,000 small values takes some tens of milliseconds of the event loop
#: that the pipeline runs on; a search over more devices than that is the database's job.
SCAN_MAX: Final = 50_000
#: Longest value shown; a longer one is cut and says so.
VALUE_BYTES_MAX: Final = 65_536


class TableUnknown(LookupError):
    """There is no table of that name."""


class StateTable(Protocol):
    """What is read of a state table."""

    def peek(self, partition: int, key: bytes) -> bytes | None:
        """The value, or None."""
        ...

    def peek_items(self, partition: int) -> Iterator[tuple[bytes, bytes]]:
        """Every entry of a partition that this worker holds."""
        ...

    def partitions(self) -> Sequence[int]:
        """Partitions whose store is open in this worker. Asking for another would open it."""
        ...


class TableReader:
    """The tables of one worker, read only.

    Args:
        tables: asked each time, because agents declare their tables after the console is installed.
        partition_of: where a key belongs.
    """

    def __init__(
        self,
        tables: Callable[[], Mapping[str, StateTable]],
        partition_of: Callable[[bytes], int],
    ) -> None:
        self._tables = tables
        self._partition_of = partition_of

    def list(self) -> list[dict[str, Any]]:
        """Every table with the partitions held."""
        return [{"name": name, "partitions": [*table.partitions()]} for name, table in sorted(self._tables().items())]

    def _table(self, name: str) -> StateTable:
        try:
            return self._tables()[name]
        except KeyError:
            message = f"no table of that name; there are: {', '.join(sorted(self._tables())) or 'none'}"
            raise TableUnknown(message) from None

    def page(self, name: str, *, after: tuple[int, bytes] | None, limit: int) -> dict[str, Any]:
        """Entries behind (partition, key) `after`, in the order of partition and key.

        Raises:
            TableUnknown: no such table.
        """
        table = self._table(name)
        entries: list[dict[str, Any]] = []
        scanned = 0
        last: tuple[int, bytes] | None = None
        for partition in table.partitions():
            if after is not None and partition < after[0]:
                continue
            for key, value in table.peek_items(partition):
                scanned += 1
                if after is not None and (partition, key) <= after:
                    continue
                if len(entries) == limit or scanned > SCAN_MAX:
                    return {"name": name, "entries": entries, "next": last}
                entries.append({"partition": partition, "key": _text(key), **_shown(value)})
                last = (partition, key)
        return {"name": name, "entries": entries, "next": None}

    def get(self, name: str, key: bytes) -> dict[str, Any]:
        """The value of one key and whether this worker holds its partition; a device may be named by any spelling of its address.

        Raises:
            TableUnknown: no such table.
        """
        found = self._get(name, key)
        others = spellings(_text(key)) if found["value"] is None else []
        return next((other for each in others if (other := self._get(name, each.encode()))["value"] is not None), found)

    def _get(self, name: str, key: bytes) -> dict[str, Any]:
        table = self._table(name)
        partition = self._partition_of(key)
        held = partition in table.partitions()
        value = table.peek(partition, key) if held else None
        shown = _shown(value) if value is not None else {"value": None, "bytes": 0}
        return {"name": name, "key": _text(key), "partition": partition, "held": held, **shown}

    def devices(self, *, q: str, after: str, limit: int) -> dict[str, Any]:
        """Devices of the table `device_configs` by address, for when the database cannot be asked: without values."""
        table = self._tables().get("device_configs")
        if table is None:
            return {"devices": [], "next": None, "total": None}
        needle = q.lower()
        found: list[dict[str, Any]] = []
        entries = itertools.chain.from_iterable(table.peek_items(p) for p in table.partitions())
        for key, value in itertools.islice(entries, SCAN_MAX):
            device_id = _text(key)
            if device_id <= after:
                continue
            try:
                doc = orjson.loads(value)
            except orjson.JSONDecodeError:
                continue
            if not isinstance(doc, dict):
                continue
            # The table may wrap the document together with the coordinates that it came from.
            inner = doc.get("doc")
            doc = inner if isinstance(inner, dict) else doc
            if doc.get("device_id", device_id) != device_id:
                continue  # the same device once more, by the canonical form of its address
            name = str(doc.get("name") or "")
            if needle in device_id.lower() or needle in name.lower() or same_address(device_id, q):
                found.append(
                    {
                        "device_id": device_id,
                        "name": name or None,
                        "type": doc.get("type"),
                        "enabled": bool(doc.get("enabled", True)),
                        "last_seen": None,
                        "values": [],
                    }
                )
        found.sort(key=lambda d: d["device_id"])
        page = found[:limit]
        return {"devices": page, "next": page[-1]["device_id"] if len(found) > limit else None, "total": None}


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _shown(value: bytes) -> dict[str, Any]:
    """A value as JSON where it is JSON, else as text with what is no text replaced."""
    cut = value[:VALUE_BYTES_MAX]
    if len(value) <= VALUE_BYTES_MAX:
        try:
            return {"value": orjson.loads(value), "bytes": len(value)}
        except orjson.JSONDecodeError:
            pass
    return {"value": _text(cut), "bytes": len(value), "cut": len(cut) < len(value)}
