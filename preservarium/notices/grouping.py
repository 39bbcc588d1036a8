"""The group stage: events of recipients in, notices out, when they are due. It waits for no database.

A recipient's state is one document (domain/notices.py). A tick hands out what the last one planned, and plans what has
fallen due: the state with the plan is stored before the notice is sent, so that a crash sends the same notice again and
never another one. Its id shows it to be the same; its number, which grows by one in each partition, shows what is missing.
"""

import asyncio
from typing import Any, Final, Protocol
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import orjson
import structlog

from preservarium import metrics, topics
from preservarium.clock import Clock
from preservarium.domain.notices import HANDED_OUT_MAX, STATE_VERSION, Delivery, Inbox, Policy, policy_of
from preservarium.domain.readings.json_text import to_bytes
from preservarium.notices.routing import RecipientLookup
from preservarium.settings import LiveSettings
from preservarium.streaming.records import parse_trusted, refuse
from preservarium.streaming.stage import Batch, Effects, Send, Tick, in_turns
from preservarium.streaming.state import Table, load_state

log = structlog.get_logger(__name__)

STAGE: Final = "group"

#: What is due is looked for this often: a notice goes out within two of these of its time.
TICK_S: Final = 1.0
#: Key of the number of the partition's next notice; no recipient has a control character in its name.
NUMBER_KEY: Final = b"\x00number"
#: Recipients that one tick works on; the others wait for the next. One takes some milliseconds where it has hundreds of alarms.
RECIPIENTS_A_TICK_MAX: Final = 50
#: A clock that is set back by more makes what is due be looked for anew; by less, notices wait as long.
BACK_MAX_US: Final = 5_000_000
#: Records after which other tasks get their turn.
_RECORDS_A_TURN: Final = 100


class PolicyDocuments(Protocol):
    """What of a `Catalogue` policies are made of."""

    @property
    def recipient(self) -> RecipientLookup:
        """The recipient of a name."""
        ...

    async def ready(self) -> None:
        """Wait until everything was read once.

        Raises:
            Retry: it could not be read yet.
        """
        ...


def _zone(name: str) -> ZoneInfo:
    """The time zone of a name; UTC where there is none, which is logged."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        log.warning("time_zone_unknown", zone=name, action="times are UTC")
        return ZoneInfo("UTC")


class Policies:
    """How each recipient wants to be told: the registry's document over the settings."""

    def __init__(self, documents: PolicyDocuments, live: LiveSettings) -> None:
        self._documents = documents
        self._live = live
        self._zones: dict[str, ZoneInfo] = {}

    def of(self, recipient: str) -> Policy:
        """The policy of a recipient, as registry and settings have it now."""
        settings = self._live().notices
        defaults = Policy(
            group_by=_words(settings.group_by),
            group_wait_us=round(settings.group_wait_s * 1e6),
            group_interval_us=round(settings.group_interval_s * 1e6),
            repeat_interval_us=round(settings.repeat_interval_s * 1e6),
            through=frozenset(_words(settings.through)),
            limit_notices=settings.limit_notices,
            limit_window_us=round(settings.limit_window_s * 1e6),
        )
        document: Any = self._documents.recipient(recipient) or {}
        return policy_of(document, defaults, self.zone_of(recipient))

    def zone_of(self, recipient: str) -> ZoneInfo:
        """The time zone of a recipient."""
        document = self._documents.recipient(recipient)
        name = (document.get("timezone") if document else None) or self._live().notices.timezone
        found = self._zones.get(name)
        if found is None:
            found = self._zones[name] = _zone(name)
        return found


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


class Grouping:
    """The stage's handler, and its `tick`.

    Args:
        table: the state table.
        documents: the catalogue.
        live: settings.
        clock: what time it is.
    """

    def __init__(self, table: Table, documents: PolicyDocuments, live: LiveSettings, clock: Clock) -> None:
        self._table = table
        self._documents = documents
        self._policies = Policies(documents, live)
        self._clock = clock
        #: partition -> recipient -> when something of it is due, µs
        self._due: dict[int, dict[str, int]] = {}
        #: partition -> the latest time at which it was looked at, µs
        self._latest: dict[int, int] = {}

    async def __call__(self, batch: Batch) -> Effects:
        """Take events in.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        effects = Effects()
        parsed, errors = parse_trusted(batch, stage=STAGE)
        for error in errors:
            refuse(effects, error)
        now_us = self._clock.now_us()
        self._latest[batch.partition] = max(now_us, self._latest.get(batch.partition, 0))
        touched: dict[str, tuple[Inbox, Policy]] = {}
        duplicates = 0
        async for lines in in_turns(parsed, _RECORDS_A_TURN):
            for event in lines:
                recipient = event["recipient"]
                if recipient not in touched:
                    touched[recipient] = self._inbox(batch.partition, recipient, now_us)
                inbox, policy = touched[recipient]
                duplicates += not inbox.hear(event, policy, now_us)
        self._put(effects, batch.partition, touched, now_us)
        if duplicates:
            effects.after.append(lambda: metrics.DUPLICATES.labels(STAGE).inc(duplicates))
        return effects

    async def tick(self, tick: Tick) -> Effects:
        """Hand out what was planned, and plan what has fallen due.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        partition, now_us = tick.partition, tick.now_us
        if tick.first or now_us < self._latest.get(partition, 0) - BACK_MAX_US:
            await self._find_due(tick)
        self._latest[partition] = now_us
        dues = sorted((due, name) for name, due in self._due.get(partition, {}).items() if due <= now_us)
        effects = Effects()
        if not dues:
            return effects
        # Numbers begin at the present millisecond, so that they grow as a rule also where the state was lost.
        first = number = orjson.loads(self._table.get(partition, NUMBER_KEY) or b"%d" % (now_us // 1_000))
        plans: list[Delivery] = []
        touched: dict[str, tuple[Inbox, Policy]] = {}
        # Those that have planned something (due 0) come first, and all of them: what was planned goes out in the order of its
        # numbers, and so many at a time that the outbox can tell them where a crash repeats them.
        for due, recipient in dues:
            if due and len(touched) >= RECIPIENTS_A_TICK_MAX:
                break
            touched[recipient] = self._inbox(partition, recipient, now_us)
            await asyncio.sleep(0)
        planned = sorted(n for inbox, _ in touched.values() for n in inbox.planned())
        last = planned[min(len(planned), HANDED_OUT_MAX) - 1] if planned else 0
        for inbox, policy in touched.values():
            await asyncio.sleep(0)
            plans += inbox.take(last)
            number = inbox.plan(policy, now_us, number, behind=tick.behind)
        for plan in sorted(plans, key=lambda plan: plan["number"]):
            effects.sends.append(Send(topics.NOTICES, plan["recipient"].encode(), to_bytes(plan), partition))
        if number != first:
            # Before the plans: Kafka keeps a prefix of what a crash cuts off, and no number may be given twice.
            effects.put(self._table.name, NUMBER_KEY, b"%d" % number)
        self._put(effects, partition, touched, now_us)
        return effects

    def _inbox(self, partition: int, recipient: str, now_us: int) -> tuple[Inbox, Policy]:
        policy = self._policies.of(recipient)
        inbox = Inbox(recipient, load_state(self._table.get(partition, recipient.encode()), STATE_VERSION))
        inbox.heal(policy, now_us)
        return inbox, policy

    def _put(self, effects: Effects, partition: int, touched: dict[str, tuple[Inbox, Policy]], now_us: int) -> None:
        dues: dict[str, int | None] = {}
        for recipient, (inbox, policy) in touched.items():
            effects.put(self._table.name, recipient.encode(), to_bytes(inbox.document()))
            dues[recipient] = inbox.due_us(policy, now_us)

        def stored() -> None:
            known = self._due.setdefault(partition, {})
            for recipient, due in dues.items():
                if due is None:
                    known.pop(recipient, None)
                else:
                    known[recipient] = due

        effects.after.append(stored)

    async def _find_due(self, tick: Tick) -> None:
        """Look through the table: what was known may be from before the partition went to another worker and back."""
        found: dict[str, int] = {}
        async for key, value in in_turns(self._table.items(tick.partition), _RECORDS_A_TURN):
            if key == NUMBER_KEY:
                continue
            recipient = key.decode()
            inbox, policy = Inbox(recipient, load_state(value, STATE_VERSION)), self._policies.of(recipient)
            inbox.heal(policy, tick.now_us)
            due = inbox.due_us(policy, tick.now_us)
            if due is not None:
                found[recipient] = due
        self._due[tick.partition] = found
