"""`preservarium notices`: try a recipient's channel, and the key that its webhooks are signed with."""

import asyncio
import sys
import time
from typing import Any

import click

from preservarium.cli.output import print_json
from preservarium.cli.system import load
from preservarium.errors import PreservariumError, Reject, Retry, reason


@click.group("notices")
def notices() -> None:
    """Try a recipient's channel; keys of webhooks."""


_recipient = click.option("--recipient", required=True, help="Name in the registry, or a mail address.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@notices.command()
@_recipient
@_json
def test(recipient: str, as_json: bool) -> None:
    """Send a test notice to a recipient and say what the server answered; exit 1 where it was not taken."""
    found = asyncio.run(_test(recipient))
    if as_json:
        print_json(found)
    else:
        click.echo(f"{found['outcome']}: {found['channel']} to {found['recipient']}: {found['answer']}")
    if found["outcome"] != "sent":
        sys.exit(1)


async def _test(recipient: str) -> dict[str, Any]:
    from preservarium.clock import SystemClock
    from preservarium.notices.channel import Notice, RefusedForNow
    from preservarium.notices.chat import AppriseChannel
    from preservarium.notices.grouping import Policies
    from preservarium.notices.mail import MailChannel
    from preservarium.notices.routing import resolve
    from preservarium.notices.webhook import WebhookChannel
    from preservarium.registry.catalogue import Catalogue
    from preservarium.settings import LiveSettings

    live = LiveSettings(load())
    catalogue = Catalogue()
    if document := await _registered(recipient):
        catalogue.offer("recipient", document)
    doc = resolve(recipient, catalogue.recipient)
    if isinstance(doc, str):
        raise PreservariumError(doc)
    if doc["channel"] == "mail" and not live().mail.host:
        message = "no mail server is configured: set PRESERVARIUM_MAIL__HOST"
        raise PreservariumError(message)
    zone_of = Policies(catalogue, live).zone_of
    channel: MailChannel | WebhookChannel | AppriseChannel
    if doc["channel"] == "mail":
        channel = MailChannel(lambda: live().mail, zone_of, _no_link)
    elif doc["channel"] == "webhook":
        channel = WebhookChannel(live, _no_link, SystemClock())
    else:
        channel = AppriseChannel(live, zone_of, _no_link)
    outcome, said = "sent", ""
    try:
        said = await channel.send(Notice(_delivery(recipient), doc["channel"], doc["address"]))
    except (Retry, RefusedForNow) as e:
        outcome, said = "not taken now", str(e)
    except Reject as e:
        outcome, said = "refused", str(e)
    finally:
        await channel.close()
    return {"recipient": recipient, "channel": doc["channel"], "outcome": outcome, "answer": said}


def _no_link(_line: Any, _recipient: str) -> None:
    return None


async def _registered(name: str) -> dict[str, Any] | None:
    """The recipient as the registry's database has it; a mail address needs none."""
    import orjson

    from preservarium.stores.connections import session
    from preservarium.stores.postgres import INFRASTRUCTURE_ERRORS

    settings = load().postgres
    try:
        connection = await session(settings, "reading the recipient")
        try:
            row = await connection.fetchrow("SELECT rev, doc FROM recipients WHERE name = $1", name)
        finally:
            await connection.close()
    except INFRASTRUCTURE_ERRORS as e:
        if "@" in name:
            return None
        message = f"the registry cannot be read: {reason(e)}"
        raise PreservariumError(message) from e
    if row is None:
        return None
    document: dict[str, Any] = orjson.loads(row["doc"]) if isinstance(row["doc"], str) else dict(row["doc"])
    return {**document, "name": name, "rev": row["rev"]}


def _delivery(recipient: str) -> dict[str, Any]:
    from preservarium.domain.readings.lineage import identity

    now_us = time.time_ns() // 1_000
    line = {
        "alarm_id": identity("test", now_us), "transition_id": identity("test", now_us, "raised"), "device_id": "test",
        "device_name": "Test", "rule": "test", "component_type": "temperature", "pin_position": "-1", "severity": "warning",
        "transition": "raised", "state": "acknowledged", "occurred_at": now_us, "detected_at": now_us, "value": 21.0,
        "unit": "°C", "threshold": 20.0, "message": "A test", "status": "raised", "new": True, "raised_count": 1,
        "first_at": now_us, "transitions": [], "transitions_count": 0,
    }  # fmt: skip
    return {
        "delivery_id": identity("notice", recipient, "test", now_us), "number": 0, "sequence": 0, "recipient": recipient,
        "kind": "test", "group": {}, "held": None, "planned_at": now_us, "lines": [line], "more": {},
    }  # fmt: skip


@notices.command()
@_recipient
def key(recipient: str) -> None:
    """Print the key that webhooks to a recipient are signed with."""
    from preservarium.notices.webhook import key_of

    secret = load().notices.webhook_secret.get_secret_value()
    if not secret:
        message = "there is no key: set PRESERVARIUM_NOTICES__WEBHOOK_SECRET"
        raise PreservariumError(message)
    click.echo(key_of(secret, recipient))


commands: list[click.Command] = [notices]
