"""Notices by mail: one message to one address, through SMTP (RFC 5321).

What a server answers sorts into three: the server is in trouble (`Retry`: everything waits), this recipient is refused
for now (`RefusedForNow`), or this notice is refused for good (`Reject`).
"""

from datetime import UTC, datetime
from email.message import EmailMessage
from email.policy import SMTP as SMTP_POLICY
from email.utils import format_datetime
from types import TracebackType
from typing import Any, Final, Self

import aiosmtplib
import jinja2

from preservarium.domain.errors import PreservariumError, ReasonCode, Reject, Retry
from preservarium.notices.notice import Notice
from preservarium.settings import Mail

#: RFC 5322, 2.1.1: a line has 998 characters; subjects are cut where mail programs stop showing them anyway.
SUBJECT_CHARS_MAX: Final = 150

_templates: Final = jinja2.Environment(
    loader=jinja2.PackageLoader("preservarium.notices"),
    autoescape=jinja2.select_autoescape(["html"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class RefusedForNow(PreservariumError):
    """The server refuses this recipient for now; later it may not."""


def instant(us: int) -> datetime:
    """µs since the epoch as a UTC datetime, exact."""
    seconds, rest = divmod(us, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)


def _shown(us: int | None) -> str:
    return "" if us is None else f"{instant(us):%Y-%m-%d %H:%M:%S} UTC"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.12g}"


def compose(notice: Notice, sender: str) -> EmailMessage:
    """The message: plain text and HTML, the same bytes' worth of content every time."""
    transition = notice.transition
    domain = sender.rpartition("@")[2].strip("> ") or "localhost"
    word = "ALARM" if transition["transition"] == "raised" else "cleared"
    values = {
        "t": transition,
        "word": word,
        "raised": transition["transition"] == "raised",
        "device": transition.get("device_name") or transition["device_id"],
        "occurred_at": _shown(transition["occurred_at"]),
        "cleared_at": _shown(transition.get("cleared_at")),
        "value": _number(transition.get("value")),
        "threshold": _number(transition.get("threshold")),
    }
    message = EmailMessage(policy=SMTP_POLICY)
    subject = f"[{transition['severity']}] {word}: {transition.get('message') or transition['rule']}"
    message["Subject"] = " ".join("".join(c if c.isprintable() else " " for c in subject).split())[:SUBJECT_CHARS_MAX]
    message["From"] = sender
    message["To"] = notice.address
    # The transition's own time, not that of sending: a second copy is the same message.
    message["Date"] = format_datetime(instant(transition["detected_at"]))
    message["Message-ID"] = f"<{transition['transition_id']}.{notice.id[:12]}@{domain}>"
    # Mail programs show what is told of one alarm as one thread.
    message["References"] = f"<{transition['alarm_id']}@{domain}>"
    message["Auto-Submitted"] = "auto-generated"
    message["X-Preservarium-Alarm"] = transition["alarm_id"]
    message["X-Preservarium-Transition"] = transition["transition_id"]
    # Quoted-printable keeps to 7 bits and short lines, which every server takes.
    message.set_content(_templates.get_template("notice.txt").render(values), cte="quoted-printable")
    html = _templates.get_template("notice.html").render(values)
    message.add_alternative(html, subtype="html", cte="quoted-printable")
    return message


class Session:
    """One SMTP connection, opened with the first message; used by one task at a time."""

    def __init__(self, settings: Mail) -> None:
        self._settings = settings
        self._client: aiosmtplib.SMTP | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        try:
            await client.quit()
        except (aiosmtplib.SMTPException, OSError):
            client.close()  # the server has gone; what it had taken it has acknowledged

    async def _connected(self) -> aiosmtplib.SMTP:
        if self._client is not None and self._client.is_connected:
            return self._client
        s = self._settings
        client = aiosmtplib.SMTP(
            hostname=s.host,
            port=s.port,
            username=s.user or None,
            password=s.password.get_secret_value() or None,
            timeout=s.timeout_s,
            use_tls=s.security == "tls",
            start_tls=s.security == "starttls",
        )
        await client.connect()
        self._client = client
        return client

    async def send(self, notice: Notice) -> None:
        """Hand one notice to the server; when this returns, the server has taken it over.

        Raises:
            Retry: the server cannot be reached, or is in trouble, or refuses us altogether.
            RefusedForNow: the server refuses the recipient for now.
            Reject: `notice_refused`: refused for good.
        """
        message = compose(notice, self._settings.sender)
        try:
            client = await self._connected()
            await client.sendmail(self._settings.sender, [notice.address], message.as_bytes())
        except aiosmtplib.SMTPRecipientsRefused as e:
            refusal = e.recipients[0]
            answer = f"{notice.address}: {refusal.code} {refusal.message}"
            if refusal.code == aiosmtplib.SMTPStatus.domain_unavailable:
                raise Retry(answer) from e
            raise (RefusedForNow(answer) if refusal.code < 500 else Reject(ReasonCode.NOTICE_REFUSED, answer)) from e
        except aiosmtplib.SMTPDataError as e:
            answer = f"{notice.address}: {e.code} {e.message}"
            raise (Retry(answer) if e.code < 500 else Reject(ReasonCode.NOTICE_REFUSED, answer)) from e
        except (aiosmtplib.SMTPException, OSError, ValueError) as e:
            # Also a wrong password, a refused sender and a server without TLS: whoever mends the settings wants the
            # mail to be there still.
            text = f"the mail server does not take mail: {_described(e)}"
            raise Retry(text) from e


def _described(error: Any) -> str:
    code = getattr(error, "code", None)
    return f"{code} {getattr(error, 'message', '')}" if code else f"{type(error).__name__}: {error}"
