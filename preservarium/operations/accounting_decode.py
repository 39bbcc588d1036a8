"""What raw messages should have become, decoded once more for the audit of a run (accounting.py)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

from preservarium.domain.decoders.scripts import ScriptParser
from preservarium.domain.readings.address import canonical_address
from preservarium.domain.readings.normalize import CompiledDevice, compile_device, normalize, standardize
from preservarium.domain.readings.reading import Message, RawMessage
from preservarium.errors import Reject
from preservarium.sandbox.pool import Call, Limits, SandboxPool
from preservarium.settings import Settings
from preservarium.stages.normalize import script_call, script_fields

#: The database must answer within this time.
CONNECT_S: Final = 30.0


async def registry_decode(settings: Settings) -> "RegistryDecode":
    """The pure normalizer with the registry as it is now in PostgreSQL. To be closed: scripts run in processes.

    Raises:
        MigrationError: PostgreSQL cannot be reached.
    """
    from preservarium.stores import registry
    from preservarium.stores.migrate import connect_postgres

    connection = await connect_postgres(settings, wait_s=CONNECT_S)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            loaded = await registry.load(connection, ("datatype", "parser", "type", "device"))
    finally:
        await connection.close(timeout=5)
    documents = {
        kind: [{**stored.document, "rev": stored.rev} for stored in streams.values()]
        for kind, streams in loaded.items()
    }
    limits = Limits.of(settings)
    # Nothing is set aside here: what the worker refused stands in iot_errors, and the rest must be decoded. Nobody waits
    # either, so a script has more time than in the stream.
    sandbox = SandboxPool(
        replace(
            limits, cpu_s=limits.cpu_s * 5, wall_s=limits.wall_s * 5, hard_faults_max=1_000, soft_faults_max=1 << 62
        )
    )
    return RegistryDecode(documents, sandbox, readings_max=settings.normalize.readings_max)


class RegistryDecode:
    """What raw messages become with these registry documents (kind -> documents).

    Args:
        documents: datatypes, parsers, types and devices.
        sandbox: runs parser scripts; closed by `close`.
        readings_max: most readings that a message may become.
    """

    def __init__(
        self, documents: Mapping[str, Sequence[Mapping[str, Any]]], sandbox: SandboxPool, *, readings_max: int
    ) -> None:
        self._compiled = _compiler(documents)
        self._sandbox = sandbox
        self._readings_max = readings_max

    def __call__(self, raw: RawMessage) -> Message | None:
        """What a message became; None: it is refused."""
        configuration = self._compiled(raw["device"])
        if configuration is None:
            return None
        try:
            return normalize(raw, configuration, raw["received_at"], self._readings_max).message
        except Reject:
            return None

    def wants(self, device_id: str) -> bool:
        """Whether this device's parser is a script."""
        configuration = self._compiled(device_id)
        return configuration is not None and isinstance(configuration.decoder, ScriptParser)

    async def decode(self, raws: Sequence[RawMessage]) -> list[Message | None]:
        """What the scripts make of these messages.

        Raises:
            Fatal: the sandbox does not start.
        """
        made: list[Message | None] = [None] * len(raws)
        calls: list[tuple[int, CompiledDevice, ScriptParser, Call]] = []
        for i, raw in enumerate(raws):
            configuration = self._compiled(raw["device"])
            if (
                configuration is None
                or not isinstance(configuration.decoder, ScriptParser)
                or not configuration.enabled
            ):
                continue
            with suppress(Reject):
                calls.append((i, configuration, configuration.decoder, script_call(configuration.decoder, raw)))
        outcomes = await self._sandbox.run([call for *_, call in calls])
        for (i, configuration, parser, _), outcome in zip(calls, outcomes, strict=True):
            with suppress(Reject):
                fields = script_fields(parser, outcome, raws[i]["received_at"])
                made[i] = standardize(raws[i], configuration, fields, self._readings_max).message
        return made

    async def close(self) -> None:
        """End the sandbox."""
        await self._sandbox.close()


def _compiler(documents: Mapping[str, Sequence[Mapping[str, Any]]]) -> Callable[[str], CompiledDevice | None]:
    datatypes: dict[str, Any] = {d["name"]: d for d in documents["datatype"]}
    parsers: dict[str, Any] = {p["name"]: p for p in documents["parser"] if p["status"] == "active"}
    types: dict[str, Any] = {t["name"]: t for t in documents["type"]}
    devices: dict[str, Any] = {canonical_address(d["device_id"]): d for d in documents["device"]}
    # Parsers are compiled once for all devices that have no variables of their own: compiling is the costly part.
    shared: dict[tuple[str, str | None], Any] = {}

    @lru_cache(maxsize=100_000)
    def compiled(device_id: str) -> CompiledDevice | None:
        device = devices.get(canonical_address(device_id))
        device_type = types.get(device["type"]) if device else None
        parser = parsers.get(device_type["parser"]) if device_type else None
        if device is None or device_type is None or parser is None:
            return None
        own_words = device.get("variables") or device.get("time_zone")
        common = parser["name"], device_type.get("time_zone")
        decoder = None if own_words else shared.get(common)
        try:
            found = compile_device(device, device_type, parser, datatypes.get, decoder)
        except Reject:
            return None
        if not own_words:
            shared[common] = found.decoder
        return found

    return compiled
