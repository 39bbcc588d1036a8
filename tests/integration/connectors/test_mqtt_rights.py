"""Who may write as whom over MQTT: a real broker with the configuration and the access list of docs/SECURITY.md, and a certificate for each device."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiomqtt
import pytest
from conftest import running
from connector_fakes import MemoryPublisher
from documented import ROOT
from pydantic import SecretStr
from tls_support import Authority

from preservarium import topics
from preservarium.clock import SystemClock
from preservarium.connectors.mqtt import MqttConnector, tls_context
from preservarium.embedded.mosquitto import Mosquitto
from preservarium.embedded.service import free_port
from preservarium.settings import LiveSettings, Settings

PAGE = (ROOT / "docs/SECURITY.md").read_text()


def printed(first: str) -> str:
    """The file that the page shows, which begins so."""
    (found,) = [block for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) if block.startswith(first)]
    return str(found)


class Guarded(Mosquitto):
    """As the page says, on loopback. The broker's own look whether it lives comes by another listener, to which nothing is allowed."""

    name = "mosquitto-rights"

    def __init__(self, directory: Path, authority: Authority) -> None:
        super().__init__(directory)
        self.authority, self.tls_port = authority, free_port()
        self.server = authority.sign("server", hosts="DNS:localhost")

    def configuration(self) -> str:
        acl = self.directory / "acl"
        acl.write_text(printed("# /etc/mosquitto/acl"))
        acl.chmod(0o600)
        shown = printed("# mosquitto.conf").replace("listener 8883", f"listener {self.tls_port} 127.0.0.1")
        for given, path in (("ca.pem", self.authority.cert), ("server.pem", self.server.cert), ("server.key", self.server.key), ("acl", acl)):  # fmt: skip
            shown = shown.replace(f"/etc/mosquitto/{given}", str(path))
        return f"{super().configuration()}{shown}"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def broker(services_directory: Path, authority: Authority) -> Iterator[Guarded]:
    yield from running(Guarded(services_directory / "mosquitto-rights", authority))


def settings(broker: Guarded, name: str) -> Settings:
    identity = broker.authority.sign(name)
    return Settings(
        mqtt={
            "url": SecretStr(f"mqtts://localhost:{broker.tls_port}"), "client_id": name, "ssl_ca_file": str(broker.authority.cert),
            "ssl_cert_file": str(identity.cert), "ssl_key_file": str(identity.key),
        }
    )  # fmt: skip


@contextlib.asynccontextmanager
async def device(broker: Guarded, name: str) -> AsyncIterator[aiomqtt.Client]:
    own = settings(broker, name).mqtt
    client = aiomqtt.Client("localhost", broker.tls_port, identifier=name, tls_context=tls_context(own), timeout=10)
    async with client:
        yield client


async def test_a_device_writes_as_itself_alone(broker: Guarded) -> None:
    publisher = MemoryPublisher()
    connector = MqttConnector(publisher, LiveSettings(settings(broker, "preservarium")), SystemClock())
    task = asyncio.create_task(connector.run())
    forged = b'{"end_device_ids":{"device_id":"dev-a","dev_eui":"dev-b"},"uplink_message":{"frm_payload":"AQ=="}}'
    try:
        async with asyncio.timeout(30):
            await connector.connected.wait()
            for topic in ("devices/dev-b/up", "devices/dev-a/down", "devices/dev-b/down", "other"):
                # Mosquitto answers, or (2.0.11) cuts the connection: either way it has seen the message.
                with contextlib.suppress(aiomqtt.MqttError):
                    async with device(broker, "dev-a") as a:
                        await a.publish(topic, b'{"forged":1}', qos=1)
            async with device(broker, "dev-a") as a, device(broker, "dev-b") as b:
                await a.publish("devices/dev-a/up", forged, qos=1)
                await a.publish("devices/dev-a/up", b'{"t":1}', qos=1)
                await b.publish("devices/dev-b/up", b'{"t":2}', qos=1)
            while len(publisher.lines()) < 2:
                await asyncio.sleep(0.01)
    finally:
        connector.stop()
        await asyncio.wait_for(task, 15)
    # What was forged would have come before.
    assert {line["device"]: line["payload"] for line in publisher.lines()} == {"dev-a": {"t": 1}, "dev-b": {"t": 2}}
    (refused,) = publisher.lines(topics.ERRORS)
    assert (refused["code"], refused["topic"]) == ("envelope_invalid", "mqtt:devices/dev-a/up")
    assert "an event of 'dev-b' under the topic of 'dev-a'" in refused["message"]


async def test_a_device_hears_what_is_for_it_alone(broker: Guarded) -> None:
    async with (
        asyncio.timeout(30),
        device(broker, "dev-a") as a,
        device(broker, "dev-b") as b,
        device(broker, "preservarium") as us,
    ):
        for each in (a, b):
            for wanted in ("devices/+/down", "devices/dev-b/down", "devices/+/up", "#"):
                with contextlib.suppress(aiomqtt.MqttError):
                    await each.subscribe(wanted, qos=1)
        await us.publish("devices/dev-b/down", b"for b", qos=1)
        await b.publish("devices/dev-b/up", b"of b", qos=1)
        await us.publish("devices/dev-a/down", b"for a", qos=1)
        first = await anext(aiter(a.messages))
        assert (str(first.topic), first.payload) == ("devices/dev-a/down", b"for a")
        heard = await anext(aiter(b.messages))
        assert (str(heard.topic), heard.payload) == ("devices/dev-b/down", b"for b")


async def test_nobody_without_a_certificate_is_let_in(broker: Guarded, authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "somebody else").sign("dev-a")
    nobody = Settings(
        mqtt={"url": SecretStr(f"mqtts://localhost:{broker.tls_port}"), "ssl_ca_file": str(authority.cert)}
    )
    other = nobody.mqtt.model_copy(update={"ssl_cert_file": str(stranger.cert), "ssl_key_file": str(stranger.key)})
    for who in (nobody.mqtt, other):
        with pytest.raises(aiomqtt.MqttError):
            async with aiomqtt.Client("localhost", broker.tls_port, tls_context=tls_context(who), timeout=5):
                pass
