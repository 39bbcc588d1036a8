"""Who is told, and in which words."""

from email import policy
from email.parser import BytesParser
from typing import Any

import pytest

from preservarium.notices.mail import SUBJECT_CHARS_MAX, compose
from preservarium.notices.notice import RECIPIENTS_MAX, Notice, Skipped, plan

US = 1_700_000_000_000_000
TRANSITION: dict[str, Any] = {
    "alarm_id": "a" * 32, "transition_id": "b" * 32, "sequence": 1, "device_id": "70b3d5", "device_name": "Attic <3>",
    "rule": "hot", "rule_rev": 1, "component_type": "air_temperature", "pin_position": "-1", "severity": "major",
    "transition": "raised", "state": "unacknowledged", "occurred_at": US, "detected_at": US + 1_000_000,
    "cleared_at": None, "transition_at": US, "value": 31.5, "unit": "°C", "threshold": 30.0,
    "message": "Attic: 31.5 °C & rising", "recipients": [], "actor": None, "comment": None,
    "raw_partition": 1, "raw_offset": 2, "raw_index": 0, "generation": 0,
}  # fmt: skip
OPS: Any = {"name": "ops", "rev": 1, "channel": "mail", "address": "ops@example.org"}
NIGHT: Any = {**OPS, "name": "night", "address": "night@example.org", "severities": ["critical"]}
HOOK: Any = {**OPS, "name": "hook", "channel": "webhook", "address": "https://example.org"}
REGISTRY = {d["name"]: d for d in (OPS, NIGHT, HOOK)}


def told(defaults: tuple[str, ...] = (), **fields: Any) -> tuple[list[str], list[Skipped], list[str]]:
    planned = plan({**TRANSITION, **fields}, REGISTRY.get, defaults)
    return [n.address for n in planned.notices], list(planned.skipped), list(planned.wrong)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"recipients": ["ops"]}, (["ops@example.org"], [], [])),
        ({"recipients": ["ops", "night"]}, (["ops@example.org"], [Skipped.SEVERITY], [])),
        (
            {"recipients": ["ops", "night"], "severity": "critical"},
            (["ops@example.org", "night@example.org"], [], []),
        ),
        ({"recipients": ["hook"]}, ([], [Skipped.CHANNEL], [])),
        ({"recipients": ["who"]}, ([], [], ["recipient 'who' is not in the registry"])),
        ({"recipients": ["a@b.c", "A@b.c", "ops"]}, (["a@b.c", "ops@example.org"], [], [])),
        ({"recipients": ["a@b.c\r\nBcc: x@y.z"]}, ([], [], ["'a@b.c\\r\\nBcc: x@y.z' is no mail address"])),
        ({"transition": "acknowledged"}, ([], [Skipped.TRANSITION], [])),
        ({"transition": "cleared", "state": "shelved"}, ([], [Skipped.TRANSITION], [])),
        ({"generation": 1}, ([], [Skipped.REPLAY], [])),
        ({}, ([], [Skipped.NOBODY], [])),
    ],
)
def test_who_is_told(fields: dict[str, Any], expected: Any):
    assert told(**fields) == expected


def test_the_settings_name_who_is_told_where_the_rule_names_nobody():
    assert told(("x@example.org", "y@example.org"))[0] == ["x@example.org", "y@example.org"]
    assert told(("x@example.org",), recipients=["ops"])[0] == ["ops@example.org"]


def test_recipients_have_a_limit():
    addresses, _, wrong = told(recipients=[f"a{i}@example.org" for i in range(RECIPIENTS_MAX + 1)])
    assert len(addresses) == RECIPIENTS_MAX
    assert wrong == [f"a{RECIPIENTS_MAX}@example.org: a transition has at most {RECIPIENTS_MAX} recipients"]


def mail(**fields: Any) -> Any:
    message = compose(Notice({**TRANSITION, **fields}, "mail", "ops@example.org"), "preservarium@site.example")
    return BytesParser(policy=policy.default).parsebytes(message.as_bytes())


def test_a_mail_says_everything_in_text_and_html():
    message = mail()
    assert message["Subject"] == "[major] ALARM: Attic: 31.5 °C & rising"
    assert (message["From"], message["To"]) == ("preservarium@site.example", "ops@example.org")
    assert message["Date"].datetime.timestamp() == (US + 1_000_000) // 1_000_000
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["References"] == f"<{'a' * 32}@site.example>"
    text = message.get_body(("plain",)).get_content()
    for expected in (
        "2023-11-14 22:13:20 UTC",
        "31.5 °C",
        "threshold 30 °C",
        "Attic <3> (70b3d5)",
        "partition 1, offset 2",
    ):
        assert expected in text
    html = message.get_body(("html",)).get_content()
    assert "Attic &lt;3&gt;" in html
    assert "31.5 °C &amp; rising" in html


def test_the_same_notice_is_the_same_bytes_but_for_the_boundary():
    one, two = mail(), mail()
    assert one["Message-ID"] == two["Message-ID"]
    assert one["Message-ID"].startswith(f"<{'b' * 32}.")
    assert one.get_body(("plain",)).get_content() == two.get_body(("plain",)).get_content()
    other = compose(Notice(TRANSITION, "mail", "other@example.org"), "p@site.example")
    assert other["Message-ID"] != one["Message-ID"]


def test_a_cleared_alarm_names_both_instants():
    text = mail(transition="cleared", state="normal", cleared_at=US + 60_000_000).get_body(("plain",)).get_content()
    assert text.splitlines()[2:4] == ["Cleared:    2023-11-14 22:14:20 UTC", "Raised:     2023-11-14 22:13:20 UTC"]


def test_what_a_device_says_cannot_reach_the_headers():
    message = mail(message="x\r\nBcc: evil@example.org" + "y" * 500)
    assert message["Bcc"] is None
    assert len(message["Subject"]) == SUBJECT_CHARS_MAX
