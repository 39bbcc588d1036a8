"""Where notices may go: public addresses, and what the settings name; whatever name, redirect or spelling leads there."""

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from notice_support import US, event, transition
from pydantic import ValidationError
from quality_support import World, catalogue, live

from preservarium.domain.notices import Inbox, Policy
from preservarium.errors import Reject
from preservarium.notices import destinations
from preservarium.notices.channel import Notice, RefusedForNow
from preservarium.notices.chat import AppriseChannel
from preservarium.notices.destinations import (
    SETTING,
    DestinationRefused,
    Destinations,
    Errand,
    errand,
    is_public,
    plain,
    watched,
)
from preservarium.notices.grouping import Policies
from preservarium.notices.webhook import WebhookChannel
from preservarium.settings import Notices

pytestmark = pytest.mark.filterwarnings("ignore:'imghdr':DeprecationWarning")

SECRET = "0123456789abcdef"

PRIVATE = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254", "169.254.170.2",
    "100.64.0.1", "100.100.100.200", "192.0.0.192", "198.18.0.1", "192.0.2.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1",
    "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1", "100::1", "::ffff:127.0.0.1",
    "::ffff:169.254.169.254", "::ffff:a9fe:a9fe", "::ffff:10.0.0.1", "::127.0.0.1", "::10.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1",
    "2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:a9fe:a9fe::1", "fec0::1",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.216.34", "172.32.0.1", "192.169.0.1", "100.128.0.1", "2606:4700:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::808:808",
          "2002:808:808::1"]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_what_is_not_the_internets_is_refused_and_the_setting_is_named(address):
    why = Destinations.of("").refusal(address)
    assert SETTING in why
    assert not is_public(plain(ipaddress.ip_address(address.partition("%")[0])))


@pytest.mark.parametrize("address", PUBLIC)
def test_what_is_the_internets_needs_no_entry(address):
    assert Destinations.of("").refusal(address) == ""


@pytest.mark.parametrize(
    ("setting", "address", "allowed"),
    [
        ("10.0.0.0/8", "10.9.8.7", True),
        ("10.0.0.0/8", "::ffff:10.9.8.7", True),
        ("10.0.0.0/8", "64:ff9b::10.9.8.7", True),
        ("10.0.0.0/8", "11.0.0.1", True),  # public
        ("10.0.0.0/8", "192.168.0.1", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.1.2.4", False),
        ("10.1.2.3/24", "10.1.2.77", True),
        ("fd00::/8, 127.0.0.1", "fd12::1", True),
        ("fd00::/8, 127.0.0.1", "127.0.0.1", True),
        ("fd00::/8, 127.0.0.1", "127.0.0.2", False),
        ("[::1]", "::1", True),
        ("::/0", "127.0.0.1", False),
        ("0.0.0.0/0", "127.0.0.1", True),
        ("tickets.lan", "10.0.0.1", False),
    ],
)
def test_networks_and_addresses_of_the_setting(setting, address, allowed):
    assert (Destinations.of(setting).refusal(address) == "") is allowed


@pytest.mark.parametrize(
    ("setting", "host", "named"),
    [
        ("tickets.lan", "tickets.lan", True),
        ("tickets.lan", "TICKETS.lan.", True),
        ("tickets.lan", "x.tickets.lan", False),
        (".cluster.local", "hook.ns.cluster.local", True),
        (".cluster.local", "evilcluster.local", False),
        ("localhost, .b", "localhost", True),
        ("", "", False),
    ],
)
def test_names_of_the_setting(setting, host, named):
    assert Destinations.of(setting).names_host(host) is named


@pytest.mark.parametrize(
    "given", ["http://tickets.lan", "tickets.lan:80", "10.0.0.0/33", "10.0.0", "a b", "*", "10.0.0.1-10.0.0.9", "a,/8"]
)
def test_an_entry_that_is_none_of_these_is_refused(given):
    with pytest.raises(ValidationError, match="neither a network"):
        Notices(private_destinations=given)


# --- webhooks: what is looked at is what is connected to -----------------------------------------------------------------


class Server:
    """An HTTP server on a loopback address; where `moved` says so, it sends its clients there."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host, self.port, self.moved = host, 0, ""
        self.asked: list[str] = []

    async def __aenter__(self) -> "Server":
        async def take(request: web.Request) -> web.Response:
            await request.read()
            self.asked.append(f"{request.method} {request.path}")
            if self.moved:
                raise web.HTTPFound(self.moved)
            return web.Response(text="ok")

        application = web.Application()
        application.router.add_route("*", "/{path:.*}", take)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.host, 0).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._runner.cleanup()


@pytest.fixture
async def server() -> Any:
    async with Server() as made:
        yield made


def delivery() -> dict[str, Any]:
    inbox, policy = Inbox("hook"), Policy(group_wait_us=0)
    inbox.hear(event(transition(1), 0), policy, US)
    inbox.plan(policy, US, 1)
    (planned,) = inbox.take()
    return dict(planned)


async def webhook(address: str, allowed: str = "") -> str:
    settings = live(notices={"webhook_secret": SECRET, "endpoint_timeout_s": 5, "private_destinations": allowed})
    channel = WebhookChannel(settings, lambda _line, _to: None, World(catalogue()).clock)
    try:
        return await channel.send(Notice(delivery(), "webhook", address))
    finally:
        await channel.close()


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "0.0.0.0", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "127.0.0.1.", "LOCALHOST",
     "１２７.0.0.1", "user:password@127.0.0.1", "[::]", "[::1]", "169.254.169.254", "[fd00:ec2::254]"],
)  # fmt: skip
async def test_no_spelling_of_a_private_address_is_reached(server, host):
    # aiohttp takes addresses of other spellings for none.
    with pytest.raises((RefusedForNow, Reject)) as told:
        await webhook(f"http://{host}:{server.port}/secret-path?key=hunter2")
    assert server.asked == []
    assert "hunter2" not in str(told.value)
    assert "secret-path" not in str(told.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"])
async def test_the_refusal_says_what_to_do(server, host):
    with pytest.raises(RefusedForNow, match=rf"may not be reached: 127.0.0.1 is loopback.*{SETTING}"):
        await webhook(f"http://{host}:{server.port}/")


@pytest.mark.parametrize(
    ("allowed", "host", "reached"),
    [
        ("127.0.0.0/8", "127.0.0.1", True),
        ("127.0.0.1", "localhost", True),
        ("localhost", "localhost", True),
        ("localhost", "127.0.0.1", False),
        ("10.0.0.0/8, tickets.lan", "127.0.0.1", False),
    ],
)
async def test_what_the_setting_names_is_reached(server, allowed, host, reached):
    asked = webhook(f"http://{host}:{server.port}/", allowed)
    if reached:
        assert (await asked).endswith("200 ok")
    else:
        with pytest.raises(RefusedForNow, match=SETTING):
            await asked
    assert len(server.asked) == reached


class Resolver:
    """Names stand for what a test says, another thing each time."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list[dict[str, Any]]:
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [
            {"hostname": host, "host": address, "port": port, "family": socket.AF_INET6 if ":" in address else socket.AF_INET, "proto": 0, "flags": 0}
            for address in found
        ]  # fmt: skip

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "found", [["127.0.0.1"], ["::ffff:127.0.0.1"], ["127.0.0.1", "::1"], ["10.255.255.1", "127.0.0.1"]]
)
async def test_a_public_name_for_a_private_address_is_not_followed(server, monkeypatch, found):
    monkeypatch.setattr(aiohttp.connector, "DefaultResolver", lambda **_: Resolver(found))
    with pytest.raises(RefusedForNow, match=SETTING):
        await webhook(f"http://hooks.example:{server.port}/")
    assert server.asked == []


async def test_a_name_that_changes_between_looks_is_judged_by_where_it_leads_now(server, monkeypatch):
    # Rebinding: who looked it up first saw an address that is allowed.
    resolver = Resolver(["127.0.0.1"], ["127.0.0.2"])
    monkeypatch.setattr(aiohttp.connector, "DefaultResolver", lambda **_: resolver)
    settings = live(notices={"webhook_secret": SECRET, "endpoint_timeout_s": 5, "private_destinations": "127.0.0.1"})
    channel = WebhookChannel(settings, lambda _line, _to: None, World(catalogue()).clock)
    notice = Notice(delivery(), "webhook", f"http://hooks.example:{server.port}/")
    assert (await channel.send(notice)).endswith("200 ok")
    await channel.close()
    with pytest.raises(RefusedForNow, match=r"127.0.0.2 is loopback"):
        await channel.send(notice)
    await channel.close()
    assert len(server.asked) == 1


async def test_an_address_that_is_refused_leaves_the_others(server, monkeypatch):
    monkeypatch.setattr(aiohttp.connector, "DefaultResolver", lambda **_: Resolver(["127.0.0.9", "127.0.0.1"]))
    assert (await webhook(f"http://hooks.example:{server.port}/", "127.0.0.1")).endswith("200 ok")


async def test_the_setting_counts_at_once(server):
    settings: Any = live(notices={"webhook_secret": SECRET})
    channel = WebhookChannel(settings, lambda _line, _to: None, World(catalogue()).clock)
    notice = Notice(delivery(), "webhook", f"http://127.0.0.1:{server.port}/")
    with pytest.raises(RefusedForNow, match=SETTING):
        await channel.send(notice)
    settings._settings = settings().model_copy(
        update={"notices": settings().notices.model_copy(update={"private_destinations": "127.0.0.1"})}
    )
    assert (await channel.send(notice)).endswith("200 ok")
    await channel.close()


async def test_a_proxy_of_the_environment_is_its_owners_choice(server, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.port}")
    assert (await webhook("http://hooks.example/path")).endswith("200 ok")
    # And of nothing else on its machine.
    async with Server() as other:
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with pytest.raises(RefusedForNow, match=SETTING):
            await webhook(f"http://127.0.0.1:{other.port}/")
        assert other.asked == []


@pytest.mark.parametrize(
    "address", ["http://[::1", "http://[x]/", "ftp://93.184.216.34/", "file:///etc/passwd", "", "http://", "//x"]
)
async def test_what_is_no_webhooks_address_is_refused_for_good(address):
    with pytest.raises(Reject, match="webhook"):
        await webhook(address)


# --- Apprise: whatever library a sender brings ---------------------------------------------------------------------------


async def chat(address: str, allowed: str = "") -> str:
    settings = live(notices={"endpoint_timeout_s": 20, "private_destinations": allowed})
    channel = AppriseChannel(settings, Policies(catalogue(), settings).zone_of, lambda _line, _to: None)
    return await channel.send(Notice(delivery(), "apprise", address))


@pytest.mark.parametrize("scheme", ["json", "xml", "form", "ntfy", "gotify", "kodi"])
async def test_no_sender_of_apprise_reaches_a_private_address(server, scheme):
    pytest.importorskip("apprise")
    rest = {"gotify": "/Abcdefghijklmno", "kodi": ""}.get(scheme, "/topic")
    with pytest.raises(RefusedForNow, match=rf"{scheme}:// may not be reached: 127.0.0.1 is loopback.*{SETTING}"):
        await chat(f"{scheme}://127.0.0.1:{server.port}{rest}")
    assert server.asked == []


# Apprise leaves a socket to the garbage collector where it cannot be used.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
async def test_neither_by_mail_nor_by_a_datagram():
    pytest.importorskip("apprise")
    taken: list[bytes] = []

    async def smtp(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(b"mail")
        writer.close()

    listening = await asyncio.start_server(smtp, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", 0))
    datagrams.setblocking(False)
    try:
        for address in (
            f"mailto://u:p@localhost:{port}?smtp=127.0.0.1&from=a@b.example&to=c@d.example",
            f"rsyslog://127.0.0.1:{datagrams.getsockname()[1]}/daemon",
        ):
            with pytest.raises(RefusedForNow, match=SETTING):
                await chat(address)
        with pytest.raises(BlockingIOError):
            datagrams.recv(1)
    finally:
        datagrams.close()
        listening.close()
    assert taken == []


async def test_a_server_that_sends_a_sender_elsewhere_leads_it_nowhere(server):
    pytest.importorskip("apprise")
    async with Server("127.0.0.2") as outside:
        outside.moved = f"http://127.0.0.1:{server.port}/internal"
        with pytest.raises(RefusedForNow, match=SETTING):
            await chat(f"json://127.0.0.2:{outside.port}/", "127.0.0.2")
        assert outside.asked == ["POST /"]
    assert server.asked == []


async def test_what_the_setting_names_is_reached_by_apprise_too(server):
    pytest.importorskip("apprise")
    assert await chat(f"json://127.0.0.1:{server.port}/", "127.0.0.0/8") == "taken by json"
    assert await chat(f"json://localhost:{server.port}/", "localhost") == "taken by json"
    with pytest.raises(RefusedForNow, match=SETTING):
        await chat(f"json://127.0.0.1:{server.port}/", "localhost")
    assert len(server.asked) == 2


# --- the threads that are listened to ------------------------------------------------------------------------------------


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def connect(port: int) -> None:
    socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_only_what_runs_an_errand_is_listened_to(port):
    under_way = errand(Destinations.of(""), "hooks.example")
    connect(port)
    with watched(under_way), pytest.raises(DestinationRefused, match=SETTING):
        connect(port)
    connect(port)
    others: list[BaseException] = []

    def elsewhere() -> None:
        try:
            connect(port)
        except OSError as e:
            others.append(e)

    other = threading.Thread(target=elsewhere)
    other.start()
    other.join()
    assert others == []


def test_threads_that_an_errand_starts_are_listened_to_and_so_are_theirs(port):
    under_way = Errand(Destinations.of(""))
    ended: list[str] = []

    def inner() -> None:
        try:
            connect(port)
            ended.append("connected")
        except DestinationRefused:
            ended.append("refused")

    def outer() -> None:
        inner()
        thread = threading.Thread(target=inner)
        thread.start()
        thread.join()

    with watched(under_way):
        thread = threading.Thread(target=outer)
        thread.start()
        thread.join()
    assert ended == ["refused", "refused"]
    assert len(under_way.refused) == 2


def test_neither_names_nor_files_are_connected_to_unseen(tmp_path):
    under_way = Errand(Destinations.of("127.0.0.0/8"))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        with (
            watched(under_way),
            socket.socket(socket.AF_UNIX) as one,
            pytest.raises(DestinationRefused, match="no address of the internet"),
        ):
            one.connect(str(tmp_path / "s"))
    with watched(under_way), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        with pytest.raises(DestinationRefused, match="is no address"):
            one.sendto(b"x", ("localhost", 9))
        assert one.sendto(b"x", ("127.0.0.1", 9)) == 1


def test_the_environments_proxies_are_known_and_broken_ones_are_none(monkeypatch):
    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "no_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    assert destinations.proxies() == set()
    monkeypatch.setenv("http_proxy", "http://u:p@127.0.0.1:3128")
    monkeypatch.setenv("https_proxy", "127.0.0.2:8080")
    monkeypatch.setenv("all_proxy", "http://[::1")
    monkeypatch.setenv("no_proxy", "127.0.0.3")
    assert destinations.proxies() == {("127.0.0.1", 3128), ("127.0.0.2", 8080)}
