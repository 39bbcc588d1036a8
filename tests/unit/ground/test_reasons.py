"""Reasons for people: never empty, never in Python's own words."""

import asyncio
import errno
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import aiosmtplib
import clickhouse_connect
import orjson
import pytest
from aiokafka.errors import KafkaConnectionError, KafkaTimeoutError, NotLeaderForPartitionError
from hypothesis import given
from hypothesis import strategies as st
from tls_support import Authority, Identity

from preservarium.errors import Fatal, Retry, reason


def _raised(call, *arguments):
    try:
        call(*arguments)
    except Exception as e:
        return e
    raise AssertionError


def _refused():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = s.getsockname()

    async def connect():
        await asyncio.open_connection(*address)

    return _raised(asyncio.run, connect())


@pytest.mark.parametrize(
    ("exception", "said"),
    [
        (TimeoutError(), "no answer in time"),
        (TimeoutError("   "), "no answer in time"),
        (ConnectionResetError(), "the other side cut the connection"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "connection reset by peer"),
        (EOFError(), "the other side ended the connection"),
        (Retry(), "A dependency cannot be reached now; the same batch is tried again."),
        (Retry("PostgreSQL is away\nsince noon"), "PostgreSQL is away since noon"),
        (Fatal("no"), "no"),
        (KafkaTimeoutError(), "kafka timeout"),
        (KafkaConnectionError("Connection at localhost:9092 closed"), "Connection at localhost:9092 closed"),
        (
            KafkaConnectionError("Unable to bootstrap from [('localhost', 9092, <AddressFamily.AF_UNSPEC: 0>)]"),
            "no broker answers",
        ),
        (
            OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 1), [Errno 111] Connect call failed ('127.0.0.1', 1)"),
            "connection refused",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"), "no such file or directory: /x"),
        (_raised(orjson.dumps, "\udcff"), "it is not text in UTF-8"),
        (_raised("\udcff".encode), "it is not text in UTF-8"),
        (PermissionError(errno.EPERM, "Operation not permitted"), "operation not permitted"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known"),
        (ssl.SSLZeroReturnError(6, "TLS/SSL connection has been closed (EOF) (_ssl.c:992)"), "TLS/SSL connection has been closed (EOF)"),
        (ssl.SSLEOFError(8, "[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol (_ssl.c:992)"), "the other side ended the connection"),
        (ssl.SSLError(1, "[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required (_ssl.c:2580)"), "TLS: tlsv13 alert certificate required"),
        (ssl.SSLError(1, "[X509: KEY_VALUES_MISMATCH] key values mismatch (_ssl.c:4067)"), "TLS: key values mismatch"),
        (ValueError(), "value"),
    ],
)  # fmt: skip
def test_what_people_are_told(exception, said):
    assert reason(exception) == said


def test_a_connection_that_is_refused_says_so_without_python():
    assert reason(_refused()) == "connection refused"


def test_an_error_of_the_broker_keeps_its_meaning():
    assert reason(NotLeaderForPartitionError()) == "not leader for partition"
    assert reason(NotLeaderForPartitionError("of t-0")) == "of t-0"


_CLASSES = [
    TimeoutError,
    OSError,
    ValueError,
    KeyError,
    Retry,
    KafkaTimeoutError,
    ConnectionError,
    UnicodeError,
    EOFError,
]


@given(st.sampled_from(_CLASSES), st.text())
def test_it_is_one_line_and_never_empty(kind, text):
    told = reason(kind(text))
    assert told.strip()
    assert "\n" not in told


# --- TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"), "somebody else")


def _serving(server: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.cert, server.key)
    return context


@asynccontextmanager
async def _listening(context: ssl.SSLContext | None, answer: bytes) -> AsyncIterator[int]:
    """A server that reads a little, answers and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def _bare(host: str, port: int, trusted: Authority) -> None:
    await asyncio.open_connection(host, port, ssl=ssl.create_default_context(cafile=trusted.cert))


async def _http(host: str, port: int, trusted: Authority) -> None:
    context = ssl.create_default_context(cafile=trusted.cert)
    async with aiohttp.ClientSession() as session, session.get(f"https://{host}:{port}/", ssl=context):
        pass


async def _mail(host: str, port: int, trusted: Authority) -> None:
    context = ssl.create_default_context(cafile=trusted.cert)
    async with aiosmtplib.SMTP(hostname=host, port=port, use_tls=True, tls_context=context, timeout=10):
        pass


async def _clickhouse(host: str, port: int, trusted: Authority) -> None:
    await clickhouse_connect.get_async_client(
        interface="https", host=host, port=port, ca_cert=str(trusted.cert), query_retries=0
    )


@pytest.mark.parametrize("connect", [_bare, _http, _mail, _clickhouse])
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("unknown authority", "certificate verify failed: unable to get local issuer certificate"),
        ("expired", "certificate verify failed: certificate has expired"),
        ("another name", "certificate verify failed: Hostname mismatch, certificate is not valid for 'localhost'"),
        ("no address", "certificate verify failed: IP address mismatch, certificate is not valid for '127.0.0.1'"),
        ("signed by itself", "certificate verify failed: self-signed certificate"),
        ("plain", "what answers there speaks no TLS (wrong version number)"),
        ("cut", "the other side cut the connection"),
    ],
)
async def test_a_handshake_that_fails_says_why_whichever_client_tried(
    connect, what: str, said: str, authority: Authority, stranger: Authority
) -> None:
    context: ssl.SSLContext | None = None
    if what == "signed by itself":
        context = _serving(Identity(stranger.cert, stranger.directory / "ca.key"))
    elif what not in ("plain", "cut"):
        hosts, days = "DNS:elsewhere" if what == "another name" else "DNS:localhost", "-1" if what == "expired" else "2"
        context = _serving(authority.sign(what.replace(" ", "-"), hosts=hosts, days=days))
    answer = b"" if what == "cut" else b"HTTP/1.1 400 Bad Request\r\n\r\n"
    async with _listening(context, answer) as port:
        host = "127.0.0.1" if what == "no address" else "localhost"
        with pytest.raises(Exception) as raised:
            await connect(host, port, stranger if what == "unknown authority" else authority)
    assert reason(raised.value) == said


@pytest.mark.parametrize("connect", [_http, _clickhouse])
async def test_a_name_that_nobody_knows_is_told(connect, authority: Authority) -> None:
    with pytest.raises(Exception) as raised:
        await connect("nowhere.invalid", 1, authority)
    assert "name" in reason(raised.value).lower()
    assert "[" not in reason(raised.value)
