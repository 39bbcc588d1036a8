"""What every client of Kafka in this process has in common: how it connects, and how it is stopped."""

import asyncio
import contextlib
import logging
import ssl
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from aiokafka.client import ConnectionGroup
from aiokafka.conn import CloseReason

from preservarium import tls
from preservarium.settings import Kafka

#: For a client that was told to stop: to leave its group and to end its own tasks.
STOP_S: Final = 10.0


async def stop(client: Any, within_s: float = STOP_S) -> None:
    """Stop a client of aiokafka; whatever becomes of it is nobody's trouble.

    Never to be awaited as `client.stop()` where the caller lives on: while a broker is gone, aiokafka cancels its own
    fetches and lets their CancelledError out of `stop()`, so that the caller ends as if it had been cancelled itself,
    without a word. So it runs in a task of its own.
    """
    _hang_up_at_the_end(client)
    stopping = asyncio.ensure_future(client.stop() if hasattr(client, "stop") else client.close())
    try:
        done, _ = await asyncio.wait({stopping}, timeout=within_s)
    except asyncio.CancelledError:
        stopping.cancel()
        raise
    if not done:
        stopping.cancel()
        await asyncio.wait({stopping}, timeout=1.0)
    if stopping.done() and not stopping.cancelled():
        with contextlib.suppress(Exception):
            stopping.result()


def _hang_up_at_the_end(client: Any) -> None:
    """Let the last step of a client's stop cut its connections, instead of taking leave of the broker in TLS.

    A broker reads nothing from a connection while it waits with an answer, so the leave of an idle consumer takes as
    long as its fetch: seconds for each idle stage, one after the other. Everything that counts (the last commit, leaving
    the group) has been acknowledged before.
    """
    # Hook: the client under a consumer; tests/contract holds it. A producer has none of this name, and no fetch.
    inner = getattr(client, "_client", None)
    if inner is None:
        return
    close = inner.close

    async def hang_up() -> None:
        for connection in inner._conns.values():
            if connection._writer is not None:
                connection._writer.transport.abort()
        await close()

    inner.close = hang_up


def hang_up(consumer: Any) -> None:
    """Cut the connections on which a started consumer fetches; they are made anew when they are needed.

    A broker reads nothing from a connection while it holds back the answer to a fetch, also where nobody waits for that
    answer any more: what is asked next would wait for as long as the fetch was to wait for records.
    """
    # Hook: the connections of the client under a consumer, by node and group; its coordinator has others.
    for (_, group), connection in list(consumer._client._conns.items()):
        if group == ConnectionGroup.DEFAULT:
            connection.close(reason=CloseReason.IDLE_DROP)


def keep_as_parsed(consumer: Any, takes: Callable[[str], bool]) -> None:
    """Let a started consumer give the records of some topics as its parser makes them, not as a ConsumerRecord each.

    A parsed record has offset, timestamp (ms), key, value and headers, and knows no topic or partition: `getmany` says
    them. The ConsumerRecord about it costs five times what parsing it costs.

    Args:
        consumer: an AIOKafkaConsumer that has nothing assigned yet.
        takes: whether a topic (full name) is one of them.
    """
    # Hook: where aiokafka's fetcher keeps what it has fetched and nobody has taken.
    consumer._fetcher._records = _Fetched(takes)


class _Fetched(OrderedDict[Any, Any]):
    def __init__(self, takes: Callable[[str], bool]) -> None:
        super().__init__()
        self._takes = takes

    def __setitem__(self, tp: Any, result: Any) -> None:
        records = getattr(result, "_partition_records", None)
        if records is not None and self._takes(tp.topic):
            # Parsed when they are taken, so this comes in time.
            records._consumer_record = _as_parsed
        super().__setitem__(tp, result)


def _as_parsed(_tp: Any, record: Any) -> Any:
    return record


def connection(kafka: Kafka) -> dict[str, Any]:
    """The arguments by which a client of aiokafka connects: brokers, TLS, log-in. Every client is made with them.

    Files are read at each call, so that a client made later has a renewed certificate.

    Raises:
        SettingsError: a file of the settings cannot be used.
    """
    arguments: dict[str, Any] = {
        "bootstrap_servers": kafka.bootstrap_servers,
        "security_protocol": kafka.security_protocol,
    }
    if kafka.tls:
        arguments["ssl_context"] = tls.client_context(
            "kafka",
            ca_file=kafka.ssl_ca_file,
            cert_file=kafka.ssl_cert_file,
            key_file=kafka.ssl_key_file,
            key_password=kafka.ssl_key_password.get_secret_value(),
            check_hostname=kafka.ssl_check_hostname,
        )
    if kafka.sasl:
        arguments |= {
            "sasl_mechanism": kafka.sasl_mechanism,
            "sasl_plain_username": kafka.sasl_username,
            "sasl_plain_password": kafka.sasl_password.get_secret_value(),
        }
    return arguments


def insecurity(kafka: Kafka) -> str:
    """What is not as safe as whoever set it may think; empty where nothing is."""
    if kafka.security_protocol == "SASL_PLAINTEXT":
        if kafka.sasl_mechanism == "PLAIN":
            return "the password goes over the network in clear text, for anybody to read: use SASL_SSL"
        return (
            "log-in without encryption: whoever reads along sees the data and can guess at the password: use SASL_SSL"
        )
    if kafka.tls and not kafka.ssl_check_hostname:
        return "host names are not checked: any server with a certificate of the authority passes for a broker"
    return ""


async def refusal(kafka: Kafka, within_s: float = 5.0) -> str:
    """Why no broker lets us in, each with its reason; empty where one does.

    aiokafka's clients say that they were "unable to bootstrap", and the reason only to the log.
    """
    from aiokafka.conn import AIOKafkaConnection, collect_hosts

    arguments = connection(kafka)
    reasons: list[str] = []
    log = logging.getLogger("aiokafka")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        for host, port, _ in collect_hosts(arguments.pop("bootstrap_servers")):
            made = AIOKafkaConnection(host, port, **arguments)
            try:
                await asyncio.wait_for(made.connect(), within_s)
                return ""
            except Exception as e:
                reasons.append(f"{host}:{port}: {_reason(e, kafka)}")
            finally:
                closed = made.close()
                if made._protocol is not None:
                    await asyncio.wait({closed}, timeout=1.0)
    finally:
        log.setLevel(level)
    return "; ".join(reasons)


def _reason(e: Exception, kafka: Kafka) -> str:
    """What a broker, or the way to it, has against us: one line without a secret."""
    from aiokafka.errors import KafkaError, SaslAuthenticationFailed, UnsupportedSaslMechanismError

    if isinstance(e, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {e.verify_message.rstrip('.')}"
    if isinstance(e, ssl.SSLError):
        return f"no TLS ({e.reason or 'handshake failed'}): is it the port of a {kafka.security_protocol} listener?"
    if isinstance(e, TimeoutError):
        return "no answer in time"
    if isinstance(e, SaslAuthenticationFailed):
        return f"user {kafka.sasl_username!r} is not let in with {kafka.sasl_mechanism}: wrong user or password"
    if isinstance(e, UnsupportedSaslMechanismError):
        return f"it does not take {kafka.sasl_mechanism}"
    if isinstance(e, (KafkaError, ConnectionResetError)):
        return (
            f"it closed the connection: is it the port of a {kafka.security_protocol} listener"
            f"{', and does it ask for a certificate that we do not show' if kafka.tls else ''}?"
        )
    return " ".join(str(e).split()) or type(e).__name__
