"""The notify stages: notices in, each handed to its channel once as long as the process lives, and a receipt out.

One notice is under way in each partition, and its feed commits to Kafka that it is about to be sent before it is: so of
what a crash cuts off, one notice of a partition may go out a second time, with the same id and Message-ID, and
no other. A notice that the group stage had to hand out twice is known by its id: the last ids are kept beside the offset.
Numbers decide nothing. They grow by one in each partition, so where they do not, notices are missing, or the group stage
lost its state; that is told, and counting goes on from there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import structlog
from cachetools import LRUCache

from preservarium import metrics, topics
from preservarium.clock import Clock
from preservarium.domain.notices import HANDED_OUT_MAX
from preservarium.domain.readings.json_text import to_bytes
from preservarium.domain.remembered import Remembered
from preservarium.errors import ReasonCode, Reject, Retry
from preservarium.notices.channel import Channel, Notice, RefusedForNow, answer
from preservarium.notices.routing import RecipientLookup, resolve
from preservarium.notices.words import subject_of
from preservarium.settings import LiveSettings
from preservarium.streaming.records import error_line, pack, parse_trusted, refuse
from preservarium.streaming.stage import Batch, Effects, Record, Send
from preservarium.waiting import alive

log = structlog.get_logger(__name__)

#: Notices remembered as settled: those of the batches under way.
SETTLED_MAX: Final = 10_000
#: Ids of a partition that are remembered as handed over: three times what a crash of the group stage repeats. Brokers take
#: 4 KiB beside an offset.
REMEMBERED_MAX: Final = 3 * HANDED_OUT_MAX
#: Notices of one flight. One, because they are what may be sent twice after a crash.
RECORDS_MAX: Final = 1


class Recipients(Protocol):
    """What of a `Catalogue` the stage needs."""

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


@dataclass(frozen=True, slots=True)
class Receipt:
    """How a notice was settled."""

    outcome: str  #: sent, refused
    answer: str
    attempts: int
    at_us: int


class Notifier:
    """Sends notices through their channels, and tells what became of each.

    It is the handler of a stage, and what its feed remembers beside the offset.

    Args:
        stage: its name.
        channels: channel -> what sends. Notices of other channels are another stage's.
        recipients: the catalogue.
        live: settings.
        clock: for receipts, and for how long a recipient is tried.
    """

    def __init__(
        self,
        stage: str,
        channels: Mapping[str, Channel],
        recipients: Recipients,
        live: LiveSettings,
        clock: Clock,
    ) -> None:
        self.stage = stage
        self._channels = channels
        self._recipients = recipients
        self._live = live
        self._clock = clock
        #: partition -> number of the last notice; 0: not known
        self._last: dict[int, int] = {}
        #: partition -> ids of the last notices
        self._known: dict[int, Remembered] = {}
        self._settled: LRUCache[str, Receipt] = LRUCache(SETTLED_MAX)
        self._attempts: LRUCache[str, int] = LRUCache(SETTLED_MAX)
        #: notice -> when it was first refused for now, seconds of the monotonic clock
        self._refused_since: LRUCache[str, float] = LRUCache(SETTLED_MAX)
        self._said = False

    def recall(self, partition: int, text: str) -> None:
        """As `feeds.Memory.recall`. A text of an earlier release is a number alone."""
        number, _, ids = text.partition(" ")
        self._last[partition] = int(number) if number.isascii() and number.isdigit() else 0
        self._known[partition] = Remembered(REMEMBERED_MAX, ids)

    def remember(self, partition: int) -> str:
        """As `feeds.Memory.remember`."""
        return f"{self._last.get(partition, 0)} {self._ids(partition).text()}"

    def _ids(self, partition: int) -> Remembered:
        return self._known.setdefault(partition, Remembered(REMEMBERED_MAX))

    async def __call__(self, batches: Sequence[Batch]) -> Effects:
        """Send every notice of the batches.

        Raises:
            Retry: a notice could not be settled yet.
        """
        await self._recipients.ready()
        effects = Effects()
        last: dict[int, int] = {}
        new: list[tuple[int, str]] = []
        breaks: list[str] = []
        wanted: list[tuple[Batch, Record, Notice]] = []
        skipped = duplicates = 0
        for batch in batches:
            last[batch.partition] = self._last.get(batch.partition, 0)
            parsed, errors = parse_trusted(batch, stage=self.stage)
            for error in errors if "mail" in self._channels else ():
                refuse(effects, error)
            known, here = self._ids(batch.partition), set[str]()
            for record, lines in zip(batch.records, parsed, strict=True):
                for delivery in lines:
                    notice_id = delivery["delivery_id"]
                    if notice_id in known or notice_id in here:
                        duplicates += 1
                        continue
                    here.add(notice_id)
                    new.append((batch.partition, notice_id))
                    breaks += self._break(batch.partition, last[batch.partition], delivery["number"])
                    last[batch.partition] = delivery["number"]
                    document = resolve(delivery["recipient"], self._recipients.recipient)
                    if isinstance(document, str):
                        if "mail" in self._channels:  # one of the stages says so
                            refuse(effects, self._error(batch, record, delivery, document))
                        continue
                    if document["channel"] not in self._channels:
                        continue
                    if document["channel"] == "mail" and not self._live().mail.host:
                        skipped += 1
                        continue
                    wanted.append((batch, record, Notice(delivery, document["channel"], document["address"])))
        if skipped and not self._said:
            self._said = True  # once a process
            log.warning("alarms_without_notice", reason="no mail server is configured")
        await self._settle([notice for *_, notice in wanted])
        for batch, record, notice in wanted:
            receipt = self._settled[notice.id]
            if receipt.outcome == "refused":
                refuse(effects, self._error(batch, record, notice.delivery, receipt.answer))
            effects.sends.append(_receipt_send(notice, receipt))

        def acknowledged() -> None:
            self._last.update(last)
            for partition, notice_id in new:
                self._ids(partition).add(notice_id)
            for what in breaks:
                metrics.NOTICE_NUMBERS.labels(self.stage, what).inc()
            for *_, notice in wanted:
                self._settled.pop(notice.id, None)
                self._attempts.pop(notice.id, None)
            if skipped:
                metrics.NOTICES.labels("mail", "skipped").inc(skipped)
            if duplicates:
                metrics.DUPLICATES.labels(self.stage).inc(duplicates)

        effects.after.append(acknowledged)
        return effects

    def _break(self, partition: int, before: int, number: int) -> list[str]:
        """Whether numbers do not go on by one; says so in the log."""
        if not before or number == before + 1:
            return []
        what = "gap" if number > before else "back"
        log.warning(
            "notice_numbers_gap" if what == "gap" else "notice_numbers_went_back",
            stage=self.stage,
            partition=partition,
            before=before,
            number=number,
            action="the notice is sent; numbers go on from it",
        )
        return [what]

    async def _settle(self, notices: Sequence[Notice]) -> None:
        """Send what was not sent yet.

        Raises:
            Retry: the server is in trouble, or refuses a recipient for now; the others were sent.
        """
        waiting: list[str] = []
        for notice in notices:
            if notice.id in self._settled:
                continue
            alive()
            attempt = self._attempts[notice.id] = self._attempts.get(notice.id, 0) + 1
            try:
                said = await self._channels[notice.channel].send(notice)
            except RefusedForNow as e:
                since_s = self._refused_since.setdefault(notice.id, self._clock.monotonic_s())
                retry_s = self._retry_s(notice.channel)
                if self._clock.monotonic_s() - since_s < retry_s:
                    metrics.NOTICES.labels(notice.channel, "retried").inc()
                    waiting.append(str(e))
                else:
                    self._settled_as(notice, "refused", f"{e} (tried for {retry_s:g} s)", attempt)
            except Reject as e:
                self._settled_as(notice, "refused", str(e), attempt)
            except Retry:
                metrics.NOTICES.labels(notice.channel, "retried").inc()
                raise
            else:
                self._settled_as(notice, "sent", said, attempt)
        if waiting:
            message = f"{len(waiting)} notices wait: {waiting[0]}"
            raise Retry(message)

    def _retry_s(self, channel: str) -> float:
        settings = self._live()
        return settings.mail.recipient_retry_s if channel == "mail" else settings.notices.endpoint_retry_s

    def _settled_as(self, notice: Notice, outcome: str, said: str, attempts: int) -> None:
        self._settled[notice.id] = Receipt(outcome, answer(said), attempts, self._clock.now_us())
        self._refused_since.pop(notice.id, None)
        metrics.NOTICES.labels(notice.channel, outcome).inc()
        waited_us = self._clock.now_us() - notice.delivery["planned_at"]
        metrics.NOTICE_SECONDS.labels(notice.channel).observe(max(0, waited_us) / 1e6)

    def _error(self, batch: Batch, record: Record, delivery: Mapping[str, Any], text: str) -> Any:
        first: Mapping[str, Any] = delivery["lines"][0] if delivery["lines"] else {}
        return error_line(
            self.stage,
            ReasonCode.NOTICE_REFUSED,
            text,
            topic=batch.topic,
            partition=batch.partition,
            offset=record.offset,
            raw=pack([delivery]),
            device_id=first.get("device_id"),
            raw_partition=first.get("raw_partition"),
            raw_offset=first.get("raw_offset"),
            raw_index=first.get("raw_index"),
            now_us=self._clock.now_us(),
        )


def _receipt_send(notice: Notice, receipt: Receipt) -> Send:
    """A line of `notice_receipts`; the address of an Apprise recipient is a secret, so its kind stands for it."""
    delivery = notice.delivery
    address = notice.address if notice.channel == "mail" else _without_secrets(notice.address)
    line = {
        "delivery_id": delivery["delivery_id"],
        "recipient": delivery["recipient"],
        "channel": notice.channel,
        "address": address,
        "kind": delivery["kind"],
        "outcome": receipt.outcome,
        "answer": receipt.answer,
        "attempts": receipt.attempts,
        "planned_at": delivery["planned_at"],
        "settled_at": receipt.at_us,
        "subject": subject_of(delivery),
        "alarms": [line["alarm_id"] for line in delivery["lines"]],
        "transitions": [t for line in delivery["lines"] for t in line["transitions"]],
    }
    return Send(topics.NOTICE_RECEIPTS, delivery["recipient"].encode(), to_bytes(line))


def _without_secrets(url: str) -> str:
    """Scheme and host: user, path and query may hold keys."""
    scheme, separator, rest = url.partition("://")
    if scheme not in ("http", "https"):
        return f"{scheme}{separator}"
    return f"{scheme}://{rest.partition('/')[0].partition('?')[0].rpartition('@')[2]}"
