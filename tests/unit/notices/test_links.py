"""Signed acknowledge links: what they allow, for how long, and that nothing else opens them."""

from urllib.parse import parse_qs, urlsplit

import pytest
from itsdangerous import TimestampSigner, URLSafeTimedSerializer

from preservarium.notices.links import LinkError, LinkExpired, acknowledge_link, opened
from preservarium.settings import SettingsError, load

ALARM = {"alarm_id": "a1", "device_id": "dev/1", "rule": "hot & humid", "pin_position": "2", "transition": "raised"}
SECRET = "0123456789abcdef-secret"


def settings(**web):
    return load(web={"public_url": "https://plant.example/", "link_secret": SECRET, **web})


def token_of(link):
    (token,) = parse_qs(urlsplit(link).query)["token"]
    return token


def test_a_link_opens_what_it_was_made_for():
    link = acknowledge_link(ALARM, "ann@example.org", settings())
    assert link.startswith("https://plant.example/ack?token=")
    found = opened(token_of(link), settings())
    assert (found.alarm_id, found.device_id, found.rule, found.pin_position) == ("a1", "dev/1", "hot & humid", "2")
    assert found.recipient == "ann@example.org"


def test_the_same_occurrence_and_recipient_are_one_action():
    ann, again, bob = (
        opened(token_of(acknowledge_link({**ALARM, "transition": t}, to, settings())), settings()).action_id
        for t, to in (("raised", "ann"), ("cleared", "ann"), ("raised", "bob"))
    )
    assert ann == again != bob


@pytest.mark.parametrize("web", [{"link_secret": ""}, {"public_url": ""}])
def test_without_secret_or_address_there_are_no_links(web):
    assert acknowledge_link(ALARM, "ann", settings(**web)) is None


def test_a_link_ends(monkeypatch):
    link = acknowledge_link(ALARM, "ann", settings())
    now = TimestampSigner(SECRET).get_timestamp()
    monkeypatch.setattr(TimestampSigner, "get_timestamp", lambda self: now + 3_602)
    assert opened(token_of(link), settings(link_ttl_s=3_700)).recipient == "ann"
    with pytest.raises(LinkExpired):
        opened(token_of(link), settings(link_ttl_s=3_600))


@pytest.mark.parametrize(
    "change", [lambda t: t[:-1], lambda t: "x" + t, lambda t: "", lambda t: "é", lambda t: t * 999]
)
def test_what_was_tampered_with_opens_nothing(change):
    with pytest.raises(LinkError):
        opened(change(token_of(acknowledge_link(ALARM, "ann", settings()))), settings())


def test_a_signature_made_for_something_else_opens_nothing():
    other = URLSafeTimedSerializer(SECRET, salt="something.else").dumps(["a", "b", "c", "d", "e"])
    with pytest.raises(LinkError):
        opened(other, settings())
    with pytest.raises(LinkError, match="switched off"):
        opened("t", settings(link_secret=""))


def test_a_short_secret_and_a_wrong_address_are_refused_without_being_told():
    with pytest.raises(SettingsError, match="LINK_SECRET") as told:
        settings(link_secret="short-one")
    assert "short-one" not in str(told.value)
    with pytest.raises(SettingsError, match="PUBLIC_URL"):
        settings(public_url="plant.example")
