"""A fleet that sends: real payloads from the registry's parser examples, with values that move.

A template is an example payload whose measurements have been found by trying: a number of the payload (a JSON number, or
a 16-bit word of the bytes) is a measurement when changing it a little changes one reading a little. Those walk around
their first value, each device around one of its own. One device in five has a measurement that leaves for the threshold
of a rule that watches it, for half a minute in five, so that alarms are raised and cleared; a device may say which and when
(`meta: {simulated: {away: co2, at_s: 8}}`). Meters count up, by the time of day and not from the start, so that a new start
does not set them back. A device's own time in a payload is set to the instant at which the message is sent; examples that
hold a history are left out. A device that fetches its commands does what they say (`Obedient`).

Everything is drawn from one seed: the same registry, seed, rate and start give the same messages. The pace is a
schedule, message k at start + k / rate; what a slow Kafka held up is sent as soon as it can be.
"""

import asyncio
import base64
import copy
import random
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, cast

import orjson
import structlog

from preservarium.clock import Clock
from preservarium.connectors.base import Backoff, Limits, RawProducer, message_send, pause
from preservarium.domain.decoders.examples import raw_message
from preservarium.domain.readings.instant import UNITS_US
from preservarium.domain.readings.normalize import CompiledDevice, compile_device, normalize
from preservarium.domain.registry.device import DatatypeDoc, DeviceDoc, DeviceTypeDoc, ParserDoc
from preservarium.errors import PreservariumError, Reject, Retry
from preservarium.streaming.stage import Send

log = structlog.get_logger(__name__)

Document = Mapping[str, Any]

CONNECTOR: Final = "simulator"
#: Addresses of a synthetic fleet: sim-00001 …
ADDRESS: Final = "sim-{:05d}"
#: A fleet that is larger than its five digits.
DEVICES_MAX: Final = 99_999
#: What is due is looked at this often. Shorter costs CPU, longer makes the flow lumpy.
TICK_S: Final = 0.05
#: Messages sent together: 5,000 are 100 ms of work.
BATCH_MESSAGES_MAX: Final = 5_000
#: A schedule that has fallen further behind than this is moved: a flood after an outage would measure nothing.
BEHIND_MAX_S: Final = 10.0
#: A device that a rule watches is beyond the threshold for so long, once in a period, at a phase of its own.
PERIOD_S: Final = 300.0
EXCURSION_S: Final = 30.0
#: Share of the watched devices that do so.
PRONE_SHARE: Final = 0.2
#: Spread of a walk as a share of the value, and its least size in the reading's unit.
SPREAD_SHARE: Final = 0.02
SPREAD_LEAST: Final = 0.05
#: Part of the way to its aim that a value goes with each message.
PULL: Final = 0.5
#: A word of a payload is a measurement when so small a step moves its reading by no more than this share.
SMOOTH_SHARE: Final = 0.2
#: Instant at which templates are tried.
_TRIAL_US: Final = 1_700_000_000_000_000
#: A meter counts so much an hour, in the unit of its reading: a hall's energy in kWh.
COUNTED_AN_HOUR: Final = 10.0
_HOUR_US: Final = 3_600_000_000
#: A device that fetches its commands asks for so long, and after an answer that is none, again after this time.
FETCH_S: Final = 10.0
FETCH_PAUSE_S: Final = 1.0

#: What devices of formats that need no parser of their own send, where the registry has no example: by kind of parser.
EXAMPLES: Final[Mapping[str, Sequence[Mapping[str, Any]]]] = {
    "senml": [
        {
            "json": [
                {"n": "temperature", "u": "Cel", "v": 21.5},
                {"n": "humidity", "u": "%RH", "v": 45.2},
                {"n": "battery_voltage", "u": "V", "v": 3.1},
            ]
        }
    ],
    "json": [{"json": {"temperature": 21.5, "humidity": 45.2, "co2": 612, "battery_voltage": 3.1}}],
}


class SimulatorError(PreservariumError):
    """There is nothing to simulate."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A measurement in a payload."""

    path: tuple[str | int, ...]  #: of the JSON number; of the bytes: (offset of the big-endian 16-bit word,)
    base: float  #: its value in the example
    spread: float  #: of the walk, in the payload's own scale; of a meter: how much an hour it counts
    integer: bool
    series: tuple[str, str]  #: component type and pin of the reading that it becomes
    alarm: float | None  #: value at which a rule's threshold is passed for certain; None: no rule watches it
    counts: bool = False  #: a meter: it only goes up


@dataclass(frozen=True, slots=True)
class OwnTime:
    """Where a payload says when it was measured."""

    path: tuple[str | int, ...]
    unit: str | None  #: s, ms, us or ns; None: ISO 8601 text

    def of(self, at_us: int) -> Any:
        """The instant as the payload spells it."""
        if self.unit is None:
            return (
                datetime.fromtimestamp(at_us // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
                + f".{at_us % 1_000_000:06d}Z"
            )
        value = at_us / UNITS_US[self.unit]
        return int(value) if value.is_integer() else value


@dataclass(frozen=True, slots=True)
class Template:
    """An example payload, ready to be varied."""

    payload: Any  #: bytes, or JSON
    port: int | None
    leaves: tuple[Leaf, ...]
    readings: int  #: that a message of it becomes
    time: OwnTime | None = None


@dataclass(slots=True)
class Totals:
    """What has been acknowledged by Kafka."""

    messages: int = 0
    readings: int = 0  #: expected of them
    retries: int = 0  #: calls that Kafka did not acknowledge; their messages may be there twice
    behind_s: float = 0.0  #: by which the schedule was moved


@dataclass(frozen=True, slots=True)
class Away:
    """Which measurement of a device leaves for the threshold of its rule, and when."""

    component_type: str
    at_s: float  #: after the start, and again in each period


class Player:
    """One device: plays its templates in turn.

    Attributes:
        state: fields of a JSON payload that the device was told (a command), and says from then on.
    """

    def __init__(
        self, device_id: str, templates: Sequence[Template], rng: random.Random, away: Away | None = None
    ) -> None:
        self.device_id = device_id
        self.state: dict[str, Any] = {}
        self._templates = templates
        self._rng = rng
        self._turn = rng.randrange(len(templates))
        self._phase_s = rng.uniform(0.0, PERIOD_S)
        watched = sorted({leaf.series for t in templates for leaf in t.leaves if leaf.alarm is not None})
        prone = rng.random() < PRONE_SHARE
        self._prone = {rng.choice(watched)} if watched and prone else set[tuple[str, str]]()
        if away is not None:
            self._prone = {series for series in watched if series[0] == away.component_type}
            self._phase_s = (PERIOD_S - away.at_s) % PERIOD_S
        self._homes = [[leaf.base + rng.gauss(0.0, leaf.spread) for leaf in t.leaves] for t in templates]
        self._values = [list(homes) for homes in self._homes]

    def next(self, elapsed_s: float, at_us: int) -> tuple[Any, int | None, int]:
        """(payload, port, readings) of the next message, `elapsed_s` seconds after the start, at `at_us` µs."""
        turn = self._turn
        self._turn = (turn + 1) % len(self._templates)
        template = self._templates[turn]
        away = bool(self._prone) and (elapsed_s + self._phase_s) % PERIOD_S < EXCURSION_S
        values = self._values[turn]
        for i, leaf in enumerate(template.leaves):
            if leaf.counts:
                values[i] = leaf.base + leaf.spread * (at_us - _TRIAL_US) / _HOUR_US
                continue
            aim = leaf.alarm if away and leaf.alarm is not None and leaf.series in self._prone else self._homes[turn][i]
            values[i] += PULL * (aim - values[i]) + self._rng.gauss(0.0, leaf.spread * 0.3)
        payload = _filled(template, values, at_us)
        if self.state and isinstance(payload, dict):
            payload = {**payload, **self.state}
        return payload, template.port, template.readings


def _filled(template: Template, values: Sequence[float], at_us: int) -> Any:
    if isinstance(template.payload, bytes):
        data = bytearray(template.payload)
        for leaf, value in zip(template.leaves, values, strict=True):
            offset = cast(int, leaf.path[0])
            data[offset : offset + 2] = min(max(round(value), 0), 65_535).to_bytes(2, "big")
        return bytes(data)
    if not template.leaves and template.time is None:
        return template.payload
    payload = copy.deepcopy(template.payload)
    for leaf, value in zip(template.leaves, values, strict=True):
        _set(payload, leaf.path, round(value) if leaf.integer else round(value, 3))
    if template.time is not None:
        _set(payload, template.time.path, template.time.of(at_us))
    return payload


def _set(tree: Any, path: Sequence[str | int], value: Any) -> None:
    for step in path[:-1]:
        tree = tree[step]
    tree[path[-1]] = value


# --- templates -------------------------------------------------------------------------------------------------------


class Catalogue:
    """The documents of a registry file, by kind and name, and the templates that they allow."""

    def __init__(self, documents: Mapping[str, Iterable[Document]]) -> None:
        self._types = {d["name"]: d for d in documents.get("type", ())}
        self._datatypes = {d["name"]: d for d in documents.get("datatype", ())}
        self._rules = {d["name"]: d for d in documents.get("rule", ())}
        self._parsers = {d["name"]: d for d in documents.get("parser", ()) if d.get("status", "active") == "active"}
        self.devices = list(documents.get("device", ()))
        self._templates: dict[bytes, tuple[Template, ...]] = {}

    @property
    def types(self) -> list[str]:
        """Names of the device types that have something to play, in the file's order."""
        return [name for name in self._types if self.templates({"device_id": "sim", "type": name})]

    def fetches(self, device: Document) -> bool:
        """Whether this device asks for its commands over HTTP."""
        ways = ((self._types.get(device["type"]) or {}).get("downlink"), device.get("downlink"))
        said = [way["format"] for way in ways if way and way.get("format")]
        return bool(said) and said[-1] == "http"

    def templates(self, device: Document) -> tuple[Template, ...]:
        """What this device can send; empty where its parser has no examples, or none that can be sent at any time."""
        varied = {
            k: v for k, v in device.items() if k in ("type", "mapping", "datatypes", "rules", "variables", "time_zone")
        }
        key = orjson.dumps(varied, option=orjson.OPT_SORT_KEYS)
        if key not in self._templates:
            self._templates[key] = tuple(self._build(device))
        return self._templates[key]

    def _build(self, device: Document) -> Iterable[Template]:
        kind = self._types.get(device["type"])
        parser = self._parsers.get(kind["parser"]) if kind is not None else None
        if kind is None or parser is None:
            return
        datatype = cast(Callable[[str], DatatypeDoc | None], self._datatypes.get)
        try:
            compiled = compile_device(
                cast(DeviceDoc, {"rev": 0, "enabled": True, **device}),
                cast(DeviceTypeDoc, {"rev": 0, **kind}),
                cast(ParserDoc, {"rev": 0, "version": 1, **parser}),
                datatype,
            )
        except Reject:
            return  # a script: what it makes of a payload is not known here
        rules = self._watching(kind, device)
        meters = {name for name, each in self._datatypes.items() if each.get("counter") is not None}
        own = parser.get("examples")
        for example in EXAMPLES.get(parser["kind"], ()) if own is None and not parser.get("source") else own or ():
            for payload in _payloads(example):
                time = _own_time(parser, payload)
                template = _template(compiled, payload, example.get("port"), time, rules, meters)
                if template is not None:
                    yield template
                    break

    def _watching(self, kind: Document, device: Document) -> list[Document]:
        overrides = device.get("rules") or {}
        names = [*(kind.get("rules") or ()), *(name for name in overrides if name not in (kind.get("rules") or ()))]
        found: list[Document] = []
        for name in names:
            if name in overrides and overrides[name] is None:
                continue
            if name in self._rules:
                found.append({**self._rules[name], **(overrides.get(name) or {})})
        return [r for r in found if r.get("kind") in ("high", "low") and r.get("threshold") is not None]


def _payloads(example: Document) -> Iterable[Any]:
    """The example's payload as it is, then without the instants that SenML may have in it."""
    if isinstance(example.get("hex"), str):
        try:
            yield bytes.fromhex(example["hex"])
        except ValueError:
            return
    elif "json" in example:
        payload = example["json"]
        yield payload
        if isinstance(payload, list) and all(isinstance(record, dict) for record in payload):
            yield [{k: v for k, v in record.items() if k not in ("t", "bt")} for record in payload]


def _own_time(parser: Document, payload: Any) -> OwnTime | None:
    """Where a JSON parser reads the message's instant from, if this payload has it there."""
    source = parser.get("source")
    name = source.get("time") if parser["kind"] == "json" and isinstance(source, dict) else None
    if not isinstance(name, str):
        return None
    path = tuple(name.split("."))
    node = payload
    for step in path:
        if not isinstance(node, dict) or step not in node:
            return None
        node = node[step]
    if isinstance(node, str):
        return OwnTime(path, None)
    unit = cast(dict[str, Any], source).get("time_unit") or "s"
    return OwnTime(path, unit) if unit in UNITS_US else None


Readings = list[dict[str, Any]]


def _readings(compiled: CompiledDevice, payload: Any, port: int | None) -> Readings | None:
    """What a payload becomes; None where it does not, or not at the instant at which it was sent."""
    raw = raw_message(payload, device=compiled.device_id, port=port, received_at=_TRIAL_US, connector=CONNECTOR)
    try:
        message, refused = normalize(raw, compiled, _TRIAL_US)
    except Reject:
        return None
    readings = cast(Readings, message["readings"])
    if refused or message["timestamp"] != _TRIAL_US or any("timestamp" in r for r in readings):
        return None
    return readings


def _template(
    compiled: CompiledDevice,
    payload: Any,
    port: int | None,
    time: OwnTime | None,
    rules: Sequence[Document],
    meters: Container[str] = (),
) -> Template | None:
    def readings_of(leaves: Sequence[Leaf], values: Sequence[float]) -> Readings | None:
        return _readings(compiled, _filled(Template(payload, port, tuple(leaves), 0, time), values, _TRIAL_US), port)

    readings = readings_of((), ())
    if not readings:
        return None
    leaves: list[Leaf] = []
    taken: set[int] = set()
    for path, base, integer, step in _numbers(payload):
        if isinstance(payload, bytes) and taken & {cast(int, path[0]), cast(int, path[0]) + 1}:
            continue
        if time is not None and path == time.path:
            continue
        changed = readings_of([Leaf(path, base, 0.0, integer, ("", ""), None)], [base + step])
        found = _moved(readings, changed) if changed is not None else None
        if found is None:
            continue
        reading, slope = found[0], found[1] / step
        counts = reading["component_type"] in meters
        if counts and isinstance(payload, bytes):
            continue  # its words would roll over within days
        spread = COUNTED_AN_HOUR / slope
        if not counts:
            spread = max(abs(reading["value"]) * SPREAD_SHARE, SPREAD_LEAST) / abs(slope)
        alarm = None if counts else _alarm(reading, slope, base, rules)
        series = (reading["component_type"], reading["pin_position"])
        leaves.append(Leaf(path, base, spread, integer, series, alarm, counts))
        if isinstance(payload, bytes):
            taken |= {cast(int, path[0]), cast(int, path[0]) + 1}
    # Together they may do what none did alone (a derived value that is no number): then the example is played as it is.
    far = [leaf.alarm if leaf.alarm is not None else leaf.base + 4 * leaf.spread for leaf in leaves]
    for values in (far, [leaf.base - 4 * leaf.spread for leaf in leaves]):
        varied = readings_of(leaves, values)
        if varied is None or len(varied) != len(readings):
            leaves = []
            break
    return Template(payload, port, tuple(leaves), len(readings), time)


def _moved(before: Readings, after: Readings) -> tuple[dict[str, Any], float] | None:
    """The reading that a small step moved a little, and by how much; None where it is no measurement."""
    if [(r["component_type"], r["pin_position"]) for r in before] != [
        (r["component_type"], r["pin_position"]) for r in after
    ]:
        return None
    moved: tuple[dict[str, Any], float] | None = None
    for old, new in zip(before, after, strict=True):
        if old == new:
            continue
        a, b = old.get("value"), new.get("value")
        # Numbers without a unit are identities, versions, counters and states.
        if a is None or b is None or not old["unit"] or abs(b - a) > max(abs(a) * SMOOTH_SHARE, 1.0):
            return None
        if moved is None:
            moved = (old, b - a)
    return moved if moved is not None and moved[1] else None


def _alarm(reading: Document, slope: float, base: float, rules: Sequence[Document]) -> float | None:
    for rule in rules:
        if rule["component_type"] != reading["component_type"]:
            continue
        if rule.get("pin_position") not in (None, reading["pin_position"]):
            continue
        threshold = float(rule["threshold"])
        beyond = max(2 * float(rule.get("deadband") or 0.0), abs(threshold) * 0.05, SPREAD_LEAST * 4)
        aim = threshold + beyond if rule["kind"] == "high" else threshold - beyond
        return float(base + (aim - reading["value"]) / slope)
    return None


def _numbers(payload: Any) -> Iterable[tuple[tuple[str | int, ...], float, bool, float]]:
    """(path, value, whole, a small step) of everything in a payload that may be a measurement."""
    if isinstance(payload, bytes):
        for offset in range(len(payload) - 1):
            value = int.from_bytes(payload[offset : offset + 2], "big")
            yield (offset,), value, True, 4.0 if value < 65_000 else -4.0
        return
    stack: list[tuple[tuple[str | int, ...], Any]] = [((), payload)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, dict):
            stack.extend(((*path, k), v) for k, v in reversed(node.items()))
        elif isinstance(node, list):
            stack.extend(((*path, i), v) for i, v in reversed(list(enumerate(node))))
        elif isinstance(node, int | float) and not isinstance(node, bool) and path:
            whole = isinstance(node, int)
            yield path, float(node), whole, 1.0 if whole else round(max(abs(node) * 0.001, 0.01), 3)


# --- fleets ----------------------------------------------------------------------------------------------------------


def fleet(catalogue: Catalogue, devices: int, types: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Documents of a synthetic fleet, as the `devices` section of a registry file has them.

    Args:
        catalogue: the registry.
        devices: how many; they take turns through the types.
        types: names of device types; all that have something to play, where empty.

    Raises:
        SimulatorError: a type has nothing to play, or there is none.
    """
    chosen = list(types) or catalogue.types
    for name in chosen:
        if not catalogue.templates({"device_id": "sim", "type": name}):
            message = f"device type {name!r} is not in the registry, or its parser has no example that can be sent now"
            raise SimulatorError(message)
    if not chosen:
        message = "no device type of the registry has a parser with examples"
        raise SimulatorError(message)
    if not 0 < devices <= DEVICES_MAX:
        message = f"a fleet has 1 to {DEVICES_MAX} devices, not {devices}"
        raise SimulatorError(message)
    return [
        {
            "device_id": ADDRESS.format(i + 1),
            "type": chosen[i % len(chosen)],
            "name": f"Simulated {i + 1}",
            "enabled": True,
            "meta": {"simulated": True},
        }
        for i in range(devices)
    ]


def players(catalogue: Catalogue, devices: Iterable[Document], seed: int) -> list[Player]:
    """A player for each device that has something to send, in an order drawn from the seed.

    A device is left out that is not enabled, or says `meta: {simulated: false}`: it is somebody's own.

    Raises:
        SimulatorError: none has.
    """
    found: list[Player] = []
    for device in devices:
        silent = not device.get("enabled", True) or (device.get("meta") or {}).get("simulated") is False
        templates = () if silent else catalogue.templates(device)
        if templates:
            # A seed of its own, so that one device more or less changes nobody else's values.
            rng = random.Random(f"{seed}/{device['device_id']}")
            found.append(Player(device["device_id"], templates, rng, _away(device)))
    if not found:
        message = "no device has a parser with an example that can be sent now"
        raise SimulatorError(message)
    random.Random(seed).shuffle(found)
    return found


def _away(device: Document) -> Away | None:
    said = (device.get("meta") or {}).get("simulated")
    if not isinstance(said, Mapping) or "away" not in said:
        return None
    return Away(str(said["away"]), float(said.get("at_s", 0.0)))


@dataclass(slots=True)
class Obedient:
    """A device that asks for its commands over HTTP, does what they say, and tells so.

    What it can do is to set the fields of its own messages: {"fan": 1} makes it say `fan: 1` from then on.
    """

    player: Player
    url: str  #: of a worker's web port
    token: str = ""  #: `http.token`
    obeyed: int = 0  #: commands

    async def run(self, clock: Clock, stop: asyncio.Event) -> None:
        """Ask and obey until `stop`. A worker that is away is waited for."""
        import aiohttp

        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        started_s, has = clock.monotonic_s(), ""
        async with aiohttp.ClientSession(self.url, headers=headers) as http:
            while not stop.is_set():
                asked = {"device": self.player.device_id, "wait_s": f"{FETCH_S:g}"} | ({"has": has} if has else {})
                waiting: list[dict[str, Any]] = []
                try:
                    asking = asyncio.ensure_future(self._asked(http, asked))
                    stopping = asyncio.ensure_future(stop.wait())
                    await asyncio.wait([asking, stopping], return_when=asyncio.FIRST_COMPLETED)
                    stopping.cancel()
                    if not asking.done():
                        asking.cancel()
                        return
                    waiting = asking.result()
                    for downlink in waiting:
                        self._obey(downlink)
                        has = downlink["id"]
                    if waiting:
                        payload, *_ = self.player.next(clock.monotonic_s() - started_s, clock.now_us())
                        async with http.post("/ingest", json={"device": self.player.device_id, "payload": payload}):
                            pass
                except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as e:
                    log.debug("simulated device cannot ask", device=self.player.device_id, error=str(e))
                if not waiting:
                    await pause(clock, FETCH_PAUSE_S, stop)

    @staticmethod
    async def _asked(http: Any, asked: Mapping[str, str]) -> list[dict[str, Any]]:
        async with http.get("/ingest/commands", params=asked) as response:
            if response.status != 200:
                return []
            return cast(list[dict[str, Any]], (await response.json())["downlinks"])

    def _obey(self, downlink: Mapping[str, Any]) -> None:
        said = orjson.loads(base64.b64decode(downlink["payload_b64"]))
        if isinstance(said, dict):
            self.player.state.update(said)
        self.obeyed += 1


def obedient(catalogue: Catalogue, found: Iterable[Player], url: str, token: str = "") -> list[Obedient]:
    """Of these players, those that fetch their commands from the worker at `url`."""
    fetching = {d["device_id"] for d in catalogue.devices if catalogue.fetches(d)}
    return [Obedient(player, url, token) for player in found if player.device_id in fetching]


@dataclass(slots=True)
class Simulator:
    """Plays a fleet at a set rate."""

    players: Sequence[Player]
    rate: float  #: messages a second
    totals: Totals = field(default_factory=Totals)

    async def run(
        self,
        producer: RawProducer,
        clock: Clock,
        limits: Limits,
        *,
        stop: asyncio.Event,
        for_s: float | None = None,
        messages_max: int | None = None,
        on_progress: Callable[[Totals], None] = lambda totals: None,
    ) -> Totals:
        """Send until `stop`, for `for_s` seconds of the schedule, or `messages_max` messages.

        Kafka being away holds it up; it gives up on no message.

        Raises:
            Fatal: Kafka's topics are not as declared.
            Reject: a payload is over the limits.
        """
        start_us, start_s = clock.now_us(), clock.monotonic_s()
        end = messages_max if messages_max is not None else 2**62
        if for_s is not None:
            end = min(end, max(1, round(for_s * self.rate)))
        k = 0
        backoff = Backoff()
        while k < end and not stop.is_set():
            elapsed_s = clock.monotonic_s() - start_s
            due = min(end, int(elapsed_s * self.rate) + 1)
            if (behind_s := elapsed_s - k / self.rate) > BEHIND_MAX_S:
                # Also the instants move: two messages must not have one, and none may be of the future.
                start_s += behind_s
                start_us += round(behind_s * 1e6)
                self.totals.behind_s += behind_s
                continue
            if due <= k:
                await pause(clock, max(TICK_S, k / self.rate - elapsed_s), stop)
                continue
            until = min(due, k + BATCH_MESSAGES_MAX)
            sends, readings = self._batch(k, until, start_us, limits)
            while True:
                try:
                    await producer.send(sends)
                except Retry as e:
                    self.totals.retries += 1
                    wait_s = backoff.next_s()
                    log.warning("simulator held up: Kafka does not acknowledge", error=str(e), wait_s=round(wait_s, 1))
                    await pause(clock, wait_s, stop)
                    if stop.is_set():
                        return self.totals
                else:
                    break
            backoff.reset()
            self.totals.messages += until - k
            self.totals.readings += readings
            k = until
            on_progress(self.totals)
            if k == due:
                await pause(clock, TICK_S, stop)
        return self.totals

    def _batch(self, first: int, until: int, start_us: int, limits: Limits) -> tuple[list[Send], int]:
        sends: list[Send] = []
        expected = 0
        count = len(self.players)
        for k in range(first, until):
            player = self.players[k % count]
            # The scheduled instant and not the clock's: no device has two messages in one microsecond.
            received_at = start_us + round(k * 1e6 / self.rate)
            payload, port, readings = player.next(k / self.rate, received_at)
            sends.append(message_send(player.device_id, payload, limits, CONNECTOR, "", received_at, port=port))
            expected += readings
        return sends, expected
