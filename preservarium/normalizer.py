"""The normalize stage: raw records in, standardized records or error lines out. Knows no Faust.

Work is grouped by device: a configuration is looked up and compiled once, then used until it changes. Compiled
configurations are kept for `normalize.config_cache_ttl_s`, and forgotten at once when the registry says so; parsers are
compiled once for all devices that use them with the same variables. Parser scripts run in the sandbox: a batch's payloads
travel there in one round trip.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol, cast

import orjson
import structlog
from cachetools import LRUCache, TTLCache

from preservarium import metrics, topics
from preservarium.clock import Clock
from preservarium.domain.decoders import Decoded, Decoder, ScriptParser, compile_any
from preservarium.domain.device import DatatypeDoc, DeviceDoc, DeviceTypeDoc, ParserDoc
from preservarium.domain.errors import Fatal, ReasonCode, Reject
from preservarium.domain.normalize import CompiledDevice, compile_device, normalize, require_enabled, standardize
from preservarium.domain.reading import ErrorLine, RawMessage
from preservarium.records import attempt_of, error_line, headers_of, parse_raw, refuse
from preservarium.sandbox.pool import Call, Outcome, Script
from preservarium.settings import LiveSettings
from preservarium.stage import Batch, Effects, Record, Send

log = structlog.get_logger(__name__)

STAGE: Final = "normalize"
#: Compiled parsers kept: some hundreds of types, some of them with variables of their own for each device.
DECODERS_MAX: Final = 5_000
#: Messages handled between two looks at the event loop: some 10 ms of work, so that heartbeats and polls are in time.
MESSAGES_AT_ONCE: Final = 250
#: A sandbox that does not start is tried again after this time: its extra may be installed by then.
SANDBOX_RETRY_S: Final = 60.0

_CACHE: Final = "compiled_config"


class Devices(Protocol):
    """Where device documents come from (`preservarium.device_lookup.DeviceLookup`)."""

    async def lookup_many(self, partition: int, device_ids: Iterable[str]) -> Mapping[str, DeviceDoc]:
        """Documents of those devices that are registered."""
        ...


class Types(Protocol):
    """Where types, parsers and datatypes come from (`preservarium.catalogue.Catalogue`)."""

    @property
    def rev(self) -> int:
        """Grows with every change."""
        ...

    def datatype(self, name: str) -> DatatypeDoc | None:
        """The datatype of that name."""
        ...

    def parser(self, name: str) -> ParserDoc | None:
        """The active version of the parser of that name."""
        ...

    def type(self, name: str) -> DeviceTypeDoc | None:
        """The device type of that name."""
        ...

    async def ready(self) -> None:
        """Return once everything was read; Retry where that does not come about."""
        ...


class Sandbox(Protocol):
    """Where parser scripts run (`preservarium.sandbox.pool.SandboxPool`)."""

    async def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """The outcome of every call, in their order; Fatal where there is no sandbox."""
        ...


#: A script's fields, or why there are none.
Ran = list[Decoded] | Reject


class Normalizer:
    """The handler of the stage. For one event loop.

    Args:
        devices: finds device documents.
        catalogue: types, parsers, datatypes.
        clock: for error lines and for how long a configuration is kept.
        live: the settings in force.
        sandbox: runs parser scripts; None: devices with such a parser are refused.
    """

    def __init__(
        self,
        devices: Devices,
        catalogue: Types,
        clock: Clock,
        live: LiveSettings,
        sandbox: Sandbox | None = None,
    ) -> None:
        self._sandbox = sandbox
        self._sandbox_down: tuple[float, str] | None = None  # until when it is not tried, and why
        self._devices = devices
        self._catalogue = catalogue
        self._clock = clock
        self._live = live
        settings = live().normalize
        #: device -> (catalogue's revision, compiled configuration or why there is none)
        self._compiled: TTLCache[str, tuple[int, CompiledDevice | Reject]] = TTLCache(
            settings.config_cache_devices_max, settings.config_cache_ttl_s, timer=clock.monotonic_s
        )
        #: for each look-up under way: devices that changed meanwhile, whose answer may be the old one
        self._changed: list[set[str]] = []
        self._decoders: LRUCache[tuple[str, int, str, bytes], Decoder | ScriptParser | Reject] = LRUCache(DECODERS_MAX)

    def forget(self, device_id: str) -> None:
        """Compile this device anew at its next message: its configuration has changed."""
        self._compiled.pop(device_id, None)
        for changed in self._changed:
            changed.add(device_id)

    async def __call__(self, batch: Batch) -> Effects:
        """Normalize a batch: for each record and device one record on `iot_standardized_data`, keyed by the device.

        Idempotent: the same batch gives the same records, but for the times in error lines.

        Raises:
            Retry: the registry's topics have not been read yet.
        """
        await self._catalogue.ready()
        now_us = self._clock.now_us()
        settings = self._live()
        effects = Effects()
        parsed: list[tuple[Record, list[RawMessage], int]] = []
        for record in batch.records:
            messages, errors = parse_raw(
                record,
                batch.topic,
                batch.partition,
                payload_bytes_max=settings.normalize.payload_bytes_max,
                now_us=now_us,
            )
            for line in errors:
                self._refuse(effects, line)
            parsed.append((record, messages, len(messages) + len(errors)))
        compiled = await self._configurations(batch.partition, {m["device"] for _, ms, _ in parsed for m in ms})
        ran = await self._run_scripts(parsed, compiled)
        handled = readings = 0
        for record, messages, lines in parsed:
            out: dict[str, list[bytes]] = {}
            for raw in messages:
                fields = ran.get(id(raw))
                readings += self._message(record, raw, lines, compiled.get(raw["device"]), fields, now_us, out, effects)
                handled += 1
                if handled % MESSAGES_AT_ONCE == 0:
                    await asyncio.sleep(0)
            if out:
                headers = headers_of(record)
                for device_id, values in out.items():
                    key = device_id.encode()
                    for value in _values(values, settings.kafka.record_bytes_max):
                        effects.sends.append(Send(topics.STANDARDIZED, key, value, headers=headers))
        metrics.READINGS.labels(STAGE).inc(readings)
        return effects

    # --- one message ------------------------------------------------------------------------------------------------

    def _message(
        self,
        record: Record,
        raw: RawMessage,
        lines: int,
        compiled: CompiledDevice | Reject | None,
        ran: Ran | None,
        now_us: int,
        out: dict[str, list[bytes]],
        effects: Effects,
    ) -> int:
        """Normalize one message into `out`; how many readings it became."""
        settings = self._live()
        refused: tuple[Reject, ...]
        count = 0
        try:
            if compiled is None:
                message = f"device {raw['device']} is not registered"
                raise Reject(ReasonCode.UNKNOWN_DEVICE, message)
            if isinstance(compiled, Reject):
                raise Reject(compiled.code, str(compiled))
            if ran is None:
                done = normalize(raw, compiled, now_us, settings.normalize.readings_max)
            elif isinstance(ran, Reject):
                raise ran
            else:
                done = standardize(raw, compiled, ran, settings.normalize.readings_max)
            attempt = attempt_of(record)
            if attempt > 1:
                done.message["attempt"] = attempt
            value = orjson.dumps(done.message)
            if len(value) > settings.kafka.record_bytes_max:
                text = f"{len(value)} bytes of readings; a record may have {settings.kafka.record_bytes_max}"
                raise Reject(ReasonCode.OUTPUT_TOO_LARGE, text)
            out.setdefault(raw["device"], []).append(value)
            refused, count = done.refused, len(done.message["readings"])
        except Reject as e:
            refused = (e,)
        for reject in refused:
            known = compiled if isinstance(compiled, CompiledDevice) else None
            line = error_line(
                STAGE,
                reject.code,
                str(reject),
                topic=topics.RAW.name,
                partition=raw["raw_partition"],
                record=record,
                index=raw["raw_index"],
                raw=_line(record, raw["raw_index"], lines),
                device_id=raw["device"],
                parser=known.parser if known else None,
                config_rev=known.rev if known else None,
                now_us=now_us,
            )
            self._refuse(effects, line)
        return count

    def _refuse(self, effects: Effects, line: ErrorLine) -> None:
        refuse(effects, line, record_bytes_max=self._live().kafka.record_bytes_max)

    # --- scripts ----------------------------------------------------------------------------------------------------

    async def _run_scripts(
        self,
        parsed: Sequence[tuple[Record, Sequence[RawMessage], int]],
        compiled: Mapping[str, CompiledDevice | Reject],
    ) -> dict[int, Ran]:
        """What the batch's scripts made of its messages, by `id()` of the message: one round trip for all."""
        ran: dict[int, Ran] = {}
        called: list[tuple[RawMessage, ScriptParser]] = []
        calls: list[Call] = []
        for _, messages, _ in parsed:
            for raw in messages:
                device = compiled.get(raw["device"])
                if not isinstance(device, CompiledDevice) or not isinstance(device.decoder, ScriptParser):
                    continue
                try:
                    require_enabled(device)
                    calls.append(script_call(device.decoder, raw))
                    called.append((raw, device.decoder))
                except Reject as e:
                    ran[id(raw)] = e
        if not calls:
            return ran
        try:
            outcomes = await self._outcomes(calls)
        except Reject as e:
            return ran | {id(raw): e for raw, _ in called}
        for i, ((raw, parser), outcome) in enumerate(zip(called, outcomes, strict=True)):
            try:
                ran[id(raw)] = script_fields(parser, outcome)
            except Reject as e:
                ran[id(raw)] = e
            if i % MESSAGES_AT_ONCE == MESSAGES_AT_ONCE - 1:
                await asyncio.sleep(0)
        return ran

    async def _outcomes(self, calls: list[Call]) -> list[Outcome]:
        """Run the calls.

        Raises:
            Reject: NO_PARSER, there is no sandbox. Other devices go on; the payloads are kept and can be redriven.
        """
        if self._sandbox is None:
            message = "this worker runs no parser scripts"
            raise Reject(ReasonCode.NO_PARSER, message)
        if self._sandbox_down is not None and self._clock.monotonic_s() < self._sandbox_down[0]:
            raise Reject(ReasonCode.NO_PARSER, self._sandbox_down[1])
        try:
            outcomes = await self._sandbox.run(calls)
        except Fatal as e:
            self._sandbox_down = self._clock.monotonic_s() + SANDBOX_RETRY_S, str(e)
            log.error("sandbox_does_not_start", error=str(e))
            raise Reject(ReasonCode.NO_PARSER, str(e)) from None
        self._sandbox_down = None
        return outcomes

    # --- configurations ---------------------------------------------------------------------------------------------

    async def _configurations(self, partition: int, device_ids: set[str]) -> dict[str, CompiledDevice | Reject]:
        """Compiled configurations of those devices that are registered."""
        found: dict[str, CompiledDevice | Reject] = {}
        missing: list[str] = []
        for device_id in device_ids:
            entry = self._compiled.get(device_id)
            if entry is not None and entry[0] == self._catalogue.rev:
                found[device_id] = entry[1]
            else:
                missing.append(device_id)
        if found:
            metrics.CACHE.labels(_CACHE, "hit").inc(len(found))
        if not missing:
            return found
        metrics.CACHE.labels(_CACHE, "miss").inc(len(missing))
        changed: set[str] = set()
        self._changed.append(changed)
        try:
            # Sorted, so that a second pass over a batch asks for the same devices in the same order.
            documents = await self._devices.lookup_many(partition, sorted(missing))
            for i, (device_id, document) in enumerate(documents.items()):
                rev = self._catalogue.rev
                found[device_id] = self._compile(document)
                if device_id not in changed:
                    self._compiled[device_id] = rev, found[device_id]
                if i % MESSAGES_AT_ONCE == MESSAGES_AT_ONCE - 1:
                    await asyncio.sleep(0)
        finally:
            # By identity: two sets with the same devices are equal.
            self._changed = [other for other in self._changed if other is not changed]
        return found

    def _compile(self, device: DeviceDoc) -> CompiledDevice | Reject:
        try:
            device_type = self._catalogue.type(device["type"])
            if device_type is None:
                message = f"device type {device['type']} is not registered"
                raise Reject(ReasonCode.NO_PARSER, message)
            parser = self._catalogue.parser(device_type["parser"])
            if parser is None:
                message = f"device type {device['type']} has no active parser {device_type['parser']}"
                raise Reject(ReasonCode.NO_PARSER, message)
            decoder = self._decoder(parser, device.get("variables") or {})
            return compile_device(device, device_type, parser, self._catalogue.datatype, decoder)
        except Reject as e:
            return e

    def _decoder(self, parser: ParserDoc, variables: dict[str, Any]) -> Decoder | ScriptParser:
        """The compiled parser.

        Raises:
            Reject: NO_PARSER, it cannot be compiled.
        """
        key = (parser["name"], parser["version"], parser["hash"], orjson.dumps(variables, option=orjson.OPT_SORT_KEYS))
        decoder = self._decoders.get(key)
        if decoder is None:
            try:
                decoder = compile_any(parser, variables)
            except Reject as e:
                decoder = e
            self._decoders[key] = decoder
        if isinstance(decoder, Reject):
            raise decoder
        return decoder


def script_call(parser: ScriptParser, raw: RawMessage) -> Call:
    """The call that decodes a message.

    Raises:
        Reject: see `ScriptParser.arguments`.
    """
    script = Script(parser.script_id, parser.name, parser.kind, parser.source)
    return Call(script, parser.function, parser.arguments(raw))


def script_fields(parser: ScriptParser, outcome: Outcome) -> list[Decoded]:
    """The fields of a call's outcome.

    Raises:
        Reject: the script faulted, with its name, version and line; or see `ScriptParser.fields`.
    """
    fault = outcome.fault
    if fault is not None:
        where = f"{parser.name}, line {fault.line}" if fault.line is not None else parser.name
        raise Reject(fault.code, f"{where}: {fault.message}")
    return parser.fields(cast(str, outcome.text))


def _line(record: Record, index: int, lines: int) -> bytes:
    """The original line: the whole value where it holds one message, which may stand on several lines."""
    value = record.value or b""
    return value if lines == 1 else value.split(b"\n")[index]


def _values(lines: list[bytes], record_bytes_max: int) -> Iterable[bytes]:
    """Lines as record values, none larger than a record may be; each line alone is small enough."""
    start = size = 0
    for i, line in enumerate(lines):
        if i > start and size + 1 + len(line) > record_bytes_max:
            yield b"\n".join(lines[start:i])
            start, size = i, 0
        size += len(line) + (i > start)
    yield b"\n".join(lines[start:])
