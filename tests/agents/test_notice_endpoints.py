"""Webhooks and Apprise against a real HTTP server: signed, slow, refusing, moving away, down."""

import asyncio
import hashlib
import hmac
import sys
from typing import Any

import orjson
import pytest
from aiohttp import web
from notice_support import US, event, transition
from quality_support import World, batch, catalogue, errors, lines, live, record

from preservarium import topics
from preservarium.domain.notices import Inbox, Policy
from preservarium.embedded.service import free_port
from preservarium.errors import Reject, Retry
from preservarium.notices.channel import Notice, RefusedForNow
from preservarium.notices.chat import AppriseChannel
from preservarium.notices.grouping import Policies
from preservarium.notices.outbox import Notifier
from preservarium.notices.webhook import WebhookChannel, key_of

# Apprise loads all that it knows, one of which loads what Python 3.13 has not any more.
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr':DeprecationWarning")

SECRET = "0123456789abcdef"
#: The servers of these tests are on this machine, where notices do not go unasked.
LOOPBACK = {"private_destinations": "127.0.0.0/8"}


class Endpoint:
    """An HTTP server whose answer a test chooses."""

    def __init__(self) -> None:
        self.port = free_port()
        self.status = 200
        self.headers: dict[str, str] = {}
        self.wait = asyncio.Event()
        self.wait.set()
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self._runner: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    async def start(self) -> None:
        async def take(request: web.Request) -> web.Response:
            self.requests.append((request.path, dict(request.headers), await request.read()))
            await self.wait.wait()
            return web.Response(status=self.status, headers=self.headers, text="said")

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", take)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        await self._runner.cleanup()


@pytest.fixture
async def endpoint() -> Any:
    made = Endpoint()
    await made.start()
    yield made
    made.wait.set()
    await made.stop()


class Hook:
    """The webhook channel and the stage over it."""

    def __init__(self, address: str, **settings: Any) -> None:
        hook = {"name": "hook", "channel": "webhook", "address": address}
        self.world = World(catalogue(("recipient", hook)))
        self.live = live(notices={"webhook_secret": SECRET, "endpoint_timeout_s": 2, **LOOPBACK, **settings})
        self.channel = WebhookChannel(self.live, lambda line, _to: f"https://x/{line['alarm_id']}", self.world.clock)
        documents, clock = self.world.documents, self.world.clock
        self.notifier = Notifier("notify-endpoints", {"webhook": self.channel}, documents, self.live, clock)
        self.address = address
        self.offset = 0

    async def send(self, *transitions: dict[str, Any]) -> str:
        return await self.channel.send(Notice(delivery(*transitions), "webhook", self.address))

    async def run(self, notice: dict[str, Any]) -> list[Any]:
        effects = await self.notifier([batch(topics.NOTICES, record(1, notice))])
        return self.world.carry_out(effects, 3)


@pytest.fixture
async def hook(endpoint: Endpoint) -> Any:
    made = Hook(endpoint.url)
    yield made
    await made.channel.close()


def delivery(*transitions: dict[str, Any], recipient: str = "hook", number: int = 1) -> dict[str, Any]:
    inbox = Inbox(recipient)
    policy = Policy(group_wait_us=0)
    for offset, line in enumerate(transitions or (transition(1),)):
        inbox.hear(event(line, offset), policy, US)
    inbox.plan(policy, US, number)
    (planned,) = inbox.take()
    return dict(planned)


async def test_a_webhook_is_what_alertmanagers_receivers_expect(hook: Hook, endpoint: Endpoint):
    over = transition(2, transition="cleared", state="normal", cleared_at=US + 1_000_000)
    assert await hook.send(transition(1), over) == f"127.0.0.1:{endpoint.port}: 200 said"
    ((_, headers, body),) = endpoint.requests
    told = orjson.loads(body)
    assert (told["version"], told["status"], told["receiver"], told["groupLabels"]) == (
        "4", "firing", "hook", {"rule": "hot"},
    )  # fmt: skip
    assert told["commonLabels"] == {"alertname": "hot", "severity": "major", "component_type": "temp", "pin": "-1"}
    first, second = told["alerts"]
    assert (first["status"], first["startsAt"], first["endsAt"]) == (
        "firing", "2023-11-14T22:13:20Z", "0001-01-01T00:00:00Z",
    )  # fmt: skip
    assert (second["status"], second["endsAt"]) == ("resolved", "2023-11-14T22:13:21Z")
    assert first["annotations"]["acknowledge"] == f"https://x/{1:032x}"
    assert "acknowledge" not in second["annotations"]
    assert headers["Content-Type"] == "application/json"


async def test_the_signature_is_the_documented_one(hook: Hook, endpoint: Endpoint):
    await hook.send()
    ((_, headers, body),) = endpoint.requests
    sent_at = headers["X-Preservarium-Timestamp"]
    # As docs/NOTICES.md shows it, with nothing of ours.
    key = hmac.new(SECRET.encode(), b"webhook:hook", hashlib.sha256).hexdigest()
    assert key == key_of(SECRET, "hook") != key_of(SECRET, "other")
    expected = "v1=" + hmac.new(key.encode(), sent_at.encode() + b"." + body, hashlib.sha256).hexdigest()
    assert headers["X-Preservarium-Signature"] == expected
    assert int(sent_at) == hook.world.clock.now_us() // 1_000_000


async def test_a_retry_is_the_same_body_with_a_time_of_its_own(hook: Hook, endpoint: Endpoint):
    notice = Notice(delivery(), "webhook", endpoint.url)
    await hook.channel.send(notice)
    hook.world.clock.advance(3_600)
    await hook.channel.send(notice)
    (_, one, body), (_, two, again) = endpoint.requests
    assert body == again
    assert one["Idempotency-Key"] == two["Idempotency-Key"] == notice.id
    assert int(two["X-Preservarium-Timestamp"]) - int(one["X-Preservarium-Timestamp"]) == 3_600
    assert one["X-Preservarium-Signature"] != two["X-Preservarium-Signature"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 413, 422])
async def test_a_refusal_is_for_good(hook: Hook, endpoint: Endpoint, status: int):
    endpoint.status = status
    with pytest.raises(Reject, match=f"{status} said"):
        await hook.send()


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
async def test_trouble_is_for_now(hook: Hook, endpoint: Endpoint, status: int):
    endpoint.status = status
    with pytest.raises(RefusedForNow, match=f"{status} said"):
        await hook.send()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(hook: Hook, endpoint: Endpoint, status: int):
    endpoint.status, endpoint.headers = status, {"Location": "/internal"}
    with pytest.raises(Reject, match="redirects are not followed"):
        await hook.send()
    assert [path for path, _, _ in endpoint.requests] == ["/hook"]


async def test_a_slow_receiver_is_given_up_in_time(hook: Hook, endpoint: Endpoint):
    endpoint.wait.clear()
    started = asyncio.get_running_loop().time()
    with pytest.raises(RefusedForNow, match="no answer in time"):
        await hook.send()
    assert asyncio.get_running_loop().time() - started < 10


async def test_a_receiver_that_dies_over_a_request_is_out_of_reach_for_now():
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Le")
        writer.close()

    server = await asyncio.start_server(die, "127.0.0.1", 0)
    hook = Hook(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook")
    with pytest.raises(RefusedForNow, match="out of reach"):
        await hook.send()
    await hook.channel.close()
    server.close()


async def test_a_receiver_that_is_down_gets_it_once_it_is_back(hook: Hook, endpoint: Endpoint):
    notice = delivery()
    await endpoint.stop()
    for _ in range(3):
        with pytest.raises(Retry, match="out of reach"):
            await hook.run(notice)
        hook.world.clock.advance(60)
    await endpoint.start()
    (receipt,) = lines(await hook.run(notice), topics.NOTICE_RECEIPTS)
    assert len(endpoint.requests) == 1
    assert (receipt["outcome"], receipt["attempts"]) == ("sent", 4)
    assert receipt["address"] == f"http://127.0.0.1:{endpoint.port}", "what is behind the host may be a key"


async def test_a_receiver_that_stays_away_is_told_after_its_time(hook: Hook, endpoint: Endpoint):
    notice = delivery()
    endpoint.status = 503
    with pytest.raises(Retry):
        await hook.run(notice)
    hook.world.clock.advance(hook.live().notices.endpoint_retry_s)
    sends = await hook.run(notice)
    assert errors(sends) == [("notice_refused", f"127.0.0.1:{endpoint.port}: 503 said (tried for 3600 s)")]
    assert [r["outcome"] for r in lines(sends, topics.NOTICE_RECEIPTS)] == ["refused"]


async def test_what_stands_in_an_address_is_not_told():
    hook = Hook(f"http://user:hunter2@127.0.0.1:{free_port()}/secret-path?key=hunter2")
    with pytest.raises(RefusedForNow) as told:
        await hook.send()
    await hook.channel.close()
    assert "hunter2" not in str(told.value)
    assert "secret-path" not in str(told.value)


async def test_a_private_receiver_is_told_of_by_the_setting_that_lets_it_be_reached(endpoint: Endpoint):
    hook = Hook(endpoint.url, private_destinations="", endpoint_retry_s=60)
    for _ in range(2):
        with pytest.raises(Retry, match=r"127.0.0.1 is loopback.*PRESERVARIUM_NOTICES__PRIVATE_DESTINATIONS"):
            await hook.run(delivery())
    hook.world.clock.advance(60)
    ((code, why),) = errors(await hook.run(delivery()))
    assert (code, "PRESERVARIUM_NOTICES__PRIVATE_DESTINATIONS" in why, endpoint.requests) == (
        "notice_refused",
        True,
        [],
    )
    await hook.channel.close()


async def test_without_a_secret_nothing_goes_out_unsigned(endpoint: Endpoint):
    hook = Hook(endpoint.url, webhook_secret="")
    with pytest.raises(RefusedForNow, match="PRESERVARIUM_NOTICES__WEBHOOK_SECRET"):
        await hook.send()
    assert endpoint.requests == []


async def test_mail_is_none_of_this_stages_business(hook: Hook):
    assert await hook.run(delivery(recipient="ops@example.org")) == []
    assert await hook.run(delivery(recipient="gone", number=2)) == [], "the mail stage says that it is not registered"


# --- Apprise ---------------------------------------------------------------------------------------------------------


def chat() -> AppriseChannel:
    settings = live(notices={"endpoint_timeout_s": 5, **LOOPBACK})
    return AppriseChannel(settings, Policies(catalogue(), settings).zone_of, lambda _line, _to: None)


async def test_apprise_takes_a_notice(endpoint: Endpoint):
    pytest.importorskip("apprise")
    address = f"json://127.0.0.1:{endpoint.port}/chat"
    assert await chat().send(Notice(delivery(), "apprise", address)) == "taken by json"
    ((path, _, body),) = endpoint.requests
    told = orjson.loads(body)
    assert path == "/chat"
    assert (told["title"], told["type"]) == ("[major] ALARM: alarm 1", "warning")
    assert "Device:     Attic (dev-1)" in told["message"]


async def test_what_apprise_does_not_take_is_tried_again(endpoint: Endpoint):
    pytest.importorskip("apprise")
    endpoint.status = 500
    with pytest.raises(RefusedForNow, match="json:// did not take it"):
        await chat().send(Notice(delivery(), "apprise", f"json://127.0.0.1:{endpoint.port}/key-to-keep"))


async def test_what_apprise_does_not_know_is_refused():
    pytest.importorskip("apprise")
    with pytest.raises(Reject, match="nosuch:// is no address that Apprise"):
        await chat().send(Notice(delivery(), "apprise", "nosuch://key"))


async def test_without_apprise_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(Reject, match=r"pip install 'preservarium\[apprise\]'"):
        await chat().send(Notice(delivery(), "apprise", "ntfy://host/topic"))
