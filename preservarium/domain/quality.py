"""How far each reading can be trusted: the QARTOD tests, streaming, one device at a time.

Flags and names follow the IOOS QARTOD manuals ("Manual for Real-Time Quality Control", tests 1–9) and the parameter
names those of ioos-qc. Each reading gets `quality`, the aggregate of its tests by QARTOD's precedence (fail over
suspect over good over not evaluated), and `flags`, the names of the tests that said suspect, fail or missing; where
every test said good, there is no `flags`.

| test | parameters | says |
|---|---|---|
| syntax (`type`) | the datatype's kind | fail |
| `missing` | – | missing: there is neither a number nor a text |
| `unit_unknown` | the datatype's unit | suspect: no conversion is known, so no other value test is made |
| `timestamp_invalid`, `timestamp_future`, `timestamp_before_birth` | bounds, allowed skew, birth | fail |
| `gross_range` | `fail_span`, `suspect_span` | outside: fail, suspect |
| `climatology` | `members` (domain/climatology.py) | outside what the season and the hour allow: fail, suspect |
| `stale` | the datatype's `stale_after_s` | suspect: older than this when it was received |
| `gap` | `threshold` in seconds | suspect: the first after a longer time without a reading |
| `rate_of_change` | `threshold`, `fail_threshold`, units per second | over: suspect, fail |
| `flat_line` | `suspect_threshold`, `fail_threshold` in seconds, `tolerance` | range < tolerance for so long: suspect, fail |
| `location` | the device's `meta.location`: `latitude`, `longitude`, `range_m` | suspect: the device is elsewhere |
| `attenuated_signal` | `suspect_threshold`, `fail_threshold`, `test_period` in seconds, `check_type` std or range | varied less: suspect, fail |
| `spike` | `suspect_threshold`, `fail_threshold`, `method` | the reading BEFORE this one: suspect, fail |

The future is judged against `received_at`, never against the clock of the worker: a re-run and a replay say the same.
Spike is known one reading late (QARTOD test 6 looks at n−1 when n comes). The verdict then follows as one more reading
in the later message: same series, the earlier timestamp, `revised`: it updates the row that stands.

A value that fails (range, rate of change, time) never enters the reference of the next one. A reading that is not
younger than the last one of its series gets no test that needs its neighbours: history is not rewritten.

A counter (`counter` of its datatype: `width`, `swaps`; domain/counter.py) brings a reading of its own with each of its
readings: `<name>_consumption`, `derived`, what was consumed since the one before. Where a part of it is unknown it is suspect:
`counter_reset`, `counter_swap`. A counter's reading that comes late brings none: the interval that it lies in has been
told as a whole, so that the sum of a series' consumption is what the meter counted, in whatever order its readings came.

Nothing here waits or reads a clock. Functions change the messages and state documents they are given, in place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import asin, cos, inf, isfinite, radians, sin
from typing import Any, Final, Literal, NamedTuple

from preservarium.domain.anomaly import Detector, detector_of
from preservarium.domain.arrival import IN_ORDER_OF_ARRIVAL, Arrival, Order, arrive, generation_of, silent
from preservarium.domain.climatology import Climatology, climatology_of
from preservarium.domain.counter import CONSUMPTION_SUFFIX, Counter, counter_of, step
from preservarium.domain.counter import State as CounterState
from preservarium.domain.device import DatatypeDoc, DeviceDoc, DeviceTypeDoc
from preservarium.domain.errors import ReasonCode
from preservarium.domain.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US, Quality
from preservarium.domain.units import canonical, conversion

GOOD: Final = int(Quality.GOOD)
NOT_EVALUATED: Final = int(Quality.NOT_EVALUATED)
SUSPECT: Final = int(Quality.SUSPECT)
FAIL: Final = int(Quality.FAIL)
MISSING: Final = int(Quality.MISSING)

#: Version of the state document; a document of another version is a defect, not something to guess at.
STATE_VERSION: Final = 1

#: Extremes kept of a flat line's window, each side. Sixteen keep one series under 1.5 KiB of state at 17-digit
#: instants; a flat signal needs one or two, and only a slow drift inside the tolerance needs many.
FLAT_EXTREMES_MAX: Final = 16

#: Parts of an attenuated signal's period: some 60 bytes each.
ATTENUATED_BUCKETS: Final = 8

#: Compiled checks that one device keeps. Field names come from devices, so their number must have a limit; beyond it
#: a check is compiled for each reading anew.
COMPILED_MAX: Final = 1_000

#: Texts of configuration problems kept; a registry with more has a cause that the first ones show.
PROBLEMS_MAX: Final = 100

_SECOND_US: Final = 1_000_000
_HOUR_US: Final = 3_600 * _SECOND_US
#: Mean radius of the Earth (IUGG).
_EARTH_RADIUS_M: Final = 6_371_008.8

#: What of a counter's step leaves a part of its consumption unknown -> flag.
_UNKNOWN_PARTS: Final = {"reset": "counter_reset", "swap_unread": "counter_swap"}


# --- what is checked -------------------------------------------------------------------------------------------------


class RateOfChange(NamedTuple):
    """QARTOD test 7: the change since the last reading, in units per second."""

    suspect: float
    fail: float


class Spike(NamedTuple):
    """QARTOD test 6: how far n−1 stands off its neighbours, in units."""

    suspect: float
    fail: float
    differential: bool  #: the smaller of both steps where they go opposite ways; else the distance from the midpoint


class FlatLine(NamedTuple):
    """QARTOD test 8: how long the values may stay within `tolerance`."""

    suspect_us: float
    fail_us: float
    tolerance: float


class Attenuated(NamedTuple):
    """QARTOD test 9: how little the values may vary over a period."""

    suspect: float
    fail: float
    bucket_us: int  #: an eighth of the period
    by_range: bool  #: the range is judged, else the standard deviation


@dataclass(frozen=True, slots=True)
class SeriesCheck:
    """The compiled checks of one component type of one device."""

    kind: Literal["number", "text", "boolean", "any"]
    unit: str | None = None  #: canonical; None: any unit is taken as it comes
    fail_min: float = -inf
    fail_max: float = inf
    suspect_min: float = -inf
    suspect_max: float = inf
    rate: RateOfChange | None = None
    flat: FlatLine | None = None
    spike: Spike | None = None
    attenuated: Attenuated | None = None
    gap_us: float | None = None
    stale_us: float | None = None
    climatology: Climatology | None = None
    anomaly: Detector | None = None  #: judged by a stage of its own; says nothing here
    #: quality of a value that no test objects to; not evaluated where there is no value test
    passed: int = NOT_EVALUATED
    counter: Counter | None = None  #: where it counts up: how
    problems: tuple[str, ...] = ()  #: what of the configuration cannot be used, for people

    @property
    def stateful(self) -> bool:
        """Whether a test needs the readings before."""
        return any(x is not None for x in (self.rate, self.flat, self.spike, self.attenuated, self.gap_us))


#: For a component type that the catalogue does not have.
UNCHECKED: Final = SeriesCheck("any")

DatatypeLookup = Callable[[str], DatatypeDoc | None]


class CheckCompiler:
    """Makes checks from registry documents; datatypes without overrides are compiled once for all devices.

    Good for one revision of the catalogue: make a new one when it changes.
    """

    def __init__(self, datatype: DatatypeLookup) -> None:
        self._datatype = datatype
        self._shared: dict[str, SeriesCheck] = {}
        #: text -> whether it was taken
        self._problems: dict[str, bool] = {}

    def take_problems(self) -> list[str]:
        """What of the configuration cannot be used, as far as it was compiled since the last call; each only once."""
        new = [text for text, taken in self._problems.items() if not taken]
        self._problems.update(dict.fromkeys(new, True))
        return new

    def device(self, device: DeviceDoc | None, device_type: DeviceTypeDoc | None = None) -> "DeviceChecks":
        """The checks of one device; without a device document, those of the catalogue alone."""
        return DeviceChecks(self, device, device_type)

    def series(self, component_type: str, overrides: tuple[Mapping[str, Any], ...]) -> SeriesCheck:
        """The checks of one component type; later overrides win, field by field."""
        if not overrides and (shared := self._shared.get(component_type)) is not None:
            return shared
        datatype = self._datatype(component_type)
        if datatype is None:
            return UNCHECKED
        fields: dict[str, Any] = dict(datatype)
        for override in overrides:
            fields.update(override)
        check = _compile(component_type, fields)
        for problem in check.problems[: max(0, PROBLEMS_MAX - len(self._problems))]:
            self._problems.setdefault(problem, False)
        if not overrides:
            self._shared[component_type] = check
        return check


class Location(NamedTuple):
    """Where a device was put: its `meta.location` with `latitude`, `longitude` (degrees) and `range_m`."""

    latitude: float
    longitude: float
    range_m: float

    def distance_m(self, latitude: float, longitude: float) -> float:
        """The great-circle distance (haversine; a sphere of the mean radius, so half a percent is not known)."""
        a, b = radians(self.latitude), radians(latitude)
        half = sin((b - a) / 2) ** 2 + cos(a) * cos(b) * sin(radians(longitude - self.longitude) / 2) ** 2
        return 2 * _EARTH_RADIUS_M * asin(min(1.0, half**0.5))


def _location_of(device: DeviceDoc | None) -> Location | None:
    given = ((device.get("meta") if device else None) or {}).get("location")
    try:
        return Location(float(given["latitude"]), float(given["longitude"]), float(given["range_m"])) if given else None
    except (KeyError, TypeError, ValueError):
        return None  # without a range it is a note for people


class DeviceChecks:
    """The checks of one device, compiled as its component types turn up."""

    __slots__ = ("_by_type", "_compiler", "_overrides", "birth_us", "lateness_us", "location")

    def __init__(
        self, compiler: CheckCompiler, device: DeviceDoc | None, device_type: DeviceTypeDoc | None = None
    ) -> None:
        self._compiler = compiler
        self._overrides = (
            (device_type.get("datatypes") or {}) if device_type else {},
            (device.get("datatypes") or {}) if device else {},
        )
        self.birth_us: int = (device.get("birth") if device else None) or TIMESTAMP_MIN_US
        self.location = _location_of(device)
        lateness_s = device.get("lateness_s") if device else None
        if lateness_s is None and device_type:
            lateness_s = device_type.get("lateness_s")
        #: how late its messages may come and still be put into order, µs; None: as the settings say
        self.lateness_us: int | None = None if lateness_s is None else round(lateness_s * _SECOND_US)
        self._by_type: dict[str, SeriesCheck] = {}

    def series(self, component_type: str) -> SeriesCheck:
        """The check of `component_type`."""
        check = self._by_type.get(component_type)
        if check is None:
            overrides = tuple(o[component_type] for o in self._overrides if o.get(component_type))
            check = self._compiler.series(component_type, overrides)
            if len(self._by_type) < COMPILED_MAX:
                self._by_type[component_type] = check
        return check


def compile_checks(
    device: DeviceDoc | None, datatype: DatatypeLookup, device_type: DeviceTypeDoc | None = None
) -> DeviceChecks:
    """The checks of one device: its datatypes, under its type's and its own overrides.

    Args:
        device: the device; None: nothing but the catalogue's datatypes is known.
        datatype: the catalogue's look-up by name.
        device_type: the device's type.
    """
    return CheckCompiler(datatype).device(device, device_type)


def _compile(name: str, doc: Mapping[str, Any]) -> SeriesCheck:
    """Never raises: what cannot be used is left out and named in `problems`."""
    problems: list[str] = []
    kind = doc.get("kind", "number")
    if kind not in ("number", "text", "boolean"):
        problems.append(f"{name}: kind {kind!r} is not number, text or boolean")
        kind = "any"
    if kind != "number":
        return SeriesCheck(kind, passed=NOT_EVALUATED if kind == "any" else GOOD, problems=tuple(problems))
    fail_min, fail_max, has_fail = _span(name, "fail_span", doc, problems)
    suspect_min, suspect_max, has_suspect = _span(name, "suspect_span", doc, problems)
    if -inf < suspect_min < fail_min or fail_max < suspect_max < inf:
        problems.append(f"{name}: suspect_span reaches beyond fail_span")
    counter: Counter | None = None
    if doc.get("counter") is not None:
        try:
            counter = counter_of(doc["counter"])
        except (ValueError, AttributeError) as e:
            problems.append(f"{name}: counter: {e}")
    tests = doc.get("tests") or {}
    rate: RateOfChange | None = None
    flat: FlatLine | None = None
    spike: Spike | None = None
    attenuated: Attenuated | None = None
    gap_us: float | None = None
    climatology: Climatology | None = None
    anomaly: Detector | None = None
    for test, parameters in tests.items():
        try:
            if test == "rate_of_change":
                rate = RateOfChange(
                    _positive(parameters, "threshold", inf), _positive(parameters, "fail_threshold", inf)
                )
            elif test == "flat_line":
                flat = FlatLine(
                    _positive(parameters, "suspect_threshold", inf) * _SECOND_US,
                    _positive(parameters, "fail_threshold", inf) * _SECOND_US,
                    _positive(parameters, "tolerance", None),
                )
            elif test == "spike":
                method = parameters.get("method", "average")
                if method not in ("average", "differential"):
                    problems.append(f"{name}: spike: method {method!r} is not average or differential")
                    continue
                spike = Spike(
                    _positive(parameters, "suspect_threshold", inf),
                    _positive(parameters, "fail_threshold", inf),
                    method == "differential",
                )
            elif test == "climatology":
                climatology = climatology_of(parameters)
            elif test == "anomaly":
                anomaly = detector_of(parameters)
            elif test == "gap":
                gap_us = _positive(parameters, "threshold", None) * _SECOND_US
            elif test == "attenuated_signal":
                check_type = parameters.get("check_type", "std")
                if check_type not in ("std", "range"):
                    problems.append(f"{name}: attenuated_signal: check_type {check_type!r} is not std or range")
                    continue
                attenuated = Attenuated(
                    _positive(parameters, "suspect_threshold", 0.0),
                    _positive(parameters, "fail_threshold", 0.0),
                    max(1, round(_positive(parameters, "test_period", None) * _SECOND_US / ATTENUATED_BUCKETS)),
                    check_type == "range",
                )
            else:
                problems.append(f"{name}: there is no test {test!r}")
        except (TypeError, ValueError, AttributeError) as e:
            problems.append(f"{name}: {test}: {e}")
    stale_us: float | None = None
    try:
        stale_us = _positive(doc, "stale_after_s", inf) * _SECOND_US if doc.get("stale_after_s") is not None else None
    except (TypeError, ValueError) as e:
        problems.append(f"{name}: {e}")
    evaluated = has_fail or has_suspect or any(x is not None for x in (rate, flat, spike, attenuated))
    return SeriesCheck(
        "number",
        unit=None if doc.get("unit") is None else canonical(doc["unit"])[0],
        fail_min=fail_min,
        fail_max=fail_max,
        suspect_min=suspect_min,
        suspect_max=suspect_max,
        rate=rate,
        flat=flat,
        spike=spike,
        attenuated=attenuated,
        gap_us=gap_us,
        stale_us=stale_us,
        climatology=climatology,
        anomaly=anomaly,
        passed=GOOD if evaluated else NOT_EVALUATED,
        counter=counter,
        problems=tuple(problems),
    )


def _span(name: str, key: str, doc: Mapping[str, Any], problems: list[str]) -> tuple[float, float, bool]:
    """(min, max, whether there is a bound); a span the wrong way round is turned, as ioos-qc does."""
    span = doc.get(key)
    if not span:
        return -inf, inf, False
    try:
        low, high = (
            default if span.get(side) is None else float(span[side]) for side, default in (("min", -inf), ("max", inf))
        )
    except (TypeError, ValueError, AttributeError):
        problems.append(f"{name}: {key} has no numbers min and max")
        return -inf, inf, False
    if low != low or high != high:
        problems.append(f"{name}: {key} is not a number")
        return -inf, inf, False
    if low > high:
        low, high = high, low
    return low, high, low != -inf or high != inf


def _positive(parameters: Mapping[str, Any], key: str, default: float | None) -> float:
    value = parameters.get(key)
    if value is None:
        if default is None:
            text = f"{key} is missing"
            raise ValueError(text)
        return default
    number = float(value)
    if not number > 0:
        text = f"{key} must be over 0, not {value!r}"
        raise ValueError(text)
    return number


# --- the state of one device -----------------------------------------------------------------------------------------
#
# {"v": 1, "g": {generation: {"m": marks, "s": {"mode\tcomponent\tpin": series}, "c": {the same: counter's last [instant,
#   value]} where there are counters, "k": [hour, least delay in it, in the hour before] of a device's clock, and of
#   domain/arrival.py "r": remembered messages, "w": latest instant, "h": [[offset, message]] held back}}, "limited": 1 once reported}
# A series is a list, because there are many of them and they are written for every batch:

_AT, _VALUE, _QUALITY, _FLAGS, _AT_BEFORE, _VALUE_BEFORE, _FLAT_SINCE, _FLAT_MAX, _FLAT_MIN, _BUCKETS = range(10)

State = dict[str, Any]


def new_state() -> State:
    """The state document of a device that nothing is known of."""
    return {"v": STATE_VERSION, "g": {}}


# --- validation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limits:
    """What the settings say."""

    future_skew_us: int  #: a device's clock may be this far ahead of `received_at`
    store_failed: bool  #: readings that fail stay in the message, flagged
    series_max: int  #: series of one device that keep state
    skew_noted_us: float = inf  #: a device's clock that is further off has its messages say so
    order: Order = IN_ORDER_OF_ARRIVAL  #: how messages are put into order


class Failure(NamedTuple):
    """A reading for `iot_errors`."""

    code: ReasonCode
    text: str
    reading: dict[str, Any]  #: with its quality and flags


@dataclass(slots=True)
class Outcome:
    """What became of one message."""

    duplicate: bool = False  #: applied before; nothing else was done
    passed: int = 0  #: readings of the message that go on, revisions not counted
    failures: list[Failure] = field(default_factory=list)
    limited: bool = False  #: for the first time, a series got no state because the device has too many


def receive(
    message: dict[str, Any], checks: DeviceChecks, state: State, limits: Limits, at: tuple[int, int] = (0, 0)
) -> Arrival:
    """Take one standardized message in: what is due then is to be judged, in its order.

    Messages of one device must come in the order of their partition. How they are cut into batches makes no difference.

    Args:
        message: a standardized message; its readings are put aside as `repeated` where they came before, and it is given the skew of its
            device's clock where that is large.
        checks: of the message's device.
        state: of the message's device; changed in place. Where the message is no duplicate it is to be written back.
        limits: the settings.
        at: offset of its record in the topic that it was read from, and how many messages that record has released before.
    """
    generation = generation_of(message, state)
    received_at, message_at = message["received_at"], message["timestamp"]
    own_time = _time_failure(message_at, received_at + limits.future_skew_us, checks.birth_us) is None
    order = limits.order
    if checks.lateness_us is not None and checks.lateness_us != order.lateness_us:
        order = replace(order, lateness_us=checks.lateness_us)
    arrival = arrive(message, generation, order, at, own_time=own_time)
    if own_time and not arrival.duplicate and message.get("clock") == "device":
        skew_us = _clock_skew(generation, received_at, message_at)
        if abs(skew_us) > limits.skew_noted_us:
            message["clock_skew"] = skew_us
    return arrival


def fall_silent(state: State, below: int, offset: int) -> list[dict[str, Any]]:
    """The device is silent: what was held back is due (`arrival.silent`), of every generation."""
    due: list[dict[str, Any]] = []
    for generation in state["g"].values():
        due += silent(generation, below, (offset, len(due)))
    return due


def validate(message: dict[str, Any], checks: DeviceChecks, state: State, limits: Limits) -> Outcome:
    """`receive` and `judge` in one, for a message that nothing holds back."""
    arrival = receive(message, checks, state, limits)
    if arrival.duplicate:
        return Outcome(duplicate=True)
    (due,) = arrival.due
    return judge(due, checks, state, limits)


def judge(message: dict[str, Any], checks: DeviceChecks, state: State, limits: Limits) -> Outcome:
    """Check the readings of a message that is due, and make it a validated one, in place.

    Sets `quality` and `flags` of every reading, converts what is not in its datatype's unit, takes out what failed
    (unless the settings keep it), and appends revisions.

    Args:
        message: a standardized message that `receive` gave.
        checks: of the message's device.
        state: of the message's device; changed in place.
        limits: the settings.
    """
    outcome = Outcome()
    generation = generation_of(message, state)
    series_states = generation["s"]
    mode = message["connector_mode"]
    message_at = message["timestamp"]
    latest = message["received_at"] + limits.future_skew_us
    time_failure = _time_failure(message_at, latest, checks.birth_us)
    by_type = checks._by_type
    kept: list[dict[str, Any]] = []
    revisions: list[dict[str, Any]] = []
    failures = outcome.failures

    for reading in message["readings"]:
        component_type = reading["component_type"]
        check = by_type.get(component_type) or checks.series(component_type)
        value = reading.get("value")
        at = reading.get("timestamp")
        if at is None:
            at = message_at
        failure = time_failure if at == message_at else _time_failure(at, latest, checks.birth_us)
        quality = check.passed
        flags: list[str] | None = None
        comparable = False

        if failure is None:
            kind = type(value)
            if (kind is float or kind is int) and check.kind == "number":
                comparable = True
                if check.unit is not None and reading["unit"] != check.unit:
                    comparable = _convert(reading, check.unit)
                    if comparable:
                        value = reading["value"]
                    else:
                        quality, flags = SUSPECT, ["unit_unknown"]
                if comparable:
                    if value < check.fail_min or value > check.fail_max:
                        failure = _range_failure(value, check)
                    elif value < check.suspect_min or value > check.suspect_max:
                        quality, flags = SUSPECT, ["gross_range"]
                    if check.climatology is not None and failure is None:
                        quality, flags, failure = _climatology(check.climatology, at, value, quality, flags)
                    if check.stale_us is not None and message["received_at"] - at > check.stale_us:
                        quality, flags = SUSPECT, [*(flags or ()), "stale"]
            elif value is None and reading.get("value_text") is None:
                quality, flags = MISSING, ["missing"]
            else:
                failure = _syntax_failure(reading, check)

        if (
            comparable
            and failure is None
            and (check.rate or check.flat or check.spike or check.attenuated or check.gap_us)
        ):
            key = f"{mode}\t{component_type}\t{reading['pin_position']}"
            series = series_states.get(key)
            if series is None:
                if len(series_states) < limits.series_max:
                    series = series_states[key] = [at, value, quality, flags, None, None, None, None, None]
                    if check.flat is not None:
                        _flat(series, at, value, check.flat)
                    if check.attenuated is not None:
                        _varied(series, at, value, check.attenuated)
                elif "limited" not in state:
                    state["limited"] = 1
                    outcome.limited = True
            elif at > series[_AT]:
                quality, flags, failure = _against_series(
                    series, reading, at, value, check, quality, flags, revisions, failures
                )

        if failure is None:
            reading["quality"] = quality
            if flags:
                reading["flags"] = flags
            kept.append(reading)
            if check.counter is not None and comparable:
                key = f"{mode}\t{component_type}\t{reading['pin_position']}"
                last_states = generation.setdefault("c", {})
                if key in last_states or len(last_states) < limits.series_max:
                    derived = _consumed(last_states, key, reading, at, value, check.counter)
                    if derived is not None:
                        revisions.append(derived)
                elif "limited" not in state:
                    state["limited"] = 1
                    outcome.limited = True
            continue
        test, code, text = failure
        reading["quality"] = FAIL
        reading["flags"] = [*(flags or ()), test]
        failures.append(Failure(code, text, reading))
        # An instant outside the bounds cannot be stored at all: the databases check it too.
        if limits.store_failed and test != "timestamp_invalid":
            kept.append(reading)

    if checks.location is not None:
        _located(kept, checks.location)
    outcome.passed = len(kept)
    message["readings"] = kept + revisions if revisions else kept
    return outcome


def _clock_skew(generation: dict[str, Any], received_at: int, at: int) -> int:
    """How far the device's clock is ahead (behind: negative), µs, by its quickest message of this and the last hour.

    A message takes its time, and what was kept back takes longer; the quickest one is the best that is known. So what is
    behind by seconds may be the network, and what is ahead is the clock.
    """
    hour, delay = received_at // _HOUR_US, received_at - at
    kept = generation.get("k")
    if kept is None or not kept[0] <= hour <= kept[0] + 1:
        kept = generation["k"] = [hour, delay, delay]
    elif hour > kept[0]:
        kept[:] = [hour, delay, kept[1]]
    elif delay < kept[1]:
        kept[1] = delay
    return -int(min(kept[1], kept[2]))


def _located(readings: list[dict[str, Any]], location: Location) -> None:
    """QARTOD test 3: whether the device is where it was put; its pairs of latitude and longitude that are not are suspect."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for reading in readings:
        if reading["component_type"] in ("latitude", "longitude") and type(reading.get("value")) in (int, float):
            found.setdefault(reading["pin_position"], {})[reading["component_type"]] = reading
    for pair in found.values():
        if (
            len(pair) == 2
            and location.distance_m(pair["latitude"]["value"], pair["longitude"]["value"]) > location.range_m
        ):
            for reading in pair.values():
                if reading["quality"] != FAIL:
                    reading["quality"] = SUSPECT
                    reading["flags"] = [*reading.get("flags", ()), "location"]


#: (name of the test, reason, text for people)
_Failed = tuple[str, ReasonCode, str]


def _time_failure(at: Any, latest: int, birth_us: int) -> _Failed | None:
    if type(at) is not int or not TIMESTAMP_MIN_US <= at <= TIMESTAMP_MAX_US:
        return "timestamp_invalid", ReasonCode.TIMESTAMP_INVALID, f"timestamp {at!r} is no instant of 2000 … 2100"
    if at > latest:
        text = f"timestamp {at} is {(at - latest) / _SECOND_US:.3f} s later than the allowed clock skew"
        return "timestamp_future", ReasonCode.TIMESTAMP_FUTURE, text
    if at < birth_us:
        text = f"timestamp {at} is earlier than the device's birth {birth_us}"
        return "timestamp_before_birth", ReasonCode.TIMESTAMP_BEFORE_BIRTH, text
    return None


def _range_failure(value: float, check: SeriesCheck) -> _Failed:
    bounds = f"{check.fail_min:g} … {check.fail_max:g}"
    return "gross_range", ReasonCode.VALUE_RANGE, f"{value} {check.unit or ''} is outside {bounds}".replace("  ", " ")


def _syntax_failure(reading: dict[str, Any], check: SeriesCheck) -> _Failed | None:
    """Whether something that is no number in a number's place is of its datatype's kind; booleans become 0 and 1."""
    value = reading.get("value")
    if check.kind == "any":
        return None
    if check.kind == "text":
        if value is None and isinstance(reading["value_text"], str):
            return None
    elif check.kind == "boolean" and value in (0, 1) and reading.get("value_text") is None:
        reading["value"] = int(value)
        return None
    given = reading["value_text"] if value is None else value
    return "type", ReasonCode.VALUE_TYPE, f"{given!r:.200} is no {check.kind}"


def _convert(reading: dict[str, Any], unit: str) -> bool:
    """Bring a number into `unit`; False where no conversion is known, then the reading stays as it is."""
    given = reading["unit"]
    # A device that names no unit is taken at the registry's word.
    if given:
        linear = conversion(given, unit)
        if linear is None:
            return False
        value = reading["value"] * linear[0] + linear[1]
        if not isfinite(value):
            return False
        reading["value"] = value
    reading["unit"] = unit
    return True


def _against_series(
    series: list[Any],
    reading: dict[str, Any],
    at: int,
    value: float,
    check: SeriesCheck,
    quality: int,
    flags: list[str] | None,
    revisions: list[dict[str, Any]],
    failures: list[Failure],
) -> tuple[int, list[str] | None, _Failed | None]:
    """The tests that need the readings before; moves the series on unless the value fails against it."""
    failure: _Failed | None = None
    last = series[_VALUE]
    if check.rate is not None:
        rate = abs(value - last) * _SECOND_US / (at - series[_AT])
        if rate > check.rate.fail:
            text = f"{value} changed by {rate:g} {check.unit or ''}/s, over {check.rate.fail:g}"
            return quality, flags, ("rate_of_change", ReasonCode.QUALITY_FAIL, text)
        if rate > check.rate.suspect:
            quality = SUSPECT
            flags = [*flags, "rate_of_change"] if flags else ["rate_of_change"]
    if check.gap_us is not None and at - series[_AT] > check.gap_us:
        quality, flags = SUSPECT, [*(flags or ()), "gap"]
    if check.attenuated is not None:
        varied = _varied(series, at, value, check.attenuated)
        if varied is not None and varied < check.attenuated.fail:
            # As with a flat line, the value stays: so the signal is seen to stay weak.
            text = f"varied by {varied:g}, under {check.attenuated.fail:g}"
            failure = ("attenuated_signal", ReasonCode.QUALITY_FAIL, text)
        elif varied is not None and varied < check.attenuated.suspect:
            quality, flags = SUSPECT, [*(flags or ()), "attenuated_signal"]
    if check.flat is not None:
        flat_us = _flat(series, at, value, check.flat)
        if flat_us >= check.flat.fail_us:
            # The value is part of the flat line: it stays in the window, so that the line is seen to go on.
            text = f"flat within {check.flat.tolerance:g} for {flat_us / _SECOND_US:g} s"
            failure = ("flat_line", ReasonCode.QUALITY_FAIL, text)
        elif flat_us >= check.flat.suspect_us:
            quality = SUSPECT
            flags = [*flags, "flat_line"] if flags else ["flat_line"]
    if check.spike is not None:
        if series[_AT_BEFORE] is not None:
            verdict, distance = _spike(series[_VALUE_BEFORE], last, value, check.spike)
            if verdict != GOOD:
                revised = _revision(series, reading, verdict)
                revisions.append(revised)
                if verdict == FAIL:
                    text = f"{last} stands {distance:g} {check.unit or ''} off its neighbours"
                    failures.append(Failure(ReasonCode.QUALITY_FAIL, text, revised))
        series[_AT_BEFORE], series[_VALUE_BEFORE] = series[_AT], last
        series[_QUALITY], series[_FLAGS] = (quality, flags) if failure is None else (FAIL, [*(flags or ()), failure[0]])
    series[_AT], series[_VALUE] = at, value
    return quality, flags, failure


def _climatology(
    climatology: Climatology, at: int, value: float, quality: int, flags: list[str] | None
) -> tuple[int, list[str] | None, _Failed | None]:
    member = climatology.at(at)
    if member is None:
        return quality, flags, None
    if value < member.fail_min or value > member.fail_max:
        text = f"{value} is outside {member.fail_min:g} … {member.fail_max:g}, the climatology at its time"
        return quality, flags, ("climatology", ReasonCode.QUALITY_FAIL, text)
    if value < member.suspect_min or value > member.suspect_max:
        return SUSPECT, [*(flags or ()), "climatology"], None
    return GOOD if quality == NOT_EVALUATED else quality, flags, None


def _varied(series: list[Any], at: int, value: float, attenuated: Attenuated) -> float | None:
    """How much the values of the period up to `at` varied; takes `value` in. None: it is not a period yet.

    The period is kept as eighths: [begin, count, mean, sum of squared differences from it, min, max]. So the period
    judged is the last one rounded to an eighth, where ioos-qc `attenuated_signal_test` keeps every value.
    """
    if len(series) == _BUCKETS:
        series.append([at, []])
    began, buckets = series[_BUCKETS]
    begin = at // attenuated.bucket_us * attenuated.bucket_us
    if buckets and buckets[-1][0] == begin:
        bucket = buckets[-1]
        bucket[1] += 1
        change = value - bucket[2]
        bucket[2] += change / bucket[1]
        bucket[3] += change * (value - bucket[2])
        bucket[4] = min(bucket[4], value)
        bucket[5] = max(bucket[5], value)
    else:
        buckets.append([begin, 1, value, 0.0, value, value])
    oldest = begin - (ATTENUATED_BUCKETS - 1) * attenuated.bucket_us
    while buckets[0][0] < oldest:
        buckets.pop(0)
    if at - began < ATTENUATED_BUCKETS * attenuated.bucket_us:
        return None
    count = sum(bucket[1] for bucket in buckets)
    if count < 2:
        return None
    if attenuated.by_range:
        varied: float = max(bucket[5] for bucket in buckets) - min(bucket[4] for bucket in buckets)
        return varied
    mean = sum(bucket[1] * bucket[2] for bucket in buckets) / count
    squares = sum(bucket[3] + bucket[1] * (bucket[2] - mean) ** 2 for bucket in buckets)
    return float((squares / count) ** 0.5)


def _consumed(
    last_states: dict[str, list[Any]], key: str, reading: Mapping[str, Any], at: int, value: float, counter: Counter
) -> dict[str, Any] | None:
    """The reading of what a counter consumed since its last state, and that state moved on."""
    last = last_states.get(key)
    if last is not None and at <= last[0]:
        return None
    last_states[key] = [at, value]
    if last is None:
        return None
    consumption, event = step(CounterState(*last), CounterState(at, value), counter)
    derived = {
        "component_type": reading["component_type"] + CONSUMPTION_SUFFIX,
        "pin_position": reading["pin_position"],
        "value": consumption,
        "unit": reading["unit"],
        "timestamp": at,
        "quality": reading["quality"],
        "derived": True,
    }
    flags = list(reading.get("flags") or ())
    if event in _UNKNOWN_PARTS:
        flags.append(_UNKNOWN_PARTS[event])
        derived["quality"] = SUSPECT
    if flags:
        derived["flags"] = flags
    return derived


def _spike(before: float, value: float, after: float, spike: Spike) -> tuple[int, float]:
    """The verdict on `value` between its neighbours, and the distance judged (ioos-qc `spike_test`)."""
    if spike.differential:
        rise, fall = value - before, after - value
        distance = 0.0 if rise * fall >= 0 else min(abs(rise), abs(fall))
    else:
        distance = abs(value - (before + after) / 2)
    if distance > spike.fail:
        return FAIL, distance
    return (SUSPECT if distance > spike.suspect else GOOD), distance


def _revision(series: list[Any], later: Mapping[str, Any], verdict: int) -> dict[str, Any]:
    """The last reading of the series once more, with the verdict that only its successor could bring."""
    return {
        "component_type": later["component_type"],
        "pin_position": later["pin_position"],
        "value": series[_VALUE],
        "unit": later["unit"],
        "timestamp": series[_AT],
        "quality": max(verdict, series[_QUALITY]),
        "flags": [*(series[_FLAGS] or ()), "spike"],
        "revised": True,
    }


def _flat(series: list[Any], at: int, value: float, flat: FlatLine) -> int:
    """For how long, µs up to `at`, all values have stayed within the tolerance; takes `value` into the window.

    The window is the longest run of latest readings whose range is under the tolerance, kept as two lists of extremes
    (the usual sliding-window minimum and maximum). An extreme is [since, at, value]: it is the extreme of every
    window that begins from `since` to `at`. At regular intervals the verdict is that of ioos-qc `flat_line_test`,
    which looks at a window of `threshold` seconds; at irregular ones it goes by time where ioos-qc counts readings.
    """
    if series[_FLAT_SINCE] is None:
        series[_FLAT_SINCE], series[_FLAT_MAX], series[_FLAT_MIN] = at, [[at, at, value]], [[at, at, value]]
        return 0
    highs, lows = series[_FLAT_MAX], series[_FLAT_MIN]
    since = at
    while highs and highs[-1][2] <= value:
        since = highs.pop()[0]
    highs.append([since, at, value])
    since = at
    while lows and lows[-1][2] >= value:
        since = lows.pop()[0]
    lows.append([since, at, value])
    # The newest reading is in both lists, and its range with itself is 0: this ends before a list is empty.
    while highs[0][2] - lows[0][2] >= flat.tolerance:
        if highs[0][1] < lows[0][1]:
            highs.pop(0)
            series[_FLAT_SINCE] = max(series[_FLAT_SINCE], highs[0][0])
        else:
            lows.pop(0)
            series[_FLAT_SINCE] = max(series[_FLAT_SINCE], lows[0][0])
    for extremes in (highs, lows):
        if len(extremes) > FLAT_EXTREMES_MAX:
            _coarsen(extremes)
    duration: int = at - series[_FLAT_SINCE]
    return duration


def _coarsen(extremes: list[list[Any]]) -> None:
    """Join the two neighbours that differ least, keeping the more extreme value: the range is never under-estimated.

    So a drifting signal may be called flat later than exact, never earlier.
    """
    at = min(range(len(extremes) - 1), key=lambda i: abs(extremes[i][2] - extremes[i + 1][2]))
    extremes[at][1] = extremes[at + 1][1]
    del extremes[at + 1]
