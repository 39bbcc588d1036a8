"""A client connects as the settings say, every one; and one that is stopped takes nobody with it, whatever it does."""

import ast
import asyncio
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.admin import ApiVersionRequest
from faust.transport.drivers import aiokafka as driver
from pydantic import SecretStr
from tls_support import Authority

from preservarium.settings import Kafka, SettingsError
from preservarium.streaming import faust_parts, kafka_clients

ROOT = Path(__file__).parents[3]


class Client:
    def __init__(self, error: BaseException | None = None, *, hangs: bool = False) -> None:
        self.error, self.hangs, self.stopped = error, hangs, False

    async def stop(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        self.stopped = True


@pytest.mark.parametrize("error", [asyncio.CancelledError(), OSError("gone"), None])
async def test_what_stop_raises_stays_there(error: BaseException | None) -> None:
    client = Client(error)
    await kafka_clients.stop(client)
    assert client.stopped is (error is None)
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_one_that_hangs_is_left() -> None:
    began = asyncio.get_running_loop().time()
    await kafka_clients.stop(Client(hangs=True), within_s=0.05)
    assert 0.05 <= asyncio.get_running_loop().time() - began < 5


async def test_who_is_cancelled_meanwhile_is_cancelled() -> None:
    task = asyncio.create_task(kafka_clients.stop(Client(hangs=True)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- how a client connects


def calls(of: frozenset[str]) -> Iterator[tuple[str, ast.Call]]:
    """Every call of one of these names in what is shipped, with where it stands."""
    for file in sorted(f for d in ("preservarium", "agents", "tables") for f in (ROOT / d).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in of:
                yield f"{file.relative_to(ROOT)}:{node.lineno}", node


#: Asks where topics end, of all that is written, and reads no record.
ENDS_ALONE = "preservarium/streaming/same_offsets.py:"


def test_every_client_of_kafka_is_made_with_the_connection_of_the_settings() -> None:
    found = list(calls(frozenset({"AIOKafkaConsumer", "AIOKafkaProducer", "AIOKafkaAdminClient", "AIOKafkaClient"})))
    assert len(found) >= 10, "the clients have other names now?"
    for where, call in found:
        spread = [ast.unparse(k.value) for k in call.keywords if k.arg is None]
        # A consumer reads of transactions only what was committed.
        consumer = ast.unparse(call.func).endswith("Consumer")
        made_with = "reading" if consumer and not where.startswith(ENDS_ALONE) else "connection"
        assert any(s.startswith(f"kafka_clients.{made_with}(") for s in spread), where
        arguments = {k.arg for k in call.keywords}
        assert not arguments & {"bootstrap_servers", "security_protocol", "ssl_context", "isolation_level"}, where


def test_no_other_client_library_of_kafka_is_used() -> None:
    # The in-memory broker is a producer of librdkafka that connects to nobody.
    allowed = {"preservarium/embedded/mock_kafka.py", "preservarium/embedded/kafka.py"}
    found = {
        str(file.relative_to(ROOT))
        for d in ("preservarium", "agents", "tables")
        for file in (ROOT / d).rglob("*.py")
        if re.search(r"^\s*(import|from) (confluent_kafka|kafka)\b", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert found <= allowed


LOGIN = {"sasl_username": "ann", "sasl_password": SecretStr("hush")}


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"])
def test_faust_connects_as_our_own_clients_do(protocol: Any, mechanism: Any) -> None:
    kafka = Kafka(
        security_protocol=protocol, sasl_mechanism=mechanism, **(LOGIN if protocol.startswith("SASL") else {})
    )
    ours = kafka_clients.connection(kafka)
    fausts = dict(driver.credentials_to_aiokafka_auth(faust_parts.credentials(kafka)))
    assert ours.pop("bootstrap_servers") == kafka.bootstrap_servers
    for arguments in (ours, fausts):
        context = arguments.pop("ssl_context", None)
        assert (context is not None) is protocol.endswith("SSL")
        if context is not None:
            assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert ours == fausts
    assert ("sasl_plain_password" in ours) is protocol.startswith("SASL")


def test_the_certificates_of_the_settings_are_used(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    client = authority.sign("client", password="hush")
    kafka = Kafka(
        security_protocol="SSL",
        ssl_ca_file=str(authority.cert),
        ssl_cert_file=str(client.cert),
        ssl_key_file=str(client.key),
        ssl_key_password=SecretStr("hush"),
        ssl_check_hostname=False,
    )
    context = kafka_clients.connection(kafka)["ssl_context"]
    assert [dict(x[0] for x in c["subject"])["commonName"] for c in context.get_ca_certs()] == ["test authority"]
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, False)
    for wrong, words in (
        ({"ssl_key_password": SecretStr("wrong/hush")}, "SSL_CERT_FILE: no certificate with its key"),
        ({"ssl_key_password": SecretStr("")}, "SSL_CERT_FILE: no certificate with its key"),
        ({"ssl_ca_file": "/nowhere"}, "SSL_CA_FILE: no certificate can be read from '/nowhere': FileNotFoundError"),
        ({"ssl_ca_file": str(client.key)}, "SSL_CA_FILE: no certificate can be read"),
    ):
        with pytest.raises(SettingsError, match=words) as e:
            kafka_clients.connection(kafka.model_copy(update=wrong))
        assert "\n" not in str(e.value)
        assert "hush" not in str(e.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ""),
        ({"security_protocol": "SSL"}, ""),
        ({"security_protocol": "SSL", "ssl_check_hostname": False}, "host names are not checked"),
        ({"security_protocol": "SASL_SSL", **LOGIN}, ""),
        ({"security_protocol": "SASL_PLAINTEXT", **LOGIN}, "clear text"),
        ({"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "SCRAM-SHA-512", **LOGIN}, "without encryption"),
    ],
)
def test_what_is_unsafe_is_said(given: dict[str, Any], words: str) -> None:
    said = kafka_clients.insecurity(Kafka(**given))
    assert bool(said) is bool(words)
    assert words in said
    assert "hush" not in said


async def test_a_consumer_cuts_its_connections_when_all_else_is_done() -> None:
    said: list[str] = []
    connection = SimpleNamespace(_writer=SimpleNamespace(transport=SimpleNamespace(abort=lambda: said.append("cut"))))

    async def close() -> None:
        said.append("close")

    client = Client()
    client._client = SimpleNamespace(_conns={1: connection, 2: SimpleNamespace(_writer=None)}, close=close)  # type: ignore[attr-defined]
    stop = client.stop

    async def leave_and_close() -> None:
        said.append("leave")
        await stop()
        await client._client.close()  # type: ignore[attr-defined]

    client.stop = leave_and_close  # type: ignore[method-assign]
    await kafka_clients.stop(client)
    assert said == ["leave", "cut", "close"]


def test_what_is_written_to_a_connection_that_was_reset_is_an_error_of_the_connection() -> None:
    """On the loop that workers have: asyncio's own swallows it, and aiokafka hears of the reset a moment later."""

    async def write() -> None:
        connection = AIOKafkaConnection(*listening.getsockname())
        connection._reader, connection._writer = await asyncio.open_connection(*listening.getsockname())
        connection._versions = {18: (0, 0)}
        # What reads has not been told yet.
        connection._read_task = asyncio.get_running_loop().create_future()
        connection._writer.transport.abort()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(KafkaConnectionError, match="the handler is closed"):
            await connection.send(ApiVersionRequest())
        assert not connection.connected()

    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(write())


def test_other_errors_of_a_runtime_stay_what_they_are() -> None:
    class Busy(AIOKafkaConnection):
        def __init__(self) -> None:
            self._writer = SimpleNamespace(transport=SimpleNamespace(is_closing=lambda: False), write=self._fail)

        def __del__(self) -> None: ...

        def _fail(self, _data: bytes) -> None:
            raise RuntimeError("another read is under way")

    with pytest.raises(RuntimeError, match="under way"):
        Busy()._send_sasl_token(b"token")
