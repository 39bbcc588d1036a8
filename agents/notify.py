"""notify: notices → mail, webhooks, Apprise, each with a receipt.

Consumer groups of their own: a mail server that is down holds up nothing else, and a webhook that is down no mail.
"""

from collections.abc import Mapping
from typing import Any

from agents.registry import catalogue
from preservarium import topics
from preservarium.notices.channel import Channel
from preservarium.notices.chat import AppriseChannel
from preservarium.notices.grouping import Policies
from preservarium.notices.links import acknowledge_link
from preservarium.notices.mail import DATA_S, TURN_S, MailChannel
from preservarium.notices.outbox import RECORDS_MAX, Notifier
from preservarium.notices.plot import Plotter
from preservarium.notices.webhook import WebhookChannel
from preservarium.streaming.app import app

_policies = Policies(catalogue, app.live)


def _link(line: Mapping[str, Any], recipient: str) -> str | None:
    return acknowledge_link(line, recipient, app.live())


_plotter = app.resource(Plotter(app.live, app.clock, _policies.zone_of))
_mail = app.resource(MailChannel(lambda: app.live().mail, _policies.zone_of, _link, _plotter))
_webhook = app.resource(WebhookChannel(app.live, _link, app.clock))
_apprise = AppriseChannel(app.live, _policies.zone_of, _link)


def _stage(name: str, channels: Mapping[str, Channel], to: str) -> None:
    notifier = Notifier(name, channels, catalogue, app.live, app.clock)
    app.group_stage(
        topics.NOTICES,
        name=name,
        group=name,
        writes=(topics.NOTICE_RECEIPTS, to),
        records_max=lambda: RECORDS_MAX,
        # No company is waited for: an alarm is to be told at once.
        linger_s=lambda: 0.0,
        # One of each partition: a recipient that is out of reach stops no other partition.
        flights=app.live().kafka.partitions,
        planned=True,
        memory=notifier,
        # For one notice: a turn at the server, its greeting, and its word for the mail.
        patience_s=lambda: TURN_S + app.live().mail.timeout_s + DATA_S,
    )(notifier)


_stage("notify", {"mail": _mail}, "mail")
_stage("notify-endpoints", {"webhook": _webhook, "apprise": _apprise}, "webhooks, Apprise")
