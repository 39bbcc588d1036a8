"""What is checked of a device's readings: compiled from what its datatypes, its type and it itself say.

Parameters have the names of ioos-qc; the tests that they belong to are in `tests.py`, which has the table of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import asin, cos, inf, radians, sin
from typing import Any, Final, Literal, NamedTuple

from preservarium.domain.circular import period_of
from preservarium.domain.quality.anomaly import Detector, detector_of
from preservarium.domain.quality.climatology import Climatology, climatology_of
from preservarium.domain.quality.counter import Counter, counter_of
from preservarium.domain.readings.reading import TIMESTAMP_MIN_US, Quality
from preservarium.domain.readings.units import canonical
from preservarium.domain.registry.device import DatatypeDoc, DeviceDoc, DeviceTypeDoc

GOOD: Final = int(Quality.GOOD)
NOT_EVALUATED: Final = int(Quality.NOT_EVALUATED)
SUSPECT: Final = int(Quality.SUSPECT)
FAIL: Final = int(Quality.FAIL)
MISSING: Final = int(Quality.MISSING)

#: Parts of an attenuated signal's period: some 60 bytes each.
ATTENUATED_BUCKETS: Final = 8

#: Compiled checks that one device keeps. Field names come from devices, so their number must have a limit; beyond it
#: a check is compiled for each reading anew.
COMPILED_MAX: Final = 1_000

#: Texts of configuration problems kept; a registry with more has a cause that the first ones show.
PROBLEMS_MAX: Final = 100

_SECOND_US: Final = 1_000_000
#: Mean radius of the Earth (IUGG).
_EARTH_RADIUS_M: Final = 6_371_008.8


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
    circular: float | None = None  #: where it comes round again: its period, in `unit`
    rare: bool = False  #: one of `climatology`, `stale_us`, `circular` is there: most are asked for none of them
    stateful: bool = False  #: a test needs the readings before
    #: a number of `unit` from `low` to `high` has passed, and nothing else is to be said of it: so it is with most
    plain: bool = False
    low: float = -inf  #: neither failed nor suspect from here …
    high: float = inf  #: … to here
    problems: tuple[str, ...] = ()  #: what of the configuration cannot be used, for people


#: For a component type that the catalogue does not have.
UNCHECKED: Final = SeriesCheck("any", plain=True)

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


class _ByType(dict[str, SeriesCheck]):
    """Checks by component type, compiled as these turn up."""

    __slots__ = ("_compiler", "_overrides")

    def __init__(self, compiler: CheckCompiler, overrides: tuple[Mapping[str, Mapping[str, Any]], ...]) -> None:
        super().__init__()
        self._compiler = compiler
        self._overrides = overrides

    def __missing__(self, component_type: str) -> SeriesCheck:
        overrides = tuple(o[component_type] for o in self._overrides if o.get(component_type))
        check = self._compiler.series(component_type, overrides)
        if len(self) < COMPILED_MAX:
            self[component_type] = check
        return check


class DeviceChecks:
    """The checks of one device."""

    __slots__ = ("_by_type", "birth_us", "lateness_us", "location", "same_instant")

    def __init__(
        self, compiler: CheckCompiler, device: DeviceDoc | None, device_type: DeviceTypeDoc | None = None
    ) -> None:
        overrides = [doc.get("datatypes") or {} for doc in (device_type, device) if doc]
        self._by_type = _ByType(compiler, tuple(filter(None, overrides)))
        self.birth_us: int = (device.get("birth") if device else None) or TIMESTAMP_MIN_US
        self.location = _location_of(device)
        lateness_s = device.get("lateness_s") if device else None
        if lateness_s is None and device_type:
            lateness_s = device_type.get("lateness_s")
        #: how late its messages may come and still be put into order, µs; None: as the settings say
        self.lateness_us: int | None = None if lateness_s is None else round(lateness_s * _SECOND_US)
        #: what becomes of a second value at one instant of its clock, see instants.py
        self.same_instant: str = (device_type.get("same_instant") if device_type else None) or "first"

    @property
    def by_type(self) -> Mapping[str, SeriesCheck]:
        """The checks by component type: of any that is asked for by `[]`."""
        return self._by_type

    def series(self, component_type: str) -> SeriesCheck:
        """The check of `component_type`."""
        return self._by_type[component_type]


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
        if kind == "any":
            return SeriesCheck("any", plain=True, problems=tuple(problems))
        return SeriesCheck(kind, passed=GOOD, problems=tuple(problems))
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
    circular: float | None = None
    try:
        circular = period_of(doc)
    except ValueError as e:
        problems.append(f"{name}: {e}")
    if counter is not None:
        fail_min = max(fail_min, 0.0)  # a counter begins at zero
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
                anomaly = detector_of(parameters)._replace(circular=circular)
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
    rare = not (climatology is None and stale_us is None and circular is None)
    stateful = any(x is not None for x in (rate, flat, spike, attenuated, gap_us))
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
        circular=circular,
        rare=rare,
        stateful=stateful,
        plain=not rare and not stateful and counter is None,
        low=max(fail_min, suspect_min),
        high=min(fail_max, suspect_max),
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
