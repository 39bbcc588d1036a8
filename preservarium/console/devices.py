"""Devices over HTTP: the list, the fleet, one device, its curves, its readings, and those as a file.

| request | what it answers |
|---|---|
| `GET /api/devices` | a page of the list: `?q`, `?state`, `?type`, `?sort`, `?order`, `?limit`, `?cursor` |
| `GET /api/fleet` | how many devices send, are silent, fail; and how many there are of each type |
| `GET /api/devices/{device_id}` | what the registry says, the last reading of each series, what its values are held to |
| `GET /api/devices/{device_id}/series` | curves: `?series`, `?from`, `?to`, `?points` |
| `GET /api/devices/{device_id}/readings` | readings, newest first: `?series`, `?from`, `?limit`, `?cursor` |
| `GET /api/devices/{device_id}/readings.csv` | the readings of a span as a file: `?series`, `?from`, `?to` |

A device may be named by any spelling of its address. Errors are problem details.
"""

import asyncio
import csv
import functools
import io
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from aiohttp import web

from preservarium.console import access
from preservarium.console.host import Host
from preservarium.console.replies import (
    answer,
    bad,
    cursor_of,
    instant_of,
    limit_of,
    missing,
    number_of,
    one_of,
    pack,
    text_of,
    wrapped,
)
from preservarium.console.tables import TableReader
from preservarium.errors import Retry
from preservarium.serving.rights import Right
from preservarium.stores.device_reads import (
    CURVES_MAX,
    EXPORT_ROWS_MAX,
    POINTS_MAX,
    POINTS_MIN,
    SILENT_S,
    SORTS,
    STATES,
    DeviceReads,
)

NAME_CHARS_MAX: Final = 255
POINTS_DEFAULT: Final = 1_000
S_US: Final = 1_000_000
DAY_US: Final = 86_400 * S_US
#: Five years, with leap days, and some room.
SPAN_US_MAX: Final = 5 * 366 * DAY_US
#: Instants that a query may name: the years 1970 to 2100.
INSTANT_MAX: Final = 4_102_444_800 * S_US
#: The ids of series are 32 bits.
SERIES_ID_MAX: Final = 2**31 - 1
#: A file of 200,000 readings takes ten seconds or so; who reads it slowly holds a connection of the console for so long.
EXPORT_TIMEOUT_S: Final = 120.0
#: Files at the same time; curves and lists have connections of their own use left.
EXPORTS_MAX: Final = 1

#: Order of a list -> which way it goes where nobody says.
_DESCENDING: Final = frozenset(("seen", "quality"))
_COLUMNS: Final = ("timestamp", "received_at", "component_type", "pin_position", "connector_mode", "value", "value_text", "unit", "quality", "flags")  # fmt: skip
#: What a spreadsheet takes for a formula where a cell begins with it.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


class DeviceViews:
    """The views of one worker."""

    def __init__(self, host: Host, reads: DeviceReads, tables: TableReader) -> None:
        self._host = host
        self._reads = reads
        self._tables = tables
        self._exports = asyncio.Semaphore(EXPORTS_MAX)

    def mount(self, application: web.Application) -> None:
        """Add the routes to an aiohttp application that has not started."""
        get = application.router.add_get
        read = functools.partial(wrapped, right=Right.READ, live=self._host.live, problems=True)
        get("/api/devices", read(self.devices))
        get("/api/fleet", read(self.fleet))
        get("/api/devices/{device_id}", read(self.device))
        get("/api/devices/{device_id}/series", read(self.series, timeout_s=10.0))
        get("/api/devices/{device_id}/readings", read(self.readings))
        get("/api/devices/{device_id}/readings.csv", read(self.export, timeout_s=EXPORT_TIMEOUT_S))

    async def devices(self, request: web.Request) -> web.Response:
        """A page of the devices with the last value of each series.

        While the database is down, the devices that this worker holds in its own table, without values, by address alone.
        """
        limit, cursor, q = limit_of(request), cursor_of(request), text_of(request, "q")
        state, type_name = one_of(request, "state", STATES, ""), text_of(request, "type")
        sort = one_of(request, "sort", SORTS, "device")
        order = one_of(request, "order", ("asc", "desc"), "desc" if sort in _DESCENDING else "asc")
        after = None
        if cursor is not None:
            if len(cursor) != 4 or cursor[:2] != [sort, order] or not isinstance(cursor[3], str):
                bad("cursor is not one of ours, or of another order")
            if type(cursor[2]) not in (int, str) or "\0" in str(cursor[2]) + cursor[3]:
                bad("cursor is not one of ours")
            if isinstance(cursor[2], int) and not -1 <= cursor[2] <= INSTANT_MAX:
                bad("cursor is not one of ours")
            after = (cursor[2], cursor[3])
        note = None
        try:
            page = await self._reads.devices(
                q=q, state=state, type_name=type_name, sort=sort, descending=order == "desc", after=after, limit=limit
            )
            source = "postgres"
        except ValueError:
            bad("cursor is not one of ours")
        except Retry as e:
            known = self._tables.devices(q=q, after=after[1] if after and sort == "device" else "", limit=limit)
            page = {**known, "next": (known["next"], known["next"]) if known["next"] else None, "refreshed_at": None}
            source, sort, order = "table", "device", "asc"
            note = f"The database does not answer ({e}): these are the devices that this worker knows, by address and without values."
        now_us = self._host.clock.now_us()
        return answer(
            {
                "devices": [{**device, "state": _state(device, now_us)} for device in page["devices"]],
                "next_cursor": pack([sort, order, *page["next"]]) if page["next"] else None,
                "total": page["total"],
                "sort": sort,
                "order": order,
                "refreshed_at": page["refreshed_at"],
                "source": source,
                "note": note,
                "at": now_us,
            }
        )

    async def fleet(self, _request: web.Request) -> web.Response:
        """How many devices there are in each state, and of each type."""
        return answer({**await self._reads.fleet(), "at": self._host.clock.now_us()})

    async def device(self, request: web.Request) -> web.Response:
        """One device."""
        found = await self._reads.device(_name(request))
        if found is None:
            missing("neither the registry nor a reading knows this device")
        now_us = self._host.clock.now_us()
        return answer({**found, "state": _state({**found, "values": found["series"]}, now_us), "at": now_us})

    async def series(self, request: web.Request) -> web.Response:
        """Curves of a span; the last day where none is named."""
        from_us, to_us = self._span(request)
        points = number_of(request, "points", POINTS_DEFAULT, POINTS_MIN, POINTS_MAX)
        series = _series(request, CURVES_MAX)
        found = await self._reads.curves(
            _name(request), series=series, from_us=from_us, to_us=to_us, points=points, now_us=self._host.clock.now_us()
        )
        if found is None:
            missing("this device has no such series")
        return answer({**found, "from": from_us, "to": to_us, "points": points, "at": self._host.clock.now_us()})

    async def readings(self, request: web.Request) -> web.Response:
        """Readings with their flags, parser and coordinates, newest first."""
        cursor, before = cursor_of(request), None
        if cursor is not None:
            if len(cursor) != 2 or any(type(each) is not int for each in cursor):
                bad("cursor is not one of ours")
            if not 0 <= cursor[0] <= INSTANT_MAX or not 0 <= cursor[1] <= SERIES_ID_MAX:
                bad("cursor is not one of ours")
            before = (cursor[0], cursor[1])
        from_us = instant_of(request, "from", 0)
        found = await self._reads.readings(
            _name(request),
            series=_series(request, None),
            from_us=min(from_us, INSTANT_MAX),
            before=before,
            limit=limit_of(request),
        )
        if found is None:
            missing("this device has no such series")
        return answer({"readings": found["readings"], "next_cursor": pack([*found["next"]]) if found["next"] else None})

    async def export(self, request: web.Request) -> web.StreamResponse:
        """The readings of a span as CSV, series by series; `# cut` is the last line where there were more than a file may have."""
        from_us, to_us = self._span(request)
        device_id = _name(request)
        if self._exports.locked():
            message = "another file is being made"
            raise Retry(message)
        async with self._exports:
            pages = aiter(self._reads.export(device_id, series=_series(request, None), from_us=from_us, to_us=to_us))
            # What goes wrong before the first line can still be said.
            page: list[dict[str, Any]] | None = await anext(pages, None)
            name = "".join(c if c.isascii() and c.isalnum() else "-" for c in device_id)
            response = web.StreamResponse(
                headers={
                    **access.HEADERS,
                    "Content-Type": "text/csv; charset=utf-8; header=present",
                    "Content-Disposition": f'attachment; filename="{name}.csv"',
                }
            )
            await response.prepare(request)
            try:
                await response.write((",".join(_COLUMNS) + "\r\n").encode())
                while page is not None:
                    await response.write(_csv(page))
                    page = await anext(pages, None)
                await response.write_eof()
            except (Retry, TimeoutError):
                # Half a file must not look like a whole one: its last chunk is missing.
                if request.transport is not None:
                    request.transport.abort()
            return response

    def _span(self, request: web.Request) -> tuple[int, int]:
        now_us = self._host.clock.now_us()
        to_us = instant_of(request, "to", now_us)
        from_us = instant_of(request, "from", to_us - DAY_US)
        if not 0 <= from_us < to_us <= INSTANT_MAX or to_us - from_us > SPAN_US_MAX:
            bad("from is before to, and they are at most five years apart")
        return from_us, to_us


def _name(request: web.Request) -> str:
    text = request.match_info["device_id"]
    if not 0 < len(text) <= NAME_CHARS_MAX or "\0" in text:
        bad(f"a device's address is at most {NAME_CHARS_MAX} characters, without NUL")
    return text


def _series(request: web.Request, most: int | None) -> list[int]:
    """The series that are asked for, by id; none: all."""
    text = text_of(request, "series")
    words = text.split(",") if text else []
    if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        bad("series is a list of the ids of series, separated by commas")
    if most is not None and len(words) > most:
        bad(f"at most {most} series at once")
    return [int(word) for word in words]


def _state(device: Mapping[str, Any], now_us: int) -> str:
    """The one of `STATES` that a device is in now."""
    if device.get("enabled") is False:
        return "off"
    seen = device.get("last_seen")
    if not seen:
        return "never"
    if seen < now_us - SILENT_S * S_US:
        return "silent"
    return "failing" if any(value.get("quality") == 4 for value in device["values"]) else "sending"


def _csv(page: list[dict[str, Any]]) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file)
    for row in page:
        if row.get("cut"):
            writer.writerow([f"# cut after {EXPORT_ROWS_MAX} readings: ask for a shorter span"])
            continue
        shown = {**row, "flags": " ".join(row["flags"] or ())}
        shown |= {name: _rfc3339(row[name]) for name in ("timestamp", "received_at")}
        writer.writerow([_cell(shown[name]) for name in _COLUMNS])
    return file.getvalue().encode()


def _cell(value: Any) -> Any:
    """A text that a spreadsheet would carry out gets an apostrophe before it; numbers are ours."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) and value != "-1" else value


def _rfc3339(at_us: int) -> str:
    seconds, us = divmod(at_us, S_US)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{us:06}Z"
