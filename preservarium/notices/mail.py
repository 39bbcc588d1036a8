"""Notices by mail: one message to one address, through SMTP (RFC 5321)."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import tzinfo
from email.message import EmailMessage
from email.policy import SMTP as SMTP_POLICY
from email.utils import format_datetime
from typing import Any, Final

import aiosmtplib

from preservarium import tls
from preservarium.domain.readings.lineage import identity
from preservarium.errors import ReasonCode, Reject, Retry, reason
from preservarium.notices.channel import Notice, RefusedForNow, answer
from preservarium.notices.words import Link, instant, tell
from preservarium.settings import Mail, SettingsError

#: A connection that nobody has used for so long is closed: servers close them after minutes.
IDLE_S: Final = 10.0
#: A server may take its time over a whole message: RFC 5321, 4.5.3.2.6, asks for ten minutes, because who gives up early
#: sends it twice. More would make the stage look stuck (STUCK_S in preservarium/streaming/reports.py).
DATA_S: Final = 90.0
#: So long a mail waits for the one before it.
TURN_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture for the HTML part."""

    png: bytes
    text: str  #: what it shows, for who does not see it


#: Draws the series of a notice; None where there is nothing to draw, or nothing to draw it of.
Draw = Callable[[Mapping[str, Any]], Awaitable[Picture | None]]


def _domain(sender: str) -> str:
    return sender.rpartition("@")[2].strip("> ") or "localhost"


def compose(notice: Notice, sender: str, zone: tzinfo, link: Link, picture: Picture | None = None) -> EmailMessage:
    """The message: plain text and HTML, the same words every time; a picture stands in the HTML only."""
    delivery = notice.delivery
    domain = _domain(sender)
    cid = f"plot.{notice.id}@{domain}"
    words = tell(delivery, zone, link, plot=f"cid:{cid}" if picture else "", plot_text=picture.text if picture else "")
    message = EmailMessage(policy=SMTP_POLICY)
    message["Subject"] = words.subject
    message["From"] = sender
    message["To"] = notice.address
    # The time of the plan, not that of sending: a second copy is the same message.
    message["Date"] = format_datetime(instant(delivery["planned_at"]))
    message["Message-ID"] = f"<{notice.id}@{domain}>"
    alarms = [line["alarm_id"] for line in delivery["lines"]]
    # Mail programs show what is told of one alarm, or of one group, as one thread.
    thread = alarms[0] if len(alarms) == 1 else identity("group", delivery["recipient"], *delivery["group"].values())
    message["References"] = f"<{thread}@{domain}>"
    message["Auto-Submitted"] = "auto-generated"
    message["X-Preservarium-Notice"] = notice.id
    if len(alarms) == 1:
        message["X-Preservarium-Alarm"] = alarms[0]
        message["X-Preservarium-Transition"] = delivery["lines"][0]["transition_id"]
    # Quoted-printable keeps to 7 bits and short lines, which every server takes.
    message.set_content(words.text, cte="quoted-printable")
    message.add_alternative(words.html, subtype="html", cte="quoted-printable")
    if picture:
        html = message.get_payload()[1]  # type: ignore[index]
        assert isinstance(html, EmailMessage)
        html.add_related(picture.png, "image", "png", cid=f"<{cid}>", disposition="inline", filename="plot.png")
    return message


class MailChannel:
    """Mail through one server: a connection is kept for the next message, and closed when none comes.

    Args:
        settings: asked for each message.
        zone: of a recipient.
        link: (line, recipient) -> where it acknowledges the alarm.
        draw: the picture.
    """

    def __init__(
        self,
        settings: Callable[[], Mail],
        zone: Callable[[str], tzinfo],
        link: Callable[[Mapping[str, Any], str], str | None],
        draw: Draw | None = None,
    ) -> None:
        self._settings = settings
        self._zone = zone
        self._link = link
        self._draw = draw
        self._client: tuple[Mail, aiosmtplib.SMTP] | None = None
        self._turn = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def send(self, notice: Notice) -> str:
        """As `Channel.send`."""
        settings = self._settings()
        recipient = notice.delivery["recipient"]
        picture = await self._draw(notice.delivery) if self._draw else None
        message = compose(
            notice, settings.sender, self._zone(recipient), lambda line: self._link(line, recipient), picture
        )
        await self._take_turn()
        try:
            try:
                return await self._hand_over(settings, notice.address, message.as_bytes())
            except Retry:
                self._drop()  # a server in trouble is asked on a new connection, which may lead to another one
                raise
        finally:
            self._turn.release()
            self._close_when_idle()

    async def _take_turn(self) -> None:
        """A connection is used by one at a time."""
        try:
            async with asyncio.timeout(TURN_S):
                await self._turn.acquire()
        except TimeoutError as e:
            message = "the mail server is busy with the mail before"
            raise Retry(message) from e

    async def _hand_over(self, settings: Mail, address: str, message: bytes) -> str:
        try:
            async with asyncio.timeout(settings.timeout_s):
                client = await self._connected(settings)
                await client.mail(settings.sender)
                await client.rcpt(address)
            taken = await client.data(message, timeout=DATA_S)
        except aiosmtplib.SMTPRecipientRefused as e:
            said = answer(f"{address}: {e.code} {e.message}")
            if e.code == aiosmtplib.SMTPStatus.domain_unavailable:
                raise Retry(said) from e
            await self._reset()
            raise (RefusedForNow(said) if e.code < 500 else Reject(ReasonCode.NOTICE_REFUSED, said)) from e
        except aiosmtplib.SMTPDataError as e:
            said = answer(f"{address}: {e.code} {e.message}")
            raise (Retry(said) if e.code < 500 else Reject(ReasonCode.NOTICE_REFUSED, said)) from e
        except (aiosmtplib.SMTPException, OSError, ValueError, SettingsError) as e:
            # Also a wrong password, a refused sender and a server without TLS: whoever mends the settings wants the
            # mail to be there still.
            text = f"the mail server does not take mail: {answer(_described(e))}"
            raise Retry(text) from e
        return answer(f"{taken.code} {taken.message}")

    async def _reset(self) -> None:
        """Give up the recipient, not the connection."""
        if self._client is not None:
            try:
                await self._client[1].rset()
            except (aiosmtplib.SMTPException, OSError):
                self._drop()

    async def _connected(self, settings: Mail) -> aiosmtplib.SMTP:
        if self._client is not None:
            known, client = self._client
            if known == settings and client.is_connected:
                return client
            self._drop()
        client = aiosmtplib.SMTP(
            hostname=settings.host,
            port=settings.port,
            username=settings.user or None,
            password=settings.password.get_secret_value() or None,
            timeout=settings.timeout_s,
            use_tls=settings.security == "tls",
            start_tls=settings.security == "starttls",
            tls_context=None
            if settings.security == "none"
            else tls.client_context("mail", ca_file=settings.ssl_ca_file),
        )
        await client.connect()
        self._client = settings, client
        return client

    def _drop(self) -> None:
        if self._client is not None:
            self._client[1].close()
            self._client = None

    def _close_when_idle(self) -> None:
        if self._idle is not None:
            self._idle.cancel()

        def begin() -> None:
            task = asyncio.ensure_future(self.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

        self._idle = asyncio.get_running_loop().call_later(IDLE_S, begin)

    async def close(self) -> None:
        """Close the connection; the next message opens another one."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        async with self._turn:
            found, self._client = self._client, None
            if found is None:
                return
            try:
                await found[1].quit()
            except (aiosmtplib.SMTPException, OSError):
                found[1].close()  # the server has gone; what it had taken it has acknowledged


def _described(error: Any) -> str:
    code = getattr(error, "code", None)
    return f"{code} {getattr(error, 'message', '')}" if code else reason(error)
