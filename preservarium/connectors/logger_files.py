"""How data loggers write their files: what stands before the rows, what the columns are called, and how a time is written. Pure.

| layout | told by | what it is |
|---|---|---|
| `toa5` | the first cell is TOA5 | Campbell Scientific: station, names, units, processing; the device is the station where none is named |
| `hobo` | the first line is `Plot Title: …`, or a column `Date Time, GMT±hh:mm` | HOBOware's export; offset, units and serial number are in the header |
| `davis` | two lines of tabulators, the second with Date and Time, a line of dashes | WeatherLink's text export |
| `guess` | only where it is asked for | any CSV: lines before the header, a line of units below it, separator, decimal mark |

`auto` takes one of the first three where a file is one, else the first line is the header.
"""

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Literal

from preservarium.domain.readings.instant import instant_us
from preservarium.domain.readings.number import number_of
from preservarium.domain.readings.wall_clock import WallClock

Name = Literal["auto", "plain", "toa5", "hobo", "davis", "guess"]
NAMES: Final = ("auto", "plain", "toa5", "hobo", "davis", "guess")
Order = Literal["dmy", "mdy", "ymd"]

#: Lines from which a layout is told: a preamble has up to 30 of them.
SAMPLE_LINES: Final = 80
#: Cells that are no value: what loggers write where they did not measure.
NO_VALUES: Final = frozenset(
    {"", "NAN", "NaN", "nan", '"NAN"', "---", "--", "------", "NA", "N/A", "null", "INF", "-INF"}
)
#: HOBOware's columns that are events of the logger.
_EVENTS: Final = frozenset({
    "#", "host connected", "host connect", "coupler detached", "coupler attached", "stopped", "started", "end of file", "bad battery",
    "good battery", "button up", "button down", "water detect",
})  # fmt: skip
_OFFSET: Final = re.compile(r"\b(?:GMT|UTC)\s*([+-])(\d{1,2}):?(\d{2})?")
_SERIAL: Final = re.compile(r"LGR S/N:\s*([\w-]+)")
_LABEL: Final = re.compile(r"LBL:\s*([^,)]+)")
_DATE: Final = re.compile(
    r"(\d{1,4})([./-])(\d{1,2})\2(\d{1,4})(?:[ T,;]+(\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d{1,6}))?)?\s*([AaPp])?\.?[Mm]?\.?)?"
)
_COMMA: Final = re.compile(r"[+-]?\d{1,15},\d{1,15}(?:[eE][+-]?\d{1,3})?")
#: Years of two digits below this are of this century.
_CENTURY: Final = 70


class LayoutError(ValueError):
    """A file is not of the layout that it should be."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file's beginning says of its rows."""

    name: str
    skip: int  #: lines before the first row
    header: tuple[str, ...]  #: names of the columns; "" for one that is left out
    delimiter: str
    units: Mapping[str, str] = field(default_factory=dict)
    time: tuple[str, ...] = ()  #: columns of the instant, joined by a blank
    offset: str | None = None  #: of the times, ±hh:mm
    order: Order | None = None  #: of day, month and year where it cannot be seen
    device: str | None = None  #: where none is named
    decimal_comma: bool = False


def layout_of(lines: Sequence[str], name: str, delimiter: str = ",") -> Layout | None:
    """The layout of a file; None for `plain`, and for `auto` where the file is of no logger that is known.

    Args:
        lines: the first of the file, up to `SAMPLE_LINES`, without their ends.
        name: what it should be, one of `NAMES`.
        delimiter: of what is not told by the layout.

    Raises:
        LayoutError: it is not what it should be.
    """
    known = {"toa5": _toa5, "hobo": _hobo, "davis": _davis}
    if name == "plain" or not lines:
        return None
    if name == "guess":
        return _guess(lines)
    for each in known if name == "auto" else [name]:
        found = known[each](lines)
        if found is not None:
            return found
    if name != "auto":
        message = f"the file's beginning is not that of {name}"
        raise LayoutError(message)
    return None


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _toa5(lines: Sequence[str]) -> Layout | None:
    first = _cells(lines[0].removeprefix("\ufeff"), ",")
    if not first or first[0] != "TOA5" or len(lines) < 4:
        return None
    header, units = _cells(lines[1], ","), _cells(lines[2], ",")
    if "TIMESTAMP" not in header:
        return None
    named = {h: u for h, u in zip(header, units, strict=False) if u and u not in ("TS", "RN")}
    kept = tuple("" if one == "RECORD" else one for one in header)
    return Layout("toa5", 4, kept, ",", named, ("TIMESTAMP",), device=first[1] if len(first) > 1 else None)


def _hobo(lines: Sequence[str]) -> Layout | None:
    start = lines[0].removeprefix("\ufeff").strip().strip('"')
    at = 1 if start.startswith("Plot Title") else 0
    if at >= len(lines):
        return None
    delimiter = max(",;\t", key=lambda one: len(_cells(lines[at], one)))
    header = _cells(lines[at].removeprefix("\ufeff"), delimiter)
    times = [cell for cell in header if cell.startswith(("Date Time", "Date", "Time"))]
    offset = next((found for cell in times if (found := _OFFSET.search(cell))), None)
    if not times or (at == 0 and offset is None):
        return None
    names, units, device = [], {}, start.partition(":")[2].strip() if at else ""
    for cell in header:
        if cell in times:
            names.append(cell)
            continue
        if serial := _SERIAL.search(cell):
            device = device if at else serial[1]
        name, _, rest = cell.partition(",")
        name = name.strip()
        if name.partition("(")[0].strip().lower() in _EVENTS:
            names.append("")
            continue
        label = _LABEL.search(cell)
        unit = rest.partition("(")[0].strip()
        name = (label[1].strip() if label else name.partition("(")[0].strip()) or name
        name = name if name not in names else f"{name}_{names.count(name) + 1}"
        names.append(name)
        if unit:
            units[name] = unit
    said = None if offset is None else f"{offset[1]}{int(offset[2]):02}:{offset[3] or '00'}"
    return Layout("hobo", at + 1, tuple(names), delimiter, units, tuple(times), said, "mdy", device or None)


def _davis(lines: Sequence[str]) -> Layout | None:
    if len(lines) < 4:
        return None
    upper, lower = lines[0].removeprefix("\ufeff").split("\t"), lines[1].split("\t")
    words = [cell.strip() for cell in lower]
    if words[:2] != ["Date", "Time"] or not set(lines[2].strip()) <= {"-", "\t"} or not lines[2].strip():
        return None
    above = [cell.strip() for cell in upper] + [""] * (len(words) - len(upper))
    names: list[str] = []
    for over, under in zip(above, words, strict=False):
        name = f"{over} {under}".strip()
        names.append(name if name not in names else f"{name}_{names.count(name) + 1}")
    firsts = [int(found[1]) for line in lines[3:] if (found := _DATE.match(line.strip()))]
    order: Order = "dmy" if any(12 < first < 32 for first in firsts) else "mdy"
    return Layout("davis", 3, tuple(names), "\t", {}, ("Date", "Time"), None, order)


def _guess(lines: Sequence[str]) -> Layout:
    """The separator that gives most lines the same number of cells; the first line of names before numbers is the header."""
    best: tuple[int, int, str] = (0, 0, ",")
    for delimiter in ";\t|,":
        counts = Counter(len(_cells(line, delimiter)) for line in lines if line.strip())
        width, often = max(
            ((w, n) for w, n in counts.items() if w > 1), key=lambda one: (one[1], one[0]), default=(0, 0)
        )
        best = max(best, (often, width, delimiter), key=lambda one: one[:2])
    _, width, delimiter = best
    rows = [
        (i, cells)
        for i, line in enumerate(lines)
        if len(cells := _cells(line.removeprefix("\ufeff"), delimiter)) == width
    ]
    if width < 2 or len(rows) < 2:
        message = "no rows of equal length are to be seen in it"
        raise LayoutError(message)
    data = next((k for k, (_, cells) in enumerate(rows) if any(map(_measured, cells))), None)
    if not data:
        message = "there is no line of names before the first numbers"
        raise LayoutError(message)
    named = [k for k in range(data) if len(set(rows[k][1])) == width and all(rows[k][1])]
    at = named[0] if named else data - 1
    header = rows[at][1]
    units = {h: u.strip("[]()") for h, u in zip(header, rows[at + 1][1], strict=True) if u} if at + 1 < data else {}
    sample = [cells for _, cells in rows[data:]]
    times = tuple(h for k, h in enumerate(header) if all(_DATE.fullmatch(cells[k]) for cells in sample if cells[k]))[:1]
    if not times:
        times = tuple(h for h in header if h.lower() in ("timestamp", "time", "datetime", "date time", "date"))[:1]
    comma = delimiter != "," and any(_COMMA.fullmatch(cell) for cells in sample for cell in cells)
    return Layout("guess", rows[data][0], tuple(header), delimiter, units, times, decimal_comma=comma)


def _measured(cell: str) -> bool:
    return number_of(cell.replace(",", ".", 1)) is not None or _DATE.fullmatch(cell) is not None


def with_point(cell: str) -> str:
    """A cell with a decimal comma as one with a point; others as they are."""
    return cell.replace(",", ".") if _COMMA.fullmatch(cell) else cell


def instant(
    text: str, order: Order | None, offset: str | None, zone: WallClock | None, now_us: int, before: int | None
) -> int | None:
    """µs since the epoch; None where the text is no instant, or where day and month cannot be told apart.

    Args:
        text: as the logger writes it.
        order: of day, month and year where it cannot be seen: a four-digit year first, dots and a number above 12 tell.
        offset: of the file's times, ±hh:mm.
        zone: of times without an offset; None: UTC.
        now_us: when the file is read, for hours that a clock showed twice.
        before: the instant of the row before.
    """
    found = _DATE.fullmatch(text.strip())
    iso = _iso(found, order) if found is not None else text.strip()
    if iso is None:
        return None
    if found is not None and offset is not None:
        iso += offset
    return instant_us(iso) if zone is None else zone.instant(iso, None, now_us, before)


def _iso(found: re.Match[str], order: Order | None) -> str | None:
    one, two, three = int(found[1]), int(found[3]), int(found[4])
    if len(found[1]) >= 3:
        order = "ymd"
    elif len(found[4]) < 3 and order == "ymd":
        pass
    elif found[2] == "." or one > 12:
        order = "dmy"
    elif two > 12:
        order = "mdy"
    if order is None:
        return None
    year, month, day = {"ymd": (one, two, three), "dmy": (three, two, one), "mdy": (three, one, two)}[order]
    if year < 100:
        year += 2000 if year < _CENTURY else 1900
    hour, minute, second = int(found[5] or 0), int(found[6] or 0), int(found[7] or 0)
    if found[9]:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if found[9] in "Pp" else 0)
    later = timedelta(days=1) if hour == 24 and not minute and not second else timedelta()
    try:
        micro = int((found[8] or "0").ljust(6, "0"))
        at = datetime(year, month, day, 0 if later else hour, minute, second, micro) + later  # noqa: DTZ001 - a wall's
    except (ValueError, OverflowError):
        return None
    return at.isoformat()
