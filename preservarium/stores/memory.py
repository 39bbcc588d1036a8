"""A store in memory, for tests and for trying things out: it passes the same contract suite as the real one."""

from collections.abc import Sequence
from typing import Any

from msgspec import UNSET

from preservarium.clock import Clock, SystemClock
from preservarium.domain.readings.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US, Message
from preservarium.domain.readings.stored import StoredMessage, StoredReading
from preservarium.errors import ReasonCode, Retry
from preservarium.stores.base import (
    DAY_US,
    FUTURE_MAX_US,
    BeforeCommit,
    Moved,
    Moves,
    Rejected,
    WriteResult,
    derivation_fault,
    series_fault,
    timestamp_code,
    value_fault,
)
from preservarium.stores.typed import typed

#: (device_id, connector_mode, component_type, pin_position, timestamp)
RowKey = tuple[str, str, str, str, int]

#: Fields that say which of several revisions is the last.
_ORDER = ("received_at", "raw_partition", "raw_offset", "raw_index")
_FROM_MESSAGE = (
    "topic", "received_at", "raw_partition", "raw_offset", "raw_index", "parser", "config_rev", "generation",
)  # fmt: skip


class MemoryStore:
    """Keeps everything in dictionaries; not for more than fits.

    Args:
        retention_days: readings older than this are rejected.
        clock: for retention.
    """

    def __init__(self, *, retention_days: int = 90, clock: Clock | None = None) -> None:
        #: natural key -> columns of iot_measurements
        self.rows: dict[RowKey, dict[str, Any]] = {}
        #: natural key -> what a row must exceed to overwrite it
        self._ranks: dict[RowKey, tuple[Any, ...]] = {}
        #: (topic, partition) -> next offset
        self.positions: dict[tuple[str, int], int] = {}
        #: While not empty, every call raises Retry with this text.
        self.down = ""
        self._retention_days = retention_days
        self._clock = clock or SystemClock()

    async def offsets(self, topic: str, partitions: Sequence[int]) -> dict[int, int | None]:
        """The next offset of each partition; None where nothing of it was ever written."""
        self._check()
        return {p: self.positions.get((topic, p)) for p in partitions}

    async def write(
        self, messages: Sequence[StoredMessage | Message], moves: Moves, *, before_commit: BeforeCommit | None = None
    ) -> WriteResult:
        """Store readings and offsets, or neither; see `Store.write`."""
        self._check()
        held = {key: self.positions.get(key) for key in moves}
        if any(held[key] != move.expected for key, move in moves.items()):
            raise Moved(held)
        now_us = self._clock.now_us()
        oldest_us = max(TIMESTAMP_MIN_US, now_us - self._retention_days * DAY_US)
        newest_us = min(TIMESTAMP_MAX_US - 1, now_us + FUTURE_MAX_US)
        result = WriteResult()
        #: readings, rows of a later generation, revisions: in the order in which one may overwrite the other
        parts: tuple[dict[RowKey, tuple[tuple[Any, ...], dict[str, Any]]], ...] = ({}, {}, {})
        total = 0
        sent = typed(messages)
        found: list[Rejected] = []
        for index, message in enumerate(sent.messages):
            for position, reading in enumerate(message.readings):
                total += 1
                row = _row(message, reading, oldest_us, newest_us)
                if isinstance(row, tuple):
                    found.append(Rejected(index, position, *row))
                else:
                    key = (*_series(message, reading), row["timestamp"])
                    rank = (row["generation"], reading.revised, *(row[name] for name in _ORDER if reading.revised))
                    part = parts[2 if reading.revised else 1 if row["generation"] else 0]
                    standing = part.get(key, (None, self.rows.get(key)))[1]
                    if part is parts[0] and standing is not None:
                        same = all(standing[name] == row[name] for name in ("value", "value_text"))
                        if not same and not standing["generation"] and not self._revised(key):
                            there = standing["value_text"] if standing["value"] is None else standing["value"]
                            text = f"{there!r:.200} stands at this instant"
                            found.append(Rejected(index, position, ReasonCode.SAME_INSTANT, text))
                    elif key not in part or rank >= part[key][0]:
                        part[key] = rank, row
        result.rejected = sent.rejected(found)
        if before_commit is not None:
            await before_commit(result.rejected)
        for part in parts:
            for key, (rank, row) in part.items():
                if key not in self.rows or self._ranks[key] < rank:
                    self.rows[key] = row
                    self._ranks[key] = rank
                    result.accepted += 1
        result.duplicates = total - result.accepted - len(found)
        self.positions.update({key: move.next for key, move in moves.items()})
        return result

    async def close(self) -> None:
        """Nothing to give back; what is stored stays."""

    def _revised(self, key: RowKey) -> bool:
        return key in self._ranks and self._ranks[key][1]

    def _check(self) -> None:
        if self.down:
            raise Retry(self.down)


def _series(message: StoredMessage, reading: StoredReading) -> tuple[str, str, str, str]:
    return message.device_id, message.connector_mode, reading.component_type, reading.pin_position


def _row(
    message: StoredMessage, reading: StoredReading, oldest_us: int, newest_us: int
) -> dict[str, Any] | tuple[ReasonCode, str]:
    key = _series(message, reading)
    text = derivation_fault((message.parser, message.config_rev, message.experiment_id))
    text = text or series_fault(key, reading.unit, message.topic)
    if text:
        return ReasonCode.STORE_REJECTED, text
    timestamp = message.timestamp if reading.timestamp is UNSET else reading.timestamp
    fault = timestamp_code(timestamp, oldest_us=oldest_us, newest_us=newest_us)
    fault = fault or value_fault(reading.value, reading.value_text, reading.flags)
    if fault:
        return fault
    row: dict[str, Any] = dict(zip(("device_id", "connector_mode", "component_type", "pin_position"), key, strict=True))
    row |= {name: getattr(message, name) for name in _FROM_MESSAGE}
    row |= {
        "timestamp": timestamp,
        "value": reading.value,
        "value_text": reading.value_text,
        "unit": reading.unit,
        "quality": reading.quality,
        "flags": list(reading.flags or ()) or None,
        "experiment_id": message.experiment_id or "",
    }
    return row
