"""Types, parsers, datatypes, rules and recipients in the memory of every worker.

They are few and everyone needs them, so each worker reads the whole compacted topic `iot_type_registry` at start and
follows it: a new parser version is one record, and no message ever waits for a query.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import orjson
import structlog

from preservarium import metrics, topics
from preservarium.domain.registry.changes import is_newer
from preservarium.domain.registry.device import DatatypeDoc, DeviceTypeDoc, ParserDoc, RecipientDoc, RuleDoc
from preservarium.errors import Retry
from preservarium.registry.relay import REV_HEADER
from preservarium.settings import Settings
from preservarium.streaming.following import Follower, follow

log = structlog.get_logger(__name__)

Document = dict[str, Any]

KINDS: Final = ("datatype", "parser", "type", "rule", "recipient")

#: A handler waits so long for the first reading; then its batch is tried again, which shows as a paused partition.
READY_WAIT_S: Final = 10.0


class Catalogue(Follower):
    """The type registry in memory. Without being started it is a plain dictionary that `apply` fills.

    Documents that it hands out are shared: do not change them.

    Args:
        settings: where Kafka is; only needed to be started.
    """

    what = "type registry"

    def __init__(self, settings: Callable[[], Settings] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._followed = False
        self._settings = settings
        self._documents: dict[str, dict[str, Document]] = {kind: {} for kind in KINDS}
        #: revision of each document, also of removed ones: an older record does not bring them back
        self._revisions: dict[tuple[str, str], int] = {}
        self._changes = 0
        self._ready = asyncio.Event()
        self._listeners: list[Callable[[str, str], None]] = []

    # --- asking -----------------------------------------------------------------------------------------------------

    @property
    def rev(self) -> int:
        """Grows with every change in this worker; what was compiled from an older one is stale."""
        return self._changes

    def datatype(self, name: str) -> DatatypeDoc | None:
        """The datatype (component type) of that name."""
        return cast(DatatypeDoc | None, self._documents["datatype"].get(name))

    def parser(self, name: str) -> ParserDoc | None:
        """The active version of the parser of that name."""
        return cast(ParserDoc | None, self._documents["parser"].get(name))

    def type(self, name: str) -> DeviceTypeDoc | None:
        """The device type of that name."""
        return cast(DeviceTypeDoc | None, self._documents["type"].get(name))

    def rule(self, name: str) -> RuleDoc | None:
        """The alarm rule of that name."""
        return cast(RuleDoc | None, self._documents["rule"].get(name))

    def recipient(self, name: str) -> RecipientDoc | None:
        """The recipient of that name."""
        return cast(RecipientDoc | None, self._documents["recipient"].get(name))

    def documents(self) -> Mapping[str, Mapping[str, Document]]:
        """Every document: kind -> name -> document."""
        return self._documents

    @property
    def is_ready(self) -> bool:
        """Whether the topic was read to its end once."""
        return self._ready.is_set()

    async def ready(self, timeout_s: float = READY_WAIT_S) -> None:
        """Wait until the topic was read to its end once; at once after that.

        Raises:
            Retry: not within `timeout_s`: Kafka is down, or the topic does not exist yet.
        """
        if self._ready.is_set():
            return
        try:
            await asyncio.wait_for(self._ready.wait(), timeout_s)
        except TimeoutError:
            message = f"{topics.TYPE_REGISTRY.name} has not been read yet"
            raise Retry(message) from None

    # --- changing ---------------------------------------------------------------------------------------------------

    def on_change(self, listener: Callable[[str, str], None]) -> None:
        """Call `listener(kind, name)` after each change; it must not raise."""
        self._listeners.append(listener)

    def apply(self, key: bytes, value: bytes | None, *, rev: int | None = None) -> bool:
        """Apply one record of `iot_type_registry`; whether it changed anything. Never raises.

        Args:
            key: `kind/name`.
            value: the document; None removes it.
            rev: the removal's revision, where its record has one.

        What is not newer than what is known is skipped, so records may come again.
        """
        kind, _, name = key.decode(errors="replace").partition("/")
        if kind not in self._documents or not name:
            log.warning("unknown registry record", key=key[:200].decode(errors="replace"))
            return False
        if value is None:
            return self._remove(kind, name, rev)
        try:
            document = orjson.loads(value)
            found = document["rev"]
            if document["name"] != name or not isinstance(found, int):
                raise ValueError(name)
        except (ValueError, KeyError, TypeError) as e:
            log.error("registry record unusable", key=f"{kind}/{name}", error=f"{type(e).__name__}: {e}")
            return False
        return self.offer(kind, document)

    def offer(self, kind: str, document: Document) -> bool:
        """Take a document that came another way (the composite query); whether it was news."""
        name, rev = str(document["name"]), int(document["rev"])
        if not is_newer(rev, self._revisions.get((kind, name))):
            return False
        self._documents[kind][name] = document
        self._changed(kind, name, rev)
        return True

    def _remove(self, kind: str, name: str, rev: int | None) -> bool:
        known = self._revisions.get((kind, name))
        if rev is not None and not is_newer(rev, known):
            return False
        if rev is not None:
            self._revisions[kind, name] = rev
        if self._documents[kind].pop(name, None) is None:
            return False
        self._changed(kind, name, rev)
        return True

    def _changed(self, kind: str, name: str, rev: int | None) -> None:
        if rev is not None:
            self._revisions[kind, name] = rev
            metrics.REGISTRY_REV.set(max(self._revisions.values()))
        self._changes += 1
        metrics.REGISTRY_DOCUMENTS.labels(kind).set(len(self._documents[kind]))
        for listener in self._listeners:
            listener(kind, name)

    # --- following --------------------------------------------------------------------------------------------------

    @property
    def current(self) -> bool:
        """Whether the topic is followed now."""
        return self._followed

    def hindered(self, why: str) -> None:
        """What we have stays valid; the worker goes on with it."""
        self._followed = False

    async def read(self) -> None:
        """Everything from the beginning, then whatever comes."""
        assert self._settings is not None, "a Catalogue that is started needs settings"
        kafka = self._settings().kafka
        seen: set[tuple[str, str]] = set()

        def take(records: Sequence[Any], first: bool) -> None:
            for record in records:
                self.apply(record.key or b"", record.value, rev=header_rev(record.headers))
                if first:
                    kind, _, name = (record.key or b"").decode(errors="replace").partition("/")
                    seen.add((kind, name))

        def caught_up() -> None:
            self._forget_others(seen)
            self._followed = True
            self._ready.set()
            log.info("type registry read", documents={k: len(d) for k, d in self._documents.items()})

        sources = {topics.TYPE_REGISTRY.full(kafka.topic_prefix): None}
        await follow(kafka, sources, take, caught_up, client="preservarium-catalogue", stopped=lambda: self.should_stop)

    def _forget_others(self, seen: set[tuple[str, str]]) -> None:
        """Remove what the topic no longer has: its tombstone may be compacted away before a long outage ended.

        Before the first complete reading everything here came from the database and is kept.
        """
        if not self._ready.is_set():
            return
        for kind, documents in self._documents.items():
            for name in [n for n in documents if (kind, n) not in seen]:
                self._remove(kind, name, None)


def header_rev(headers: Any) -> int | None:
    """The revision in a registry record's headers; None where there is none."""
    for name, value in headers or ():
        if name == REV_HEADER and value is not None and value.isdigit() and len(value) < 19:
            return int(value)
    return None
