"""The normalize stage: raw records in, standardized records or error lines out. Knows no Faust.

Work is grouped by device: a configuration is looked up and compiled once, then used until it changes. Compiled
configurations are kept for `normalize.config_cache_ttl_s`, and forgotten at once when the registry says so; parsers are
compiled once for all devices that use them with the same variables. Parser scripts run in the sandbox: a batch's payloads
travel there in one round trip.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, cast

import orjson
import structlog
from cachetools import LRUCache

from preservarium import metrics, topics
from preservarium.clock import Clock
from preservarium.domain.decoders.base import Decoded, Decoder, PartRefused
from preservarium.domain.decoders.kinds import compile_any
from preservarium.domain.decoders.scripts import ScriptParser
from preservarium.domain.readings.address import canonical_address
from preservarium.domain.readings.json_text import to_bytes
from preservarium.domain.readings.mapping import Mapper
from preservarium.domain.readings.normalize import (
    CompiledDevice,
    Normalized,
    compile_device,
    has_payload,
    normalize,
    require_enabled,
    standardize,
    variables_of,
)
from preservarium.domain.readings.reading import ErrorLine, RawMessage
from preservarium.domain.registry.device import DatatypeDoc, DeviceDoc, DeviceTypeDoc, ParserDoc
from preservarium.errors import Fatal, ReasonCode, Reject
from preservarium.sandbox.pool import Call, Outcome, Script
from preservarium.settings import LiveSettings
from preservarium.streaming.records import (
    ERROR_RAW_BYTES_MAX,
    around,
    attempt_of,
    error_line,
    headers_of,
    original_line,
    parse_raw,
    refuse,
)
from preservarium.streaming.stage import Batch, Effects, Record, Send

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
    """Where device documents come from (`preservarium.registry.device_lookup.DeviceLookup`)."""

    async def lookup_many(self, partition: int, device_ids: Iterable[str]) -> Mapping[str, DeviceDoc]:
        """Documents of those devices that are registered."""
        ...


class Types(Protocol):
    """Where types, parsers and datatypes come from (`preservarium.registry.catalogue.Catalogue`)."""

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
Ran = list[Decoded | Reject] | Reject


class Normalizer:
    """The handler of the stage. For one event loop.

    A device is found by any spelling of its address, and is called from here on as it is registered.

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
        self._devices_max, self._ttl_s = settings.config_cache_devices_max, settings.config_cache_ttl_s
        #: canonical address -> (kept until, catalogue's revision, compiled configuration or why there is none); oldest first
        self._compiled: dict[str, tuple[float, int, CompiledDevice | Reject]] = {}
        #: for each look-up under way: devices that changed meanwhile, whose answer may be the old one
        self._changed: list[set[str]] = []
        #: device type -> what its devices have in common, as of a revision of the catalogue
        self._types: dict[str, _Type] = {}
        self._types_rev = catalogue.rev
        self._decoders: LRUCache[tuple[str, int, str, bytes], Decoder | ScriptParser | Reject] = LRUCache(DECODERS_MAX)

    def forget(self, device_id: str) -> None:
        """Compile this device anew at its next message: its configuration has changed."""
        address = canonical_address(device_id)
        self._compiled.pop(address, None)
        for changed in self._changed:
            changed.add(address)

    async def __call__(self, batch: Batch) -> Effects:
        """Normalize a batch: for each record and device one record on `iot_standardized_data`, keyed by the device.

        Idempotent: the same batch gives the same records, but for the times in error lines.

        Raises:
            Retry: the registry's topics have not been read yet.
        """
        await self._catalogue.ready()
        now_us = self._clock.now_us()
        settings = self._live()
        payload_bytes_max, record_bytes_max = settings.normalize.payload_bytes_max, settings.kafka.record_bytes_max
        readings_max = settings.normalize.readings_max
        effects = Effects()
        parsed: list[tuple[Record, list[RawMessage], int]] = []
        for record in batch.records:
            messages, errors = parse_raw(
                record, batch.topic, batch.partition, payload_bytes_max=payload_bytes_max, now_us=now_us
            )
            for line in errors:
                self._refuse(effects, line)
            parsed.append((record, messages, len(messages) + len(errors)))
        compiled = await self._configurations(batch.partition, {m["device"] for _, ms, _ in parsed for m in ms})
        ran = await self._run_scripts(parsed, compiled)
        handled = readings = empty = 0
        for record, messages, lines in parsed:
            made: list[tuple[str, bytes]] = []
            for raw in messages:
                if not raw["payload"] and not has_payload(raw):
                    empty += 1
                    continue
                device = compiled.get(raw["device"])
                try:
                    fields = ran.get(id(raw)) if ran else None
                    message, refused = _normalized(raw, device, fields, now_us, readings_max)
                    attempt = attempt_of(record)
                    if attempt > 1:
                        message["attempt"] = attempt
                    value = to_bytes(message)
                    if len(value) > record_bytes_max:
                        text = f"{len(value)} bytes of readings; a record may have {record_bytes_max}"
                        raise Reject(ReasonCode.OUTPUT_TOO_LARGE, text)
                    made.append((message["device_id"], value))
                    readings += len(message["readings"])
                except Reject as e:
                    refused = (e,)
                if refused:
                    self._tell(refused, record, raw, lines, device, now_us, effects)
                handled += 1
                if handled % MESSAGES_AT_ONCE == 0:
                    await asyncio.sleep(0)
            if made:
                headers = headers_of(record)
                for device_id, value in made if len(made) == 1 else _packed(made, record_bytes_max):
                    effects.sends.append(Send(topics.STANDARDIZED, device_id.encode(), value, None, headers))
        metrics.READINGS.labels(STAGE).inc(readings)
        metrics.WITHOUT_PAYLOAD.inc(empty)
        return effects

    # --- what is refused --------------------------------------------------------------------------------------------

    def _tell(
        self,
        refused: Sequence[Reject],
        record: Record,
        raw: RawMessage,
        lines: int,
        compiled: CompiledDevice | Reject | None,
        now_us: int,
        effects: Effects,
    ) -> None:
        """Write error lines for all that was refused of a message."""
        known = compiled if isinstance(compiled, CompiledDevice) else None
        original = original_line(record.value or b"", raw["raw_index"], alone=lines == 1)
        for line in _error_lines(record, raw, original, known, refused, now_us):
            self._refuse(effects, line)

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
        if not any(isinstance(c, CompiledDevice) and isinstance(c.decoder, ScriptParser) for c in compiled.values()):
            return ran
        called: list[tuple[RawMessage, ScriptParser]] = []
        calls: list[Call] = []
        for _, messages, _ in parsed:
            for raw in messages:
                device = compiled.get(raw["device"])
                if not isinstance(device, CompiledDevice) or not isinstance(device.decoder, ScriptParser):
                    continue
                if not has_payload(raw):
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
                ran[id(raw)] = script_fields(parser, outcome, raw["received_at"])
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
        now_s, rev = self._clock.monotonic_s(), self._catalogue.rev
        for device_id in device_ids:
            entry = self._compiled.get(canonical_address(device_id))
            if entry is not None and entry[0] > now_s and entry[1] == rev:
                found[device_id] = entry[2]
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
            until_s = self._clock.monotonic_s() + self._ttl_s
            for i, (device_id, document) in enumerate(documents.items()):
                rev = self._catalogue.rev
                compiled = found[device_id] = self._compile(document)
                address = canonical_address(device_id)
                if address not in changed:
                    self._compiled.pop(address, None)
                    if len(self._compiled) >= self._devices_max:
                        del self._compiled[next(iter(self._compiled))]
                    self._compiled[address] = until_s, rev, compiled
                if i % MESSAGES_AT_ONCE == MESSAGES_AT_ONCE - 1:
                    await asyncio.sleep(0)
        finally:
            # By identity: two sets with the same devices are equal.
            self._changed = [other for other in self._changed if other is not changed]
        return found

    def _compile(self, device: DeviceDoc) -> CompiledDevice | Reject:
        try:
            kind = self._type(device["type"])
            own_words = device.get("variables") or device.get("time_zone")
            decoder = self._decoder(kind.parser, variables_of(device, kind.document)) if own_words else kind.decoder
            if isinstance(decoder, Reject):
                return decoder
            # A device that says nothing of its own has the mapping of its type.
            own = device.get("mapping") or device.get("datatypes")
            datatype = self._catalogue.datatype
            mapper = Mapper(device, kind.document, datatype) if own else kind.mapper
            return compile_device(device, kind.document, kind.parser, datatype, decoder, mapper)
        except Reject as e:
            return e

    def _type(self, name: str) -> "_Type":
        """What the devices of a type have in common.

        Raises:
            Reject: NO_PARSER, the type or its parser is not there.
        """
        if self._types_rev != self._catalogue.rev:
            self._types_rev = self._catalogue.rev
            self._types.clear()
        kind = self._types.get(name)
        if kind is None:
            document = self._catalogue.type(name)
            if document is None:
                message = f"device type {name} is not registered"
                raise Reject(ReasonCode.NO_PARSER, message)
            parser = self._catalogue.parser(document["parser"])
            if parser is None:
                message = f"device type {name} has no active parser {document['parser']}"
                raise Reject(ReasonCode.NO_PARSER, message)
            mapper = Mapper(cast(DeviceDoc, {}), document, self._catalogue.datatype)
            kind = self._types[name] = _Type(
                document, parser, self._decoder(parser, variables_of({}, document)), mapper
            )
        return kind

    def _decoder(self, parser: ParserDoc, variables: dict[str, Any]) -> Decoder | ScriptParser | Reject:
        """The compiled parser, or why it cannot be compiled."""
        key = (parser["name"], parser["version"], parser["hash"], orjson.dumps(variables, option=orjson.OPT_SORT_KEYS))
        decoder = self._decoders.get(key)
        if decoder is None:
            try:
                decoder = compile_any(parser, variables)
            except Reject as e:
                decoder = e
            self._decoders[key] = decoder
        return decoder


class _Type(NamedTuple):
    """What the devices of a type have in common."""

    document: DeviceTypeDoc
    parser: ParserDoc
    decoder: Decoder | ScriptParser | Reject  #: of those that have no variables
    mapper: Mapper  #: of those that say nothing of their own


def _error_lines(
    record: Record,
    raw: RawMessage,
    original: bytes,
    known: CompiledDevice | None,
    refused: Sequence[Reject],
    now_us: int,
) -> Iterator[ErrorLine]:
    """A line for each value, and for each part, of a message that cannot be used.

    A part that says something by itself is told with its own bytes. All others are told with those of the whole message, which a
    redrive sends once: where they are many and it is large, only the first of each code.
    """
    bytes_left = ERROR_RAW_BYTES_MAX
    told: set[ReasonCode] = set()
    for number, reject in enumerate(refused, 1):
        part = number if isinstance(reject, PartRefused) else None
        bare = part is None and reject.code in told and bytes_left < len(original)
        if part is None:
            bytes_left -= len(original)
            told.add(reject.code)
        yield error_line(
            STAGE,
            reject.code,
            str(reject),
            topic=topics.RAW.name,
            partition=raw["raw_partition"],
            record=record,
            index=raw["raw_index"],
            raw=reject.payload if isinstance(reject, PartRefused) else original,
            part=part,
            envelope=None if part is None else around(raw),
            bare=bare,
            device_id=known.device_id if known else raw["device"],
            parser=known.parser if known else None,
            config_rev=known.rev if known else None,
            now_us=now_us,
        )


def script_call(parser: ScriptParser, raw: RawMessage) -> Call:
    """The call that decodes a message.

    Raises:
        Reject: see `ScriptParser.arguments`.
    """
    script = Script(parser.script_id, parser.name, parser.kind, parser.source)
    return Call(script, parser.function, parser.arguments(raw))


def script_fields(parser: ScriptParser, outcome: Outcome, received_at: int = 0) -> list[Decoded | Reject]:
    """The fields of a call's outcome.

    Args:
        parser: the script.
        outcome: what became of its call.
        received_at: when the message was received, µs.

    Raises:
        Reject: the script faulted, with its name, version and line; or see `ScriptParser.fields`.
    """
    fault = outcome.fault
    if fault is not None:
        where = f"{parser.name}, line {fault.line}" if fault.line is not None else parser.name
        raise Reject(fault.code, f"{where}: {fault.message}")
    return parser.fields(cast(str, outcome.text), received_at)


def _normalized(
    raw: RawMessage, compiled: CompiledDevice | Reject | None, ran: Ran | None, now_us: int, readings_max: int
) -> Normalized:
    """A message with its readings, of what its script found (`ran`) where its parser is one.

    Raises:
        Reject: it cannot be used.
    """
    if type(compiled) is CompiledDevice:
        if ran is None:
            return normalize(raw, compiled, now_us, readings_max)
        if isinstance(ran, Reject):
            raise ran
        return standardize(raw, compiled, ran, readings_max)
    if isinstance(compiled, Reject):
        raise Reject(compiled.code, str(compiled))
    message = f"device {raw['device']} is not registered"
    raise Reject(ReasonCode.UNKNOWN_DEVICE, message)


def _packed(made: Sequence[tuple[str, bytes]], record_bytes_max: int) -> Iterator[tuple[str, bytes]]:
    """(device, value) of lines in as few values for a device as records may be large; each line alone is small enough."""
    by_device: dict[str, list[bytes]] = {}
    for device_id, line in made:
        by_device.setdefault(device_id, []).append(line)
    for device_id, lines in by_device.items():
        start = size = 0
        for i, line in enumerate(lines):
            if i > start and size + 1 + len(line) > record_bytes_max:
                yield device_id, b"\n".join(lines[start:i])
                start, size = i, 0
            size += len(line) + (i > start)
        yield device_id, b"\n".join(lines[start:])
