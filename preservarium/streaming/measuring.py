"""What a worker measures of itself: how old messages are when a stage has done with them, how far it is behind, what it uses.

The way of the data pays for one observation a batch (`Arrivals.done`); everything else is looked at once a second or less.
"""

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, Final

import psutil
import structlog

from preservarium import metrics
from preservarium.domain.capacity import wanted_share
from preservarium.streaming.records import generation_of
from preservarium.streaming.records.metadata import received_ms
from preservarium.streaming.stage import Batch
from preservarium.topics import BY_NAME, RAW

log = structlog.get_logger(__name__)

#: Stage -> what its end is called in `preservarium_end_to_end_seconds`. The label has these values and no others.
ENDS: Final[Mapping[str, str]] = {
    "normalize": "standardized",
    "validate": "validated",
    "alarm": "alarm",
    "aggregate": "aggregates",
    "anomaly": "anomalies",
    "sink": "postgres",
    "sync": "clickhouse",
}
#: A message's own words for when it was received and of when it is stand before its readings; this much is looked through.
#: Within a string of JSON a quotation mark is escaped, so no name or payload can be taken for them.
HEAD_BYTES: Final = 4_096
_RECEIVED: Final = re.compile(rb'"received_at":(\d{1,17})(?!\d)')
_OWN: Final = re.compile(rb'"timestamp":(\d{1,17})(?!\d)')
_RAW: Final = re.compile(rb'"raw_partition":(\d{1,10}),"raw_offset":(\d{1,19}),"raw_index":(\d{1,10})')
#: Of inputs that were redriven: when they were received says nothing of how fast we are.
_AGAIN: Final = b'"attempt":'
#: An observation of so much brings along, as an exemplar, whose it is: `preservarium trace --raw` takes that.
SLOW_S: Final = 1.0
#: What the process uses is asked for this often; Prometheus asks no more often as a rule.
USAGE_S: Final = 5.0
#: Where a cgroup says nothing, or "max", there is no limit. Version 2, then 1.
_MEMORY_LIMITS: Final = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Arrivals:
    """Of one stage: how old messages are when it has done with them, and up to when it has come."""

    def __init__(self, stage: str) -> None:
        #: partition -> Kafka's time of the last record done, ms
        self.done_ms: dict[int, int] = {}
        #: when the newest message was received that the stage has done with, µs; 0: none yet
        self.newest_us = 0
        to = ENDS.get(stage)
        self._since_receipt = None if to is None else metrics.END_TO_END.labels(to, "receipt")
        self._since_device = None if to is None else metrics.END_TO_END.labels(to, "device")
        self._processing = metrics.PROCESSING_LATENCY if to == "postgres" else None

    def done(self, batches: Sequence[Batch], now_us: int) -> None:
        """Note that all of these records are acknowledged; the oldest message among them is observed.

        The age of a message that a clock ahead has stamped counts as 0. Takes some microseconds; raises nothing.

        Args:
            batches: as they were handed over.
            now_us: µs since the epoch, UTC, by this machine's clock.
        """
        oldest = batches[0]
        for batch in batches:
            self.done_ms[batch.partition] = batch.records[-1].timestamp
            if batch.records[0].timestamp < oldest.records[0].timestamp:
                oldest = batch
        if self._since_receipt is None:
            newest = max(self.done_ms[batch.partition] for batch in batches) * 1_000
            self.newest_us = max(self.newest_us, min(newest, now_us))
            return
        record, last = oldest.records[0], oldest.records[-1]
        if oldest.topic == RAW.name:
            received_us: int | None = received_ms(record) * 1_000
            newest_us: int | None = last.timestamp * 1_000
        else:
            received_us = _number(_RECEIVED, record.value)
            newest_us = received_us if last is record else _number(_RECEIVED, last.value)
        self.newest_us = max(self.newest_us, min(newest_us or 0, now_us))
        if received_us is None or generation_of(record) or _AGAIN in (record.value or b""):
            return
        age_s = max(0, now_us - received_us) / 1e6
        exemplar = _exemplar(oldest) if age_s >= SLOW_S else None
        self._since_receipt.observe(age_s, exemplar)
        if self._processing is not None:
            self._processing.observe(age_s, exemplar)
        own_us = None if oldest.topic == RAW.name else _number(_OWN, record.value)
        if own_us and self._since_device is not None:
            self._since_device.observe(max(0, now_us - own_us) / 1e6, exemplar)


def _number(pattern: re.Pattern[bytes], value: bytes | None) -> int | None:
    found = pattern.search(value or b"", 0, HEAD_BYTES)
    return None if found is None else int(found[1])


def _exemplar(batch: Batch) -> dict[str, str] | None:
    """Whose it is: the raw coordinates of the message, as `trace --raw` takes them."""
    record = batch.records[0]
    if batch.topic == RAW.name:
        return {"raw": f"{batch.partition}:{record.offset}"}
    found = _RAW.search(record.value or b"", 0, HEAD_BYTES)
    return None if found is None else {"raw": ":".join(part.decode() for part in found.groups())}


class Behind:
    """How far each stage is behind, in seconds: from what its reports say, once a second."""

    def __init__(self) -> None:
        #: (stage, partition) -> when it had no lag last, ms since the epoch
        self._even_ms: dict[tuple[str, int], int] = {}

    def lag_s(self, stage: str, report: Mapping[str, Any], done_ms: Mapping[int, int], now_ms: int) -> float:
        """At most so old is the oldest record that a stage has not acknowledged; 0 where it has no lag.

        That record was written after the last one that is done, and after the last look at which there was no lag. A stage that
        has neither, because it has just begun, is as far behind as its first record has waited here.

        Args:
            stage: its name.
            report: of `reports.stage_reports`.
            done_ms: partition -> Kafka's time of the last record done.
            now_ms: ms since the epoch, UTC.
        """
        worst_ms = 0.0
        lag = report["lag_by_partition"]
        for partition, records in lag.items():
            key = stage, partition
            if not records:
                self._even_ms[key] = now_ms
                continue
            since = max(self._even_ms.get(key, 0), done_ms.get(partition, 0))
            worst_ms = max(worst_ms, now_ms - since if since else report["commit_age_s"] * 1_000)
        for key in [key for key in self._even_ms if key[0] == stage and key[1] not in lag]:
            del self._even_ms[key]  # another worker's now
        return max(0.0, worst_ms / 1_000)


def retention_s(topic: str) -> float | None:
    """How long Kafka is declared to keep a topic's records, s; None where it keeps what is newest of each key."""
    declared = BY_NAME.get(topic)
    return None if declared is None or declared.retention_ms is None else declared.retention_ms / 1_000


class Usage:
    """What this process uses, and what it may use. `sample` is for the event loop's own thread.

    Args:
        data_dir: whose disk is looked at.
    """

    def __init__(self, data_dir: str) -> None:
        self._data_dir = data_dir
        self._process = psutil.Process()
        self._sampled_s = 0.0
        self._cpu_s = time.thread_time()
        self._io: tuple[int, int] = (0, 0)
        self._network: tuple[int, int] | None = None
        self._loop_s = (monotonic(), self._cpu_s)
        #: share of a core that the event loop's thread used between the last samples
        self.utilisation = 0.0

    def sample(self) -> None:
        """Look, where it is time to; some 0.3 ms, every `USAGE_S`."""
        cpu_s = time.thread_time()
        metrics.LOOP_CPU_SECONDS.inc(max(0.0, cpu_s - self._cpu_s))
        self._cpu_s = cpu_s
        now_s = monotonic()
        if now_s - self._sampled_s < USAGE_S:
            return
        self._sampled_s = now_s
        began_s, began_cpu_s = self._loop_s
        if now_s > began_s:
            self.utilisation = min(1.0, (cpu_s - began_cpu_s) / (now_s - began_s))
        self._loop_s = now_s, cpu_s
        try:
            self._look()
        except (psutil.Error, OSError) as e:
            # A container may forbid one of them: the others, and the worker, go on.
            log.debug("usage_not_known", error=repr(e))

    def _look(self) -> None:
        metrics.CPU_CORES.set(cores())
        metrics.MEMORY_LIMIT_BYTES.set(memory_limit_bytes())
        used = [self._process, *self._process.children(recursive=True)]
        metrics.MEMORY_BYTES.set(sum(_resident(process) for process in used))
        place = next(p for p in (Path(self._data_dir), *Path(self._data_dir).absolute().parents) if p.exists())
        disk = psutil.disk_usage(str(place))
        metrics.DISK_FREE_BYTES.set(disk.free)
        metrics.DISK_SIZE_BYTES.set(disk.total)
        network = psutil.net_io_counters()
        if network is not None:
            now = network.bytes_recv, network.bytes_sent
            _grow(metrics.NETWORK_BYTES, self._network or now, now, ("received", "sent"))
            self._network = now
        io = self._process.io_counters()
        _grow(metrics.IO_BYTES, self._io, (io.read_bytes, io.write_bytes), ("read", "written"))
        self._io = io.read_bytes, io.write_bytes


def _grow(counter: Any, before: tuple[int, int], now: tuple[int, int], directions: tuple[str, str]) -> None:
    for old, new, direction in zip(before, now, directions, strict=True):
        counter.labels(direction).inc(max(0, new - old))


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0  # it has just ended


def cores() -> float:
    """Cores that this process may use: those that it may run on, or its container's share where that is less."""
    allowed = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return allowed if quota == "max" else min(allowed, int(quota) / int(period))
    except (OSError, ValueError):
        return allowed


def memory_limit_bytes(files: Iterable[str] = _MEMORY_LIMITS) -> int:
    """Memory that this process may use: its container's limit, else the machine's memory."""
    machine = int(psutil.virtual_memory().total)
    for file in files:
        try:
            return min(machine, int(Path(file).read_text()))
        except (OSError, ValueError):
            continue
    return machine


def set_wanted(reports: Mapping[str, Mapping[str, Any]], lag_s: Mapping[str, float], utilisation: float) -> None:
    """Say how many workers this one's share of the load asks for.

    Stages that wait for a dependency do not count: another worker would wait for it, too.
    """
    behind = [lag_s[name] for name, report in reports.items() if name in lag_s and not report["paused"]]
    metrics.WORKERS_WANTED.set(wanted_share(utilisation, max(behind, default=0.0)))
