"""Windows: what a series did in each stretch of event time, the same for any order within the allowed lateness.

A window is [start, start + size); windows of one size start every `hop` since the epoch, UTC. Size equal to hop is a
tumbling window, a larger one hops. Readings go into panes of one hop each, a window is made of its panes, and a pane of
which a smaller hop is a part is made of those when they close: a reading costs one update for "1h,24h,24h/1h".

Time is the device's. Its watermark is the latest instant that it sent less the allowed lateness; a window closes when the
watermark comes to its end, and its record is revision 0. A later reading within the correction horizon makes the same
record again, one revision up; one beyond it is counted and left out. A device that is silent lets the wall clock
close what has ended (`silence`); what comes after all is a correction.

Which records come, and in which order, is a function of the messages in their order alone (and of silences): it makes no
difference how messages are cut into batches, and a re-run from an older state makes the same records again. The last
revision of a window is the same for every order of the messages: sums are exact until they are rounded once (`math.fsum`), and
of readings at one instant the larger is the last, the smaller the first.

The consumption of a counter's window is the sum of what validate told of it with the readings in the window
(`<name>_consumption`, domain/quality/meter.py), so that windows add up, and to the same as those readings. Of a circular quantity
(domain/circular.py) a window has the mean of the directions, their spread, and the sums of their unit vectors; it has neither minimum
nor maximum nor sum. Where a datatype becomes circular, or ceases to be, a window counts what came since.

Left out: readings that failed or are missing, texts, those whose unit could not be converted or whose names have a tab in
them, and revisions of what came before: the verdict of the spike test, which comes one reading late, does not take a reading out again.

Nothing here waits or reads a clock. Functions change the state documents that they are given, in place.

It is one file because panes, windows and corrections are one state document, which all of them read and write.
"""

import re
from base64 import b85decode, b85encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import fsum
from typing import Any, Final, NamedTuple
from zlib import compress, decompress

import orjson

from preservarium.domain.circular import direction, unit_vector
from preservarium.domain.quality.meter import CONSUMPTION_SUFFIX
from preservarium.domain.readings.json_text import to_bytes
from preservarium.domain.readings.lineage import generation_state, identity, take
from preservarium.domain.readings.reading import Quality

#: Version of the state document; a document of another version is a defect, not something to guess at.
STATE_VERSION: Final = 2

#: Sizes of window at once: each costs state and records for every series.
SPECS_MAX: Final = 8

#: Sums of a hundred million such values do not overflow; no sensor reports larger ones.
VALUE_MAX: Final = 1e300

_LEFT_OUT: Final = frozenset({int(Quality.FAIL), int(Quality.MISSING)})

_SECOND_US: Final = 1_000_000
_UNITS_S: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}

State = dict[str, Any]


class Nature(NamedTuple):
    """What a series is, beyond numbers."""

    counts: bool = False  #: a counter, of which validate tells the consumption
    circular: float | None = None  #: its period, in its unit


#: component type -> its nature; None where there is nothing to say
NatureLookup = Callable[[str], Nature | None]


class Spec(NamedTuple):
    """One size of window."""

    size_s: int
    hop_s: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Which windows there are, and how late a reading may come."""

    specs: tuple[Spec, ...]
    lateness_us: int  #: a window stays open so long after its end, in event time
    horizon_us: int  #: a closed window takes corrections so long
    series_max: int  #: series of one device
    panes_max: int  #: panes of one series
    #: hop, smallest first -> its sizes, largest first; made from `specs`
    by_hop: dict[int, tuple[int, ...]] = field(init=False)
    #: hops that readings go into, and their µs; the others are made of smaller ones
    direct: tuple[tuple[int, int], ...] = field(init=False)
    #: hop -> larger hops that are made of it
    feeds: dict[int, tuple[int, ...]] = field(init=False)
    #: what state of other windows is told by
    name: str = field(init=False)

    def __post_init__(self) -> None:
        """Group the specs.

        Raises:
            ValueError: a series would need more panes than it may have.
        """
        by_hop = {
            hop: tuple(sorted((s.size_s for s in self.specs if s.hop_s == hop), reverse=True))
            for hop in sorted({spec.hop_s for spec in self.specs})
        }
        part = {hop: max((h for h in by_hop if h < hop and hop % h == 0), default=None) for hop in by_hop}
        object.__setattr__(self, "by_hop", by_hop)
        object.__setattr__(self, "direct", tuple((hop, hop * _SECOND_US) for hop in by_hop if part[hop] is None))
        object.__setattr__(self, "feeds", {h: tuple(hop for hop in by_hop if part[hop] == h) for h in by_hop})
        object.__setattr__(self, "name", ",".join(f"{s.size_s}/{s.hop_s}" for s in sorted(self.specs)))
        late_s = (self.lateness_us + self.horizon_us) // _SECOND_US
        needed = sum((sizes[0] + late_s) // hop + 2 for hop, sizes in by_hop.items())
        if needed > self.panes_max:
            text = f"these windows, lateness and horizon need {needed} panes a series; {self.panes_max} are allowed"
            raise ValueError(text)


def parse_specs(text: str) -> tuple[Spec, ...]:
    """Windows as "60s,1h,24h/1h": sizes, each with its hop where it hops.

    Raises:
        ValueError: not of that form, or the size is no multiple of the hop.
    """
    specs: list[Spec] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d{1,9})([smhd])(?:/(\d{1,9})([smhd]))?", part)
        if match is None:
            message = f"window {part!r}: write 60s, 5m, 1h or 24h/1h"
            raise ValueError(message)
        size = int(match[1]) * _UNITS_S[match[2]]
        hop = int(match[3]) * _UNITS_S[match[4]] if match[3] else size
        if not hop or not size or size % hop:
            message = f"window {part!r}: the size must be a multiple of the hop"
            raise ValueError(message)
        spec = Spec(size, hop)
        if spec not in specs:
            specs.append(spec)
    if len(specs) > SPECS_MAX:
        message = f"{len(specs)} windows; there may be {SPECS_MAX}"
        raise ValueError(message)
    return tuple(specs)


# --- panes -----------------------------------------------------------------------------------------------------------
#
# A list, because there are many of them and they are written for every batch. From PARTIALS on stand the parts of an exact sum: of
# the values; where PERIOD is a number, the pane is of a circular quantity, and it is that of their cosines. BESIDE are the parts of
# a second sum: of the sines, or of what a counter consumed; None where there is none. What comes is put behind them, and now and
# then few parts are made of many.

_HOP, _START, _COUNT, _MIN, _MAX, _LAST_AT, _LAST, _PERIOD, _BESIDE, _PARTIALS = range(10)

Pane = list[Any]

#: Parts of a sum in memory: to make few of them costs a microsecond, for one reading as for as many as these.
_PARTS_MAX: Final = 64
#: Parts of a sum in a state document: two are what sums of decimal numbers come to, more cost bytes and fewer time.
_PARTS_STORED_MAX: Final = 4
_STORED_MAX: Final = _PARTIALS + _PARTS_STORED_MAX


def _pane(hop_s: int, start_s: int, at: int, value: float, eaten: float | None, period: float | None) -> Pane:
    if period is not None:
        x, y = unit_vector(value, period)
        return [hop_s, start_s, 1, None, None, at, value, period, [y], x]
    return [hop_s, start_s, 1, value, value, at, value, None, None if eaten is None else [eaten], value]


def _take(pane: Pane, at: int, value: float) -> None:
    pane[_COUNT] += 1
    last_at = pane[_LAST_AT]
    if at > last_at or (at == last_at and value > pane[_LAST]):
        pane[_LAST_AT], pane[_LAST] = at, value
    if pane[_PERIOD] is not None:
        value, y = unit_vector(value, pane[_PERIOD])
        pane[_BESIDE].append(y)
    elif value < pane[_MIN]:
        pane[_MIN] = value
    elif value > pane[_MAX]:
        pane[_MAX] = value
    pane.append(value)
    if len(pane) > _PARTIALS + _PARTS_MAX:
        _shorten(pane, _PARTS_MAX)


def _eat(pane: Pane, eaten: float | None) -> None:
    """Add what a counter consumed up to a reading that is in the pane."""
    if eaten is None or pane[_PERIOD] is not None:
        return
    if pane[_BESIDE] is None:
        pane[_BESIDE] = [eaten]
    else:
        pane[_BESIDE].append(eaten)


def _shorten(pane: Pane, parts_max: int) -> None:
    """Make few parts of a pane's sums where there are more than so many."""
    if len(pane) > _PARTIALS + parts_max:
        pane[_PARTIALS:] = _few(pane[_PARTIALS:])
    beside = pane[_BESIDE]
    if beside is not None and len(beside) > parts_max:
        pane[_BESIDE] = _few(beside)


def _few(parts: list[float]) -> list[float]:
    """Numbers of the same exact sum: it rounded, what that takes away rounded, and so on; the smallest first."""
    few: list[float] = []
    rest = list(parts)
    while high := fsum(rest):
        few.append(high)
        rest.append(-high)
    few.reverse()
    return few or [0.0]


def _copied(pane: Pane) -> Pane:
    copy = list(pane)
    if pane[_BESIDE] is not None:
        copy[_BESIDE] = list(pane[_BESIDE])
    return copy


def _merge(pane: Pane, part: Pane) -> None:
    if pane[_PERIOD] != part[_PERIOD]:
        # The quantity has become another: what came since counts.
        pane[_COUNT:] = _copied(part)[_COUNT:]
        return
    pane[_COUNT] += part[_COUNT]
    if pane[_PERIOD] is None:
        pane[_MIN] = min(pane[_MIN], part[_MIN])
        pane[_MAX] = max(pane[_MAX], part[_MAX])
    if (part[_LAST_AT], part[_LAST]) > (pane[_LAST_AT], pane[_LAST]):
        pane[_LAST_AT], pane[_LAST] = part[_LAST_AT], part[_LAST]
    if part[_BESIDE] is not None:
        pane[_BESIDE] = [*(pane[_BESIDE] or ()), *part[_BESIDE]]
    pane += part[_PARTIALS:]
    _shorten(pane, _PARTS_MAX)


def _find(panes: Iterable[Pane], hop_s: int, start_s: int) -> Pane | None:
    return next((pane for pane in panes if pane[_START] == start_s and pane[_HOP] == hop_s), None)


# --- state -----------------------------------------------------------------------------------------------------------
#
# {"v": 2, "g": {generation: {"m": marks, "a": latest instant, "c": closed up to, "n": next end of a window,
#   "s": {"mode\tcomponent\tpin\tunit": [open panes, closed]}}}, "limited": 1 once reported}
# `closed` is the JSON text of [panes, {window: revision}], packed where it is long: it is read only when something closes
# or comes late, and a text costs nothing to carry from batch to batch. "w" names the windows: where they were others, they begin anew.

_OPEN, _CLOSED = range(2)

#: Digits pack to half their size. A short text is not worth the time; a long one is of small windows, which close often.
_PACKED_BYTES: Final = range(513, 8_193)
#: JSON never begins with it.
_PACKED: Final = "z"


def new_state() -> State:
    """The state document of a device that nothing is known of."""
    return {"v": STATE_VERSION, "g": {}}


def from_version_1(state: State) -> None:
    """Bring a document of version 1 to this one, in place: counters' panes had their first reading instead of a consumption."""
    first_at, first = _PERIOD, _BESIDE
    for generation in state["g"].values():
        for series in generation["s"].values():
            for pane in [*series[_OPEN], *_closed(series)[0]]:
                if pane[first_at] is not None:
                    # What it was between the first and the last, but for what a reset or rollover hid.
                    consumed = max(pane[_LAST] - pane[first], 0.0)
                    pane[_PERIOD], pane[_BESIDE] = None, [consumed]
    state["v"] = STATE_VERSION


def _new_generation() -> dict[str, Any]:
    return {"m": {}, "a": 0, "c": 0, "n": None, "w": "", "s": {}}


def dump_state(state: State) -> bytes:
    """The document as it is stored."""
    for generation in state["g"].values():
        for series in generation["s"].values():
            for pane in series[_OPEN]:
                if len(pane) > _STORED_MAX or pane[_BESIDE]:
                    _shorten(pane, _PARTS_STORED_MAX)
            if type(series[_CLOSED]) is list:
                panes, revisions = series[_CLOSED]
                for pane in panes:
                    _shorten(pane, _PARTS_STORED_MAX)
                series[_CLOSED] = _packed(orjson.dumps([panes, revisions])) if panes or revisions else ""
    return to_bytes(state)


def next_end_us(state: State) -> int | None:
    """When the next open window of a device ends, µs; None: it has none."""
    soonest: int | None = None
    for generation in state["g"].values():
        end = generation["n"]
        if end is not None and (soonest is None or end < soonest):
            soonest = end
    return soonest


def _packed(text: bytes) -> str:
    if len(text) not in _PACKED_BYTES:
        return text.decode()
    return _PACKED + b85encode(compress(text, 1)).decode()


def _unpacked(text: str) -> Any:
    return orjson.loads(decompress(b85decode(text[1:])) if text[0] == _PACKED else text)


def _closed(series: list[Any]) -> list[Any]:
    closed: Any = series[_CLOSED]
    if type(closed) is str:
        closed = series[_CLOSED] = _unpacked(closed) if closed else [[], {}]
    result: list[Any] = closed
    return result


# --- readings in, windows out ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """What became of a message, or of some of them."""

    duplicate: bool = False  #: applied before; nothing else was done
    taken: int = 0  #: readings that went into a window
    late: int = 0  #: of these, into one that was closed
    dropped: int = 0  #: readings beyond the correction horizon of every window
    limited: bool = False  #: for the first time, a reading found no room in the state
    windows: list[dict[str, Any]] = field(default_factory=list)  #: records


def observe(
    message: Mapping[str, Any], state: State, plan: Plan, natures: NatureLookup, outcome: Outcome | None = None
) -> Outcome:
    """Take the readings of one validated message in, and close what its watermark closes.

    Messages of one device must come in the order of their partition; one that was applied before is left (`duplicate`).

    Args:
        message: a validated message.
        state: of the message's device; changed in place, to be written back where the message is no duplicate.
        plan: the windows.
        natures: what the device's component types are; asked where a pane begins or a window ends.
        outcome: of messages before, which this one's is added to and which is given back.
    """
    if outcome is None:
        outcome = Outcome()
    generation = generation_state(state["g"], message["generation"], _new_generation)
    if not take(generation["m"], message):
        outcome.duplicate = True
        return outcome

    if generation["w"] != plan.name:
        generation.update(s={}, n=None, w=plan.name)
    all_series = generation["s"]
    closed_to = generation["c"]
    mode, message_at = message["connector_mode"], message["timestamp"]
    latest = generation["a"]
    late: dict[tuple[str, int, int, int], int] = {}
    places_of_message = _places(message_at, closed_to, plan)
    readings = message["readings"]
    # Derived readings stand behind those that they are made of, among the revisions.
    behind = readings[-1] if readings else {}
    eaten_of = _consumptions(readings) if "derived" in behind or "revised" in behind else None
    for reading in readings:
        value = reading.get("value")
        kind = type(value)
        if (kind is not float and kind is not int) or not -VALUE_MAX < value < VALUE_MAX:
            continue
        if reading.get("quality") in _LEFT_OUT or "revised" in reading:
            continue
        if "flags" in reading and "unit_unknown" in (reading["flags"] or ()):
            continue
        at = reading.get("timestamp")
        if at is None:
            at, places = message_at, places_of_message
        else:
            places = _places(at, closed_to, plan)
        if at > latest:
            latest = at
        component_type, pin = reading["component_type"], reading["pin_position"]
        eaten = eaten_of.pop((component_type, pin, at), None) if eaten_of else None
        key = f"{mode}\t{component_type}\t{pin}\t{reading['unit']}"
        series = all_series.get(key)
        if series is None:
            if key.count("\t") != 3:
                continue  # a name with a tab in it: it could not be told from another
            if len(all_series) >= plan.series_max:
                outcome.limited = _limit(state) or outcome.limited
                continue
            series = all_series[key] = [[], ""]
        value += 0.0  # an int becomes a float, and -0.0 becomes 0.0, which would be another minimum
        taken = False
        for hop_s, start, start_s, is_closed in places:
            if is_closed:
                taken |= _late(
                    series, key, hop_s, start, at, value, eaten, generation, plan, natures, late, outcome, state
                )
                continue
            for pane in series[_OPEN]:
                if pane[_START] == start_s and pane[_HOP] == hop_s:
                    _take(pane, at, value)
                    if eaten is not None:
                        _eat(pane, eaten)
                    taken = True
                    break
            else:
                if _open(series, hop_s, start_s, at, value, eaten, generation, plan, natures, component_type):
                    taken = True
                else:
                    outcome.limited = _limit(state) or outcome.limited
        if taken:
            outcome.taken += 1
        elif not series[_OPEN] and not series[_CLOSED]:
            del all_series[key]
    if late:
        outcome.late += sum(late.values())
        _correct(message["device_id"], message["generation"], generation, late, natures, outcome.windows)
    generation["a"] = latest
    if latest - plan.lateness_us > closed_to:
        _close(message, generation, latest - plan.lateness_us, plan, natures, "watermark", outcome.windows)
    return outcome


def _places(at: int, closed_to: int, plan: Plan) -> list[tuple[int, int, int, bool]]:
    """The panes that a reading of an instant goes into: hop, start in µs and in seconds, whether it is closed."""
    places: list[tuple[int, int, int, bool]] = []
    for hop_s, hop in plan.direct:
        start = at // hop * hop
        places.append((hop_s, start, start // _SECOND_US, start + hop <= closed_to))
    return places


def _consumptions(readings: list[dict[str, Any]]) -> dict[tuple[str, str, int], float]:
    """(counter, pin, instant) -> what validate tells that was consumed up to it."""
    return {
        (
            reading["component_type"].removesuffix(CONSUMPTION_SUFFIX),
            reading["pin_position"],
            reading["timestamp"],
        ): reading["value"]
        for reading in readings
        if "derived" in reading and reading["component_type"].endswith(CONSUMPTION_SUFFIX)
    }


def silence(device_id: str, state: State, to_us: int, plan: Plan, natures: NatureLookup) -> list[dict[str, Any]]:
    """Close the windows that have ended by `to_us`: the device is silent, and the wall clock counts instead of its own.

    Returns:
        Their records; where there are none, the state is as it was.
    """
    windows: list[dict[str, Any]] = []
    for number, generation in state["g"].items():
        if generation["w"] != plan.name:
            generation.update(s={}, n=None, w=plan.name)
        if generation["n"] is not None and generation["n"] <= to_us:
            about = {"device_id": device_id, "generation": int(number)}
            _close(about, generation, to_us, plan, natures, "silence", windows)
    return windows


def _limit(state: State) -> bool:
    """Whether this is the first time."""
    if "limited" in state:
        return False
    state["limited"] = 1
    return True


def _floor(generation: Mapping[str, Any], plan: Plan) -> int:
    """Windows that end at or before this take no corrections. A silence does not move it: only the device's time does."""
    floor: int = generation["a"] - plan.lateness_us - plan.horizon_us
    return floor


def _period(natures: NatureLookup, component_type: str) -> float | None:
    nature = natures(component_type)
    return None if nature is None else nature.circular


def _open(
    series: list[Any],
    hop_s: int,
    start_s: int,
    at: int,
    value: float,
    eaten: float | None,
    generation: dict[str, Any],
    plan: Plan,
    natures: NatureLookup,
    component_type: str,
) -> bool:
    """Begin an open pane with a reading; whether there was room."""
    panes = series[_OPEN]
    if len(panes) >= plan.panes_max:
        return False
    panes.append(_pane(hop_s, start_s, at, value, eaten, _period(natures, component_type)))
    end = (start_s + hop_s) * _SECOND_US
    if generation["n"] is None or end < generation["n"]:
        generation["n"] = end
    return True


def _late(
    series: list[Any],
    key: str,
    hop_s: int,
    start: int,
    at: int,
    value: float,
    eaten: float | None,
    generation: dict[str, Any],
    plan: Plan,
    natures: NatureLookup,
    late: dict[tuple[str, int, int, int], int],
    outcome: Outcome,
    state: State,
) -> bool:
    """Take a reading into a closed pane, and note the windows that this corrects; whether it was taken anywhere.

    What this pane is a part of had it in already, so the reading goes there by itself.
    """
    taken = False
    for larger_s in plan.feeds[hop_s]:
        larger = larger_s * _SECOND_US
        begin = at // larger * larger
        if begin + larger <= generation["c"]:
            taken |= _late(
                series, key, larger_s, begin, at, value, eaten, generation, plan, natures, late, outcome, state
            )
        elif (pane := _find(series[_OPEN], larger_s, begin // _SECOND_US)) is not None:
            _take(pane, at, value)
            _eat(pane, eaten)
            taken = True
        else:
            component_type = key.split("\t")[1]
            begin_s = begin // _SECOND_US
            taken |= _open(series, larger_s, begin_s, at, value, eaten, generation, plan, natures, component_type)
    floor, closed_to, hop = _floor(generation, plan), generation["c"], hop_s * _SECOND_US
    sizes = plan.by_hop[hop_s]
    largest = sizes[0] * _SECOND_US
    if start + largest <= floor:
        if not taken and not plan.feeds[hop_s]:
            outcome.dropped += 1
        return taken
    panes = _closed(series)[0]
    start_s = start // _SECOND_US
    pane = _find(panes, hop_s, start_s)
    if pane is not None:
        _take(pane, at, value)
        _eat(pane, eaten)
    elif len(panes) >= plan.panes_max:
        outcome.limited = _limit(state) or outcome.limited
        return taken
    else:
        period = _period(natures, key.split("\t")[1])
        panes.append(_pane(hop_s, start_s, at, value, eaten, period))
    for size_s in sizes:
        size = size_s * _SECOND_US
        for window in range(start - size + hop, start + 1, hop):
            if floor < window + size <= closed_to:
                about = (key, size_s, hop_s, window // _SECOND_US)
                late[about] = late.get(about, 0) + 1
    following = _following(start, hop, largest, closed_to)
    if following is not None and (generation["n"] is None or following < generation["n"]):
        generation["n"] = following
    return True


def _following(start: int, hop: int, largest: int, closed_to: int) -> int | None:
    """End of the first window of a pane that is still open."""
    end = max(start + hop, (closed_to // hop + 1) * hop)
    return end if end <= start + largest else None


def _correct(
    device_id: str,
    number: int,
    generation: dict[str, Any],
    late: Mapping[tuple[str, int, int, int], int],
    natures: NatureLookup,
    windows: list[dict[str, Any]],
) -> None:
    for (key, size_s, hop_s, start_s), added in late.items():
        series = generation["s"][key]
        closed = _closed(series)
        chosen = _of_window(closed[0], size_s, hop_s, start_s)
        revision = 0
        if sum(pane[_COUNT] for pane in chosen) > added:
            about = f"{size_s}/{hop_s}@{start_s}"
            revision = closed[1][about] = closed[1].get(about, 0) + 1
        windows.append(_record(device_id, number, key, size_s, hop_s, start_s, chosen, revision, "late", natures))


def _of_window(panes: Iterable[Pane], size_s: int, hop_s: int, start_s: int) -> list[Pane]:
    chosen = [pane for pane in panes if pane[_HOP] == hop_s and start_s <= pane[_START] < start_s + size_s]
    chosen.sort(key=lambda pane: pane[_START])
    return chosen


def _ends(panes: Iterable[Pane], plan: Plan, after: int, to: int) -> Iterator[tuple[int, int, int]]:
    """(size, hop, start) of the windows with a pane in them that end in (after, to]."""
    found: set[tuple[int, int, int]] = set()
    for pane in panes:
        hop_s, pane_start = pane[_HOP], pane[_START]
        for size_s in plan.by_hop.get(hop_s, ()):
            for start_s in range(pane_start - size_s + hop_s, pane_start + 1, hop_s):
                if after < (start_s + size_s) * _SECOND_US <= to:
                    found.add((size_s, hop_s, start_s))
    yield from sorted(found, key=lambda window: (window[2] + window[0], window))


def _close(
    about: Mapping[str, Any],
    generation: dict[str, Any],
    to: int,
    plan: Plan,
    natures: NatureLookup,
    why: str,
    windows: list[dict[str, Any]],
) -> None:
    """Move the generation's closed end to `to`; where windows end by then, make their records and tidy the state."""
    after = generation["c"]
    generation["c"] = to
    if generation["n"] is None or generation["n"] > to:
        return
    floor = _floor(generation, plan)
    hops = any(spec.size_s > spec.hop_s for spec in plan.specs)
    all_series = generation["s"]
    following: int | None = None
    for key in list(all_series):
        series = all_series[key]
        opened = series[_OPEN]
        opened, ending = _split(opened, to, plan)
        series[_OPEN] = opened
        if ending or hops or not opened:
            closed = _closed(series)
            panes = closed[0]
            for size_s, hop_s, start_s in _ends([*panes, *ending], plan, after, to):
                chosen = _of_window([*panes, *ending], size_s, hop_s, start_s)
                record = _record(
                    about["device_id"], about["generation"], key, size_s, hop_s, start_s, chosen, 0, why, natures
                )
                windows.append(record)
            closed[0] = [
                pane
                for pane in (*panes, *ending)
                if (sizes := plan.by_hop.get(pane[_HOP])) and (pane[_START] + sizes[0]) * _SECOND_US > floor
            ]
            closed[1] = {name: n for name, n in closed[1].items() if _end_of(name) * _SECOND_US > floor}
            for pane in closed[0]:
                hop = pane[_HOP] * _SECOND_US
                end = _following(pane[_START] * _SECOND_US, hop, plan.by_hop[pane[_HOP]][0] * _SECOND_US, to)
                if end is not None and (following is None or end < following):
                    following = end
            if not opened and not closed[0]:
                del all_series[key]
                continue
        for pane in opened:
            end = (pane[_START] + pane[_HOP]) * _SECOND_US
            if following is None or end < following:
                following = end
    generation["n"] = following


def _split(opened: list[Pane], to: int, plan: Plan) -> tuple[list[Pane], list[Pane]]:
    """(panes that stay open, panes that end by `to`); those that end go into what they are a part of."""
    if all((pane[_START] + pane[_HOP]) * _SECOND_US > to for pane in opened):
        return opened, []
    left, ending = list(opened), []
    for hop_s in plan.by_hop:
        closing = [pane for pane in left if pane[_HOP] == hop_s and (pane[_START] + hop_s) * _SECOND_US <= to]
        if not closing:
            continue
        left = [pane for pane in left if pane[_HOP] != hop_s or (pane[_START] + hop_s) * _SECOND_US > to]
        ending += closing
        for pane in closing:
            for larger_s in plan.feeds[hop_s]:
                start_s = pane[_START] // larger_s * larger_s
                larger = _find(left, larger_s, start_s)
                if larger is None:
                    left.append([larger_s, start_s, *_copied(pane)[_COUNT:]])
                else:
                    _merge(larger, pane)
    return left, ending


def _end_of(window: str) -> int:
    size, _, start = window.partition("@")
    return int(size.partition("/")[0]) + int(start)


def _record(
    device_id: str,
    generation: int,
    key: str,
    size_s: int,
    hop_s: int,
    start_s: int,
    panes: list[Pane],
    revision: int,
    why: str,
    natures: NatureLookup,
) -> dict[str, Any]:
    mode, component_type, pin_position, unit = key.split("\t")
    last = panes[-1]
    period = last[_PERIOD]
    panes = [pane for pane in panes if pane[_PERIOD] == period]
    count = sum(pane[_COUNT] for pane in panes)
    total = fsum(partial for pane in panes for partial in pane[_PARTIALS:])
    beside = fsum(partial for pane in panes for partial in pane[_BESIDE] or ())
    record = {
        "window_id": identity(
            "window", device_id, mode, component_type, pin_position, unit, start_s, size_s, hop_s, generation
        ),
        "revision": revision,
        "device_id": device_id,
        "connector_mode": mode,
        "component_type": component_type,
        "pin_position": pin_position,
        "unit": unit,
        "window_start": start_s * _SECOND_US,
        "window_end": (start_s + size_s) * _SECOND_US,
        "size_s": size_s,
        "hop_s": hop_s,
        "count": count,
        "last": last[_LAST],
        "last_at": last[_LAST_AT],
        "closed_by": why,
        "generation": generation,
    }
    if period is not None:
        mean, spread = direction(total, beside, count, period)
        record.update(circular=period, mean=mean, spread=spread, cos_sum=total, sin_sum=beside)
        return record
    record.update(
        min=min(pane[_MIN] for pane in panes), max=max(pane[_MAX] for pane in panes), mean=total / count, sum=total
    )
    nature = natures(component_type)
    if nature is not None and nature.counts:
        record["consumption"] = beside
    return record
