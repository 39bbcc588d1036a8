"""Notices through real workers: killed in the middle, with servers that are down, nothing is lost and at most one doubled."""

import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from notice_support import transition
from worker_support import Workers, make_topics, read_all, until

from preservarium import topics
from preservarium.notices.webhook import SIGNATURE_HEADER, TIMESTAMP_HEADER, key_of, signature_of
from preservarium.settings import LiveSettings, load
from preservarium.streaming.publish import Publisher
from preservarium.streaming.stage import Send

PARTITIONS = 3
SECRET = "sixteen characters at least"
HOOK = "hook"
#: A member that was killed in the middle of a rebalance is waited for until the rebalance timeout, 60 s.
TAKE_OVER_S = 100


class Receiver:
    """A real HTTP server that takes webhooks."""

    def __init__(self) -> None:
        self.taken: list[tuple[dict[str, str], bytes]] = []
        self.status = 200
        self.url = ""
        self._runner: Any = None

    async def start(self) -> None:
        async def take(request: web.Request) -> web.Response:
            body = await request.read()
            if self.status == 200:
                self.taken.append((dict(request.headers), body))
            return web.Response(status=self.status)

        app = web.Application()
        app.router.add_post("/hook", take)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/hook"

    async def stop(self) -> None:
        await self._runner.cleanup()


class Plant:
    """Topics, recipients and worker processes of one test."""

    def __init__(self, kafka: str, prefix: str, directory: Path, smtp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kafka, self.prefix = kafka, prefix
        environment = {
            "PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS": kafka,
            "PRESERVARIUM_KAFKA__TOPIC_PREFIX": prefix,
            "PRESERVARIUM_KAFKA__GROUP": f"{prefix}worker",
            "PRESERVARIUM_KAFKA__PARTITIONS": str(PARTITIONS),
            "PRESERVARIUM_KAFKA__SESSION_TIMEOUT_S": "6",
            "PRESERVARIUM_AGENTS__ENABLED": "registry,notices,notify",
            "PRESERVARIUM_AGENTS__BACKOFF_MAX_S": "0.5",
            "PRESERVARIUM_MAIL__HOST": smtp.host,
            "PRESERVARIUM_MAIL__PORT": str(smtp.port),
            "PRESERVARIUM_NOTICES__GROUP_BY": "alarm",
            "PRESERVARIUM_NOTICES__GROUP_WAIT_S": "0",
            "PRESERVARIUM_NOTICES__LIMIT_NOTICES": "1000",
            "PRESERVARIUM_NOTICES__WEBHOOK_SECRET": SECRET,
            "PRESERVARIUM_NOTICES__PRIVATE_DESTINATIONS": "127.0.0.1",
            "PRESERVARIUM_NOTICES__PLOT_HOURS": "0",
            "PRESERVARIUM_POSTGRES__PORT": "1",  # nothing of notices waits for a database
            "PRESERVARIUM_DATA_DIR": str(directory / "data"),
            "PRESERVARIUM_LOG_FORMAT": "json",
            "PRESERVARIUM_ENV_FILE": str(directory / "none"),
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        self.live = LiveSettings(load())
        self.workers = Workers(Path(__file__).parent / "notice_app.py", environment, directory)
        self.receiver = Receiver()

    async def start(self) -> None:
        used = [
            topics.ALERTS, topics.NOTICE_EVENTS, topics.NOTICES, topics.NOTICE_RECEIPTS, topics.ERRORS,
            topics.DEVICE_REGISTRY, topics.TYPE_REGISTRY, topics.ALARM_STANDING, topics.ALARM_ANSWERS,
        ]  # fmt: skip
        await make_topics(self.kafka, self.prefix, PARTITIONS, used)
        await self.receiver.start()
        recipients = [
            {"name": "ops", "rev": 1, "channel": "mail", "address": "ops@example.org"},
            {"name": "night", "rev": 2, "channel": "mail", "address": "night@example.org"},
            {"name": HOOK, "rev": 3, "channel": "webhook", "address": self.receiver.url},
        ]
        await self.publish(
            [Send(topics.TYPE_REGISTRY, f"recipient/{r['name']}".encode(), orjson.dumps(r)) for r in recipients]
        )

    async def publish(self, sends: list[Send]) -> None:
        publisher = Publisher(self.live)
        try:
            await publisher.publish(sends)
        finally:
            await publisher.stop()

    async def raise_alarms(self, numbers: range, recipients: list[str]) -> None:
        now_us = time.time_ns() // 1_000
        lines = [transition(n, recipients=recipients, detected_at=now_us, occurred_at=now_us) for n in numbers]
        await self.publish([Send(topics.ALERTS, x["device_id"].encode(), orjson.dumps(x)) for x in lines])

    async def lines(self, topic: topics.Topic) -> list[dict[str, Any]]:
        return [orjson.loads(r.value) for r in await read_all(self.kafka, topic.full(self.prefix), PARTITIONS)]

    async def stop(self) -> None:
        self.workers.stop()
        await self.receiver.stop()


@pytest.fixture
async def plant(kafka: str, topic_prefix: str, tmp_path: Path, smtp: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Plant(kafka, topic_prefix, tmp_path, smtp, monkeypatch)
    await made.start()
    yield made
    await made.stop()


def told(smtp: Any) -> Counter[tuple[str, str]]:
    """(address, subject) -> mails."""
    return Counter((m["To"], m["Subject"]) for m in smtp.messages)


async def test_workers_killed_in_the_middle_lose_no_mail_and_double_at_most_the_one_under_way(plant: Plant, smtp: Any):
    alarms = range(40)
    accepted = smtp.handle_DATA
    kill_at = [7, 23]
    current = [plant.workers.start()]

    async def accept_and_kill(server: Any, session: Any, envelope: Any) -> str:
        answer: str = await accepted(server, session, envelope)
        if kill_at and len(smtp.messages) >= kill_at[0]:
            # The server has it; whoever sent it will not live to hear so.
            kill_at.pop(0)
            plant.workers.signal(current[0], signal.SIGKILL)
        return answer

    smtp.handle_DATA = accept_and_kill
    await plant.workers.ready(current[0], TAKE_OVER_S)
    await plant.raise_alarms(alarms, ["ops", "night"])
    for left in (1, 0):
        await until(lambda left=left: len(kill_at) == left, 60, lambda: plant.workers.log(current[0])[-3_000:])
        await plant.workers.ended(current[0])
        current[0] = plant.workers.start()
        await plant.workers.ready(current[0], TAKE_OVER_S)
    expected = {(f"{to}@example.org", f"[major] ALARM: alarm {n}") for n in alarms for to in ("ops", "night")}
    await until(lambda: set(told(smtp)) == expected, 60, lambda: str(expected - set(told(smtp))))

    async def proven() -> bool:
        return len({r["delivery_id"] for r in await plant.lines(topics.NOTICE_RECEIPTS)}) == len(expected)

    await until(proven, 30)
    doubled = [key for key, count in told(smtp).items() if count > 1]
    # A partition has one notice under way; two recipients are in two partitions at most.
    assert len(doubled) <= 2 * 2
    assert max(told(smtp).values()) <= 2
    for to, subject in doubled:
        ids = {m["Message-ID"] for m in smtp.messages if (m["To"], m["Subject"]) == (to, subject)}
        assert len(ids) == 1
    assert await plant.lines(topics.ERRORS) == []
    # What was handed out twice has the same number and is the same; what was told, was told once.
    notices: dict[tuple[str, int], dict[str, Any]] = {}
    for notice in await plant.lines(topics.NOTICES):
        assert notices.setdefault((notice["recipient"], notice["number"]), notice) == notice
    assert len({n["delivery_id"] for n in notices.values()}) == len(notices) == len(expected)


async def test_partitions_that_move_between_workers_lose_no_mail(plant: Plant, smtp: Any):
    alarms = range(40)
    first = plant.workers.start()
    await plant.workers.ready(first, TAKE_OVER_S)
    await plant.raise_alarms(range(20), ["ops", "night"])
    await until(lambda: len(smtp.messages) >= 3, 40, lambda: plant.workers.log(first)[-3_000:])
    # It joins, takes partitions over, and is left alone, while mail goes out.
    second = plant.workers.start()
    await plant.workers.ready(second, TAKE_OVER_S)
    await plant.raise_alarms(range(20, 40), ["ops", "night"])
    await until(lambda: len(smtp.messages) >= 43, 60, lambda: plant.workers.log(second)[-3_000:])
    plant.workers.signal(first, signal.SIGTERM)
    assert await plant.workers.ended(first) == 0
    expected = {(f"{to}@example.org", f"[major] ALARM: alarm {n}") for n in alarms for to in ("ops", "night")}
    await until(lambda: set(told(smtp)) == expected, 60, lambda: str(expected - set(told(smtp))))
    assert max(told(smtp).values()) <= 2
    assert len({m["Message-ID"] for m in smtp.messages}) == len(expected), (
        "a second copy has the Message-ID of the first"
    )


async def test_servers_that_are_down_hold_up_only_their_own(plant: Plant, smtp: Any):
    number = plant.workers.start()
    await plant.workers.ready(number, TAKE_OVER_S)
    smtp.stop()
    await plant.raise_alarms(range(3), ["ops", HOOK])
    await until(lambda: len(plant.receiver.taken) == 3, 40, lambda: plant.workers.log(number)[-3_000:])
    assert smtp.messages == []
    plant.receiver.status = 503
    await plant.raise_alarms(range(3, 6), ["ops", HOOK])
    smtp.start()
    await until(lambda: len(smtp.messages) == 6, 40, lambda: plant.workers.log(number)[-3_000:])
    assert len(plant.receiver.taken) == 3
    plant.receiver.status = 200
    await until(lambda: len(plant.receiver.taken) == 6, 40, lambda: plant.workers.log(number)[-3_000:])
    assert set(told(smtp).values()) == {1}
    key = key_of(SECRET, HOOK)
    for headers, body in plant.receiver.taken:
        assert headers[SIGNATURE_HEADER] == signature_of(key, int(headers[TIMESTAMP_HEADER]), body)
    assert len({h["Idempotency-Key"] for h, _ in plant.receiver.taken}) == 6

    async def proven() -> bool:
        receipts = await plant.lines(topics.NOTICE_RECEIPTS)
        return Counter((r["recipient"], r["outcome"]) for r in receipts) == {("ops", "sent"): 6, (HOOK, "sent"): 6}

    await until(proven, 30)
