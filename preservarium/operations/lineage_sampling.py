"""Stored readings that a worker derives again, a few a minute: whether lineage holds is known before somebody asks.

What is counted is what could be verified: of the readings of the last hour, for which Kafka still holds the raw records as a rule.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import asyncpg
import structlog

from preservarium import metrics
from preservarium.clock import Clock
from preservarium.errors import Retry, reason
from preservarium.operations.lineage_check import Checker, Report
from preservarium.operations.raw_records import RecordsError
from preservarium.operations.trace import rederivation_text
from preservarium.settings import Settings
from preservarium.stores.connections import Pool

_log = structlog.get_logger(__name__)

#: Readings of so long ago are drawn: long enough for all devices to have sent, short enough for their bytes to be there.
SPAN_US: Final = 3_600_000_000
#: A turn that takes longer is given up, so that turns do not follow each other without a pause.
TURN_TIMEOUT_S: Final = 45.0
#: Differences that are logged of one turn.
LOGGED_MAX: Final = 5
#: Idle connections are given back between two turns only where turns are rare.
CONNECTION_IDLE_S: Final = 120.0


@dataclass(slots=True)
class Tally:
    """What was verified since the worker began."""

    identical: int = 0
    different: int = 0

    @property
    def ratio(self) -> float | None:
        """The share that came out identical; None where nothing could be verified yet."""
        verified = self.identical + self.different
        return self.identical / verified if verified else None


class Sampler:
    """Derives a sample at each turn. For one event loop.

    Args:
        settings: asked at each turn.
        clock: the worker's.
    """

    def __init__(self, settings: Callable[[], Settings], clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self.tally = Tally()
        self._pool = Pool(
            lambda: settings().postgres.dsn,
            connections_max=lambda: 2,  # one is in the middle of an answer while the registry is asked by the other
            connect_timeout_s=lambda: settings().postgres.connect_timeout_s,
            command_timeout_s=lambda: settings().postgres.command_timeout_s,
            server_settings={"application_name": "preservarium-lineage"},
            idle_s=CONNECTION_IDLE_S,
        )

    async def turn(self) -> Report | None:
        """Derive a sample again and count it; None where it is switched off, or could not be done: that is logged, and does no harm."""
        settings = self._settings()
        sample = settings.sink.lineage_samples
        if not sample:
            return None
        now_us, began_s = self._clock.now_us(), self._clock.monotonic_s()
        try:
            async with (
                asyncio.timeout(TURN_TIMEOUT_S),
                self._pool.acquire() as connection,
                self._pool.acquire() as registry,
            ):
                report = await Checker(settings, connection, registry).check(now_us - SPAN_US, now_us, sample=sample)
        except (
            Retry,
            RecordsError,
            OSError,
            TimeoutError,
            asyncpg.PostgresError,
            asyncpg.InterfaceError,
            asyncpg.InternalClientError,
        ) as e:
            metrics.LINEAGE_TURNS.labels("failed").inc()
            _log.warning("lineage_not_sampled", error=reason(e))
            return None
        metrics.LINEAGE_TURNS.labels("done").inc()
        self._count(report, self._clock.monotonic_s() - began_s)
        return report

    def _count(self, report: Report, took_s: float) -> None:
        outcomes = {
            "identical": report.identical,
            "different": report.different,
            "unverifiable": report.unverifiable.total(),
        }
        for outcome, count in outcomes.items():
            metrics.LINEAGE_VERIFIED.labels(outcome).inc(count)
        self.tally.identical += report.identical
        self.tally.different += report.different
        if (ratio := self.tally.ratio) is not None:
            metrics.LINEAGE_VERIFIED_RATIO.set(ratio)
        for _ in range(report.checked):
            metrics.LINEAGE_TRACKING_SECONDS.observe(took_s / report.checked)
        for example in report.examples[:LOGGED_MAX]:
            r = example.reading
            _log.error(
                "lineage_differs", device_id=r.device_id, component_type=r.component_type, pin_position=r.pin_position,
                timestamp=r.timestamp, raw=str(r.raw), parser=r.parser, verdict=rederivation_text(example.verdict),
                action="preservarium trace says more; preservarium lineage verify counts",
            )  # fmt: skip

    async def close(self) -> None:
        """Give the connections back."""
        await self._pool.close()
