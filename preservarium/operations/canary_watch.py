"""What is in force beside a canary's candidate, on the same messages: derived twice by the code that runs live, compared, counted.

A worker notes the messages of devices that are in a share, and compares them a moment later, so that no message waits for it. Where more
come than are compared in time they are counted as skipped. What was counted goes to PostgreSQL, where one worker decides for all.
"""

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, cast

import asyncpg
import structlog
from cachetools import LRUCache, TTLCache

from preservarium import metrics
from preservarium.clock import Clock
from preservarium.domain.canary import CanaryDoc, Counts, Readings, Seen, decide, readings_of, sees
from preservarium.domain.decoders.scripts import ScriptParser
from preservarium.domain.quality.checks import DeviceChecks, compile_checks
from preservarium.domain.quality.rederivation import judged
from preservarium.domain.quality.validation import Limits
from preservarium.domain.readings.address import canonical_address
from preservarium.domain.readings.normalize import (
    CompiledDevice,
    compile_device,
    has_payload,
    normalize,
    require_enabled,
    standardize,
)
from preservarium.domain.readings.reading import RawMessage
from preservarium.domain.registry.device import DeviceDoc
from preservarium.errors import Fatal, PreservariumError, ReasonCode, Reject, Retry, reason
from preservarium.settings import Settings
from preservarium.stages.normalize import Sandbox, script_call, script_fields
from preservarium.stores import canaries
from preservarium.stores.connections import Pool

log = structlog.get_logger(__name__)

#: Messages that wait to be compared, and those that one turn compares: some 100 ms of work.
WAITING_MAX: Final = 2_000
#: Bytes of a message that is compared; larger ones are skipped.
PAYLOAD_BYTES_MAX: Final = 65_536
#: Messages compared between two looks at the event loop.
AT_ONCE: Final = 50
#: Compiled configurations: two of each device that is in a share.
COMPILED_MAX: Final = 5_000
#: Devices of which it is remembered whether they see a canary; and for how long, as a device may be sent in another spelling.
SHARES_MAX: Final = 100_000
SHARES_TTL_S: Final = 60.0
#: One worker decides at a time ("PRESCA").
DECIDE_LOCK_KEY: Final = 0x5052_4553_4341
#: Who acts where the limits do.
ACTOR: Final = "preservarium (limits)"

_Compiled = tuple[CompiledDevice | Reject, DeviceChecks]


class Watch:
    """Compares on one worker. For one event loop.

    Args:
        types: the catalogue, with `canaries` and `rev`.
        known: the document of a device on a partition, where this worker knows it.
        settings: asked at each turn.
        clock: the worker's.
        sandbox: for parser scripts.
    """

    def __init__(
        self,
        types: Any,
        known: Callable[[int, str], DeviceDoc | None],
        settings: Callable[[], Settings],
        clock: Clock,
        sandbox: Sandbox | None = None,
    ) -> None:
        self._types = types
        self._known = known
        self._settings = settings
        self._clock = clock
        self._sandbox = sandbox
        self._worker = f"{socket.gethostname()}/{os.getpid()}"
        self._waiting: deque[tuple[CanaryDoc, RawMessage, DeviceDoc]] = deque()
        self._compiled: LRUCache[tuple[Any, ...], _Compiled] = LRUCache(COMPILED_MAX)
        #: address as it is sent -> document, where it sees a canary, and which
        self._shares: TTLCache[str, tuple[DeviceDoc | None, Sequence[CanaryDoc]]] = TTLCache(
            SHARES_MAX, SHARES_TTL_S, timer=clock.monotonic_s
        )
        self._shares_rev = -1
        #: canary, started, share -> what was compared and is not told yet
        self._counts: dict[tuple[str, int, int], tuple[CanaryDoc, Counts]] = {}
        self._pool = Pool(
            lambda: settings().postgres.dsn,
            connections_max=lambda: 1,
            connect_timeout_s=lambda: settings().postgres.connect_timeout_s,
            command_timeout_s=lambda: settings().postgres.command_timeout_s,
            server_settings={"application_name": "preservarium-canary"},
        )

    def saw(self, partition: int, messages: Iterable[RawMessage]) -> None:
        """Note messages, to be compared later. Never waits, never raises."""
        for raw in messages:
            if raw.get("generation") or not has_payload(raw):
                continue
            device, found = self._share(partition, raw["device"])
            if device is None:
                continue
            for canary in found:
                if len(self._waiting) >= WAITING_MAX:
                    self._of(canary).skipped += 1
                else:
                    self._waiting.append((canary, raw, device))

    def _share(self, partition: int, address: str) -> tuple[DeviceDoc | None, Sequence[CanaryDoc]]:
        """A device's document and the canaries that it sees; remembered until the registry or the device changes."""
        if self._shares_rev != self._types.rev:
            self._shares_rev = self._types.rev
            self._shares.clear()
        found = self._shares.get(address)
        if found is None:
            device = self._known(partition, address)
            if device is None:
                return None, ()  # it may be registered any moment
            seen = [
                canary
                for canary in self._types.canaries.values()
                if sees(canary, device["device_id"]) and self._concerns(canary, device)
            ]
            found = self._shares[address] = (device if seen else None), seen
        return found

    def forget(self, device_id: str) -> None:
        """Look a device up anew: its configuration has changed."""
        for address in {device_id, canonical_address(device_id)}:
            self._shares.pop(address, None)

    def _concerns(self, canary: CanaryDoc, device: DeviceDoc) -> bool:
        """Whether the candidate may make a difference to a device."""
        if canary["kind"] != "parser":
            return True
        kind = self._types.type(device["type"])
        return kind is not None and kind["parser"] == canary["of"]

    def _of(self, canary: CanaryDoc) -> Counts:
        key = canary["name"], canary["started_at"], canary["percent"]
        return self._counts.setdefault(key, (canary, Counts()))[1]

    # --- comparing

    async def turn(self) -> None:
        """Compare what waits, tell PostgreSQL, and decide where nobody else does. What cannot be done is logged, and tried again."""
        for n in range(min(len(self._waiting), WAITING_MAX)):
            canary, raw, device = self._waiting.popleft()
            await self._compare(canary, raw, device)
            if n % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
        if not self._counts and not self._types.canaries:
            return
        try:
            async with self._pool.acquire() as connection:
                await self._tell(connection)
                await self._decide(connection)
        except (
            Retry,
            PreservariumError,
            OSError,
            TimeoutError,
            asyncpg.PostgresError,
            asyncpg.InterfaceError,
            asyncpg.InternalClientError,
        ) as e:
            log.warning("canary_put_off", error=reason(e))

    async def _compare(self, canary: CanaryDoc, raw: RawMessage, device: DeviceDoc) -> None:
        counts = self._of(canary)
        try:
            candidate = await self._derived(canary, raw, device)
            current = await self._derived(None, raw, device)
        except Fatal as e:
            counts.skipped += 1
            log.warning("canary_not_compared", canary=canary["name"], error=str(e))
            return
        before = counts.different
        counts.add(
            current, candidate,
            {"device_id": device["device_id"], "raw": f"{raw['raw_partition']}:{raw['raw_offset']}:{raw['raw_index']}"},
        )  # fmt: skip
        outcome = "different" if counts.different > before else "same"
        metrics.CANARY_MESSAGES.labels(canary["name"], outcome).inc()

    async def _derived(self, canary: CanaryDoc | None, raw: RawMessage, device: DeviceDoc) -> Readings | None:
        """What becomes of a message: its readings as judged; None where it is refused.

        Raises:
            Fatal: the parser is a script, and the sandbox does not start.
        """
        settings = self._settings()
        compiled, checks = self._configuration(canary, device)
        try:
            if isinstance(compiled, Reject):
                raise compiled
            if isinstance(compiled.decoder, ScriptParser):
                require_enabled(compiled)
                if self._sandbox is None:
                    message = "this worker runs no parser scripts"
                    raise Fatal(message)
                (outcome,) = await self._sandbox.run([script_call(compiled.decoder, raw)])
                fields = script_fields(compiled.decoder, outcome, raw["received_at"])
                normalized = standardize(raw, compiled, fields, settings.normalize.readings_max)
            else:
                normalized = normalize(raw, compiled, raw["received_at"], settings.normalize.readings_max)
        except Reject:
            return None
        quality = settings.quality
        limits = Limits(
            future_skew_us=round(quality.future_skew_s * 1e6),
            store_failed=quality.store_failed,
            series_max=quality.series_per_device_max,
        )
        done = judged(cast(Mapping[str, Any], normalized.message), checks, limits)
        return readings_of(done.message, done.readings)

    def _configuration(self, canary: CanaryDoc | None, device: DeviceDoc) -> _Compiled:
        """Compiled as the share sees it, or (None) as all others do: by the one canary alone, whatever others are under way."""
        key = device["device_id"], device["rev"], self._types.rev, None if canary is None else canary["rev"]
        found = self._compiled.get(key)
        if found is None:
            types = self._types if canary is None else Seen(self._types, [canary])
            checks = compile_checks(device, types.datatype, types.type(device["type"]))
            found = self._compiled[key] = _compile(types, device), checks
        return found

    # --- telling and deciding

    async def _tell(self, connection: Any) -> None:
        for key in list(self._counts):
            canary, new = self._counts.pop(key)
            try:
                await canaries.add_counts(connection, canary, self._worker, new)
            except BaseException:
                self._of(canary).join(new)  # what was counted meanwhile stays, too
                raise

    async def _decide(self, connection: Any) -> None:
        async with connection.transaction():
            # Until the end of the transaction: also through a pooler.
            if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", DECIDE_LOCK_KEY):
                return
            for stored in await canaries.all_of_them(connection):
                canary, now_us = stored.document, self._clock.now_us()
                decision = decide(canary, await canaries.counts(connection, canary), now_us)
                if decision is None:
                    continue
                name, why = canary["name"], decision.reason
                by: dict[str, Any] = {"actor": ACTOR, "reason": why, "at_us": now_us, "expected": stored.version}
                if decision.action == "step":
                    await canaries.step(connection, name, decision.percent, **by)
                else:
                    await canaries.end(connection, name, promote=decision.action == "promote", **by)
                log.warning(
                    "canary_decided", canary=name, action=decision.action, percent=canary["percent"], reason=why
                )
                metrics.CANARY_DECISIONS.labels(name, decision.action).inc()
            await canaries.prune(connection)

    async def close(self) -> None:
        """Give the connection back."""
        await self._pool.close()


def _compile(types: Any, device: DeviceDoc) -> CompiledDevice | Reject:
    kind = types.type(device["type"])
    parser = None if kind is None else types.parser(kind["parser"])
    if kind is None or parser is None:
        return Reject(ReasonCode.NO_PARSER, "the type or its parser is not there")
    try:
        return compile_device(device, kind, parser, types.datatype)
    except Reject as e:
        return e
