"""Raw records made readings and alarms once more, in memory: by the code of the stages, with the state of each device as an object.

What a stage keeps in a table is kept here for as long as the records take, so nothing is read or written for it. A message is read with the candidate
where it was received in the time asked for, else with what stands: so the tests, counters and alarms have their past when the time begins.

Nothing is told of what is refused but its count: the live stages have told it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from preservarium import topics
from preservarium.clock import SystemClock
from preservarium.domain.alarms.device import DeviceAlarms
from preservarium.domain.alarms.rule import DeviceRules
from preservarium.domain.alarms.rules import compile_rules
from preservarium.domain.alarms.turn import Outcome as Alarmed
from preservarium.domain.decoders.scripts import ScriptParser
from preservarium.domain.quality.arrival import Order
from preservarium.domain.quality.checks import CheckCompiler, DeviceChecks
from preservarium.domain.quality.validation import Limits, Outcome, fall_silent, judge, new_state, receive
from preservarium.domain.readings.address import canonical_address
from preservarium.domain.readings.lineage import GENERATION_LIVE
from preservarium.domain.readings.normalize import CompiledDevice, has_payload, normalize, require_enabled, standardize
from preservarium.domain.readings.reading import RawMessage
from preservarium.domain.registry.device import DeviceDoc, DeviceTypeDoc
from preservarium.errors import Reject
from preservarium.registry.catalogue import Catalogue
from preservarium.sandbox.pool import Call, SandboxPool
from preservarium.settings import LiveSettings, Settings
from preservarium.stages.normalize import Normalizer, script_call, script_fields
from preservarium.streaming.records import parse_raw

#: Messages between two looks at the event loop.
MESSAGES_AT_ONCE: Final = 1_000
#: Later than every offset of a topic: all that is held back is due.
_ALL: Final = 1 << 62

Documents = Mapping[str, Mapping[str, Mapping[str, Any]]]  #: kind -> name -> document


class Registry(Catalogue):
    """A catalogue of documents that are given to it."""

    def __init__(self, documents: Documents, instead: Documents | None = None) -> None:
        super().__init__()
        for kind, named in documents.items():
            for name, document in {**named, **((instead or {}).get(kind) or {})}.items():
                self.offer(kind, {**document, "name": name})

    async def ready(self, timeout_s: float = 0.0) -> None:
        """At once."""


class _NoDevices:
    async def lookup_many(self, partition: int, device_ids: Any) -> Mapping[str, DeviceDoc]:
        return {}


class Reading(NamedTuple):
    """How a device's messages are read, under one configuration."""

    compiled: CompiledDevice | Reject
    checks: DeviceChecks
    rules: DeviceRules | None


class Configuration:
    """One state of the registry, compiled as devices turn up."""

    def __init__(self, settings: Settings, catalogue: Registry, *, alarms: bool) -> None:
        self._catalogue = catalogue
        self._normalizer = Normalizer(_NoDevices(), catalogue, SystemClock(), LiveSettings(settings))
        self._compiler = CheckCompiler(catalogue.datatype)
        self._alarms = alarms
        self._shared: dict[str, DeviceRules] = {}

    def of(self, device: DeviceDoc) -> Reading:
        """How this device's messages are read."""
        kind = self._catalogue.type(device["type"])
        return Reading(
            self._normalizer.compiled(device), self._compiler.device(device, kind), self._rules_of(device, kind)
        )

    def _rules_of(self, device: DeviceDoc, kind: DeviceTypeDoc | None) -> DeviceRules | None:
        """Its alarm rules; those of a type's devices that say nothing of their own are compiled once."""
        if not self._alarms:
            return None
        shares = not any(device.get(name) is not None for name in ("rules", "outages", "datatypes")) and device.get(
            "enabled", True
        )
        rules = self._shared.get(device["type"]) if shares else None
        if rules is None:
            rules = compile_rules(device, kind, self._catalogue.rule, self._catalogue.datatype)
            if shares:
                self._shared[device["type"]] = rules
        return replace(rules, device_name=device.get("name") or device["device_id"]) if rules.by_name else None


@dataclass(frozen=True, slots=True)
class Span:
    """Which messages are told of, by their receipt: those read with the candidate, and those after them. µs since the epoch, UTC."""

    from_us: int
    to_us: int  #: the candidate reads what was received before this
    until_us: int  #: what is received from here on is left out

    def told(self, received_at: int) -> bool:
        """Whether what this message says is told."""
        return self.from_us <= received_at < self.until_us


@dataclass(slots=True)
class Counts:
    """What became of the records."""

    records: int = 0
    messages: int = 0  #: of the devices asked for
    readings: int = 0  #: that were derived, told or not
    refused: int = 0  #: messages, parts and readings that are refused
    seen: set[str] = field(default_factory=set)  #: devices

    def add(self, other: "Counts") -> None:
        """Take in another part's."""
        self.records += other.records
        self.messages += other.messages
        self.readings += other.readings
        self.refused += other.refused
        self.seen |= other.seen


class _Device:
    """A device, with all that the stages keep of it."""

    __slots__ = ("alarms", "candidate", "document", "standing", "state")

    def __init__(self, document: DeviceDoc) -> None:
        self.document = document
        self.state: dict[str, Any] = new_state()
        self.alarms: DeviceAlarms | None = None
        self.candidate: Reading | None = None
        self.standing: Reading | None = None


Tell = Callable[[Mapping[str, Any]], None]  #: a validated message that is told
TellAlarms = Callable[[Sequence[Mapping[str, Any]]], None]  #: transitions that are told
#: (device, received at) -> how a message of then was read; for the standing configuration where the registry has changed since
AsOf = Callable[[str, int], Awaitable[Reading]]


class Deriver:
    """Derives records. For one task at a time; to be closed, because scripts run in processes.

    Args:
        settings: limits, as the stages have them.
        candidate: how messages of the time are read.
        standing: how those before and after it are read.
        devices: by their ids; messages of others are left out.
        span: what is told.
        tell: takes validated messages.
        tell_alarms: takes transitions; None: alarms are left out.
        sandbox: for scripts; its own where none is given.
        as_of: how messages were read at their time, instead of `standing`.
    """

    def __init__(
        self,
        settings: Settings,
        candidate: Configuration,
        standing: Configuration,
        devices: Mapping[str, DeviceDoc],
        span: Span,
        tell: Tell,
        tell_alarms: TellAlarms | None = None,
        *,
        sandbox: Callable[[], SandboxPool] | None = None,
        as_of: AsOf | None = None,
    ) -> None:
        self._candidate, self._standing, self._as_of = candidate, standing, as_of
        self._span, self._tell, self._tell_alarms = span, tell, tell_alarms
        self._devices = {device_id: _Device(document) for device_id, document in devices.items()}
        self._by_address = {canonical_address(device_id): one for device_id, one in self._devices.items()}
        self._named: dict[str, _Device | None] = {}
        self._make_sandbox = sandbox
        self._sandbox: SandboxPool | None = None
        self._payload_bytes_max = settings.normalize.payload_bytes_max
        self._readings_max = settings.normalize.readings_max
        quality = settings.quality
        self._limits = Limits(
            future_skew_us=round(quality.future_skew_s * 1e6),
            store_failed=quality.store_failed,
            series_max=quality.series_per_device_max,
            skew_noted_us=quality.skew_noted_s * 1e6,
            order=Order(
                lateness_us=round(quality.lateness_s * 1e6),
                held_max=quality.held_per_device_max,
                repeats_max=quality.repeats_remembered,
            ),
        )
        self._judged = Outcome()
        self._alarmed = Alarmed()
        self._position = 0
        self._readings: dict[tuple[str, int], Reading] = {}
        self.counts = Counts()

    async def close(self) -> None:
        """End the sandbox."""
        if self._sandbox is not None:
            await self._sandbox.close()

    async def take(self, records: Sequence[Any], partition: int) -> None:
        """Derive records of one raw partition, in their order.

        Raises:
            Fatal: a parser is a script, and the sandbox does not start.
        """
        work: list[tuple[_Device, RawMessage, Reading]] = []
        counts, span = self.counts, self._span
        from_us, to_us = span.from_us, span.to_us
        for record in records:
            counts.records += 1
            messages, errors = parse_raw(record, topics.RAW.name, partition, payload_bytes_max=self._payload_bytes_max)
            counts.refused += len(errors)
            for raw in messages:
                if raw["generation"] != GENERATION_LIVE or raw["received_at"] >= span.until_us:
                    continue
                device = self._device(raw["device"])
                if device is None or (not raw["payload"] and not has_payload(raw)):
                    continue
                at = raw["received_at"]
                reading = device.candidate if from_us <= at < to_us else device.standing
                work.append((device, raw, reading or await self._reading(device, at)))
        counts.messages += len(work)
        ran = await self._run_scripts(work)
        for n, (device, raw, reading) in enumerate(work):
            if n % MESSAGES_AT_ONCE == MESSAGES_AT_ONCE - 1:
                await asyncio.sleep(0)
            compiled = reading.compiled
            if isinstance(compiled, Reject):
                counts.refused += 1
                continue
            try:
                fields = ran.get(id(raw)) if ran else None
                if fields is None:
                    made = normalize(raw, compiled, raw["received_at"], self._readings_max)
                elif isinstance(fields, Reject):
                    raise fields
                else:
                    made = standardize(raw, compiled, fields, self._readings_max)
            except Reject:
                counts.refused += 1
                continue
            counts.refused += len(made.refused)
            self._position += 1
            message: dict[str, Any] = made.message  # type: ignore[assignment]
            arrival = receive(message, reading.checks, device.state, self._limits, (self._position, 0))
            for one in arrival.due:
                self._judge(device, one, reading if one is message else await self._reading(device, one["received_at"]))

    async def finish(self) -> None:
        """No more records come: what is held back is due, and silence is what it is at the end of the time."""
        for device in self._devices.values():
            for one in fall_silent(device.state, _ALL, self._position + 1):
                self._judge(device, one, await self._reading(device, one["received_at"]))
            if device.alarms is not None:
                rules = (await self._reading(device, self._span.until_us - 1)).rules
                outcome = device.alarms.tick(self._span.until_us, rules)
                if self._tell_alarms is not None and outcome.transitions:
                    self._tell_alarms(outcome.transitions)

    def _judge(self, device: _Device, message: dict[str, Any], reading: Reading) -> None:
        judged = judge(message, reading.checks, device.state, self._limits, self._judged)
        counts = self.counts
        counts.readings += len(message["readings"])
        if judged.failures:
            counts.refused += len(judged.failures)
            judged.failures = []
        judged.limited = False
        told = self._span.told(message["received_at"])
        if told and message["readings"]:
            self._tell(message)
        if reading.rules is not None and self._tell_alarms is not None:
            if device.alarms is None:
                device.alarms = DeviceAlarms(device.document["device_id"])
            outcome = device.alarms.observe(message, reading.rules, outcome=self._alarmed)
            if outcome.transitions:
                if told:
                    self._tell_alarms(outcome.transitions)
                outcome.transitions = []
            outcome.duplicate, outcome.standing = False, {}

    def _device(self, name: str) -> _Device | None:
        found = self._devices.get(name)
        if found is None:
            if name in self._named:
                return self._named[name]
            found = self._by_address.get(canonical_address(name))
            if len(self._named) < 1_000_000:
                self._named[name] = found
        if found is not None:
            self.counts.seen.add(found.document["device_id"])
        return found

    async def _reading(self, device: _Device, received_at: int) -> Reading:
        if self._span.from_us <= received_at < self._span.to_us:
            if self._as_of is not None:
                return await self._as_of(device.document["device_id"], received_at)
            if device.candidate is None:
                device.candidate = self._candidate.of(device.document)
            return device.candidate
        if device.standing is None:
            device.standing = self._standing.of(device.document)
        return device.standing

    async def _run_scripts(self, work: Sequence[tuple[_Device, RawMessage, Reading]]) -> dict[int, Any]:
        calls: list[Call] = []
        called: list[tuple[RawMessage, ScriptParser]] = []
        ran: dict[int, Any] = {}
        for _, raw, reading in work:
            compiled = reading.compiled
            if isinstance(compiled, Reject) or not isinstance(compiled.decoder, ScriptParser):
                continue
            try:
                require_enabled(compiled)
                calls.append(script_call(compiled.decoder, raw))
                called.append((raw, compiled.decoder))
            except Reject as e:
                ran[id(raw)] = e
        if calls:
            if self._sandbox is None:
                assert self._make_sandbox is not None, "scripts need a sandbox"
                self._sandbox = self._make_sandbox()
            for (raw, parser), outcome in zip(called, await self._sandbox.run(calls), strict=True):
                try:
                    ran[id(raw)] = script_fields(parser, outcome, raw["received_at"])
                except Reject as e:
                    ran[id(raw)] = e
        return ran
