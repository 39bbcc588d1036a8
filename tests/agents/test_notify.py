"""The notify stage against a real SMTP server: once each, in trouble nothing is lost, refused ones are told."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from quality_support import World, batch, catalogue, errors, live, offer, record

from preservarium import metrics, topics
from preservarium.domain.errors import Retry
from preservarium.embedded.service import free_port
from preservarium.notices.outbox import Notifier

US = 1_700_000_000_000_000


def transition(number: int = 1, **fields: Any) -> dict[str, Any]:
    return {
        "alarm_id": f"{number:032x}", "transition_id": f"{number + 1000:032x}", "sequence": 1, "device_id": "dev-1",
        "device_name": "Attic", "rule": "hot", "rule_rev": 1, "component_type": "temp", "pin_position": "-1",
        "severity": "major", "transition": "raised", "state": "unacknowledged", "occurred_at": US, "detected_at": US,
        "cleared_at": None, "transition_at": US, "value": 31.5, "unit": "°C", "threshold": 30.0,
        "message": f"alarm {number}", "recipients": ["ops"], "actor": None, "comment": None, "raw_partition": 1,
        "raw_offset": number, "raw_index": 0, "generation": 0, **fields,
    }  # fmt: skip


class Stage:
    def __init__(self, host: str = "", port: int = 25, **mail: Any) -> None:
        ops = ("recipient", {"name": "ops", "channel": "mail", "address": "ops@example.org"})
        self.world = World(catalogue(ops))
        self.mail = {"host": host, "port": port, "timeout_s": 5.0, **mail}
        self.start()

    def start(self) -> None:
        """A new process: nothing is remembered."""
        self.notifier = Notifier(self.world.documents, live(mail=self.mail), self.world.clock)

    async def run(self, *records: Any, crash: bool = False) -> list[Any]:
        effects = await self.notifier([batch(topics.ALERTS, *records)])
        return effects.sends if crash else self.world.carry_out(effects, 3)


def subjects(smtp: Any) -> list[str]:
    return [m["Subject"] for m in smtp.messages]


def count(outcome: str) -> float:
    return metrics.NOTICES.labels("mail", outcome)._value.get()


async def test_every_transition_is_told_once(smtp: Any):
    stage = Stage(smtp.host, smtp.port)
    before = count("sent")
    cleared = transition(2, transition="cleared", state="normal", cleared_at=US + 5)
    assert await stage.run(record(1, transition(1), cleared), record(2, transition(3, transition="acknowledged"))) == []
    assert subjects(smtp) == ["[major] ALARM: alarm 1", "[major] cleared: alarm 2"]
    assert [e[1] for e in smtp.envelopes] == [["ops@example.org"]] * 2
    assert count("sent") - before == 2
    assert [m.get_content_type() for m in smtp.messages[0].iter_parts()] == ["text/plain", "text/html"]


async def test_a_server_that_is_down_loses_nothing_and_doubles_nothing(smtp: Any):
    stage = Stage(smtp.host, smtp.port)
    records = [record(i, transition(i)) for i in range(3)]
    await asyncio.to_thread(smtp.stop)
    for _ in range(2):
        with pytest.raises(Retry, match="does not take mail"):
            await stage.run(*records)
    await asyncio.to_thread(smtp.start)
    assert await stage.run(*records) == []
    assert subjects(smtp) == [f"[major] ALARM: alarm {i}" for i in range(3)]


async def test_a_server_in_trouble_halfway_gets_only_the_rest_again(smtp: Any):
    stage = Stage(smtp.host, smtp.port)
    records = [record(i, transition(i)) for i in range(4)]
    taken = smtp.handle_DATA

    async def second_fails(server: Any, session: Any, envelope: Any) -> str:
        if len(smtp.messages) == 2:
            return "451 4.3.0 try later"
        return await taken(server, session, envelope)

    smtp.handle_DATA = second_fails
    with pytest.raises(Retry, match="451"):
        await stage.run(*records)
    smtp.handle_DATA = taken
    assert await stage.run(*records) == []
    assert subjects(smtp) == [f"[major] ALARM: alarm {i}" for i in range(4)]


async def test_after_a_crash_a_notice_comes_at_most_twice_with_one_message_id(smtp: Any):
    stage = Stage(smtp.host, smtp.port)
    await stage.run(record(1, transition(1)), crash=True)
    stage.start()
    await stage.run(record(1, transition(1)))
    first, second = smtp.messages
    assert first["Message-ID"] == second["Message-ID"]


async def test_a_refusal_for_good_is_told_and_the_next_goes_out(smtp: Any):
    stage = Stage(smtp.host, smtp.port)
    smtp.refuse = "554 5.7.1 no"
    sends = await stage.run(record(1, transition(1)), record(2, transition(2, recipients=["who"])))
    assert errors(sends) == [
        ("notice_refused", "recipient 'who' is not in the registry"),
        ("notice_refused", "ops@example.org: 554 5.7.1 no"),
    ]
    smtp.refuse = ""
    assert await stage.run(record(3, transition(3))) == []
    assert subjects(smtp) == ["[major] ALARM: alarm 3"]


class Picky:
    """Takes mail for some and not for others."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.taken: list[str] = []

    async def handle_RCPT(self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any) -> str:
        if answer := self.answers.get(address):
            return answer
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:
        self.taken += envelope.rcpt_tos
        return "250 OK"


@pytest.fixture
def picky() -> Iterator[tuple[Picky, int]]:
    handler, port = Picky(), free_port()
    controller = Controller(handler, hostname="127.0.0.1", port=port)
    controller.start()
    yield handler, port
    controller.stop()


async def test_an_unknown_mailbox_holds_up_nobody(picky: tuple[Picky, int]):
    handler, port = picky
    handler.answers["gone@example.org"] = "550 5.1.1 no such user"
    stage = Stage("127.0.0.1", port)
    sends = await stage.run(record(1, transition(1, recipients=["gone@example.org", "ops"])))
    assert errors(sends) == [("notice_refused", "gone@example.org: 550 5.1.1 no such user")]
    assert handler.taken == ["ops@example.org"]


async def test_a_mailbox_refused_for_now_is_tried_for_a_time(picky: tuple[Picky, int]):
    handler, port = picky
    handler.answers["full@example.org"] = "452 4.2.2 mailbox full"
    stage = Stage("127.0.0.1", port, recipient_retry_s=60)
    one = record(1, transition(1, recipients=["full@example.org", "ops"]))
    for _ in range(2):
        with pytest.raises(Retry, match="mailbox full"):
            await stage.run(one)
        stage.world.clock.advance(29)
    assert handler.taken == ["ops@example.org"]
    stage.world.clock.advance(5)
    assert errors(await stage.run(one)) == [
        ("notice_refused", "full@example.org: 452 4.2.2 mailbox full (tried for 60 s)")
    ]
    assert handler.taken == ["ops@example.org"]


async def test_a_mailbox_that_takes_it_later_gets_it_once(picky: tuple[Picky, int]):
    handler, port = picky
    handler.answers["ops@example.org"] = "450 4.2.0 greylisted"
    stage = Stage("127.0.0.1", port)
    with pytest.raises(Retry):
        await stage.run(record(1, transition(1)))
    handler.answers.clear()
    assert await stage.run(record(1, transition(1))) == []
    assert handler.taken == ["ops@example.org"]


async def test_without_a_mail_server_everything_is_skipped_and_counted():
    stage = Stage()
    before = count("skipped")
    assert await stage.run(record(1, transition(1)), record(2, transition(2, recipients=[]))) == []
    assert count("skipped") - before == 2


async def test_changes_of_a_recipient_count_at_once(smtp: Any):
    stage = Stage(smtp.host, smtp.port)
    offer(stage.world.documents, "recipient", name="ops", channel="mail", address="new@example.org")
    await stage.run(record(1, transition(1)))
    assert smtp.envelopes[0][1] == ["new@example.org"]


async def test_a_wrong_password_waits_for_whoever_mends_the_settings(smtp: Any):
    stage = Stage(smtp.host, smtp.port, user="u", password="p")
    with pytest.raises(Retry, match="does not take mail"):
        await stage.run(record(1, transition(1)))
    assert smtp.messages == []


async def test_a_torn_record_is_told(smtp: Any):
    stage = Stage(smtp.host, smtp.port)
    sends = await stage.run(record(1, b"{"), record(2, transition(2)))
    assert [e[0] for e in errors(sends)] == ["envelope_not_json"]
    assert len(smtp.messages) == 1
