"""What every client of Kafka in this process has in common: how it connects, and how it is stopped."""

import asyncio
import contextlib
import functools
import logging
import ssl
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, Final, NamedTuple

from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.errors import IllegalStateError, KafkaConnectionError, for_code
from aiokafka.protocol.commit import OffsetFetchRequest

from preservarium import tls
from preservarium.errors import reason
from preservarium.settings import Kafka

#: For a client that was told to stop: to leave its group and to end its own tasks.
STOP_S: Final = 10.0


def _closed_is_broken(send: Callable[..., Any]) -> Callable[..., Any]:
    """Have what is written to a closed connection be an error of the connection, which every client of aiokafka survives.

    A connection that the other side has reset is closed before aiokafka hears of it. asyncio's own transport swallows
    what is written then; uvloop's raises RuntimeError, which ended a group's coordination, and with it the worker.
    """

    @functools.wraps(send)
    def sent(connection: Any, *args: Any, **kwargs: Any) -> Any:
        writer = connection._writer
        try:
            return send(connection, *args, **kwargs)
        except RuntimeError as e:
            if writer is None or not writer.transport.is_closing():
                raise
            connection.close(reason=CloseReason.CONNECTION_BROKEN)
            message = f"Connection at {connection.host}:{connection.port} broken: {e}"
            raise KafkaConnectionError(message) from e

    return sent


# Hook: the two ways in which aiokafka writes to a connection, of every client in this process; tests/contract holds them.
AIOKafkaConnection.send = _closed_is_broken(AIOKafkaConnection.send)
AIOKafkaConnection._send_sasl_token = _closed_is_broken(AIOKafkaConnection._send_sasl_token)


def _offsets_or_error(send: Callable[..., Any]) -> Callable[..., Any]:
    """Have an answer without offsets be an error, where it says why it has none.

    A broker that has just started has not read its groups yet. It says so for the whole answer (OffsetFetch from version 2
    on), and aiokafka looks at single partitions only: a group that stands somewhere was taken for one that has never
    committed, and read everything again from the beginning.
    """

    @functools.wraps(send)
    async def sent(client: Any, node_id: Any, request: Any, **kwargs: Any) -> Any:
        response = await send(client, node_id, request, **kwargs)
        if isinstance(request, OffsetFetchRequest) and (code := getattr(response, "error_code", 0)):
            raise for_code(code)
        return response

    return sent


# Hook: the way of every request of clients, consumers and administrators among them; tests/contract holds it.
AIOKafkaClient.send = _offsets_or_error(AIOKafkaClient.send)


async def stop(client: Any, within_s: float = STOP_S) -> None:
    """Stop a client of aiokafka; whatever becomes of it is nobody's trouble.

    Never to be awaited as `client.stop()` where the caller lives on: while a broker is gone, aiokafka cancels its own
    fetches and lets their CancelledError out of `stop()`, so that the caller ends as if it had been cancelled itself,
    without a word. So it runs in a task of its own. What does not stop in time is cut off: a membership that is half
    closed would go on to send heartbeats, and keep its partitions from everybody.
    """
    _hang_up_at_the_end(client)
    stopping = asyncio.ensure_future(client.stop() if hasattr(client, "stop") else client.close())
    try:
        done, _ = await asyncio.wait({stopping}, timeout=within_s)
    except asyncio.CancelledError:
        stopping.cancel()
        _cut_off(client)
        raise
    if not done:
        stopping.cancel()
        _cut_off(client)
        await asyncio.wait({stopping}, timeout=1.0)
    if stopping.done() and not stopping.cancelled():
        with contextlib.suppress(Exception):
            stopping.result()


def _cut_off(client: Any) -> None:
    """End everything that a client does, without a farewell."""
    # Hook: the tasks of a consumer, and the connections under it. tests/contract holds them.
    coordinator, fetcher = getattr(client, "_coordinator", None), getattr(client, "_fetcher", None)
    inner = getattr(client, "_client", None)
    tasks = [getattr(coordinator, f"_{name}_task", None) for name in ("coordination", "heartbeat", "commit_refresh")]
    tasks += [getattr(fetcher, "_fetch_task", None), getattr(inner, "_sync_task", None)]
    for task in tasks:
        if task is not None:
            task.cancel()
    for connection in list(getattr(inner, "_conns", {}).values()):
        if connection._writer is not None:
            connection._writer.transport.abort()
        connection.close(reason=CloseReason.SHUTDOWN)


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


class Place(NamedTuple):
    """Where a consumer stands in a partition, as its last fetch left it."""

    position: int | None  #: offset that it goes on from; None: not known yet
    end: int | None  #: of what it may read, the last stable offset; None: not fetched yet
    held: int | None  #: the high watermark: beyond `end` where transactions are open
    asked_s: float | None  #: monotonic time of the request whose answer said so; None where nobody notes it


def place_of(consumer: Any, tp: TopicPartition) -> Place | None:
    """Where a consumer stands, without a wait; None: the partition is not assigned to it."""
    # Hook: aiokafka's own notes. Its `highwater` fails for a partition that a rebalance has just taken.
    subscription = consumer._subscription.subscription
    assignment = subscription.assignment if subscription is not None else None
    found = assignment.state_value(tp) if assignment is not None else None
    if found is None:
        return None
    end = found.highwater if found.lso is None or found.lso < 0 else found.lso
    position = found.position if found.has_valid_position else None
    return Place(position, end, found.highwater, getattr(found, "asked_s", None))


def seek(consumer: Any, tp: TopicPartition, offset: int) -> bool:
    """Fetch from an offset on; False: the partition is not assigned to the consumer (any more)."""
    try:
        consumer.seek(tp, offset)
    except (IllegalStateError, AssertionError):  # the latter while the group is being joined again
        return False
    return True


def note_when_asked(consumer: Any) -> None:
    """Have a started consumer note when each partition was last asked for with success: aiokafka notes the wall clock."""
    # Hook: what sends one request and keeps its answer; the notes are with aiokafka's own of the partition.
    fetcher = consumer._fetcher
    fetch = fetcher._proc_fetch_request

    async def noted(assignment: Any, node_id: int, request: Any) -> Any:
        states = [
            found
            for topic, partitions in request.topics
            for partition, *_ in partitions
            if (found := assignment.state_value(TopicPartition(topic, partition))) is not None
        ]
        before, asked_s = [state.timestamp for state in states], monotonic()
        woken = await fetch(assignment, node_id, request)
        for state, stamp in zip(states, before, strict=True):
            # Another object, be it the same millisecond: the answer was taken.
            if state.timestamp is not stamp:
                state.asked_s = asked_s
        return woken

    fetcher._proc_fetch_request = noted


def note_heartbeats(consumer: Any, heard: Callable[[], None]) -> None:
    """Have `heard` called whenever the group answers a heartbeat of a started consumer as one of its member's."""
    # Hook: what sends one heartbeat; it says whether the group knows us.
    coordinator = consumer._coordinator
    beat = coordinator._do_heartbeat

    async def noted() -> Any:
        known = await beat()
        if known:
            heard()
        return known

    coordinator._do_heartbeat = noted


#: Beside each offset that a worker commits and has nothing else to note with: whoever else sets an offset does not write it.
OWN: Final = "worker"


def mark_commits(consumer: Any) -> None:
    """Have a consumer commit its offsets with `OWN` beside them, where nothing else is noted."""
    commit = consumer.commit

    async def marked(offsets: Mapping[Any, Any] | None = None) -> None:
        await commit(None if offsets is None else {tp: _marked(at) for tp, at in offsets.items()})

    consumer.commit = marked


def _marked(at: Any) -> tuple[int, str]:
    offset, noted = (at, "") if isinstance(at, int) else at
    return offset, noted or OWN


async def commits(consumer: Any, partitions: Sequence[Any]) -> dict[Any, Any]:
    """What a started consumer's group has committed of partitions, with what was noted beside it; without those that have nothing.

    Raises:
        KafkaError: the coordinator cannot be asked.
    """
    # Hook: the coordinator under a consumer; `committed()` does not give what is noted. tests/contract holds it.
    found: Mapping[Any, Any] = await consumer._coordinator.fetch_committed_offsets(list(partitions))
    return {tp: at for tp, at in found.items() if at.offset >= 0}


def stay_active(consumer: Any) -> None:
    """Have a consumer count as asked for records just now.

    One that nobody has asked for `max_poll_interval` leaves its group, and joins none again before somebody asks: a worker
    that waits for its partitions before it asks would wait for ever. From any thread.
    """
    # Hook: aiokafka's own note of the last call. tests/contract holds it.
    consumer._subscription._last_fetch_ended = monotonic()


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


def reading(kafka: Kafka) -> dict[str, Any]:
    """The arguments of every consumer: as `connection`, and of transactions only what was committed.

    Raises:
        SettingsError: as `connection`.
    """
    return connection(kafka) | {"isolation_level": "read_committed"}


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
    from aiokafka.conn import collect_hosts

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
    return reason(e)


async def offsets_since(consumer: Any, times_ms: Mapping[Any, int]) -> dict[Any, int]:
    """Where the records of a time and later begin, for each partition: its end where none is so late.

    Earlier ones may stand behind that. librdkafka's in-memory broker knows no times, and says of any that nothing is so
    late: then it is the partition's beginning, and the caller has to look at the records' times.

    Raises:
        KafkaError: the broker does not answer.
    """
    found = await consumer.offsets_for_times(dict(times_ms))
    places = {tp: found[tp].offset for tp in times_ms if found.get(tp)}
    if late := [tp for tp in times_ms if tp not in places]:
        ever = await consumer.offsets_for_times(dict.fromkeys(late, 0))
        firsts, ends = await consumer.beginning_offsets(late), await consumer.end_offsets(late)
        places |= {tp: ends[tp] if ever.get(tp) else firsts[tp] for tp in late}
    return places
