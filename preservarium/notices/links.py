"""Signed links in notices: whoever holds one may acknowledge one occurrence of one alarm, for a time.

A link is made of the transition and a secret, without asking anyone; the console opens it. It names the occurrence: once
that is over, the machine refuses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from itsdangerous import BadSignature, SignatureExpired, URLSafeTimedSerializer

from preservarium.domain.readings.lineage import identity
from preservarium.errors import PreservariumError
from preservarium.settings import Settings

#: Path of the page that a link opens.
PATH: Final = "/ack"
#: Ties a signature to this purpose: one that the same secret made for another is worth nothing here.
_SALT: Final = "preservarium.acknowledge.1"
#: A token is the names of one alarm; four names of 255 characters, escaped and signed, are below this.
TOKEN_CHARS_MAX: Final = 8_192


class LinkError(PreservariumError):
    """The link is not one of ours."""


class LinkExpired(LinkError):
    """The link is too old."""


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """What a link allows."""

    alarm_id: str  #: the occurrence
    device_id: str
    rule: str
    pin_position: str
    recipient: str  #: whom the notice was sent to; recorded as the actor

    @property
    def action_id(self) -> str:
        """Deterministic: opening the link twice is one action."""
        return identity("link", self.alarm_id, self.recipient)


def _serializer(settings: Settings) -> URLSafeTimedSerializer | None:
    secret = settings.web.link_secret.get_secret_value()
    return URLSafeTimedSerializer(secret, salt=_SALT) if secret else None


def acknowledge_link(alarm: Mapping[str, Any], recipient: str, settings: Settings) -> str | None:
    """The address of the page where `recipient` acknowledges the alarm; None where links are switched off.

    Args:
        alarm: a line of `iot_alerts`.
        recipient: who gets the notice: an address or a name; it will be recorded as the actor.
        settings: `web.public_url` and `web.link_secret`; either empty: no links.
    """
    serializer = _serializer(settings)
    base = settings.web.public_url.rstrip("/")
    if serializer is None or not base:
        return None
    token = serializer.dumps(
        [alarm["alarm_id"], alarm["device_id"], alarm["rule"], alarm.get("pin_position", "-1"), recipient]
    )
    return f"{base}{PATH}?token={quote(str(token), safe='')}"


def opened(token: str, settings: Settings) -> Acknowledgement:
    """What a token allows.

    Raises:
        LinkExpired: it is older than `web.link_ttl_s`.
        LinkError: it was not signed with the secret, or links are switched off.
    """
    serializer = _serializer(settings)
    if serializer is None:
        message = "links are switched off: PRESERVARIUM_WEB__LINK_SECRET is empty"
        raise LinkError(message)
    if len(token) > TOKEN_CHARS_MAX:
        raise LinkError
    try:
        names = serializer.loads(token, max_age=round(settings.web.link_ttl_s))
    except SignatureExpired:
        raise LinkExpired from None
    except BadSignature:
        raise LinkError from None
    if not isinstance(names, list) or len(names) != 5 or not all(isinstance(name, str) for name in names):
        raise LinkError
    return Acknowledgement(*names)
