"""Notices by webhook: a signed POST of JSON, in the shape that Prometheus Alertmanager's receivers know.

The signature is HMAC-SHA256 over the time and the body, with the recipient's own key; docs/NOTICES.md says how to check it.
"""

import asyncio
import hashlib
import hmac
import socket
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import getproxies

import aiohttp
import orjson
from aiohappyeyeballs import AddrInfoType

from preservarium.clock import Clock
from preservarium.domain.readings.lineage import identity
from preservarium.errors import ReasonCode, Reject, reason
from preservarium.notices.channel import ANSWER_CHARS_MAX, Notice, RefusedForNow, answer
from preservarium.notices.destinations import DestinationRefused, Destinations, Errand, errand, host_of, reasons
from preservarium.notices.words import instant, subject_of
from preservarium.settings import Settings

SIGNATURE_HEADER: Final = "X-Preservarium-Signature"
TIMESTAMP_HEADER: Final = "X-Preservarium-Timestamp"
#: The answers that say "later": everything else of 4xx is meant as it is said (RFC 9110, 15.5; RFC 6585, 4).
_LATER: Final = frozenset({408, 425, 429})
#: The errand that a connection is made for.
_under_way: ContextVar[Errand | None] = ContextVar("webhook", default=None)


def key_of(secret: str, recipient: str) -> str:
    """The recipient's signing key, hexadecimal: of the settings' secret, so that no receiver can sign for another."""
    return hmac.new(secret.encode(), f"webhook:{recipient}".encode(), hashlib.sha256).hexdigest()


def signature_of(key: str, timestamp: int, body: bytes) -> str:
    """`v1=` and the signature of a body sent at `timestamp` (seconds since the epoch)."""
    return "v1=" + hmac.new(key.encode(), b"%d." % timestamp + body, hashlib.sha256).hexdigest()


def body_of(
    delivery: Mapping[str, Any], link: Callable[[Mapping[str, Any]], str | None], public_url: str = ""
) -> bytes:
    """The body: version 4 of Alertmanager's webhook, and beside it what only we know."""

    def at(us: int | None) -> str:
        return "0001-01-01T00:00:00Z" if us is None else instant(us).isoformat().replace("+00:00", "Z")

    alerts = []
    for line in delivery["lines"]:
        alert: dict[str, Any] = {
            "status": "firing" if line["status"] == "raised" else "resolved",
            "labels": {
                "alertname": line["rule"],
                "severity": line["severity"],
                "device": line["device_id"],
                "component_type": line["component_type"],
                "pin": line["pin_position"],
            },
            "annotations": {
                "summary": line.get("message") or line["rule"],
                "device_name": line.get("device_name") or "",
            },
            "startsAt": at(line["occurred_at"]),
            "endsAt": at(line.get("cleared_at") if line["status"] == "cleared" else None),
            "generatorURL": public_url,
            "fingerprint": identity("alarm", line["device_id"], line["rule"], line["pin_position"])[:16],
            "preservarium": {k: v for k, v in line.items() if v is not None},
        }
        if line["state"].endswith("unacknowledged") and (url := link(line)):
            alert["annotations"]["acknowledge"] = url
        alerts.append(alert)
    common = {
        name: value
        for name, value in (alerts[0]["labels"].items() if alerts else ())
        if all(alert["labels"][name] == value for alert in alerts)
    }
    return orjson.dumps(
        {
            "version": "4",
            "groupKey": "{}:{" + ",".join(f'{k}="{v}"' for k, v in delivery["group"].items()) + "}",
            "truncatedAlerts": sum(delivery["more"].values()),
            "status": "firing" if any(alert["status"] == "firing" for alert in alerts) else "resolved",
            "receiver": delivery["recipient"],
            "groupLabels": delivery["group"],
            "commonLabels": common,
            "commonAnnotations": {},
            "externalURL": public_url,
            "alerts": alerts,
            "delivery_id": delivery["delivery_id"],
            "kind": delivery["kind"],
            "held": delivery["held"],
            "subject": subject_of(delivery),
            "planned_at": at(delivery["planned_at"]),
        }
    )


class WebhookChannel:
    """Signed POSTs. Redirects are not followed: an address that moves must be moved in the registry, by someone who may.

    Args:
        settings: asked for each notice.
        link: (line, recipient) -> where it acknowledges the alarm.
        clock: for the signature's time.
    """

    def __init__(
        self, settings: Callable[[], Settings], link: Callable[[Mapping[str, Any], str], str | None], clock: Clock
    ) -> None:
        self._settings = settings
        self._link = link
        self._clock = clock
        self._client: aiohttp.ClientSession | None = None

    async def send(self, notice: Notice) -> str:
        """As `Channel.send`."""
        settings = self._settings()
        secret = settings.notices.webhook_secret.get_secret_value()
        recipient = notice.delivery["recipient"]
        if not secret:
            message = f"{recipient}: webhooks are signed: set PRESERVARIUM_NOTICES__WEBHOOK_SECRET"
            raise RefusedForNow(message)
        body = body_of(notice.delivery, lambda line: self._link(line, recipient), settings.web.public_url)
        timestamp = self._clock.now_us() // 1_000_000
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "preservarium",
            # The same however often it is sent: receivers drop the second copy.
            "Idempotency-Key": notice.id,
            TIMESTAMP_HEADER: str(timestamp),
            SIGNATURE_HEADER: signature_of(key_of(secret, recipient), timestamp, body),
        }
        # What stands in a URL may be a secret: messages name its host only.
        name = host_of(notice.address)
        if not name or not notice.address.lower().startswith(("http://", "https://")):
            message = f"{recipient}: its address is none of a webhook: http(s)://host[:port]/path"
            raise Reject(ReasonCode.NOTICE_REFUSED, message)
        host = urlsplit(notice.address).netloc.rpartition("@")[2]
        destinations = Destinations.of(settings.notices.private_destinations)
        # Looking names up takes a thread, and is needed only where the settings name the host, or a proxy is in between.
        lookup = destinations.names_host(name) or getproxies()
        asked = await asyncio.to_thread(errand, destinations, name) if lookup else Errand(destinations)
        before = _under_way.set(asked)
        try:
            timeout = aiohttp.ClientTimeout(total=settings.notices.endpoint_timeout_s)
            async with self._session().post(
                notice.address, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                status = response.status
                said = (await response.content.read(ANSWER_CHARS_MAX)).decode("utf-8", "replace")
        except aiohttp.InvalidURL as e:
            message = f"{recipient}: {host!r} is no address of a webhook"
            raise Reject(ReasonCode.NOTICE_REFUSED, message) from e
        except (aiohttp.ClientError, OSError, TimeoutError) as e:
            if asked.refused:
                message = answer(f"{recipient}: {host} may not be reached: {reasons(asked.refused)}")
                raise RefusedForNow(message) from e
            message = answer(f"{host} is out of reach: {reason(e)}".replace(notice.address, host))
            raise RefusedForNow(message) from e
        finally:
            _under_way.reset(before)
        text = answer(f"{host}: {status} {said}")
        if 200 <= status < 300:
            return text
        if status >= 500 or status in _LATER:
            raise RefusedForNow(text)
        if 300 <= status < 400:
            text = f"{host}: {status}: redirects are not followed; give the address that it leads to"
        raise Reject(ReasonCode.NOTICE_REFUSED, text)

    def _session(self) -> aiohttp.ClientSession:
        if self._client is None or self._client.closed:
            connector = aiohttp.TCPConnector(socket_factory=_socket)
            self._client = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=True
            )
        return self._client

    async def close(self) -> None:
        """Close the connections; the next notice opens others."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()


def _socket(info: AddrInfoType) -> socket.socket:
    """A socket for an address that the errand under way may go to; aiohttp makes none of its own.

    Raises:
        DestinationRefused: it may not.
    """
    family, kind, protocol, _, where = info
    asked = _under_way.get()
    if asked is None:
        message = "a connection for no errand"
        raise DestinationRefused(message)
    asked.check(str(where[0]), int(where[1]))
    return socket.socket(family, kind, protocol)
