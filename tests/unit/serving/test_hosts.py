"""Under which names we are served, and whose pages may ask."""

import socket
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict
from pydantic import ValidationError

from preservarium.serving import hosts
from preservarium.serving.clients import Places, client_of
from preservarium.settings import Web


def asked(*named: str, target: str = "/health", **headers: str) -> Any:

    given = CIMultiDict([("Host", host) for host in named])
    given.update({name.replace("_", "-"): value for name, value in headers.items()})
    return make_mocked_request("GET", target, given)


@pytest.mark.parametrize(
    ("host", "name"),
    [("localhost:6066", "localhost"), ("[::1]:6066", "::1"), ("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("", "")],
)
def test_host_names_are_read_without_port_and_brackets(host, name):
    assert hosts.host_name(host) == name


#: Names of which a stranger cannot make ours, or which are ours whatever the settings.
ALWAYS = ["localhost", "LOCALHOST:6066", "localhost.:1", "127.0.0.1", "127.9.9.9:80", "[::1]", "[::1]:6066", "10.2.3.4:6066", "192.168.1.7", "8.8.8.8",
          "[2001:db8::7]:443", "[fe80::1]", ""]  # fmt: skip
NEVER = ["evil.example", "evil.example:6066", "127.0.0.1.evil.example", "localhost.evil.example", "evil.localhost.example", "127.1", "0x7f.1", "2130706433",
         "xn--lcalhost-26a", "localhost@evil.example", "evil.example#localhost", "[evil.example]", "127.0.0.1\x00.evil", "1.2.3.4.5", "*", ".", ".."]  # fmt: skip


@pytest.mark.parametrize(
    "web",
    [Web(), Web(host="0.0.0.0"), Web(host="::"), Web(host="10.2.3.4"), Web(allowed_hosts="own.example")],
    ids=repr,
)
def test_addresses_and_loopback_are_always_ours_and_names_of_strangers_never(web):
    assert [host for host in ALWAYS if hosts.misaddressed(asked(host), web)] == []
    assert [host for host in NEVER if not hosts.misaddressed(asked(host), web)] == []


@pytest.mark.parametrize(
    ("web", "host", "ours"),
    [
        (Web(public_url="https://plant.example/path"), "plant.example", True),
        (Web(public_url="https://plant.example:8443"), "PLANT.example.:8443", True),
        (Web(public_url="https://plant.example"), "www.plant.example", False),
        (Web(host="plant.lan"), "plant.lan:6066", True),
        (Web(host="plant.lan"), "plan.lan", False),
        (Web(allowed_hosts="worker, Metrics.Example ,"), "worker:6066", True),
        (Web(allowed_hosts="worker, Metrics.Example ,"), "metrics.example.", True),
        (Web(allowed_hosts="worker"), "worker.example", False),
        (Web(allowed_hosts=".example.org"), "a.b.example.org", True),
        (Web(allowed_hosts=".example.org"), "example.org", False),
        (Web(allowed_hosts=".example.org"), "evilexample.org", False),
        (Web(allowed_hosts=".example.org"), "example.org.evil", False),
        (Web(allowed_hosts="*"), "anything.example", True),
        (Web(host="0.0.0.0"), socket.gethostname() or "localhost", True),
        (Web(host="0.0.0.0"), (socket.gethostname() or "localhost").partition(".")[0], True),
        (Web(host="127.0.0.1"), "some-" + socket.gethostname(), False),
    ],
)  # fmt: skip
def test_what_the_settings_name_is_ours(web, host, ours):
    why = hosts.misaddressed(asked(host), web)
    assert (why == "") is ours
    assert ours or "PRESERVARIUM_WEB__ALLOWED_HOSTS" in why


def test_two_hosts_are_refused_and_no_host_is_no_browser():
    assert "one Host" in hosts.misaddressed(asked("localhost", "localhost"), Web())
    assert hosts.misaddressed(asked(), Web()) == ""


def test_a_host_in_the_request_line_is_looked_at_too():
    assert hosts.misaddressed(asked("localhost", target="http://evil.example/health"), Web())
    assert hosts.misaddressed(asked("evil.example", target="http://localhost/health"), Web())
    assert hosts.misaddressed(asked(target="http://evil.example/health"), Web())
    assert hosts.misaddressed(asked("localhost", target="http://localhost/health"), Web()) == ""
    assert hosts.misaddressed(asked("localhost", target="/health?next=http://evil.example/"), Web()) == ""


@pytest.mark.parametrize(
    "given", ["https://plant.example", "plant.example:80", "a b", "plant.example/", "*.example", "a..b", "*,a/b"]
)
def test_an_entry_that_is_no_name_is_refused(given):
    with pytest.raises(ValidationError, match="is no name"):
        Web(allowed_hosts=given)


OWN = "127.0.0.1:6066"


@pytest.mark.parametrize(
    ("headers", "strange"),
    [
        ({}, False),
        ({"Sec_Fetch_Site": "same-origin"}, False),
        ({"Sec_Fetch_Site": "none"}, False),
        ({"Sec_Fetch_Site": "same-site"}, True),
        ({"Sec_Fetch_Site": "cross-site"}, True),
        ({"Sec_Fetch_Site": "new-word"}, True),
        ({"Origin": f"http://{OWN}"}, False),
        ({"Origin": f"HTTP://{OWN}"}, False),
        ({"Origin": "http://127.0.0.1:3000"}, True),
        ({"Origin": "http://127.0.0.1"}, True),
        ({"Origin": "http://localhost:6066"}, True),
        ({"Origin": "null"}, True),
        ({"Origin": ""}, True),
        ({"Origin": OWN}, True),
        ({"Origin": f"http://{OWN}.evil.example"}, True),
        ({"Origin": "https://plant.example"}, False),
        ({"Origin": "http://plant.example"}, True),
        ({"Origin": f"http://{OWN}", "Sec_Fetch_Site": "cross-site"}, True),
    ],
)
def test_pages_of_strangers_are_told_by_what_browsers_send(headers, strange):
    web = Web(public_url="https://plant.example")
    assert hosts.from_a_strangers_page(asked(OWN, **headers), web) is strange


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::9", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        (None, ""),
        ("@abstract", "@abstract"),
    ],
)
def test_a_client_is_an_address_or_a_network_that_one_has(address, client):
    assert client_of(address) == client


def test_places_are_given_back_whatever_happens():
    places = Places()

    def work() -> None:
        with places.taken("a"), places.taken("a"), places.taken("b"):
            assert (places.of("a"), places.of("b"), places.total) == (2, 1, 3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert (places.of("a"), places.total, places._taken) == (0, 0, {})
