"""Rules of silence: a series that is watched for readings that do not come (`no_data`).

By the readings' own time, a series was silent when its next reading comes too late. By a clock it is silent when the time
of that reading is over; both tell of the same instant.
"""

from preservarium.domain.alarms.rule import Rule
from preservarium.domain.alarms.watch import Evaluation, Verdict, Watch


def silent(rule: Rule, watch: Watch, at: int) -> Verdict | None:
    """Whether a no-data rule's series, whose next reading is of `at`, was silent for too long; marks it so, in place."""
    return _silent(rule, watch, at, None)


def overdue(rule: Rule, watch: Watch, now_us: int) -> Verdict | None:
    """Whether a no-data rule's series is silent for too long by a clock; marks it so, in place.

    A reading that was received after its own deadline shows that the series is heard of again, however old what it
    says: from then on a clock waits once more, while the alarm, if it comes, is still of the deadline of the readings.
    """
    return _silent(rule, watch, now_us, watch.since)


def _silent(rule: Rule, watch: Watch, now_us: int, heard_at: int | None) -> Verdict | None:
    if watch.active or not watch.at:
        return None
    deadline, told_at = rule.deadline(watch.at), rule.told_at(watch.at, heard_at)
    if deadline is None or told_at is None or told_at >= now_us:
        return None
    watch.active = True
    # Kept, because a reading that comes late after all cannot end the silence before it began.
    watch.since = deadline
    return Verdict(Evaluation.RAISED, deadline)


def take_presence(rule: Rule, watch: Watch, at: int, received_at: int | None) -> list[Verdict]:
    """Take one reading of a series that is watched for silence; as `evaluation.take`."""
    told: list[Verdict] = []
    raised = silent(rule, watch, at)
    if raised is None and received_at is not None:
        # A clock would have said so before this came: it has the same history whether one was looked at or not.
        raised = overdue(rule, watch, received_at)
    if raised is not None:
        told.append(raised)
    if watch.active:
        told.append(Verdict(Evaluation.RETURNED, max(at, watch.since or 0)))
        watch.active = False
    watch.at, watch.since = at, None
    deadline = rule.deadline(at)
    if received_at is not None and deadline is not None and received_at > deadline:
        watch.since = received_at
    return told
