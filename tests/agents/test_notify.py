"""From transitions to mails against a real SMTP server: once each, in trouble nothing is lost, refused ones are told."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from notice_support import US, Memory, transition
from quality_support import World, batch, catalogue, errors, lines, live, offer, record

from preservarium import metrics, topics
from preservarium.embedded.service import free_port
from preservarium.errors import Retry
from preservarium.notices.grouping import Grouping, Policies
from preservarium.notices.mail import MailChannel
from preservarium.notices.outbox import Notifier
from preservarium.notices.routing import Router
from preservarium.streaming.stage import Tick

_open: list[MailChannel] = []


@pytest.fixture(autouse=True)
async def closing() -> AsyncIterator[None]:
    yield
    while _open:
        await _open.pop().close()


class Stage:
    """route, group and notify of one partition; each alarm is a group of its own, and no group waits."""

    def __init__(self, host: str = "", port: int = 25, **mail: Any) -> None:
        ops = ("recipient", {"name": "ops", "channel": "mail", "address": "ops@example.org"})
        self.world = World(catalogue(ops))
        self.live = live(
            mail={"host": host, "port": port, "timeout_s": 5.0, **mail},
            notices={"group_by": "alarm", "group_wait_s": 0},
        )
        world = self.world
        self.router = Router(world.known, world.documents, self.live, world.clock)
        self.grouping = Grouping(Memory(world), world.documents, self.live, world.clock)
        self.first = True
        self.waiting: list[Any] = []  #: what notify has not acknowledged
        self.offset = 0
        self.receipts: list[dict[str, Any]] = []
        self.remembered = ""
        self.start()

    def start(self) -> None:
        """A new process: nothing is remembered but what was kept beside the offset."""
        mail = MailChannel(
            lambda: self.live().mail, Policies(self.world.documents, self.live).zone_of, lambda _line, _recipient: None
        )
        _open.append(mail)
        self.notifier = Notifier("notify", {"mail": mail}, self.world.documents, self.live, self.world.clock)
        self.notifier.recall(3, self.remembered)

    async def plan(self, *records: Any) -> list[Any]:
        """Bring transitions as far as `notices`; what route sent to `iot_errors`."""
        sends = self.world.carry_out(await self.router(batch(topics.ALERTS, *records)), 3)
        if events := [record(i, s.value) for i, s in enumerate(sends) if s.topic is topics.NOTICE_EVENTS]:
            self.world.carry_out(await self.grouping(batch(topics.NOTICE_EVENTS, *events)), 3)
        for _ in range(2):
            self.world.clock.advance(1)
            effects = await self.grouping.tick(Tick(3, self.world.clock.now_us(), self.first, False))
            self.first = False
            for send in self.world.carry_out(effects, 3):
                self.offset += 1
                self.waiting.append(record(self.offset, send.value))
        return [s for s in sends if s.topic is topics.ERRORS]

    async def run(self, *records: Any, crash: bool = False) -> list[Any]:
        """Tell of transitions; the same ones again are heard once. What was sent but for receipts."""
        refused = await self.plan(*records)
        if not self.waiting:
            return refused
        effects = await self.notifier([batch(topics.NOTICES, *self.waiting)])
        if crash:
            return effects.sends
        sends = self.world.carry_out(effects, 3)
        self.waiting = []
        self.remembered = self.notifier.remember(3)
        self.receipts += lines(sends, topics.NOTICE_RECEIPTS)
        return refused + [s for s in sends if s.topic is not topics.NOTICE_RECEIPTS]


def subjects(smtp: Any) -> list[str]:
    return [m["Subject"] for m in smtp.messages]


def count(outcome: str, channel: str = "mail") -> float:
    return metrics.NOTICES.labels(channel, outcome)._value.get()


async def test_every_transition_is_told_once(smtp: Any):
    stage = Stage(smtp.host, smtp.port)
    before = count("sent")
    cleared = transition(2, transition="cleared", state="normal", cleared_at=US + 5)
    assert await stage.run(record(1, transition(1), cleared), record(2, transition(3, transition="acknowledged"))) == []
    assert subjects(smtp) == ["[major] ALARM: alarm 1", "[major] cleared: alarm 2"]
    assert [e[1] for e in smtp.envelopes] == [["ops@example.org"]] * 2
    assert count("sent") - before == 2
    assert [m.get_content_type() for m in smtp.messages[0].iter_parts()] == ["text/plain", "text/html"]
    assert [(r["outcome"], r["recipient"], r["address"], r["attempts"], r["transitions"]) for r in stage.receipts] == [
        ("sent", "ops", "ops@example.org", 1, [line["transition_id"]]) for line in (transition(1), cleared)
    ]
    assert all(r["answer"].startswith("250 ") for r in stage.receipts)
    assert f"<{stage.receipts[0]['delivery_id']}@localhost>" == smtp.messages[0]["Message-ID"]


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
    assert first.get_body(("plain",)).get_content() == second.get_body(("plain",)).get_content()


async def test_what_the_group_stage_handed_out_twice_is_sent_once(smtp: Any):
    stage = Stage(smtp.host, smtp.port)
    await stage.plan(record(1, transition(1)), record(2, transition(2)))
    again = stage.waiting[0]
    stage.waiting.insert(1, again)
    await stage.run()
    stage.start()
    stage.waiting = [again]
    await stage.run(record(3, transition(3)))
    assert subjects(smtp) == [f"[major] ALARM: alarm {i}" for i in (1, 2, 3)]


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
    assert [(r["outcome"], r["recipient"]) for r in stage.receipts] == [
        ("refused", "gone@example.org"),
        ("sent", "ops"),
    ]


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
    before = count("skipped"), count("skipped", "none")
    assert await stage.run(record(1, transition(1)), record(2, transition(2, recipients=[]))) == []
    assert (count("skipped") - before[0], count("skipped", "none") - before[1]) == (1, 1)


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


async def test_a_server_that_takes_its_time_over_a_message_gets_it_once(smtp: Any):
    stage = Stage(smtp.host, smtp.port, timeout_s=0.5)
    taken = smtp.handle_DATA

    async def slow(server: Any, session: Any, envelope: Any) -> str:
        await asyncio.sleep(1.5)
        answer: str = await taken(server, session, envelope)
        return answer

    smtp.handle_DATA = slow
    assert await stage.run(record(1, transition(1))) == []
    assert len(smtp.messages) == 1


async def test_a_server_that_says_nothing_is_given_up_in_time():
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    stage = Stage("127.0.0.1", server.sockets[0].getsockname()[1], timeout_s=0.3)
    with pytest.raises(Retry, match="does not take mail"):
        await asyncio.wait_for(stage.run(record(1, transition(1))), 5)
    server.close()


async def test_the_server_closing_idle_connections_is_no_trouble(smtp: Any):
    stage = Stage(smtp.host, smtp.port)
    await stage.run(record(1, transition(1)))
    await asyncio.to_thread(smtp.stop)
    await asyncio.to_thread(smtp.start)
    for _ in range(2):  # at most the first try meets the closed connection
        try:
            await stage.run(record(2, transition(2)))
            break
        except Retry:
            continue
    assert subjects(smtp) == ["[major] ALARM: alarm 1", "[major] ALARM: alarm 2"]
