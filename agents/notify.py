"""notify: iot_alerts → mail. Its own consumer group: a mail server that is down holds up nothing else."""

from agents.registry import catalogue
from preservarium import topics
from preservarium.engine import app
from preservarium.notices.outbox import RECORDS_MAX, Notifier

_notifier = Notifier(catalogue, app.live, app.clock)

# No company is waited for: an alarm is to be told at once.
app.group_stage(
    topics.ALERTS,
    name="notify",
    group="notify",
    records_max=lambda: RECORDS_MAX,
    linger_s=lambda: 0.0,
)(_notifier)
