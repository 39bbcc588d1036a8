"""Refusals that nobody wants any more: set aside with a reason, so that no redrive sends them.

Nothing is deleted: the error line and its bytes stay for as long as their topics keep them. What is written is a marker of the same kind
as a redrive's, keyed by the coordinates of the input, that says who gave which reason. Whatever has a marker already is left alone, so
that doing it twice does it once. To take it back is not possible; the bytes can be sent by hand.
"""

from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any, Final

import orjson

from preservarium import topics
from preservarium.errors import PreservariumError
from preservarium.operations import dlq
from preservarium.settings import LiveSettings, Settings
from preservarium.streaming.publish import Publisher
from preservarium.streaming.stage import Send

#: Longest reason: a sentence or two.
REASON_CHARS_MAX: Final = 1_000
#: Markers that are sent at once.
BATCH: Final = 1_000


class ReasonMissing(PreservariumError):
    """Whoever sets refusals aside says why."""


@dataclass(slots=True)
class Discarded:
    """What was done."""

    matched: int = 0
    discarded: int = 0  #: or would be, in a dry run
    already: int = 0  #: redriven or discarded before

    def document(self) -> dict[str, int]:
        """As JSON."""
        return asdict(self)


async def discard(
    settings: Settings, select: dlq.Select, *, reason: str, actor: str, now_us: int, dry_run: bool = False
) -> Discarded:
    """Set the refusals of a selection aside.

    Args:
        settings: where Kafka is.
        select: which; its limit counts what is discarded.
        reason: why, for whoever looks later.
        actor: who says so.
        now_us: for the markers, µs.
        dry_run: only count.

    Raises:
        ReasonMissing: there is no reason, or it is too long.
        DlqError: Kafka cannot be read.
        Retry: Kafka does not take the markers; those that were acknowledged hold.
    """
    reason = reason.strip()
    if not 0 < len(reason) <= REASON_CHARS_MAX:
        message = f"say why, in at most {REASON_CHARS_MAX} characters"
        raise ReasonMissing(message)
    done = Discarded()
    publisher = Publisher(LiveSettings(settings))
    try:
        await publisher.ensure_topic(topics.REDRIVEN.full(settings.kafka.topic_prefix))
        known = await dlq.settled(settings)
        waiting: list[Send] = []
        everything = dlq.Select(select.codes, select.device, select.since_us)
        async with aclosing(dlq.letters(settings, everything)) as selected:
            async for each in selected:
                done.matched += 1
                if each.coordinates in known:
                    done.already += 1
                    continue
                known.add(each.coordinates)
                waiting.append(_marker(each, reason, actor, now_us))
                done.discarded += 1
                if len(waiting) >= BATCH and not dry_run:
                    await publisher.publish(waiting)
                    waiting = []
                if select.limit is not None and done.discarded >= select.limit:
                    break
        if waiting and not dry_run:
            await publisher.publish(waiting)
        return done
    finally:
        await publisher.on_stop()


def _marker(each: dlq.Letter, reason: str, actor: str, now_us: int) -> Send:
    value: Mapping[str, Any] = {
        "error": each.id,
        "code": each.line.get("code"),
        "device_id": each.line.get("device_id"),
        "at": now_us,
        "discarded": reason,
        "actor": actor,
    }
    return Send(topics.REDRIVEN, each.coordinates.encode(), orjson.dumps(value))
