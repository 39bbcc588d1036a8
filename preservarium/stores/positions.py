"""Where the sinks stand, for those who move them; and the replays that were opened, as facts of the event store.

Functions work on a connection of asyncpg that the caller has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from preservarium.stores import events
from preservarium.stores.events import NewEvent

#: The stream of the replays: an event opens a generation, another one says that all of it was sent.
STREAM: Final = "replay/generations"
OPENED: Final = "opened"
SENT: Final = "sent"
#: Replays that are looked at; each was asked for by somebody.
REPLAYS_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Replay:
    """A generation that was opened."""

    generation: int
    starts: Mapping[int, int]  #: partition of iot_raw_data -> first offset
    ends: Mapping[int, int]  #: partition -> the offset that it ends before
    actor: str
    opened_at: int  #: µs since the epoch, UTC
    sent_at: int | None  #: when all of it had been sent; None: it was interrupted, or is under way


async def stored(connection: Any, sink: str, topic: str, generation: int) -> dict[int, int]:
    """Next offset of each partition that a sink has stored something of."""
    rows = await connection.fetch(
        "SELECT partition, next_offset FROM sink_offsets WHERE sink = $1 AND topic = $2 AND generation = $3",
        sink, topic, generation,
    )  # fmt: skip
    return {row["partition"]: row["next_offset"] for row in rows}


async def move(connection: Any, sink: str, topic: str, generation: int, offsets: Mapping[int, int]) -> None:
    """Have a sink stand at these offsets, all of them or none.

    A worker that is in the middle of a write either commits before, and is overruled, or finds that its offsets have moved, and
    begins where they are.
    """
    async with connection.transaction():
        await connection.executemany(
            "INSERT INTO sink_offsets (sink, topic, partition, generation, next_offset) VALUES ($1, $2, $3, $4, $5)"
            " ON CONFLICT (sink, topic, partition, generation) DO UPDATE SET next_offset = excluded.next_offset, updated_at = now()",
            [(sink, topic, partition, generation, offset) for partition, offset in sorted(offsets.items())],
        )


async def replays(connection: Any) -> list[Replay]:
    """The generations that were opened, the oldest first."""
    rows = await connection.fetch(
        "SELECT type, data, actor, at FROM event_store WHERE stream_id = $1 ORDER BY version LIMIT $2",
        STREAM,
        REPLAYS_MAX,
    )
    found: dict[int, Replay] = {}
    for row in rows:
        data, at = orjson.loads(row["data"]), events.microseconds(row["at"])
        generation = data["generation"]
        if row["type"] == OPENED:
            found[generation] = Replay(
                generation,
                {int(p): o for p, o in data["starts"].items()},
                {int(p): o for p, o in data["ends"].items()},
                row["actor"],
                at,
                None,
            )
        elif row["type"] == SENT and (one := found.get(generation)) is not None:
            found[generation] = Replay(one.generation, one.starts, one.ends, one.actor, one.opened_at, at)
    return list(found.values())


async def open_replay(
    connection: Any, generation: int, starts: Mapping[int, int], ends: Mapping[int, int], *, actor: str, at_us: int
) -> None:
    """Note that a generation is opened.

    Raises:
        ConflictError: somebody else opened one meanwhile.
    """
    data = {
        "generation": generation,
        "starts": {str(p): o for p, o in sorted(starts.items())},
        "ends": {str(p): o for p, o in sorted(ends.items())},
    }
    await _append(connection, OPENED, data, actor=actor, at_us=at_us)


async def close_replay(connection: Any, generation: int, counts: Mapping[str, int], *, actor: str, at_us: int) -> None:
    """Note that all of a generation was sent."""
    await _append(connection, SENT, {"generation": generation, **counts}, actor=actor, at_us=at_us)


async def _append(connection: Any, kind: str, data: Mapping[str, Any], *, actor: str, at_us: int) -> None:
    async with connection.transaction():
        heads = await events.heads(connection, [STREAM])
        version = heads.get(STREAM, (0, b""))[0]
        await events.append(connection, [NewEvent(STREAM, version, kind, data)], actor=actor, at_us=at_us)
