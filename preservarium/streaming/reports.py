"""How a worker stands: what the console, the metrics and the judgement of health are told of its stages.

It is read from the lanes and from what the consumer knows already, so a report asks nobody anything.
"""

from collections.abc import Mapping
from time import monotonic
from typing import Any, Final

from faust.types import TP

from preservarium.streaming.feeds import GroupFeed
from preservarium.streaming.lanes import Stages
from preservarium.streaming.positions import Standing
from preservarium.streaming.runner import Runner

#: A handler that gives no sign of life for so much longer than its own limits allow is stuck. For an event loop that is busy,
#: and a machine that swaps.
STUCK_GRACE_S: Final = 15.0
#: A fetch or poll loop that has not turned for so long is stuck; a turn takes a second, a rebalance up to a minute.
LOOP_STUCK_S: Final = 90.0
#: Partitions that are taken over bring a step forward (a generation of the group, a record restored) at least so often: a
#: rebalance may take a minute, and a step of recovery has limits of its own. Beyond, the worker stands in its group and works not.
TAKING_STUCK_S: Final = 300.0


def connected(consumer: Any) -> bool:
    """Whether the shared feed's consumer is there and can be asked."""
    return consumer is not None and getattr(consumer._thread, "_consumer", None) is not None


def stage_reports(
    stages: Stages,
    feeds: Mapping[str, GroupFeed],
    consumer: Any,
    ends: Mapping[TP, int],
    *,
    group: str,
    clock_s: float,
) -> dict[str, dict[str, Any]]:
    """How every stage stands: partitions, pending and lagging records, ages of what waits, what is paused.

    Args:
        stages: of the shared feed.
        feeds: those with a group of their own, by stage.
        consumer: of the shared feed; None where there is none.
        ends: end of what may be read, as Kafka said last.
        group: of the shared feed.
        clock_s: the app's clock, s, which says since when a batch is worked on.
    """
    now_s = monotonic()
    reports: dict[str, dict[str, Any]] = {}
    asked = connected(consumer)
    for stage in stages:
        known: dict[int, int] = {}
        committed: dict[int, int] = {}
        if asked:
            for tp in [tp for tp in consumer.assignment() if tp.topic == stage.topic_full]:
                known[tp.partition] = max(consumer.highwater(tp) or 0, ends.get(tp, 0))
                committed[tp.partition] = consumer._committed_offset.get(tp) or 0
        # What another stage on the topic has not finished, nobody can commit.
        held = {p for p, lane in stage.lanes.items() if not _committable(stages, TP(stage.topic_full, p), lane)}
        reports[stage.name] = _report(
            "shared", stage.topic, group, stage.runner, stage.lanes, known, committed, held, now_s, clock_s
        )
    for feed in feeds.values():
        known = {p: max(lane.end or 0, ends.get(TP(feed.kafka_topic, p), 0)) for p, lane in feed.lanes.items()}
        report = _report("group", feed.topic, feed.group, feed.runner, feed.lanes, known, {}, set(), now_s, clock_s)
        report["trouble"] = feed.trouble
        reports[feed.name] = report
    return reports


def _committable(stages: Stages, tp: TP, lane: Standing) -> bool:
    position = stages.position(tp)
    return position is not None and position > (lane.committed or 0)


def assignment_of(consumer: Any) -> dict[str, list[int]]:
    """The shared feed's partitions by topic."""
    assignment: dict[str, list[int]] = {}
    if connected(consumer):
        for tp in sorted(consumer.assignment()):
            assignment.setdefault(tp.topic, []).append(tp.partition)
    return assignment


class TakingOver:
    """For how long a worker takes partitions over without getting on with it."""

    def __init__(self) -> None:
        self._step: Any = None
        self._since_s: float | None = None

    def look(self, step: Any, now_s: float) -> float:
        """Look at it, now and then.

        Args:
            step: how far it is, in anything that can be compared; None: nothing is being taken over.
            now_s: monotonic time.

        Returns:
            Seconds since the last step forward; 0 where nothing is being taken over.
        """
        if step is None or step != self._step or self._since_s is None:
            self._step, self._since_s = step, now_s
        return 0.0 if step is None else now_s - self._since_s


def problems_of(
    reports: Mapping[str, Mapping[str, Any]],
    feeds: Mapping[str, GroupFeed],
    consumer: Any,
    *,
    assigned: bool,
    kafka_answers: bool,
    taking_s: float = 0.0,
) -> list[str]:
    """What a restart could mend.

    Args:
        reports: of the stages, see `stage_reports`.
        feeds: those with a group of their own, by stage.
        consumer: of the shared feed.
        assigned: whether it has partitions.
        kafka_answers: where it does not, loops stand still for want of it, and a restart would mend nothing.
        taking_s: for how long partitions have been taken over without a step forward (`TakingOver`).
    """
    now_s = monotonic()
    problems: list[str] = []
    for name, stage in reports.items():
        if stage["fuse"]["blown"]:
            problems.append(f"{name}: fuse blown: {stage['fuse']['reason']}")
        problems += [
            f"{name}: partition {p} works on one batch for {stage['busy_s'][p]:.0f} s, the last {silent_s:.0f} s of them"
            " without a sign of life"
            for p, silent_s in stage["silent_s"].items()
            if silent_s > stage["patience_s"] + STUCK_GRACE_S
        ]
    if not kafka_answers:
        return problems
    if taking_s > TAKING_STUCK_S:
        problems.append(f"partitions are being taken over, without a step forward for {taking_s:.0f} s")
    if assigned and consumer.flow_active and now_s - consumer.fetched_s > LOOP_STUCK_S:
        problems.append(f"the fetch loop stands still for {now_s - consumer.fetched_s:.0f} s")
    for name, feed in feeds.items():
        if feed.polled_s is not None and now_s - feed.polled_s > LOOP_STUCK_S:
            problems.append(f"{name}: the poll loop stands still for {now_s - feed.polled_s:.0f} s")
    return problems


def _report(
    feed: str,
    topic: str,
    group: str,
    runner: Runner,
    lanes: Mapping[int, Any],
    ends: Mapping[int, int],
    committed: Mapping[int, int],
    held: set[int],
    now_s: float,
    clock_s: float,
) -> dict[str, Any]:
    lag: dict[int, int] = {}
    for partition in set(ends) | set(lanes):
        lane = lanes.get(partition)
        # Where the stage has not finished anything since the assignment, its commit says where it stands.
        position = None if lane is None else lane.position if lane.position is not None else lane.committed
        if position is None:
            position = committed.get(partition, 0)
        if partition in ends:
            lag[partition] = max(0, ends[partition] - position)
    busy = {p: (lane, lane.progress) for p, lane in lanes.items() if lane.progress.since_s is not None}
    # In a group feed who waits may wait for a flight; a lane of the shared feed waits for nobody.
    idle = [lane for p, lane in lanes.items() if p not in busy] if feed == "shared" or not busy else []
    uncommitted = [0.0 if p in held else lane.uncommitted_age_s(now_s) for p, lane in lanes.items()]
    return {
        "feed": feed,
        "topic": topic,
        "group": group,
        "partitions": sorted(set(ends) | set(lanes)),
        "pending": sum(lane.pending_records for lane in lanes.values()),
        "lag": sum(lag.values()),
        "lag_by_partition": lag,
        # Of the oldest record that was handed over and is not committed.
        "commit_age_s": max(
            [*uncommitted, *(lane.unacknowledged_age_s(now_s) for lane in lanes.values())], default=0.0
        ),
        # How long there has been work, and neither a result nor anybody who works on it.
        "stalled_s": max([*uncommitted, *(lane.unacknowledged_age_s(now_s) for lane in idle)], default=0.0),
        "busy_s": {p: clock_s - progress.since_s for p, (_, progress) in busy.items()},
        "silent_s": {p: clock_s - progress.alive_s for p, (_, progress) in busy.items()},
        "patience_s": runner.patience_s(),
        "paused": {p: lane.progress.reason for p, lane in lanes.items() if lane.progress.paused},
        "fuse": runner.fuse.report(),
    }
