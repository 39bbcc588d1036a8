"""Addresses that send and that nobody registered: how often, what, and which parsers of the registry understand it.

What is refused as `unknown_device` is counted by address, in whatever spelling. The last payloads of each are given to every parser in force, scripts in
the sandbox as in the stream. A parser that takes all of them without an error comes before one that takes some; then the one whose readings have datatypes
and lie within their spans; then the one of which more readings do. Nothing is written.
"""

from collections import deque
from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Protocol, cast

import orjson

from preservarium.domain.decoders.base import Decoded
from preservarium.domain.decoders.kinds import compile_any
from preservarium.domain.decoders.scripts import ScriptParser
from preservarium.domain.readings.address import canonical_address
from preservarium.domain.readings.normalize import compile_device, has_payload, standardize
from preservarium.domain.readings.number import shown
from preservarium.domain.readings.reading import RawMessage
from preservarium.domain.registry.device import DatatypeDoc, DeviceDoc, DeviceTypeDoc, ParserDoc
from preservarium.errors import ReasonCode, Reject
from preservarium.operations.dlq import Letter
from preservarium.sandbox.pool import Call, Outcome
from preservarium.stages.normalize import script_call, script_fields
from preservarium.streaming.records import is_envelope, parse_envelope, payload_of

#: Addresses that are counted; of a flood of invented ones only the number of messages.
ADDRESSES_MAX: Final = 10_000
#: Last payloads of an address that are tried: a device has a few kinds of messages.
SAMPLES_MAX: Final = 3
#: Bytes of payloads that are kept; of addresses that come when they are full only the number of messages.
SAMPLE_BYTES_MAX: Final = 64 * 1024 * 1024
#: Tries in all. A declarative parser takes some 20 µs, a script some 50 µs.
TRIES_MAX: Final = 200_000
#: Fields of a parser that are shown.
FIELDS_SHOWN_MAX: Final = 6


@dataclass(slots=True)
class Unknown:
    """An address that nobody registered."""

    device: str  #: as it was spelled last
    count: int = 0
    first_seen: int = 0  #: µs
    last_seen: int = 0  #: µs
    samples: deque[RawMessage] = field(default_factory=deque)  #: the last ones, oldest first
    sizes: deque[int] = field(default_factory=deque)  #: of them, bytes

    @property
    def last(self) -> RawMessage | None:
        """Its last message that can be read."""
        return self.samples[-1] if self.samples else None


@dataclass(frozen=True, slots=True)
class Fit:
    """A parser that takes payloads of an address."""

    parser: str  #: its name
    types: tuple[str, ...]  #: device types that use it
    taken: int  #: payloads that it takes without an error
    tried: int
    readings: int  #: of those payloads
    plausible: int  #: of them, that have a datatype and lie within what it allows
    shown: Mapping[str, Any]  #: fields of the last payload that it takes

    @property
    def rank(self) -> tuple[float, float, int]:
        """The better, the greater."""
        return self.taken / self.tried, self.plausible / max(1, self.readings), self.plausible


@dataclass(slots=True)
class Tally:
    """All of them, as error lines tell."""

    by_address: dict[str, Unknown] = field(default_factory=dict)
    others: int = 0  #: messages of addresses beyond `ADDRESSES_MAX`
    bytes: int = 0  #: of the payloads that are kept

    def add(self, line: Mapping[str, Any], sample: RawMessage | None, size: int = 0) -> None:
        """Count an error line.

        Args:
            line: of `iot_errors`, with the code `unknown_device`.
            sample: the message that it keeps, where it can be read.
            size: of the message, bytes.
        """
        device = str(line.get("device_id") or "")
        if not device:
            return
        address = canonical_address(device)
        found = self.by_address.get(address)
        if found is None:
            if len(self.by_address) >= ADDRESSES_MAX:
                self.others += 1
                return
            found = self.by_address[address] = Unknown(device)
        at = int(line.get("first_seen") or 0)
        found.count += 1
        found.first_seen = min(found.first_seen or at, at)
        if at >= found.last_seen:
            found.last_seen, found.device = at, device
        if sample is None:
            return
        if len(found.samples) == SAMPLES_MAX:
            found.samples.popleft()
            self.bytes -= found.sizes.popleft()
        if self.bytes + size <= SAMPLE_BYTES_MAX:
            found.samples.append(sample)
            found.sizes.append(size)
            self.bytes += size

    def without(self, registered: Iterable[str]) -> list[Unknown]:
        """Those that are not registered meanwhile, the busiest first."""
        known = {canonical_address(device) for device in registered}
        left = [unknown for address, unknown in self.by_address.items() if address not in known]
        return sorted(left, key=lambda u: (-u.count, u.device))


class Sandbox(Protocol):
    """Where scripts run."""

    async def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """The outcome of every call, in their order."""
        ...


async def tally(letters: AsyncIterable[Letter], payload_bytes_max: int) -> Tally:
    """Count the addresses of error lines.

    Args:
        letters: those with the code `unknown_device`, in their order.
        payload_bytes_max: of a message.
    """
    found = Tally()
    async for letter in letters:
        found.add(letter.line, message_of(letter, payload_bytes_max), len(letter.input or b""))
    return found


def message_of(letter: Letter, payload_bytes_max: int) -> RawMessage | None:
    """The message that a letter keeps; None where it is not wholly kept, or is an event of the network alone."""
    original = letter.input
    if original is None:
        return None
    parsed, device = payload_of(original), str(letter.line["device_id"])
    received_at = int(letter.line.get("received_at") or letter.line.get("first_seen") or 0)
    fields: dict[str, Any]
    if is_envelope(parsed):
        try:
            fields = parse_envelope(parsed, key_device=device, size=len(original), payload_bytes_max=payload_bytes_max)
        except Reject:
            return None
    else:
        fields = {
            "device": device, "received_at": None, "connector": "", "mode": "", "topic": "", "port": None, "payload": parsed, "meta": {},
            "experiment_id": None,
        }  # fmt: skip
    if fields["received_at"] is None:
        fields["received_at"] = received_at
    raw = cast(RawMessage, {**fields, "raw_partition": 0, "raw_offset": 0, "raw_index": 0, "generation": 0})
    return raw if has_payload(raw) else None


class Matcher:
    """Tries the parsers of a registry.

    Args:
        documents: of the registry, by kind.
        sandbox: runs scripts; None: they are left out.
    """

    def __init__(self, documents: Mapping[str, Sequence[Mapping[str, Any]]], sandbox: Sandbox | None) -> None:
        self._sandbox = sandbox
        self._datatypes: dict[str, Any] = {d["name"]: d for d in documents.get("datatype", ())}
        self._types: dict[str, list[Mapping[str, Any]]] = {}
        for kind in documents.get("type", ()):
            self._types.setdefault(kind["parser"], []).append(kind)
        self._parsers: list[tuple[Mapping[str, Any], Any]] = []
        for doc in documents.get("parser", ()):
            if doc.get("status") != "active":
                continue
            try:
                compiled = compile_any({"version": 1, **doc})
            except Reject:
                continue  # the registry's own checks tell
            if sandbox is not None or not isinstance(compiled, ScriptParser):
                self._parsers.append((doc, compiled))

    async def fits(self, unknown: Sequence[Unknown]) -> list[list[Fit]]:
        """For each address the parsers that take any of its payloads, the best first."""
        every = (
            (place, at, raw)
            for place, one in enumerate(unknown)
            for at in range(len(self._parsers))
            for raw in one.samples
        )
        tries = list(islice(every, TRIES_MAX))
        ran = await self._run(tries)
        found: list[list[Fit]] = [[] for _ in unknown]
        made: dict[tuple[int, int], list[tuple[RawMessage, Sequence[Decoded]]]] = {}
        for number, (place, at, raw) in enumerate(tries):
            compiled = self._parsers[at][1]
            try:
                fields = ran[number] if isinstance(compiled, ScriptParser) else compiled.decode(raw)
            except Reject:
                continue
            if fields is None or not fields or any(isinstance(one, Reject) for one in fields):
                continue
            made.setdefault((place, at), []).append((raw, fields))
        for (place, at), taken in made.items():
            found[place].append(self._fit(at, taken, len(unknown[place].samples)))
        return [
            sorted(fits, key=lambda fit: ((-fit.rank[0], -fit.rank[1], -fit.rank[2]), fit.parser)) for fits in found
        ]

    async def _run(self, tries: Sequence[tuple[int, int, RawMessage]]) -> dict[int, Sequence[Any] | None]:
        """What scripts make of their tries, by the number of the try; None where they fault."""
        numbers: list[int] = []
        calls: list[Call] = []
        for number, (_, at, raw) in enumerate(tries):
            compiled = self._parsers[at][1]
            if isinstance(compiled, ScriptParser):
                try:
                    calls.append(script_call(compiled, raw))
                    numbers.append(number)
                except Reject:
                    continue
        ran: dict[int, Sequence[Any] | None] = dict.fromkeys(range(len(tries)))
        if calls and self._sandbox is not None:
            for number, outcome in zip(numbers, await self._sandbox.run(calls), strict=True):
                _, at, raw = tries[number]
                try:
                    ran[number] = script_fields(self._parsers[at][1], outcome, raw["received_at"])
                except Reject:
                    continue
        return ran

    def _fit(self, at: int, taken: Sequence[tuple[RawMessage, Sequence[Decoded]]], tried: int) -> Fit:
        doc, compiled = self._parsers[at]
        types = self._types.get(doc["name"], [])
        # Of types that share a parser the first says what its fields are called; each of them may.
        kind = types[0] if types else {"name": "?", "manufacturer": "?", "parser": doc["name"]}
        device = cast(DeviceDoc, {"device_id": "?", "rev": 0, "type": kind["name"], "enabled": True})
        configuration = compile_device(
            device, cast(DeviceTypeDoc, {"rev": 0, **kind}), cast(ParserDoc, {"rev": 0, "version": 1, **doc}),
            cast(Callable[[str], DatatypeDoc | None], self._datatypes.get), compiled,
        )  # fmt: skip
        readings = plausible = 0
        for raw, fields in taken:
            try:
                message, refused = standardize(raw, configuration, fields)
            except Reject:
                readings += len(fields)
                continue
            readings += len(message["readings"]) + len(refused)
            plausible += sum(self._plausible(reading) for reading in message["readings"])
        last = taken[-1][1]
        return Fit(
            doc["name"], tuple(t["name"] for t in types), len(taken), tried, readings, plausible,
            {one.name: shown(one.value) for one in last[:FIELDS_SHOWN_MAX]},
        )  # fmt: skip

    def _plausible(self, reading: Mapping[str, Any]) -> bool:
        datatype = self._datatypes.get(reading["component_type"])
        if datatype is None or {"unit_mismatch", "unit_unknown"} & set(reading.get("flags", ())):
            return False
        value, span = (
            reading.get("value"),
            {**(datatype.get("fail_span") or {}), **(datatype.get("suspect_span") or {})},
        )
        if value is None:
            return True
        low, high = span.get("min"), span.get("max")
        return (low is None or value >= low) and (high is None or value <= high)


def document(unknown: Unknown, fits: Sequence[Fit]) -> dict[str, Any]:
    """An address and its parsers as JSON; instants in µs."""
    last = unknown.last
    found: dict[str, Any] = {
        "device": unknown.device, "count": unknown.count, "first_seen": unknown.first_seen, "last_seen": unknown.last_seen,
    }  # fmt: skip
    if last is not None:
        payload = last["payload"]
        found |= {"connector": last["connector"], "mode": last["mode"], "topic": last["topic"], "port": last["port"]}
        found |= {"hex": payload.hex()} if isinstance(payload, bytes) else {"payload": payload}
    found["parsers"] = [
        {
            "parser": fit.parser, "types": list(fit.types), "taken": fit.taken, "tried": fit.tried, "readings": fit.readings,
            "plausible": fit.plausible, "fields": dict(fit.shown),
        }
        for fit in fits
    ]  # fmt: skip
    return found


def payload_text(raw: RawMessage | None, characters: int) -> str:
    """A payload for people, cut."""
    if raw is None:
        return ""
    payload = raw["payload"]
    text = payload.hex() if isinstance(payload, bytes) else orjson.dumps(payload).decode()
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


#: The only code that is asked for.
CODES: Final = (ReasonCode.UNKNOWN_DEVICE,)
