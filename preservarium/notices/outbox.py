"""The notify stage: transitions in, notices out, each once as long as the process lives.

A batch is acknowledged when every notice of it is settled: taken over by its channel, or refused for good and told in
`iot_errors`. Until then it is tried again, and what was settled is remembered, so that no try sends a notice twice.
After a crash the batch is read again: a notice may then go out a second time, with the same Message-ID.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Protocol

import structlog
from cachetools import LRUCache

from preservarium import metrics
from preservarium.clock import Clock
from preservarium.domain.errors import ReasonCode, Reject, Retry
from preservarium.notices.mail import RefusedForNow
from preservarium.notices.mail import Session as MailSession
from preservarium.notices.notice import Notice, RecipientLookup, Skipped, plan
from preservarium.records import error_line, error_send, pack, parse_trusted
from preservarium.settings import LiveSettings, Mail
from preservarium.stage import Batch, Effects, Record

log = structlog.get_logger(__name__)

STAGE: Final = "notify"

#: Notices remembered as settled: those of the batches under way (100 transitions × 50 recipients, two flights).
SETTLED_MAX: Final = 10_000
#: Transitions handed over at once. Few, because they are what may be sent twice after a crash.
RECORDS_MAX: Final = 100


class Channel(Protocol):
    """What sends."""

    async def send(self, notice: Notice) -> None:
        """Return when the notice is taken over; raises as `mail.Session.send` does."""
        ...


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


class Notifier:
    """The stage's handler.

    Args:
        recipients: the catalogue.
        live: settings.
        clock: for how long a recipient is refused.
        session: makes a mail session of the settings.
    """

    def __init__(
        self,
        recipients: Recipients,
        live: LiveSettings,
        clock: Clock,
        session: Callable[[Mail], AbstractAsyncContextManager[Channel]] = MailSession,
    ) -> None:
        self._recipients = recipients
        self._live = live
        self._clock = clock
        self._session = session
        #: notice -> "" where it was sent, else why it was refused for good
        self._settled: LRUCache[str, str] = LRUCache(SETTLED_MAX)
        #: notice -> when its recipient was first refused for now, seconds of the monotonic clock
        self._refused_since: LRUCache[str, float] = LRUCache(SETTLED_MAX)
        self._said: set[Skipped] = set()

    async def __call__(self, batches: Sequence[Batch]) -> Effects:
        """Tell everyone of every transition of the batches.

        Raises:
            Retry: a notice could not be settled yet.
        """
        await self._recipients.ready()
        effects = Effects()
        wanted: list[tuple[Batch, Record, int, dict[str, Any], Notice]] = []
        defaults = [a.strip() for a in self._live().mail.recipients.split(",") if a.strip()]
        skipped: dict[str, int] = {}
        for batch in batches:
            parsed, errors = parse_trusted(batch, stage=STAGE)
            for error in errors:
                self._refuse(effects, error)
            for record, lines in zip(batch.records, parsed, strict=True):
                for index, line in enumerate(lines):
                    planned = plan(line, self._recipients.recipient, defaults)
                    for text in planned.wrong:
                        self._refuse(effects, self._error(batch, record, index, line, text))
                    for reason in planned.skipped:
                        skipped[reason] = skipped.get(reason, 0) + 1
                        self._say(reason)
                    wanted += [(batch, record, index, line, notice) for notice in planned.notices]
        if wanted and not self._live().mail.host:
            skipped[Skipped.NOBODY] = skipped.get(Skipped.NOBODY, 0) + len(wanted)
            self._say(Skipped.NOBODY)
            wanted = []
        await self._settle([notice for *_, notice in wanted])
        for batch, record, index, line, notice in wanted:
            if text := self._settled[notice.id]:
                self._refuse(effects, self._error(batch, record, index, line, text))

        def acknowledged() -> None:
            for *_, notice in wanted:
                self._settled.pop(notice.id, None)
            for count in skipped.values():
                metrics.NOTICES.labels("mail", "skipped").inc(count)

        effects.after.append(acknowledged)
        return effects

    async def _settle(self, notices: Sequence[Notice]) -> None:
        """Send what was not sent yet.

        Raises:
            Retry: the server is in trouble, or refuses a recipient for now; the others were sent.
        """
        open_notices = [n for n in notices if n.id not in self._settled]
        if not open_notices:
            return
        waiting: list[str] = []
        async with self._session(self._live().mail) as session:
            for notice in open_notices:
                if notice.id in self._settled:  # twice in one batch
                    continue
                try:
                    await session.send(notice)
                except RefusedForNow as e:
                    since_s = self._refused_since.setdefault(notice.id, self._clock.monotonic_s())
                    if self._clock.monotonic_s() - since_s < self._live().mail.recipient_retry_s:
                        metrics.NOTICES.labels(notice.channel, "retried").inc()
                        waiting.append(str(e))
                    else:
                        self._settle_refused(notice, f"{e} (tried for {self._live().mail.recipient_retry_s:g} s)")
                except Reject as e:
                    self._settle_refused(notice, str(e))
                except Retry:
                    metrics.NOTICES.labels(notice.channel, "retried").inc()
                    raise
                else:
                    self._settled[notice.id] = ""
                    self._refused_since.pop(notice.id, None)
                    metrics.NOTICES.labels(notice.channel, "sent").inc()
        if waiting:
            message = f"{len(waiting)} notices wait: {waiting[0]}"
            raise Retry(message)

    def _settle_refused(self, notice: Notice, text: str) -> None:
        self._settled[notice.id] = text
        self._refused_since.pop(notice.id, None)
        metrics.NOTICES.labels(notice.channel, "refused").inc()

    def _error(self, batch: Batch, record: Record, index: int, line: dict[str, Any], text: str) -> Any:
        return error_line(
            STAGE,
            ReasonCode.NOTICE_REFUSED,
            text,
            topic=batch.topic,
            partition=batch.partition,
            offset=record.offset,
            index=index,
            raw=pack([line]),
            device_id=line["device_id"],
            raw_partition=line.get("raw_partition"),
            raw_offset=line.get("raw_offset"),
            raw_index=line.get("raw_index"),
            generation=line.get("generation"),
            now_us=self._clock.now_us(),
        )

    def _refuse(self, effects: Effects, line: Any) -> None:
        effects.sends.append(error_send(line))
        effects.refused[line["code"]] = effects.refused.get(line["code"], 0) + 1

    def _say(self, reason: Skipped) -> None:
        """Log, once a process, that alarms reach nobody for want of configuration."""
        if reason in (Skipped.NOBODY, Skipped.CHANNEL) and reason not in self._said:
            self._said.add(reason)
            log.warning("alarms_without_notice", reason=str(reason))
