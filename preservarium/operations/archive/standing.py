"""How the archive is: what it has, how far it is behind Kafka, and what each tier keeps."""

import asyncio
from time import time_ns
from typing import Any

from preservarium import topics
from preservarium.operations.archive.archiver import archived_topics, full_name
from preservarium.operations.archive.reading import connections
from preservarium.operations.raw_records import Records
from preservarium.settings import Settings
from preservarium.stores import archive_index as index
from preservarium.stores.archive_files import Files
from preservarium.streaming.topics_admin import retention_ms


def tiers(settings: Settings) -> list[dict[str, Any]]:
    """Where data are, and for how long: hot, warm and cold, with the one setting of each."""
    keep = settings.archive.keep_days
    return [
        {
            "tier": "hot",
            "where": "Kafka (iot_raw_data)",
            "for": f"{settings.kafka.raw_retention_hours} hours",
            "setting": "PRESERVARIUM_KAFKA__RAW_RETENTION_HOURS",
        },
        {
            "tier": "warm",
            "where": "TimescaleDB (compressed)",
            "for": f"from day {settings.sink.compress_after_days} to day {settings.sink.retention_days}",
            "setting": "PRESERVARIUM_SINK__COMPRESS_AFTER_DAYS",
        },
        {
            "tier": "cold",
            "where": f"archive ({settings.archive.url})" if settings.archive.url else "archive (none)",
            "for": (f"{keep} days" if keep else "ever") if settings.archive.url else "",
            "setting": "PRESERVARIUM_ARCHIVE__KEEP_DAYS",
        },
    ]


async def status(settings: Settings) -> dict[str, Any]:
    """How the archive is; JSON.

    Raises:
        RecordsError: Kafka cannot be asked.
        ArchiveError: the place cannot be asked.
    """
    document: dict[str, Any] = {"url": settings.archive.url, "epoch": settings.archive.epoch, "tiers": tiers(settings)}
    pool = connections(lambda: settings, "preservarium-archive-status")
    now_us = time_ns() // 1_000
    try:
        async with pool.acquire() as connection:
            found = await index.summaries(connection)
        document["topics"] = [
            {
                "topic": s.topic, "epoch": s.epoch, "partitions": s.partitions, "files": s.segments, "records": s.records,
                "value_bytes": s.value_bytes, "file_bytes": s.file_bytes, "from": s.from_us, "to": s.to_us,
                "gaps": s.gaps, "lost": s.lost,
            }
            for s in found
        ]  # fmt: skip
        lags = []
        if settings.archive.url:
            await asyncio.to_thread(Files(settings.archive).check)
            async with Records(settings, archived=False) as records:
                for topic in archived_topics(settings):
                    lags.append(await _lag(settings, pool, records, topic, now_us))
        document["lags"] = lags
    finally:
        await pool.close()
    return document


async def _lag(settings: Settings, pool: Any, records: Records, topic: topics.Topic, now_us: int) -> dict[str, Any]:
    full = full_name(settings, topic)
    async with pool.acquire() as connection:
        standing = await index.standings(connection, topic.name, settings.archive.epoch)
    waiting, oldest, lost, anew = 0, 0.0, 0, False
    for partition in await records.partitions(full):
        span = await records.span(full, partition)
        if span is None:
            continue
        at = standing.get(partition)
        count = span.end - (at.next if at is not None else span.begin)
        anew = anew or count < 0
        waiting += max(0, count)
        lost += max(0, span.begin - at.next) if at is not None else 0
        if count > 0 and at is not None and at.archived_at is not None:
            oldest = max(oldest, (now_us - at.archived_at) / 1e6)
    kept_ms = retention_ms(topic, settings)
    return {
        "topic": topic.name,
        "records": waiting,  #: in Kafka, and in no file yet
        "seconds": round(oldest, 1),  #: since the partition that waits longest was archived to its end
        "about_to_be_lost": lost,  #: Kafka has deleted them, and they are in no file
        "made_anew": anew,  #: Kafka's offsets end before what is archived
        "kafka_keeps_s": None if kept_ms < 0 else kept_ms / 1_000,
        "leases": sum(at.leased for at in standing.values()),
    }
