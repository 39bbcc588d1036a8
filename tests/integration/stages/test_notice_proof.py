"""The proof in PostgreSQL, the picture of stored readings, and trying a recipient from the command line."""

import time
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest
from click.testing import CliRunner
from notice_support import event, transition
from quality_support import World, batch, catalogue, lines, record
from sink_support import NOW_US, SECOND_US, fetch, live, message

from preservarium import topics
from preservarium.__main__ import cli
from preservarium.clock import ManualClock
from preservarium.domain.notices import Inbox, Policy
from preservarium.embedded.service import free_port
from preservarium.notices.grouping import Policies
from preservarium.notices.mail import MailChannel
from preservarium.notices.outbox import Notifier
from preservarium.notices.plot import HEIGHT_IN, PNG_BYTES_MAX, WIDTH_IN, Plotter
from preservarium.stores.event_tables import EventStore
from preservarium.stores.tables import NOTICES
from preservarium.stores.timescale import TimescaleStore

pytest.importorskip("matplotlib")


def delivery(number: int = 1, **fields: Any) -> dict[str, Any]:
    inbox = Inbox("ops")
    policy = Policy(group_wait_us=0)
    line = transition(
        1, device_id="dev-1", component_type="temperature", occurred_at=NOW_US, detected_at=NOW_US, **fields
    )
    inbox.hear(event(line, 1), policy, NOW_US)
    inbox.plan(policy, NOW_US, number)
    (planned,) = inbox.take()
    return dict(planned)


class Drawing:
    """A plotter, and the readings of a day."""

    def __init__(self, dsn: str, **notices: Any) -> None:
        self.live = live(postgres={"url": dsn}, notices=notices, breaker={"failures_max": 2, "open_s": 60})
        self.clock = ManualClock(NOW_US)
        self.plotter = Plotter(self.live, self.clock, Policies(catalogue(), self.live).zone_of)
        self.store = TimescaleStore(self.live)

    async def fill(self, hours: int = 24) -> None:
        each_s = 300
        messages = []
        for number in range(hours * 3_600 // each_s):
            value = {"value": 20 + number % 40 / 4, "pin_position": "-1"}
            messages.append(message("dev-1", value, at=NOW_US - number * each_s * SECOND_US, offset=number))
        await self.store.write(messages, {})

    async def close(self) -> None:
        await self.plotter.close()
        await self.store.close()


@pytest.fixture
async def drawing(dsn: str) -> Any:
    made = Drawing(dsn)
    await made.fill()
    yield made
    await made.close()


def size_of(png: bytes) -> tuple[int, int]:
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


async def test_a_picture_of_the_stored_series(drawing: Drawing):
    picture = await drawing.plotter(delivery())
    assert picture is not None
    assert picture.png.startswith(b"\x89PNG")
    width, height = size_of(picture.png)
    assert (width, height) == (round(WIDTH_IN * 200), round(HEIGHT_IN * 200))
    assert len(picture.png) < PNG_BYTES_MAX
    assert picture.text.startswith("Attic: temperature from ")
    assert picture.text.endswith("20 to 29.75 °C, last 20 °C")


async def test_names_of_devices_are_no_formulas(drawing: Drawing):
    assert await drawing.plotter(delivery(device_name="$\\frac{$ 100 $")) is not None


async def test_a_series_without_readings_has_no_picture(drawing: Drawing):
    assert await drawing.plotter(delivery(pin_position="7")) is None
    assert await drawing.plotter(delivery(value=None)) is None


async def test_a_database_that_does_not_answer_costs_no_more_than_its_time(dsn: str):
    drawing = Drawing(dsn, plot_timeout_s=0.5)
    await drawing.fill(1)
    blocker = await asyncpg.connect(dsn)
    try:
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE series IN ACCESS EXCLUSIVE MODE")
            for _ in range(2):
                started = time.monotonic()
                assert await drawing.plotter(delivery()) is None
                assert time.monotonic() - started < 5
            # Then it is not asked any more for a time, so mails do not wait at all.
            assert drawing.plotter._breaker.state.name == "OPEN"
    finally:
        await blocker.close()
    assert await drawing.plotter(delivery()) is None
    drawing.clock.advance(100)
    assert await drawing.plotter(delivery()) is not None
    await drawing.close()


async def test_a_database_that_is_down_leaves_the_mail_without_its_picture(smtp: Any):
    drawing = Drawing(f"postgresql://nobody@127.0.0.1:{free_port()}/none")
    world = World(catalogue(("recipient", {"name": "ops", "channel": "mail", "address": "ops@example.org"})))
    settings = live(mail={"host": smtp.host, "port": smtp.port})
    channel = MailChannel(lambda: settings().mail, lambda _: Policy().zone, lambda _line, _to: None, drawing.plotter)
    notifier = Notifier("notify", {"mail": channel}, world.documents, settings, world.clock)
    await notifier([batch(topics.NOTICES, record(1, delivery()))])
    await channel.close()
    await drawing.close()
    (mail,) = smtp.messages
    assert [part.get_content_type() for part in mail.walk()] == ["multipart/alternative", "text/plain", "text/html"]


async def test_a_mail_with_its_picture_and_its_proof(dsn: str, drawing: Drawing, smtp: Any):
    world = World(catalogue(("recipient", {"name": "ops", "channel": "mail", "address": "ops@example.org"})))
    settings = live(mail={"host": smtp.host, "port": smtp.port}, postgres={"url": dsn})
    channel = MailChannel(lambda: settings().mail, lambda _: Policy().zone, lambda _line, _to: None, drawing.plotter)
    notifier = Notifier("notify", {"mail": channel}, world.documents, settings, world.clock)
    notice = delivery()
    effects = await notifier([batch(topics.NOTICES, record(1, notice))])
    await channel.close()
    (mail,) = smtp.messages
    images = [part for part in mail.walk() if part.get_content_type() == "image/png"]
    assert len(images) == 1
    receipts = lines(effects.sends, topics.NOTICE_RECEIPTS)
    proofs = EventStore(NOTICES, settings, sink="sink-notices")
    assert (await proofs.write([*receipts, *receipts], {})).accepted == 1
    await proofs.close()
    (row,) = await fetch(dsn, "SELECT * FROM notice_deliveries WHERE alarms ? $1", notice["lines"][0]["alarm_id"])
    assert (row["delivery_id"], row["recipient"], row["outcome"]) == (notice["delivery_id"], "ops", "sent")
    assert row["answer"].startswith("250")
    assert orjson.loads(row["transitions"]) == notice["lines"][0]["transitions"]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def registered(dsn: str, smtp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    file = tmp_path / "registry.yaml"
    file.write_text(
        "recipients:\n  - {name: ops, channel: mail, address: ops@example.org, timezone: Europe/Berlin}\n"
        "  - {name: hook, channel: webhook, address: 'http://127.0.0.1:9/hook'}\n"
    )
    environment = {
        "POSTGRES__URL": dsn, "MAIL__HOST": smtp.host, "MAIL__PORT": str(smtp.port), "NOTICES__WEBHOOK_SECRET": "0123456789abcdef", "NOTICES__PRIVATE_DESTINATIONS": "127.0.0.0/8"
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(f"PRESERVARIUM_{name}", value)
    applied = CliRunner().invoke(cli, ["registry", "apply", str(file)])
    assert applied.exit_code == 0, applied.output
    return smtp


def run(*arguments: str) -> tuple[int, Any]:
    done = CliRunner().invoke(cli, ["notices", *arguments])
    return done.exit_code, orjson.loads(done.stdout) if "--json" in arguments and done.stdout else done.output


def test_a_test_notice_goes_out_and_says_what_happened(registered: Any):
    code, found = run("test", "--recipient", "ops", "--json")
    assert (code, found["outcome"], found["channel"]) == (0, "sent", "mail")
    assert found["answer"].startswith("250")
    (mail,) = registered.messages
    assert (mail["To"], mail["Subject"]) == ("ops@example.org", "Test: this is what a notice looks like")
    assert "nothing is wrong" in mail.get_body(("plain",)).get_content()
    assert run("test", "--recipient", "someone@example.org")[0] == 0


def test_what_is_not_taken_is_said(registered: Any):
    registered.refuse = "550 5.1.1 no"
    code, found = run("test", "--recipient", "ops", "--json")
    assert (code, found["outcome"], found["answer"]) == (1, "refused", "ops@example.org: 550 5.1.1 no")
    registered.stop()
    code, found = run("test", "--recipient", "ops", "--json")
    assert (code, found["outcome"]) == (1, "not taken now")
    assert "does not take mail" in found["answer"]
    code, found = run("test", "--recipient", "hook", "--json")
    assert (code, found["outcome"]) == (1, "not taken now")
    assert "out of reach" in found["answer"]
    registered.start()


def test_an_unknown_recipient_is_an_error_on_one_line(registered: Any):
    code, output = run("test", "--recipient", "nobody")
    assert (code, output) == (1, "preservarium: recipient 'nobody' is not in the registry\n")
    code, output = run("key", "--recipient", "hook")
    assert (code, len(output.strip())) == (0, 64)
