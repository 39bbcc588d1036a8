"""Payloads through parsers, to be looked at, over HTTP: a refusal's, or one that is typed in. For operators; nothing is sent or stored.

| request | what it answers |
|---|---|
| `POST /api/decode` | what a parser makes of a payload, as fields and as readings |
| `POST /api/decode/all` | which parsers of the registry take a payload, the best first |

The payload is that of a refusal (`refusal`, its id), or `hex`, `text` or `json`, with `port`. The parser is one of the registry (`parser`,
`version`), or one that is written down (`kind`, `source`).
"""

import asyncio
import base64
import functools
from dataclasses import replace
from typing import Any, Final

from aiohttp import web

from preservarium import topics
from preservarium.console.acting import body_of, only, string, whole
from preservarium.console.host import Host
from preservarium.console.replies import TEXT_MAX, answer, bad, missing, wrapped
from preservarium.domain.decoders import examples
from preservarium.domain.decoders.kinds import KINDS
from preservarium.domain.decoders.scripts import FUNCTIONS
from preservarium.domain.readings.reading import RawMessage
from preservarium.domain.registry.documents import source_hash
from preservarium.errors import Fatal, Retry
from preservarium.operations import dlq, trying, unknown_devices
from preservarium.operations.refusals import Refusals
from preservarium.sandbox.pool import Limits, SandboxPool
from preservarium.serving.rights import Right
from preservarium.stores.registry_reads import RegistryReads

#: A payload of a megabyte as hexadecimal, or a source, and some room.
BODY_BYTES_MAX: Final = 4_194_304
PAYLOAD_CHARS_MAX: Final = 2_200_000
TIMEOUT_S: Final = 25.0
#: A person waits, not a stream: a script may be so many times as long under way.
PATIENCE: Final = 10
#: Formats that are parsers by themselves, without a source.
FORMATS: Final = tuple(sorted(set(KINDS) - {"table", "json", "network"}))
#: Payloads that are tried at the same time: each is some ms of the worker's loop, or a turn of the sandbox.
TRIES_MAX: Final = 2

_PAYLOAD: Final = frozenset(("refusal", "hex", "text", "json", "port"))


class Bench:
    """A sandbox for what people try: apart from the stream's, so that no try sets a version of a stream's script aside.

    It starts when it is first needed, and is made anew when many scripts were tried, since each edit is a version of its own.
    """

    RUNS_MAX: Final = 500

    def __init__(self, host: Host) -> None:
        self._host = host
        self._pool: SandboxPool | None = None
        self._runs = 0
        self._turn = asyncio.Lock()

    async def run(self, calls: Any) -> Any:
        """The outcome of every call.

        Raises:
            Fatal: the sandbox does not start.
        """
        async with self._turn:
            if self._pool is not None and self._runs >= self.RUNS_MAX:
                await self._pool.close()
                self._pool = None
            if self._pool is None:
                # An exception is what the person wants to see, again and again. What a script may use is as in the stream; how long a
                # machine that does much else takes for it says nothing of the script.
                limits = Limits.of(self._host.live())
                limits = replace(limits, wall_s=limits.wall_s * PATIENCE, soft_faults_max=1 << 62)
                self._pool, self._runs = SandboxPool(limits), 0
            self._runs += len(calls)
            return await self._pool.run(calls)

    async def close(self) -> None:
        """End its processes."""
        if self._pool is not None:
            await self._pool.close()


class DecodeViews:
    """The views of one worker."""

    def __init__(self, host: Host, reads: RegistryReads, refusals: Refusals, bench: Bench) -> None:
        self._host = host
        self._reads = reads
        self._refusals = refusals
        self._bench = bench
        self._turns = asyncio.Semaphore(TRIES_MAX)

    def mount(self, application: web.Application) -> None:
        """Add the routes to an aiohttp application that has not started."""
        view = functools.partial(wrapped, right=Right.OPERATE, live=self._host.live, problems=True, timeout_s=TIMEOUT_S)
        application.router.add_post("/api/decode", view(self.decode))
        application.router.add_post("/api/decode/all", view(self.all))

    async def decode(self, request: web.Request) -> web.Response:
        """What one parser makes of a payload: `fields`, `readings`, `refused`, `error`, `parser`, `took_ms`."""
        asked = await body_of(request, BODY_BYTES_MAX)
        only(asked, _PAYLOAD | {"parser", "version", "kind", "source"})
        parser = await self._parser(asked)
        raw = await self._message(asked)
        async with self._turns:
            documents = await self._reads.matching()
            datatypes: Any = {each["name"]: each for each in documents["datatype"]}
            kinds = [each for each in documents["type"] if each["parser"] == parser["name"]]
            device_type: Any = {"rev": 0, **kinds[0]} if kinds else None
            try:
                found = await trying.attempt(parser, raw, self._bench, device_type=device_type, datatypes=datatypes)
            except Fatal as e:
                raise Retry(str(e)) from None
        named = f"{parser['name']}@{parser['version']}" if "version" in parser else parser["name"]
        return answer({**found, "parser": named, "type": kinds[0]["name"] if kinds else None})

    async def all(self, request: web.Request) -> web.Response:
        """The parsers in force that take a payload: `parsers`, the best first, each with what it finds."""
        asked = await body_of(request, BODY_BYTES_MAX)
        only(asked, _PAYLOAD)
        raw = await self._message(asked)
        async with self._turns:
            documents = await self._reads.matching()
            unknown = unknown_devices.Unknown(raw["device"])
            unknown.samples.append(raw)
            try:
                (fits,) = await unknown_devices.Matcher(documents, self._bench).fits([unknown])
            except Fatal as e:
                raise Retry(str(e)) from None
        return answer(
            {"parsers": unknown_devices.document(unknown, fits)["parsers"], "tried": len(documents["parser"])}
        )

    async def _parser(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = string(asked, "parser", TEXT_MAX, default="")
        if name:
            version = whole(asked, "version", 1, 2**31 - 1)
            found = await self._reads.parser(name, version)
            if found is None and version is None and name in FORMATS:
                return {"name": name, "kind": name, "source": {}, "hash": source_hash(name, {})}
            if found is None:
                missing("the registry has no such parser in force")
            return found
        kind = string(asked, "kind", TEXT_MAX, default="")
        if kind not in KINDS and kind not in FUNCTIONS:
            bad(f"name a parser, or its kind: {', '.join(sorted({*KINDS, *FUNCTIONS}))}")
        source = asked.get("source", {})
        if kind in FUNCTIONS and not isinstance(source, str):
            bad(f"a {kind} parser's source is its text")
        return {"name": "tried", "version": 1, "kind": kind, "source": source, "hash": source_hash(kind, source)}

    async def _message(self, asked: dict[str, Any]) -> RawMessage:
        given = [name for name in ("refusal", "hex", "text", "json") if name in asked]
        if len(given) != 1:
            bad("give one of refusal, hex, text, json")
        port = whole(asked, "port", 0, 255)
        if given[0] == "json":
            return examples.raw_message(asked["json"], port=port, received_at=self._host.clock.now_us())
        text = string(asked, given[0], PAYLOAD_CHARS_MAX)
        if given[0] == "text":
            return examples.raw_message(text, port=port, received_at=self._host.clock.now_us())
        if given[0] == "hex":
            try:
                data = bytes.fromhex(text.removeprefix("0x"))
            except ValueError:
                bad("hex is hexadecimal digits, two a byte")
            return examples.raw_message(data, port=port, received_at=self._host.clock.now_us())
        raw = await self._refused(text)
        return raw if port is None else {**raw, "port": port}

    async def _refused(self, identity: str) -> RawMessage:
        kept = self._refusals.get(identity)
        settings = self._host.live()
        try:
            letter = dlq.Letter(identity, kept.line) if kept else await dlq.letter(settings, identity)
            raw = unknown_devices.message_of(letter, settings.normalize.payload_bytes_max) if letter.input else None
            if raw is None and (original := await dlq.original(settings, letter)) is not None:
                kept_of = {k: v for k, v in letter.line.items() if k not in ("raw", "part", "message")}
                line = {**kept_of, "topic": topics.RAW.name, "raw_b64": base64.b64encode(original).decode()}
                raw = unknown_devices.message_of(dlq.Letter(identity, line), settings.normalize.payload_bytes_max)
        except dlq.NoSuchError as e:
            missing(str(e))
        except dlq.DlqError as e:
            raise Retry(str(e)) from None
        if raw is None:
            missing("its payload is not to be had any more, or is none of a device")
        return raw
