"""The downlink stage: each line of `device_downlinks` to the broker, and a report of what became of it.

A downlink is settled when the broker has acknowledged it, when its time is over, or when it cannot be made. Settled is
reported to `device_commands`, and only then is the batch acknowledged. While the broker is down the batch is tried
again; what was settled meanwhile is remembered and not sent twice.

The stage before may send a downlink again after a crash, with the same id: the last ids of each partition are kept beside
the group's offset, and one that is among them is left out. After a crash here, between the broker's acknowledgement and the
commit of the offset, a downlink goes to the broker once more, with the same id.
"""

import base64
import binascii
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import structlog
from cachetools import LRUCache

from preservarium import metrics
from preservarium.clock import Clock
from preservarium.domain.commands.downlinks import (
    ENCODERS,
    DownlinkError,
    Payload,
    encoded,
    encoder_arguments,
    envelope,
    plain_payload,
)
from preservarium.domain.decoders.base import ParserError
from preservarium.domain.decoders.scripts import compile_script
from preservarium.domain.registry.device import ParserDoc
from preservarium.errors import ReasonCode, Retry
from preservarium.sandbox.pool import Call, Outcome, Script
from preservarium.settings import LiveSettings
from preservarium.stages.commands import command_send
from preservarium.streaming.records import error_line, pack, parse_trusted, refuse
from preservarium.streaming.stage import Batch, Effects, Record, Send

log = structlog.get_logger(__name__)

STAGE: Final = "downlink"

#: Downlinks handed over at once: what a crash may send twice.
RECORDS_MAX: Final = 100
#: Ids of a partition that are remembered: brokers take 4 KiB beside an offset, and an id takes 11 bytes there. Three times
#: what a crash of the stage before repeats (commanding.DOWNLINKS_A_TURN_MAX).
REMEMBERED_MAX: Final = 350
#: Bytes of an id that are kept: two of 350 are the same with a chance of 1 in 10**14.
ID_BYTES: Final = 8
#: Settled downlinks of batches that are not acknowledged; a batch that goes to another worker leaves its own behind.
SETTLED_MAX: Final = 10_000


class Documents(Protocol):
    """What of a `Catalogue` the stage needs."""

    def parser(self, name: str) -> ParserDoc | None:
        """The active version of a parser."""
        ...

    async def ready(self) -> None:
        """Wait until everything was read once; raises Retry where it could not be."""
        ...


class Sandbox(Protocol):
    """Runs scripts."""

    async def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """Every call's outcome, in order."""
        ...


class Publishes(Protocol):
    """Takes messages for devices."""

    async def publish(self, messages: Sequence[tuple[str, bytes, int]]) -> tuple[list[bool], str]:
        """Which were acknowledged, and why not all."""
        ...


Line = dict[str, Any]


class Downlinks:
    """Sends tries of commands to the broker or into the mailbox, each once, and reports what became of them.

    It is the stage's handler, and its memory (preservarium/streaming/feeds.py).

    Args:
        documents: the catalogue, for parsers.
        sandbox: runs their encoders.
        broker: takes the downlinks.
        mailbox: takes those for devices that fetch.
        publish: to Kafka, for reports that must not wait for the broker.
        live: settings.
        clock: for expiry.
    """

    def __init__(
        self,
        documents: Documents,
        sandbox: Sandbox,
        broker: Publishes,
        mailbox: Publishes,
        publish: Callable[[Sequence[Send]], Awaitable[Any]],
        live: LiveSettings,
        clock: Clock,
    ) -> None:
        self._documents = documents
        self._sandbox = sandbox
        self._broker = broker
        self._mailbox = mailbox
        self._publish = publish
        self._live = live
        self._clock = clock
        #: downlink -> its report
        self._settled: LRUCache[str, Line] = LRUCache(SETTLED_MAX)
        #: downlinks whose report Kafka has, though their batch is not acknowledged
        self._told: LRUCache[str, bool] = LRUCache(SETTLED_MAX)
        #: partition -> ids of what was acknowledged last
        self._recent: dict[int, deque[bytes]] = {}

    # --- memory

    def recall(self, partition: int, text: str) -> None:
        """Take a partition over."""
        try:
            kept = base64.b64decode(text, validate=True)
        except binascii.Error:
            log.error("downlink_memory_unreadable", partition=partition, action="a downlink may go out twice")
            kept = b""
        ids = [kept[at : at + ID_BYTES] for at in range(0, len(kept), ID_BYTES)]
        self._recent[partition] = deque(ids, REMEMBERED_MAX)

    def remember(self, partition: int) -> str:
        """What is to be known of everything acknowledged."""
        return base64.b64encode(b"".join(self._recent.get(partition, ()))).decode()

    # --- the handler

    async def __call__(self, batches: Sequence[Batch]) -> Effects:
        """Settle every downlink of the batches.

        Raises:
            Retry: the broker, the catalogue or Kafka cannot be reached.
            Fatal: the sandbox cannot be started.
        """
        await self._documents.ready()
        effects = Effects()
        lines: dict[str, Line] = {}
        seen: list[tuple[int, str]] = []
        duplicates = 0
        for batch in batches:
            parsed, errors = parse_trusted(batch, stage=STAGE)
            for error in errors:
                refuse(effects, error)
            recent = set(self._recent.get(batch.partition, ()))
            for record, found in zip(batch.records, parsed, strict=True):
                for index, line in enumerate(found):
                    if fault := _fault(line):
                        refuse(effects, self._error(batch, record, index, line, fault))
                        continue
                    identifier = line["downlink_id"]
                    if _short(identifier) in recent or identifier in lines:
                        duplicates += 1
                        continue
                    lines[identifier] = line
                    seen.append((batch.partition, identifier))
        await self._settle(lines)
        reports = [self._settled[identifier] for identifier in lines if identifier not in self._told]
        effects.sends += [command_send(report) for report in reports]

        def acknowledged() -> None:
            for partition, identifier in seen:
                self._recent.setdefault(partition, deque(maxlen=REMEMBERED_MAX)).append(_short(identifier))
                report = self._settled.pop(identifier, None)
                self._told.pop(identifier, None)
                if report is not None:
                    metrics.DOWNLINKS.labels(lines[identifier]["format"], report["report"]).inc()
            if duplicates:
                metrics.DOWNLINKS.labels("any", "duplicate").inc(duplicates)

        effects.after.append(acknowledged)
        return effects

    async def _settle(self, lines: Mapping[str, Line]) -> None:
        """Send what is not settled.

        Raises:
            Retry: some could not be sent now; the others are settled and reported.
        """
        now_us = self._clock.now_us()
        for line in self._open(lines):
            if line["expires_at"] <= now_us:
                self._report(line, "expired", "its time was over before it could be sent")
        messages = await self._made(self._open(lines))
        trouble = ""
        # The mailbox first: it is Kafka, which is there, while a broker that is gone takes its time to say so.
        for broker, fetched in ((self._mailbox, True), (self._broker, False)):
            mine = [(line, data) for line, data in messages if (line["format"] == "http") is fetched]
            if not mine:
                continue
            acknowledged, why = await broker.publish([(line["topic"], data, line["qos"]) for line, data in mine])
            for (line, _), done in zip(mine, acknowledged, strict=True):
                if done:
                    self._report(line, "sent", "")
            trouble = trouble or why
        if trouble:
            await self._tell_settled(lines)
            raise Retry(trouble)

    def _open(self, lines: Mapping[str, Line]) -> list[Line]:
        return [line for identifier, line in lines.items() if identifier not in self._settled]

    async def _tell_settled(self, lines: Mapping[str, Line]) -> None:
        """Report what is settled of a batch that is not: a broker that is down for an hour must not hide it."""
        settled = [i for i in lines if i in self._settled and i not in self._told]
        if settled:
            await self._publish([command_send(self._settled[i]) for i in settled])
            for identifier in settled:
                self._told[identifier] = True

    async def _made(self, lines: Sequence[Line]) -> list[tuple[Line, bytes]]:
        """The MQTT payload of each downlink; one that cannot be made is settled."""
        made: list[tuple[Line, bytes]] = []
        calls: list[tuple[Line, Call]] = []
        for line in lines:
            try:
                call = self._call(line)
                if call is None:
                    made.append((line, envelope(line, plain_payload(line["content"]))))
                else:
                    calls.append((line, call))
            except DownlinkError as e:
                self._report(line, "failed", str(e))
        outcomes = await self._sandbox.run([call for _, call in calls]) if calls else []
        for (line, _), outcome in zip(calls, outcomes, strict=True):
            try:
                made.append((line, envelope(line, _payload(outcome, line["content"]))))
            except DownlinkError as e:
                self._report(line, "failed", str(e))
        return made

    def _call(self, line: Line) -> Call | None:
        """The call of the encoder; None where the content needs none."""
        content = line["content"]
        if "fields" not in content:
            return None
        parser = self._documents.parser(line["parser"])
        if parser is None:
            message = f"there is no active parser {line['parser']!r:.100}"
            raise DownlinkError(message)
        kind = parser["kind"]
        if kind not in ENCODERS:
            return None
        try:
            script = compile_script(parser)
        except ParserError as e:
            raise DownlinkError(str(e)) from e
        arguments = encoder_arguments(kind, line["device_id"], content, line["variables"])
        return Call(Script(script.script_id, script.name, kind, script.source), ENCODERS[kind], arguments)

    def _report(self, line: Line, word: str, reason: str) -> None:
        report = {
            "kind": "report",
            "device_id": line["device_id"],
            "downlink_id": line["downlink_id"],
            "report": word,
            "at": self._clock.now_us(),
            "actor": STAGE,
        }
        self._settled[line["downlink_id"]] = report | ({"reason": reason} if reason else {})

    def _error(self, batch: Batch, record: Record, index: int, line: Line, text: str) -> Any:
        return error_line(
            STAGE,
            ReasonCode.COMMAND_INVALID,
            text,
            topic=batch.topic,
            partition=batch.partition,
            record=record,
            index=index,
            raw=pack([line]),
            now_us=self._clock.now_us(),
        )


_NEEDED: Final[Mapping[str, type]] = {
    "downlink_id": str, "device_id": str, "expires_at": int, "format": str, "topic": str, "qos": int, "parser": str,
    "variables": dict, "content": dict, "confirmed": bool,
}  # fmt: skip


def _fault(line: Line) -> str:
    """What is wrong with a line, which only we write, but anyone could have."""
    wrong = next((name for name, kind in _NEEDED.items() if not isinstance(line.get(name), kind)), None)
    if wrong is not None:
        return f"{wrong} is missing or of the wrong type"
    try:
        _short(line["downlink_id"])
    except ValueError:
        return "downlink_id is no id"
    return "" if line["content"] else "the content is empty"


def _short(identifier: str) -> bytes:
    return bytes.fromhex(identifier)[:ID_BYTES]


def _payload(outcome: Outcome, content: Mapping[str, Any]) -> Payload:
    if outcome.text is None:
        message = outcome.fault.message if outcome.fault else "the codec gave no result"
        raise DownlinkError(message)
    return encoded(outcome.text, content)
