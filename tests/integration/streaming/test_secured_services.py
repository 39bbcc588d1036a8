"""TLS towards PostgreSQL, ClickHouse, MQTT and SMTP: real servers with a certificate of an authority of their own."""

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from datetime import UTC
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiomqtt
import asyncpg
import pytest
from conftest import Smtp, running
from pydantic import SecretStr
from tls_support import Authority, Identity

from preservarium.cli.doctor import State, check_clickhouse, check_mqtt, check_postgres
from preservarium.cli.notices import _delivery
from preservarium.connectors.mqtt import tls_context
from preservarium.embedded.mosquitto import Mosquitto
from preservarium.embedded.postgres import Binaries, Postgres, find_binaries
from preservarium.embedded.service import ServiceUnavailable, free_port
from preservarium.errors import Retry
from preservarium.notices.channel import Notice
from preservarium.notices.mail import MailChannel
from preservarium.settings import Mail, Settings
from preservarium.stores.clickhouse import ClickHouseStore


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> Identity:
    return authority.sign("server", hosts="DNS:localhost")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(Authority(tmp_path_factory.mktemp("stranger"), "somebody else").cert)


def serving(server: Identity) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(server.cert, server.key)
    return context


# --- PostgreSQL


class SecuredPostgres(Postgres):
    """Of an installation that was built with TLS; the one that comes as a wheel was not."""

    def _fitting(self) -> Binaries:
        for found in find_binaries():
            program = found.directory / "pg_config"
            if program.exists() and "ssl" in subprocess.check_output([program, "--configure"], text=True, timeout=10):
                return found
        message = "a PostgreSQL server that was built with OpenSSL (Debian: apt install postgresql)"
        raise ServiceUnavailable(message)


@pytest.fixture(scope="module")
def secured_postgres(services_directory: Path, server: Identity) -> Iterator[Postgres]:
    files = {"ssl": "on", "ssl_cert_file": str(server.cert), "ssl_key_file": str(server.key)}
    yield from running(SecuredPostgres(services_directory / "postgres-tls", settings={"fsync": "off", **files}))


@pytest.mark.postgres
async def test_postgres(secured_postgres: Postgres, authority: Authority, stranger: str) -> None:
    def settings(**given: Any) -> Settings:
        where = {"host": "localhost", "port": secured_postgres.port, "database": "postgres", "user": "postgres"}
        user = urlsplit(secured_postgres.dsn()).username
        password = SecretStr(secured_postgres.password)
        return Settings(postgres={**where, "user": user, "password": password, **given})

    verified = settings(ssl_mode="verify-full", ssl_ca_file=str(authority.cert))
    for dsn in (
        verified.postgres.dsn,
        f"{secured_postgres.dsn().replace('127.0.0.1', 'localhost')}?sslmode=verify-full&sslrootcert={authority.cert}",
    ):
        connection = await asyncpg.connect(dsn)
        assert await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()") is True
        await connection.close()
    found = (await check_postgres(verified))[0]
    assert (found.state, "TLSv1." in found.found) == (State.GREEN, True), found
    assert "not encrypted" in (await check_postgres(settings(ssl_mode="disable")))[0].found
    for wrong, words in (
        ({"ssl_mode": "verify-full", "ssl_ca_file": stranger}, "certificate verify failed"),
        (
            {"ssl_mode": "verify-full", "ssl_ca_file": str(authority.cert), "host": "127.0.0.1"},
            "certificate is not valid",
        ),
    ):
        (finding,) = await check_postgres(settings(**wrong))
        assert (finding.state, words in finding.found) == (State.RED, True), finding
        assert secured_postgres.password not in finding.found


# --- ClickHouse


@contextlib.asynccontextmanager
async def behind_tls(port: int, server: Identity) -> AsyncIterator[int]:
    """A port with TLS before a port without."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=serving(server))
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()


async def test_clickhouse(
    clickhouse: str, clickhouse_database: str, server: Identity, authority: Authority, stranger: str
) -> None:
    u = urlsplit(clickhouse)
    async with behind_tls(u.port or 8123, server) as port:

        def settings(ca: str, host: str = "localhost") -> Settings:
            url = SecretStr(f"https://{u.username}:{u.password}@{host}:{port}")
            return Settings(clickhouse={"url": url, "database": clickhouse_database, "ssl_ca_file": ca})

        good = settings(str(authority.cert))
        (finding,) = await check_clickhouse(good)
        assert finding.state == State.GREEN, finding
        store = ClickHouseStore(lambda: good)
        try:
            rows = await store.query("SELECT 1")
            assert [list(row) for row in rows] == [[1]]
        finally:
            await store.close()
        for wrong in (settings(stranger), settings(""), settings(str(authority.cert), "127.0.0.1")):
            (finding,) = await check_clickhouse(wrong)
            assert (finding.state, "ertificate" in finding.found) == (State.RED, True), finding
            assert str(u.password) not in finding.found


# --- MQTT


class SecuredMosquitto(Mosquitto):
    """With a second listener, that asks for a certificate."""

    name = "mosquitto-tls"

    def __init__(self, directory: Path, authority: Authority, server: Identity) -> None:
        super().__init__(directory)
        self.authority, self.server, self.tls_port = authority, server, free_port()

    def configuration(self) -> str:
        return (
            f"{super().configuration()}listener {self.tls_port} 127.0.0.1\ncafile {self.authority.cert}\n"
            f"certfile {self.server.cert}\nkeyfile {self.server.key}\nrequire_certificate true\n"
        )


@pytest.fixture(scope="module")
def secured_mosquitto(services_directory: Path, authority: Authority, server: Identity) -> Iterator[SecuredMosquitto]:
    yield from running(SecuredMosquitto(services_directory / "mosquitto-tls", authority, server))


async def test_mqtt(secured_mosquitto: SecuredMosquitto, authority: Authority, stranger: str) -> None:
    client = authority.sign("connector", password="key secret")

    def settings(**given: str) -> Settings:
        url = SecretStr(f"mqtts://localhost:{secured_mosquitto.tls_port}")
        own = {
            "ssl_ca_file": str(authority.cert),
            "ssl_cert_file": str(client.cert),
            "ssl_key_file": str(client.key),
            "ssl_key_password": SecretStr("key secret"),
        }
        return Settings(mqtt={"enabled": True, "url": url, **own, **given})

    good = settings()
    (finding,) = await check_mqtt(good)
    assert finding.state == State.GREEN, finding
    at = {"hostname": "localhost", "port": secured_mosquitto.tls_port, "timeout": 5}
    async with aiomqtt.Client(**at, tls_context=tls_context(good.mqtt)) as connected:
        await connected.subscribe("x")
        await connected.publish("x", b"1", qos=1)
        async with asyncio.timeout(10):
            assert (await anext(aiter(connected.messages))).payload == b"1"
    (finding,) = await check_mqtt(settings(ssl_ca_file=stranger))
    assert (finding.state, "ertificate" in finding.found) == (State.RED, True), finding
    nobody = settings(ssl_cert_file="", ssl_key_file="", ssl_key_password=SecretStr(""))  # type: ignore[arg-type]
    with pytest.raises(aiomqtt.MqttError):
        async with aiomqtt.Client(**at, tls_context=tls_context(nobody.mqtt)):
            pass


# --- SMTP


@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_mail(security: Any, server: Identity, authority: Authority, stranger: str) -> None:
    from aiosmtpd.controller import Controller

    box = Smtp("localhost", free_port())
    context = serving(server)
    how: dict[str, Any] = (
        {"ssl_context": context} if security == "tls" else {"tls_context": context, "require_starttls": True}
    )
    controller = Controller(box, hostname=box.host, port=box.port, ready_timeout=10, **how)
    controller.start()

    def channel(ca: str, host: str = "localhost") -> MailChannel:
        mail = Mail(host=host, port=box.port, security=security, ssl_ca_file=ca)
        return MailChannel(lambda: mail, lambda _: UTC, lambda _line, _to: None)

    notice = Notice(_delivery("ann"), "mail", "ann@example.org")
    try:
        for wrong, words in (
            (channel(stranger), "ertificate"),
            (channel(str(authority.cert), "127.0.0.1"), "ertificate"),
            (channel("/nowhere"), "PRESERVARIUM_MAIL__SSL_CA_FILE"),
        ):
            with pytest.raises(Retry, match=words):
                await wrong.send(notice)
            await wrong.close()
        assert box.messages == []
        good = channel(str(authority.cert))
        assert (await good.send(notice)).startswith("250")
        await good.close()
        assert box.envelopes == [("preservarium@localhost", ["ann@example.org"])]
    finally:
        controller.stop()
