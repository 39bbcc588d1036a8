"""How an alarm system does: the figures of ISA-18.2 (section 16) and EEMUA 191, from the views of 0005_alarm_kpis.sql."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

#: Floods, chattering and stale alarms that are listed one by one; their number is of all.
LISTED_MAX: Final = 100
#: What is called "the most frequent alarms".
TOP: Final = 10

_MINUTES_10_US: Final = 600_000_000
_HOUR_US: Final = 3_600_000_000

_RATES: Final = """
SELECT operator, bucket, sum(annunciations)::bigint AS n FROM {view} WHERE bucket >= $1 AND bucket < $2 GROUP BY 1, 2"""
_PRIORITIES: Final = """
SELECT severity, sum(annunciations)::bigint AS n FROM alarm_rate_10m
WHERE operator = '' AND bucket >= $1 AND bucket < $2 GROUP BY 1"""
_AREAS: Final = """
SELECT area, sum(annunciations)::bigint AS n FROM alarm_rate_10m
WHERE operator = '' AND area <> '' AND bucket >= $1 AND bucket < $2 GROUP BY 1"""
_FLOODS: Final = """
SELECT operator, begins_at, ends_at, most, annunciations FROM alarm_floods
WHERE begins_at < $2 AND ends_at > $1 ORDER BY begins_at, operator"""
_CHATTER: Final = """
SELECT device_id, rule, pin_position, count(*) AS times, max(raised_in_minute) AS most_in_minute FROM alarm_chatter
WHERE occurred_at >= $1 AND occurred_at < $2 GROUP BY 1, 2, 3 ORDER BY 4 DESC, 1, 2, 3"""
_STALE: Final = """
SELECT device_id, rule, pin_position, severity, state, occurred_at, extract(epoch FROM age)::float8 AS age_s FROM alarm_stale
ORDER BY occurred_at"""
_ACKNOWLEDGED: Final = """
SELECT count(waited) AS acknowledged, count(*) - count(waited) AS never,
       extract(epoch FROM percentile_cont(0.5) WITHIN GROUP (ORDER BY waited))::float8 AS median_s,
       extract(epoch FROM percentile_cont(0.9) WITHIN GROUP (ORDER BY waited))::float8 AS p90_s,
       extract(epoch FROM max(waited))::float8 AS longest_s
FROM alarm_acknowledgements WHERE raised_at >= $1 AND raised_at < $2"""


async def kpis(connection: Any, from_us: int, to_us: int) -> dict[str, Any]:
    """The figures of a time, which is widened to whole intervals of 10 minutes.

    Args:
        connection: of asyncpg, to a migrated database.
        from_us: begin, µs since the epoch, UTC.
        to_us: end; not part of it.

    Returns:
        JSON-able figures: instants in µs, durations in seconds. What stands and is stale is of now, whatever the time.
    """
    from_us -= from_us % _MINUTES_10_US
    to_us += -to_us % _MINUTES_10_US
    times = _instant(from_us), _instant(to_us)
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        tens = await connection.fetch(_RATES.format(view="alarm_rate_10m"), *times)
        hours = await connection.fetch(_RATES.format(view="alarm_rate_1h"), times[0].replace(minute=0), times[1])
        priorities = await connection.fetch(_PRIORITIES, *times)
        areas = await connection.fetch(_AREAS, *times)
        floods = await connection.fetch(_FLOODS, *times)
        chatter = await connection.fetch(_CHATTER, *times)
        stale = await connection.fetch(_STALE)
        acknowledged = await connection.fetchrow(_ACKNOWLEDGED, *times)
        top = await connection.fetch("SELECT * FROM alarm_top($1, $2) LIMIT $3", *times, TOP)
    total = sum(row["n"] for row in priorities)
    return {
        "from": from_us,
        "to": to_us,
        "annunciations": total,
        "operators": {
            operator: _load(operator, tens, hours, floods, from_us, to_us)
            for operator in sorted({"", *(row["operator"] for row in tens)})
        },
        "areas": {row["area"]: row["n"] for row in sorted(areas)},
        "floods": [_plain(row) for row in floods[:LISTED_MAX]],
        "chattering": {"alarms": len(chatter), "listed": [_plain(row) for row in chatter[:LISTED_MAX]]},
        "stale": {"alarms": len(stale), "listed": [_plain(row) for row in stale[:LISTED_MAX]]},
        "top": {"share": sum(row["share"] for row in top), "listed": [_plain(row) for row in top]},
        "acknowledgements": _plain(acknowledged),
        "priorities": {r["severity"]: {"annunciations": r["n"], "share": r["n"] / total} for r in sorted(priorities)},
    }


def _load(operator: str, tens: Any, hours: Any, floods: Any, from_us: int, to_us: int) -> dict[str, Any]:
    """What one operator has to bear; '' is everybody together."""
    intervals = (to_us - from_us) // _MINUTES_10_US
    mine = [row["n"] for row in tens if row["operator"] == operator]
    spans = [
        (max(_us(f["begins_at"]), from_us), min(_us(f["ends_at"]), to_us)) for f in floods if f["operator"] == operator
    ]
    return {
        "annunciations": sum(mine),
        "per_10min_mean": sum(mine) / intervals if intervals else 0.0,
        "per_10min_most": max(mine, default=0),
        "per_hour_mean": sum(mine) / intervals * 6 if intervals else 0.0,
        "per_hour_most": max((row["n"] for row in hours if row["operator"] == operator), default=0),
        "intervals_above_10": sum(n > 10 for n in mine),
        "floods": len(spans),
        "time_in_flood": sum(end - begin for begin, end in spans) / (to_us - from_us) if to_us > from_us else 0.0,
    }


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _us(value) if isinstance(value, datetime) else value for name, value in dict(row).items()}


def _instant(us: int) -> datetime:
    return datetime.fromtimestamp(us // 1_000_000, UTC)


def _us(at: datetime) -> int:
    whole = at.replace(microsecond=0)
    return round(whole.timestamp()) * 1_000_000 + at.microsecond
