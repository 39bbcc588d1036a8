"""downlink: device_downlinks → the MQTT broker, device_mailbox; reports to device_commands. Its own consumer group: a broker that is down
holds up nothing else.
"""

from agents.registry import catalogue
from preservarium import topics
from preservarium.connectors.commands import Broker
from preservarium.connectors.mailbox import MailboxBroker
from preservarium.sandbox.pool import Limits, SandboxPool
from preservarium.stages.downlink import RECORDS_MAX, Downlinks
from preservarium.streaming.app import app

# Its own: normalize need not run in this worker, and its backlog must not hold up a command.
_sandbox = app.resource(SandboxPool(Limits.of(app.live()), monotonic=app.clock.monotonic_s))
_broker = app.resource(Broker(app.live, app.clock))
_mailbox = MailboxBroker(app.publisher.publish)
_downlinks = Downlinks(catalogue, _sandbox, _broker, _mailbox, app.publisher.publish, app.live, app.clock)

# No company is waited for: a device that has just woken listens for seconds.
app.group_stage(
    topics.DOWNLINKS,
    name="downlink",
    group="downlink",
    writes=(topics.COMMANDS, topics.MAILBOX, "MQTT broker"),
    records_max=lambda: RECORDS_MAX,
    linger_s=lambda: 0.0,
    planned=True,
    memory=_downlinks,
)(_downlinks)
