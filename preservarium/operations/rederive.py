"""Raw bytes made a reading once more, by the code that runs live and the registry as it was, for `trace` and `lineage verify`.

Which documents a message met is not written in its row; only the parser's version is. They are those of the time between its
receipt and its storing, and as a rule these are the same. Where the registry changed meanwhile, each state that it had is tried
(`moments`), and the first that gives the stored reading is the one.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, cast

import structlog

from preservarium import topics
from preservarium.domain.decoders.base import Decoded, sorted_out
from preservarium.domain.decoders.scripts import ScriptParser
from preservarium.domain.quality.checks import DeviceChecks, compile_checks
from preservarium.domain.quality.rederivation import (
    Difference,
    Judged,
    Status,
    StoredReading,
    Unverifiable,
    compare,
    judged,
    needs_others,
)
from preservarium.domain.quality.validation import Limits
from preservarium.domain.readings import legacy
from preservarium.domain.readings.normalize import (
    CompiledDevice,
    Normalized,
    compile_device,
    normalize,
    require_enabled,
    standardize,
)
from preservarium.domain.readings.reading import RawMessage
from preservarium.errors import Fatal, Reject
from preservarium.sandbox.pool import Call, SandboxPool
from preservarium.sandbox.pool import Limits as SandboxLimits
from preservarium.settings import Settings
from preservarium.stages.normalize import script_call, script_fields
from preservarium.stores.registry_past import Documents, Past
from preservarium.streaming.records import loads, parse_raw

log = structlog.get_logger(__name__)

#: A change of the registry reaches the workers within seconds, and what they had looked up before is kept for a minute.
LEARNT_US: Final = 60_000_000
#: Configurations kept compiled: those of many devices, or of one at many times.
CONFIGURATIONS_MAX: Final = 20_000


class Configuration(NamedTuple):
    """What a device's messages were read with."""

    compiled: CompiledDevice
    checks: DeviceChecks
    documents: Documents
    as_of: int | None  #: µs since the epoch, UTC; None: now


@dataclass(frozen=True, slots=True)
class Derived:
    """A message that was derived again."""

    fields: Sequence[Decoded]  #: what the parser found; nothing of an old service's message
    judged: Judged
    refused: Sequence[Reject]  #: parts and values of it that normalize does not take
    configuration: Configuration | None  #: None: of an old service's message


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of deriving a stored reading again."""

    status: Status
    why: Unverifiable | None = None
    differences: tuple[Difference, ...] = ()
    derived: Derived | None = None
    text: str = ""  #: for people, where there is more to say


class Rederiver:
    """Derives messages again. For one task at a time; to be closed, because scripts run in processes.

    Args:
        settings: limits, and how scripts are confined.
        past: the registry.
    """

    def __init__(self, settings: Settings, past: Past) -> None:
        self._settings = settings
        self._past = past
        self._sandbox: SandboxPool | None = None
        self._known: dict[tuple[str, int, str | None], Configuration | str] = {}
        quality = settings.quality
        self._limits = Limits(
            future_skew_us=round(quality.future_skew_s * 1e6),
            store_failed=quality.store_failed,
            series_max=quality.series_per_device_max,
        )

    async def close(self) -> None:
        """End the sandbox."""
        if self._sandbox is not None:
            await self._sandbox.close()

    # --- configurations

    async def configuration(self, device_id: str, at_us: int | None, parser: str | None) -> Configuration | str:
        """A device's configuration as of an instant, compiled; or why there is none, for people.

        Args:
            device_id: in any spelling.
            at_us: µs since the epoch, UTC; None: now.
            parser: name@version that is to read, whatever was active; None: the active one.
        """
        key = device_id, await self._past.last_change(at_us), parser
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= CONFIGURATIONS_MAX:
                self._known.clear()
            found = self._known[key] = await self._compiled(device_id, at_us, parser)
        return found

    async def _compiled(self, device_id: str, at_us: int | None, parser: str | None) -> Configuration | str:
        documents = await self._past.at(device_id, at_us, parser)
        when = "" if at_us is None else " at that time"
        if documents.device is None:
            return f"device {device_id} is not registered{when}"
        if documents.type is None:
            return f"device type {documents.device['type']} is not registered{when}"
        if documents.parser is None:
            named = parser or f"{documents.type['parser']}, active"
            return f"the registry has no parser {named}{when}"
        try:
            compiled = compile_device(documents.device, documents.type, documents.parser, documents.datatype)
        except Reject as e:
            return str(e)
        checks = compile_checks(documents.device, documents.datatype, documents.type)
        return Configuration(compiled, checks, documents, at_us)

    async def moments(self, device_id: str, received_at: int, ingested_at: int | None) -> list[int | None]:
        """The instants as of which the registry may have been when a message was read, each state of it once."""
        times: list[int | None] = [received_at]
        if ingested_at is not None:
            times.append(ingested_at)
        times += [received_at - LEARNT_US, None]
        found: dict[int, int | None] = {}
        for at_us in times:
            found.setdefault(await self._past.last_change(at_us), at_us)
        return list(found.values())

    # --- deriving

    async def derive(self, raw: RawMessage, configuration: Configuration) -> Derived:
        """Derive a message again.

        Raises:
            Reject: it cannot be used, as normalize says.
            Fatal: its parser is a script, and the sandbox does not start.
        """
        (made,) = await self.derive_many([(raw, configuration)])
        if isinstance(made, Reject):
            raise made
        return made

    async def derive_many(self, wanted: Sequence[tuple[RawMessage, Configuration]]) -> list[Derived | Reject]:
        """Derive messages again; scripts run in one round trip. Of what cannot be used, why not.

        Raises:
            Fatal: a parser is a script, and the sandbox does not start.
        """
        made: list[Derived | Reject | None] = [None] * len(wanted)
        calls: list[tuple[int, ScriptParser, Call]] = []
        for i, (raw, configuration) in enumerate(wanted):
            compiled = configuration.compiled
            try:
                if isinstance(compiled.decoder, ScriptParser):
                    require_enabled(compiled)
                    calls.append((i, compiled.decoder, script_call(compiled.decoder, raw)))
                    continue
                normalized = normalize(raw, compiled, raw["received_at"], self._settings.normalize.readings_max)
                fields, _ = sorted_out(compiled.decoder.decode(raw))
                made[i] = self._derived(normalized, fields, configuration)
            except Reject as e:
                made[i] = e
        if calls:
            outcomes = await self._scripts().run([call for *_, call in calls])
            for (i, parser, _), outcome in zip(calls, outcomes, strict=True):
                raw, configuration = wanted[i]
                try:
                    decoded = script_fields(parser, outcome)
                    normalized = standardize(
                        raw, configuration.compiled, decoded, self._settings.normalize.readings_max
                    )
                    made[i] = self._derived(normalized, sorted_out(decoded)[0], configuration)
                except Reject as e:
                    made[i] = e
        return cast(list[Derived | Reject], made)

    def _derived(self, normalized: Normalized, fields: Sequence[Decoded], configuration: Configuration) -> Derived:
        done = judged(cast(Mapping[str, Any], normalized.message), configuration.checks, self._limits)
        return Derived(fields, done, normalized.refused, configuration)

    def _scripts(self) -> SandboxPool:
        if self._sandbox is None:
            limits = SandboxLimits.of(self._settings)
            # Nobody waits for the next message here, and no version is set aside: each message says what it says.
            self._sandbox = SandboxPool(
                replace(
                    limits,
                    cpu_s=limits.cpu_s * 5,
                    wall_s=limits.wall_s * 5,
                    hard_faults_max=1_000,
                    soft_faults_max=1 << 62,
                )
            )
        return self._sandbox

    # --- verifying

    async def verify(self, stored: StoredReading, record: Any | None) -> Verdict:
        """Say whether a stored reading comes out of its raw record bit by bit as it is stored."""
        (verdict,) = await self.verify_many([(stored, record)])
        return verdict

    async def verify_many(self, rows: Sequence[tuple[StoredReading, Any | None]]) -> list[Verdict]:
        """`verify` for many readings, each with its raw record, or None where Kafka has it no more."""
        verdicts: list[Verdict | None] = [None] * len(rows)
        lines: dict[int, dict[int, RawMessage]] = {}
        waiting: list[tuple[int, RawMessage, list[int | None]]] = []
        for i, (stored, record) in enumerate(rows):
            if i % 200 == 199:
                await asyncio.sleep(0)
            if record is None:
                verdicts[i] = Verdict(Status.UNVERIFIABLE, Unverifiable.RAW_GONE)
            elif stored.parser == legacy.PARSER:
                verdicts[i] = _legacy(stored, record)
            else:
                if id(record) not in lines:
                    lines[id(record)] = self.messages(record, stored.raw.partition)
                raw = lines[id(record)].get(stored.raw.line)
                if raw is None:
                    difference = Difference("reading", str(stored.raw), "no message is at these coordinates")
                    verdicts[i] = Verdict(Status.DIFFERENT, differences=(difference,))
                else:
                    raw = cast(RawMessage, {**raw, "generation": stored.generation})
                    waiting.append(
                        (i, raw, await self.moments(stored.device_id, stored.received_at, stored.ingested_at))
                    )
        # As of one instant after the other: the second is seldom needed.
        while waiting:
            later: list[tuple[int, RawMessage, list[int | None]]] = []
            at_work: list[tuple[int, RawMessage, list[int | None], Configuration]] = []
            for i, raw, moments in waiting:
                stored = rows[i][0]
                configuration = await self.configuration(stored.device_id, moments[0], stored.parser)
                if isinstance(configuration, str):
                    verdicts[i] = _better(
                        verdicts[i], Verdict(Status.UNVERIFIABLE, Unverifiable.NO_CONFIGURATION, text=configuration)
                    )
                    if len(moments) > 1:
                        later.append((i, raw, moments[1:]))
                else:
                    at_work.append((i, raw, moments, configuration))
            try:
                made = await self.derive_many([(raw, configuration) for _, raw, _, configuration in at_work])
            except Fatal as e:
                made = None
                log.warning("sandbox_does_not_start", error=str(e))
            for n, (i, raw, moments, _) in enumerate(at_work):
                if made is None:
                    verdicts[i] = Verdict(Status.UNVERIFIABLE, Unverifiable.NO_SANDBOX)
                    continue
                verdict = _verdict(rows[i][0], made[n])
                verdicts[i] = _better(verdicts[i], verdict)
                if verdict.status is Status.DIFFERENT and len(moments) > 1:
                    later.append((i, raw, moments[1:]))
            waiting = later
        return cast(list[Verdict], verdicts)

    def messages(self, record: Any, partition: int) -> dict[int, RawMessage]:
        """The messages of a record of `iot_raw_data`, by their lines."""
        found, _ = parse_raw(
            record, topics.RAW.name, partition, payload_bytes_max=self._settings.normalize.payload_bytes_max
        )
        return {message["raw_index"]: message for message in found}


def _better(before: Verdict | None, now: Verdict) -> Verdict:
    """Of what was found as of two instants, what counts: that it is identical, else what the first one said that could say anything."""
    if before is None or now.status is Status.IDENTICAL or before.why is Unverifiable.NO_CONFIGURATION:
        return now
    return before


def _verdict(stored: StoredReading, made: Derived | Reject) -> Verdict:
    if isinstance(made, Reject):
        return Verdict(
            Status.DIFFERENT,
            differences=(Difference("reading", stored.component_type, f"refused: {made.code}: {made}"),),
        )
    if needs_others(stored, made.judged):
        return Verdict(Status.UNVERIFIABLE, Unverifiable.OTHER_MESSAGES, derived=made)
    differences = compare(stored, made.judged)
    return Verdict(Status.DIFFERENT if differences else Status.IDENTICAL, differences=differences, derived=made)


def _legacy(stored: StoredReading, record: Any) -> Verdict:
    """Of the replaced service's messages: their topic has the bytes, and they are no device's."""
    raws = (record.value or b"").split(b"\n")
    try:
        message = legacy.legacy_message(
            loads(raws[stored.raw.line]),
            received_at=record.timestamp * 1_000,
            partition=stored.raw.partition,
            offset=stored.raw.offset,
            index=stored.raw.line,
            generation=stored.generation,
        )
    except (Reject, IndexError) as e:
        return Verdict(Status.DIFFERENT, differences=(Difference("reading", stored.component_type, f"refused: {e}"),))
    done = Judged(cast(Mapping[str, Any], message), cast(Sequence[Mapping[str, Any]], message["readings"]), ())
    differences = compare(stored, done)
    derived = Derived((), done, (), None)
    return Verdict(Status.DIFFERENT if differences else Status.IDENTICAL, differences=differences, derived=derived)
