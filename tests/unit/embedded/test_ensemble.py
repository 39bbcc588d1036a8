"""The services together: what the settings name is not started, what is missing is said."""

import pytest

from preservarium.embedded import mosquitto
from preservarium.embedded.ensemble import Ensemble
from preservarium.embedded.service import Interrupted, ServiceError, ServiceUnavailable
from preservarium.settings import load


@pytest.fixture
def given(monkeypatch):
    """Settings that name every service but MQTT."""
    monkeypatch.setenv("PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS", "broker:9092")
    monkeypatch.setenv("PRESERVARIUM_POSTGRES__HOST", "db")
    monkeypatch.setenv("PRESERVARIUM_CLICKHOUSE__URL", "http://ch:8123")
    return load


async def test_what_is_named_is_not_started_and_mail_has_a_place(given, tmp_path):
    said: list[str] = []
    ensemble = Ensemble(tmp_path, said.append)
    await ensemble.start(given(), mqtt=False)
    try:
        assert set(ensemble.reach) == {"mail"}
        assert ensemble.mail is not None
        assert ensemble.variables["PRESERVARIUM_MAIL__PORT"] == str(ensemble.mail.port)
        assert said == []
    finally:
        await ensemble.stop()


async def test_a_mail_server_that_is_named_has_the_mail(given, monkeypatch, tmp_path):
    monkeypatch.setenv("PRESERVARIUM_MAIL__HOST", "smtp.example.org")
    ensemble = Ensemble(tmp_path, print)
    await ensemble.start(given(), mqtt=False)
    assert (ensemble.mail, ensemble.reach) == (None, {})
    await ensemble.stop()


async def test_without_mosquitto_it_says_what_to_install(given, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(mosquitto, "PLACES", ())
    ensemble = Ensemble(tmp_path, print)
    with pytest.raises(ServiceUnavailable, match=r"Mosquitto is not installed \(Debian: apt install mosquitto\)"):
        await ensemble.start(given(), mqtt=True)
    await ensemble.stop()


async def test_a_broker_of_one_s_own_is_connected(given, monkeypatch, tmp_path):
    monkeypatch.setenv("PRESERVARIUM_MQTT__URL", "mqtt://broker:1883")
    ensemble = Ensemble(tmp_path, print)
    await ensemble.start(given(), mqtt=True)
    assert ensemble.reach["mqtt"] == {"PRESERVARIUM_MQTT__ENABLED": "true"}
    await ensemble.stop()


async def test_security_without_brokers_is_refused(given, monkeypatch, tmp_path):
    monkeypatch.delenv("PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS")
    monkeypatch.setenv("PRESERVARIUM_KAFKA__SECURITY_PROTOCOL", "SSL")
    with pytest.raises(ServiceError, match="no PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS are given"):
        await Ensemble(tmp_path, print).start(given(), mqtt=False)


async def test_a_start_that_nobody_wants_any_more_starts_nothing(given, monkeypatch, tmp_path):
    monkeypatch.delenv("PRESERVARIUM_POSTGRES__HOST")
    ensemble = Ensemble(tmp_path, print)
    ensemble.interrupt()
    with pytest.raises(Interrupted):
        await ensemble.start(given(), mqtt=False)
    assert ensemble.reach == {}
    await ensemble.stop()
