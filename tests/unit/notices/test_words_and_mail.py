"""Who is told of an alarm, and in which words."""

from datetime import UTC
from email import policy
from email.parser import BytesParser
from typing import Any

import pytest

from preservarium.domain.notices import Inbox, Policy
from preservarium.notices.channel import Notice
from preservarium.notices.mail import Picture, compose
from preservarium.notices.routing import RECIPIENTS_MAX, Skipped, labels_of, route
from preservarium.notices.words import SUBJECT_CHARS_MAX, subject_of

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
    found = route({**TRANSITION, **fields}, REGISTRY.get, defaults)
    return [one.address for one in found.told], list(found.skipped), list(found.wrong)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"recipients": ["ops"]}, (["ops@example.org"], [], [])),
        ({"recipients": ["ops", "night"]}, (["ops@example.org"], [Skipped.SEVERITY], [])),
        (
            {"recipients": ["ops", "night"], "severity": "critical"},
            (["ops@example.org", "night@example.org"], [], []),
        ),
        ({"recipients": ["hook"]}, (["https://example.org"], [], [])),
        ({"recipients": ["who"]}, ([], [], ["recipient 'who' is not in the registry"])),
        ({"recipients": ["a@b.c", "A@b.c", "ops"]}, (["a@b.c", "ops@example.org"], [], [])),
        ({"recipients": ["a@b.c\r\nBcc: x@y.z"]}, ([], [], ["'a@b.c\\r\\nBcc: x@y.z' is no mail address"])),
        ({"recipients": ["night"], "transition": "severity_raised"}, ([], [Skipped.SEVERITY], [])),
        # It may have been critical before, so that it is over is to be heard.
        ({"recipients": ["night"], "transition": "cleared"}, (["night@example.org"], [], [])),
        # Of what operators do, recipients hear so that they are not told of it any more.
        ({"recipients": ["ops"], "transition": "acknowledged"}, (["ops@example.org"], [], [])),
        ({"recipients": ["ops"], "transition": "shelved", "state": "shelved"}, (["ops@example.org"], [], [])),
        ({"transition": "commented"}, ([], [Skipped.TRANSITION], [])),
        ({"transition": "superseded"}, ([], [Skipped.TRANSITION], [])),
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


def planned(*transitions: dict[str, Any]) -> dict[str, Any]:
    """The notice that tells of them."""
    inbox = Inbox("ops")
    policy = Policy(group_wait_us=0)
    for offset, line in enumerate(transitions):
        labels = labels_of(line, None)
        inbox.hear(
            {
                "recipient": "ops",
                "source": "1",
                "offset": offset,
                "index": 0,
                "after_s": 0,
                "below": False,
                "labels": labels,
                "transition": line,
            },
            policy,
            US,
        )
    inbox.plan(policy, US, 1)
    (delivery,) = inbox.take()
    return dict(delivery)


def no_link(_line: Any) -> None:
    return None


def read(delivery: dict[str, Any], address: str = "ops@example.org", **fields: Any) -> Any:
    notice = Notice(delivery, "mail", address)
    message = compose(notice, "preservarium@site.example", UTC, fields.pop("link", no_link), **fields)
    return BytesParser(policy=policy.default).parsebytes(message.as_bytes())


def mail(**fields: Any) -> Any:
    return read(planned({**TRANSITION, **fields}))


def test_a_mail_says_everything_in_text_and_html():
    message = mail()
    assert message["Subject"] == "[major] ALARM: Attic: 31.5 °C & rising"
    assert (message["From"], message["To"]) == ("preservarium@site.example", "ops@example.org")
    assert message["Date"].datetime.timestamp() == US // 1_000_000
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
    assert one["X-Preservarium-Transition"] == "b" * 32
    assert one.get_body(("plain",)).get_content() == two.get_body(("plain",)).get_content()
    other = planned({**TRANSITION, "transition_id": "c" * 32})
    assert read(other)["Message-ID"] != one["Message-ID"]


def test_a_cleared_alarm_names_both_instants():
    text = mail(transition="cleared", state="normal", cleared_at=US + 60_000_000).get_body(("plain",)).get_content()
    assert text.splitlines()[2:4] == ["Cleared:    2023-11-14 22:14:20 UTC", "Raised:     2023-11-14 22:13:20 UTC"]


def test_what_a_device_says_cannot_reach_the_headers():
    message = mail(message="x\r\nBcc: evil@example.org" + "y" * 500)
    assert message["Bcc"] is None
    assert len(message["Subject"]) == SUBJECT_CHARS_MAX


def test_several_alarms_are_one_mail():
    many = [
        {**TRANSITION, "device_id": f"d{n}", "alarm_id": f"{n}", "transition_id": f"t{n}", "severity": s}
        for n, s in enumerate(["minor", "critical"])
    ]
    over = {
        **TRANSITION,
        "device_id": "d9",
        "alarm_id": "9",
        "transition_id": "t9",
        "transition": "cleared",
        "state": "normal",
        "cleared_at": US,
    }
    message = read(planned(*many, over))
    assert message["Subject"] == "[critical] 2 alarms, 1 cleared: hot"
    text = message.get_body(("plain",)).get_content()
    assert [line for line in text.splitlines() if line[:1].isdigit()] == [
        "1. [critical] ALARM: Attic: 31.5 °C & rising",
        "2. [minor] ALARM: Attic: 31.5 °C & rising",
        "3. [major] cleared: Attic: 31.5 °C & rising",
    ]


def test_an_alarm_can_be_acknowledged_from_its_mail():
    message = read(planned(TRANSITION), link=lambda line: f"https://plant.example/ack?token={line['alarm_id']}&x=1")
    text, html = (message.get_body((kind,)).get_content() for kind in ("plain", "html"))
    assert f"Acknowledge: https://plant.example/ack?token={'a' * 32}&x=1" in text
    assert f'href="https://plant.example/ack?token={"a" * 32}&amp;x=1"' in html
    over = read(planned({**TRANSITION, "transition": "cleared", "state": "normal"}), link=lambda _: "https://x")
    assert "Acknowledge" not in over.get_body(("plain",)).get_content()


def test_a_picture_stands_in_the_html_and_changes_no_word_of_the_text():
    delivery = planned(TRANSITION)
    with_picture, without = read(delivery, picture=Picture(b"\x89PNG", 'temperature "high"')), read(delivery)
    assert with_picture.get_body(("plain",)).get_content() == without.get_body(("plain",)).get_content()
    assert with_picture["Message-ID"] == without["Message-ID"]
    (image,) = [part for part in with_picture.walk() if part.get_content_type() == "image/png"]
    html = with_picture.get_body(("html",)).get_content()
    assert f'src="cid:{image["Content-ID"].strip("<>")}"' in html
    assert 'alt="temperature &#34;high&#34;"' in html
    assert image.get_content() == b"\x89PNG"
    assert image.get_content_disposition() == "inline"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kind": "repeat"}, "[major] still ALARM: Attic: 31.5 °C & rising"),
        ({"kind": "test"}, "Test: this is what a notice looks like"),
        ({"more": {"raised": 7}}, "[major] 8 alarms: hot"),
        ({"lines": [], "more": {"raised": 7, "cleared": 2}}, "[indeterminate] 7 alarms, 2 cleared: hot"),
    ],
)
def test_subjects(fields: dict[str, Any], expected: str):
    assert subject_of({**planned(TRANSITION), **fields}) == expected
