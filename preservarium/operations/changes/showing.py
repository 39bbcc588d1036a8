"""What a change does, for people and programs: its rows side by side, and sums of them."""

from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from preservarium.domain.quality.rederivation import bits
from preservarium.stores.changes import Change
from preservarium.stores.events import microseconds

#: Rows that are held at once.
AT_ONCE: Final = 1_000

_ROWS: Final = """
SELECT s.device_id, s.component_type, s.pin_position, s.connector_mode, s.unit AS s_unit, c.timestamp, c.before, c.after, c.swapped,
       b.parser AS b_parser, a.parser AS a_parser
FROM change_rows c JOIN series s USING (series_id) LEFT JOIN derivations b ON b.derivation_id = (c.before).derivation_id
LEFT JOIN derivations a ON a.derivation_id = (c.after).derivation_id
WHERE c.change_id = $1 AND ($2::text IS NULL OR s.device_id = $2) AND ($3::text IS NULL OR s.component_type = $3)
ORDER BY s.device_id, s.component_type, s.pin_position, s.connector_mode, c.timestamp"""


def same_number(a: float | None, b: float | None, tolerance: float) -> bool:
    """Whether two values are the same within a tolerance, absolute or relative to the larger; without one, bit by bit."""
    if a is None or b is None:
        return a is b
    if bits(a) == bits(b):
        return True
    return tolerance > 0 and abs(a - b) <= tolerance * max(1.0, abs(a), abs(b))


def _side(row: Any, side: str) -> dict[str, Any] | None:
    said = row["before" if side == "b" else "after"]
    if said is None or said["received_at"] is None:
        return None
    return {
        "value": said["value"],
        "value_text": said["value_text"],
        "unit": row["s_unit"] if said["unit"] is None else said["unit"],
        "quality": said["quality"],
        "flags": list(said["flags"] or ()),
        "parser": row[f"{side}_parser"],
        "generation": said["generation"],
        "raw": f"{said['raw_partition']}:{said['raw_offset']}:{said['raw_index']}",
    }


def is_within(row: Mapping[str, Any], tolerance: float) -> bool:
    """Whether nothing but a number differs, by no more than the tolerance."""
    before, after = row["before"], row["after"]
    if before is None or after is None:
        return False
    return same_number(before["value"], after["value"], tolerance) and all(
        before[name] == after[name] for name in ("value_text", "unit", "quality", "flags")
    )


async def rows(
    connection: Any, change: Change, *, device: str | None = None, component_type: str | None = None
) -> AsyncIterator[dict[str, Any]]:
    """The rows of a change, series by series, in the order of their instants (µs since the epoch, UTC)."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        cursor = connection.cursor(_ROWS, change.change_id, device, component_type, prefetch=AT_ONCE)
        async for row in cursor:
            before, after = _side(row, "b"), _side(row, "a")
            yield {
                "op": "added" if before is None else "removed" if after is None else "changed",
                "device_id": row["device_id"],
                "component_type": row["component_type"],
                "pin_position": row["pin_position"],
                "connector_mode": row["connector_mode"],
                "timestamp": microseconds(row["timestamp"]),
                "before": before,
                "after": after,
                "swapped": row["swapped"],
            }


async def report(
    connection: Any,
    change: Change,
    *,
    tolerance: float = 0.0,
    device: str | None = None,
    component_type: str | None = None,
    limit: int = 1_000,
) -> dict[str, Any]:
    """What a change does: sums by series and kind, the first rows, and what alarms would have said.

    Args:
        connection: of asyncpg.
        change: which.
        tolerance: numbers that differ by no more, absolutely or relatively, are counted and not listed.
        device: only this one.
        component_type: only this one.
        limit: rows and transitions that are listed one by one; the sums are of all.
    """
    sums = {"added": 0, "removed": 0, "changed": 0, "within_tolerance": 0}
    series: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    listed: list[dict[str, Any]] = []
    async for row in rows(connection, change, device=device, component_type=component_type):
        kind = "within_tolerance" if is_within(row, tolerance) else row["op"]
        sums[kind] += 1
        key = row["device_id"], row["component_type"], row["pin_position"], row["connector_mode"]
        one = series.get(key)
        if one is None:
            if len(series) >= limit:
                continue
            one = series[key] = {
                "device_id": key[0], "component_type": key[1], "pin_position": key[2], "connector_mode": key[3],
                **dict.fromkeys(sums, 0), "first": row["timestamp"], "last": row["timestamp"], "largest": None,
            }  # fmt: skip
        one[kind] += 1
        one["last"] = row["timestamp"]
        before, after = row["before"], row["after"]
        if before and after and before["value"] is not None and after["value"] is not None:
            by = after["value"] - before["value"]
            if one["largest"] is None or abs(by) > abs(one["largest"]):
                one["largest"] = by
        if kind != "within_tolerance" and len(listed) < limit:
            listed.append(row)
    events = await connection.fetch(
        "SELECT op, device_id, rule, transition, severity, occurred_at, detected_at, value, detail ->> 'message' AS message, alarm_id"
        " FROM change_alarm_events WHERE change_id = $1 AND ($2::text IS NULL OR device_id = $2) ORDER BY detected_at, op, transition_id LIMIT $3",
        change.change_id, device, limit,
    )  # fmt: skip
    return {
        **change.document(),
        "tolerance": tolerance,
        "sums": sums,
        "series": list(series.values()),
        "rows": listed,
        "alarms": [
            {
                **dict(event),
                "occurred_at": microseconds(event["occurred_at"]),
                "detected_at": microseconds(event["detected_at"]),
            }
            for event in events
        ],
    }
