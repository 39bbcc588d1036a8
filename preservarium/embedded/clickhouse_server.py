"""The one process that owns the chDB engine and serves ClickHouse's HTTP interface on loopback.

`python -m preservarium.embedded.clickhouse_server --port P --path DIR --password-file FILE`

chDB allows one engine path per process and one process per path, hangs after fork, and takes some 300 MB: so it lives
here alone, and workers, console and tests are HTTP clients, exactly as of a ClickHouse server or a cluster.

A thread serves a connection; a request opens a connection to the engine of its own (about a millisecond), so that its
database and settings end with it. The engine runs the queries of several connections in parallel.
"""

import argparse
import email.parser
import email.policy
import hmac
import itertools
import json
import logging
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from chdb.state.sqlitelike import Connection

from preservarium.embedded.clickhouse_http import (
    READING_WORDS,
    STREAMED_FORMATS,
    ClickHouseError,
    Insert,
    choose_encoding,
    decode,
    encode,
    find_insert,
    first_word,
    is_stateful,
    output_format,
    quote_name,
    quote_text,
    set_statement,
    split_parameters,
)

log = logging.getLogger("clickhouse")

#: Of a statement, without the rows that follow an INSERT … FORMAT; four times what the engine parses by default.
STATEMENT_BYTES_MAX: Final = 16 * 1024 * 1024
#: Of the rows of one insert, decoded. They stream through, so the limit guards the disk, not the memory.
INSERT_BYTES_MAX: Final = 4 * 1024 * 1024 * 1024
#: How much of a body is read to find where the statement ends.
HEAD_BYTES: Final = 64 * 1024
READ_BYTES: Final = 256 * 1024
#: Connections at once; each is a thread. Eight a worker, and room for a console, a test run and a person.
CONNECTIONS_MAX: Final = 256
#: Queries at once: beyond this they wait. More than the cores, because inserts wait for the disk.
QUERIES_MAX: Final = 16
QUERY_WAIT_S: Final = 60.0
#: One query may take this much memory unless it says otherwise: the machine is shared.
QUERY_MEMORY_BYTES: Final = 4_000_000_000
SESSIONS_MAX: Final = 64
SESSION_S: Final = 60.0  #: ClickHouse's default_session_timeout
SESSION_S_MAX: Final = 3600.0  #: ClickHouse's max_session_timeout
#: Long: a pooled client connection that we closed while it was idle would fail the client's next insert.
IDLE_S: Final = 3600.0
STOP_S: Final = 10.0  #: running requests get this long to end
#: The rest of a refused body is read up to here, so that the client hears the answer instead of a reset.
DRAIN_BYTES_MAX: Final = 64 * 1024 * 1024
#: A shorter answer gains nothing from compression.
COMPRESS_BYTES_MIN: Final = 1024


@dataclass
class Session:
    """An engine connection that outlives a request, because a statement changed its state."""

    connection: Connection
    timeout_s: float
    used_s: float
    lock: threading.Lock = field(default_factory=threading.Lock)


class Engine:
    """The engine's connections: one for each request, or one for each session that has state."""

    def __init__(self, path: str) -> None:
        self.path = path
        #: rows on their way into the engine; what a killed process left there is nobody's
        self.spool = Path(path).parent / "inserts"
        shutil.rmtree(self.spool, ignore_errors=True)
        self.spool.mkdir(mode=0o700, parents=True)
        # Holds the engine open: it would shut down with the last connection.
        self._anchor = Connection(path)
        self.version = str(self._anchor.query("SELECT version()", "TabSeparated").bytes().decode().strip())
        self.timezone = str(self._anchor.query("SELECT timezone()", "TabSeparated").bytes().decode().strip())
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(QUERIES_MAX)

    @contextmanager
    def connection(
        self, *, database: str, settings: dict[str, str], session_id: str, timeout_s: float, stateful: bool
    ) -> Iterator[Connection]:
        """A connection in the right database with the right settings.

        Raises:
            ClickHouseError: unknown database or setting, too many queries, the session is in use.
        """
        if not self._places.acquire(timeout=QUERY_WAIT_S):
            raise ClickHouseError.new(202, "TOO_MANY_SIMULTANEOUS_QUERIES", f"Already {QUERIES_MAX} queries run")
        try:
            session = self._session(session_id, timeout_s, create=stateful) if session_id else None
            if session is None:
                connection = Connection(self.path)
                try:
                    self._enter(connection, database, settings)
                    yield connection
                finally:
                    connection.close()
                return
            try:
                before = self._snapshot(session.connection, settings)
                self._enter(session.connection, database, settings)
                try:
                    yield session.connection
                finally:
                    self._restore(session.connection, before)
            finally:
                session.used_s = time.monotonic()
                session.lock.release()
        finally:
            self._places.release()

    def close(self) -> None:
        """Close every connection; the engine then writes down what it must and ends."""
        with self._lock:
            for session in self._sessions.values():
                session.connection.close()
            self._sessions.clear()
        self._anchor.close()

    @staticmethod
    def _enter(connection: Connection, database: str, settings: dict[str, str]) -> None:
        try:
            if database:
                connection.query(f"USE {quote_name(database)}", "TabSeparated")
            if settings:
                connection.query(set_statement(settings), "TabSeparated")
        except Exception as e:
            raise ClickHouseError.of(e) from e

    def _session(self, session_id: str, timeout_s: float, *, create: bool) -> Session | None:
        """The locked session, or None where it has no state and gets none now."""
        now = time.monotonic()
        with self._lock:
            for name, old in list(self._sessions.items()):
                if now - old.used_s > old.timeout_s and old.lock.acquire(blocking=False):
                    del self._sessions[name]
                    old.connection.close()
            session = self._sessions.get(session_id)
            if session is None:
                if not create:
                    return None
                if len(self._sessions) >= SESSIONS_MAX:
                    raise ClickHouseError.new(202, "TOO_MANY_SIMULTANEOUS_QUERIES", f"{SESSIONS_MAX} sessions are open")
                session = Session(Connection(self.path), timeout_s, now)
                self._sessions[session_id] = session
            if not session.lock.acquire(blocking=False):
                raise ClickHouseError.new(373, "SESSION_IS_LOCKED", f"Session {session_id} is locked by another query")
            session.timeout_s = timeout_s
            return session

    @staticmethod
    def _snapshot(connection: Connection, settings: dict[str, str]) -> list[tuple[str, str, bool]]:
        """What the settings of one request hide in its session."""
        if not settings:
            return []
        names = ", ".join(map(quote_text, settings))
        found = connection.query(
            f"SELECT name, value, changed FROM system.settings WHERE name IN ({names})", "JSONEachRow"
        ).bytes()
        return [(row["name"], row["value"], bool(row["changed"])) for row in map(json.loads, found.splitlines())]

    @staticmethod
    def _restore(connection: Connection, before: list[tuple[str, str, bool]]) -> None:
        for name, value, changed in before:
            connection.query(f"SET {name} = {quote_text(value) if changed else 'DEFAULT'}", "TabSeparated")


class Server(ThreadingHTTPServer):
    """The HTTP server, bound to loopback."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, port: int, engine: Engine, password: str) -> None:
        self.engine = engine
        self.password = password
        self.started_s = time.monotonic()
        self._places = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._running = 0
        self._idle = threading.Condition()
        super().__init__(("127.0.0.1", port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the connection, or refuse it where there are too many."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""
        error = sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            log.error("connection failed", exc_info=error)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Counts the requests under way."""
        with self._idle:
            self._running += 1
        try:
            yield
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request is under way; False where some still is."""
        with self._idle:
            return self._idle.wait_for(lambda: self._running == 0, timeout_s)


@dataclass
class Request:
    """One request, its body not yet read beyond what the statement needs."""

    text: bytes  #: the statement, and the first rows where it is an insert with data
    rest: Iterator[bytes]  #: what follows in the body
    parameters: dict[str, str]
    insert: Insert | None


class Handler(BaseHTTPRequestHandler):
    """One client connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "ClickHouse"
    timeout = IDLE_S
    rbufsize = READ_BYTES
    wbufsize = READ_BYTES
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""

    def do_HEAD(self) -> None:
        """As GET, without the body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Ping, or a query that may not write."""
        path = urlsplit(self.path)
        if path.path == "/ping" or (path.path == "/" and not path.query):
            self._answer(200, b"Ok.\n", {"Content-Type": "text/plain; charset=UTF-8"})
        elif path.path == "/":
            self._serve(readonly=True)
        else:
            self._answer(404, b"There is no handle " + path.path.encode() + b"\n", {})

    def do_POST(self) -> None:
        """Any query."""
        if urlsplit(self.path).path != "/":
            self.close_connection = True
            self._answer(404, b"There is no such handle\n", {})
            return
        self._serve(readonly=False)

    def _serve(self, *, readonly: bool) -> None:
        self._left: int | None = None
        self._sent = False
        self._query_id = ""
        with self.server.busy():
            try:
                request = self._request()
                self._query_id = request.parameters.get("query_id") or str(uuid.uuid4())
                self._run(request, readonly=readonly)
            except ClickHouseError as e:
                self._fail(e)
            except (ConnectionError, TimeoutError):
                self.close_connection = True
            except Exception as e:
                log.exception("request failed")
                self._fail(ClickHouseError.of(e))
            self.wfile.flush()

    # --- what comes in

    def _request(self) -> Request:
        parameters = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True, errors="surrogateescape"))
        self._authenticate(parameters)
        for header, name in (
            ("X-ClickHouse-Database", "database"),
            ("X-ClickHouse-Format", "default_format"),
            ("X-ClickHouse-Query-Id", "query_id"),
        ):
            if value := self.headers.get(header):
                parameters.setdefault(name, value)
        for name in ("compress", "decompress"):
            if parameters.get(name, "0") not in ("", "0"):
                raise ClickHouseError.new(48, "NOT_IMPLEMENTED", f"{name}=1 (ClickHouse's own block compression)")
        body = decode(self.headers.get("Content-Encoding", ""), self._body())
        if (self.headers.get("Content-Type") or "").startswith("multipart/form-data"):
            parameters |= self._form(body)
            body = iter(())
        query = parameters.get("query", "").encode("utf-8", "surrogateescape")
        if query:
            query += b"\n"
        text = bytearray(query)
        for piece in body:
            text += piece
            if len(text) >= HEAD_BYTES + len(query):
                break
        insert = find_insert(bytes(text))
        if insert is None:
            # Not an insert with data: the statement is the whole body.
            for piece in body:
                text += piece
                if len(text) > STATEMENT_BYTES_MAX:
                    raise ClickHouseError.new(
                        162, "QUERY_IS_TOO_LARGE", f"The query is over {STATEMENT_BYTES_MAX} bytes"
                    )
            insert = find_insert(bytes(text)) if len(text) > HEAD_BYTES else None
            body = iter(())
        return Request(bytes(text), body, parameters, insert)

    def _authenticate(self, parameters: dict[str, str]) -> None:
        if not self.server.password:
            return
        given = self.headers.get("X-ClickHouse-Key") or parameters.get("password", "")
        kind, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if kind.lower() == "basic":
            try:
                given = b64decode(token).decode().partition(":")[2]
            except ValueError:
                given = ""
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.server.password.encode()):
            text = "default: Authentication failed: password is incorrect, or there is no user with such name"
            raise ClickHouseError.new(516, "AUTHENTICATION_FAILED", text)

    def _body(self) -> Iterator[bytes]:
        """The raw body as it arrives, whichever way its length is told."""
        if "chunked" in (self.headers.get("Transfer-Encoding") or "").lower():
            yield from self._chunked_body()
            return
        try:
            self._left = int(self.headers.get("Content-Length") or 0)
        except ValueError:
            self.close_connection = True
            raise ClickHouseError.new(36, "BAD_ARGUMENTS", "Content-Length is not a number") from None
        while self._left > 0:
            piece = self.rfile.read1(min(self._left, READ_BYTES))
            if not piece:
                self.close_connection = True
                raise ClickHouseError.new(33, "CANNOT_READ_ALL_DATA", "The request ends in the middle of its body")
            self._left -= len(piece)
            yield piece

    def _chunked_body(self) -> Iterator[bytes]:
        self._left = -1
        while True:
            line = self.rfile.readline(1024)
            try:
                size = int(line.partition(b";")[0], 16)
            except ValueError:
                self.close_connection = True
                raise ClickHouseError.new(33, "CANNOT_READ_ALL_DATA", "The request's chunks are torn") from None
            if size == 0:
                while self.rfile.readline(8192) not in (b"\r\n", b"\n", b""):
                    pass
                self._left = 0
                return
            while size > 0:
                piece = self.rfile.read1(min(size, READ_BYTES))
                if not piece:
                    self.close_connection = True
                    raise ClickHouseError.new(33, "CANNOT_READ_ALL_DATA", "The request ends in the middle of a chunk")
                size -= len(piece)
                yield piece
            self.rfile.readline(8)

    def _form(self, body: Iterator[bytes]) -> dict[str, str]:
        """The text fields of a form: the query and its parameters, where a URL would be too long for them."""
        raw = bytearray(f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode())
        for piece in body:
            raw += piece
            if len(raw) > STATEMENT_BYTES_MAX:
                raise ClickHouseError.new(162, "QUERY_IS_TOO_LARGE", f"The form is over {STATEMENT_BYTES_MAX} bytes")
        fields: dict[str, str] = {}
        for part in email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(bytes(raw)).iter_parts():
            if part.get_filename() is not None:
                raise ClickHouseError.new(48, "NOT_IMPLEMENTED", "External tables")
            name = part.get_param("name", header="content-disposition")
            value = part.get_payload(decode=True)
            assert isinstance(value, bytes), "a part of a form is no multipart itself"
            fields[str(name)] = value.decode("utf-8", "surrogateescape")
        return fields

    # --- what goes on inside

    def _run(self, request: Request, *, readonly: bool) -> None:
        parameters = request.parameters
        settings, values = split_parameters(parameters)
        settings.setdefault("max_memory_usage", str(QUERY_MEMORY_BYTES))
        stateful = request.insert is None and is_stateful(request.text)
        if readonly and not stateful:
            # As ClickHouse does: a link or an image on a web page is a GET, and must change nothing.
            settings["readonly"] = "2"
        try:
            timeout_s = min(float(parameters.get("session_timeout") or SESSION_S), SESSION_S_MAX)
        except ValueError:
            raise ClickHouseError.new(36, "BAD_ARGUMENTS", "session_timeout is not a number") from None
        with self.server.engine.connection(
            database=parameters.get("database", ""),
            settings=settings,
            session_id=parameters.get("session_id", ""),
            timeout_s=timeout_s,
            stateful=stateful,
        ) as connection:
            if request.insert is not None and not values:
                if readonly:
                    raise ClickHouseError.new(164, "READONLY", "Cannot execute query in readonly mode")
                self._insert(connection, request, request.insert)
            else:
                self._query(connection, request, values)

    def _insert(self, connection: Connection, request: Request, insert: Insert) -> None:
        # Through a file, and not through the engine's streaming insert: that one reports what it parsed and keeps silent
        # about what the table refused (a constraint, too many partitions, a full disk).
        total = 0
        with tempfile.NamedTemporaryFile(prefix="insert-", dir=self.server.engine.spool) as spooled:
            for piece in itertools.chain((request.text[insert.data_start :],), request.rest):
                total += len(piece)
                if total > INSERT_BYTES_MAX:
                    text = f"The insert is over {INSERT_BYTES_MAX} bytes"
                    raise ClickHouseError.new(307, "TOO_MANY_BYTES", text)
                spooled.write(piece)
            spooled.flush()
            rows = 0
            if total:
                try:
                    done = connection.query(insert.from_file(spooled.name), "TabSeparated")
                except Exception as e:
                    raise ClickHouseError.of(e) from e
                rows = int(done.rows_read())
        summary = {
            "read_rows": str(rows),
            "read_bytes": str(total),
            "written_rows": str(rows),
            "written_bytes": str(total),
        }
        self._answer(200, b"", self._headers(None, summary))

    def _query(self, connection: Connection, request: Request, values: dict[str, str]) -> None:
        parameters = request.parameters
        # The engine takes text: bytes that are not UTF-8 can stand in data only, and that goes through `_insert`.
        try:
            text = request.text.decode("utf-8")
        except UnicodeDecodeError:
            text = request.text  # type: ignore[assignment]
        word = first_word(request.text)
        asked = output_format(request.text) if word in READING_WORDS else None
        name = asked or parameters.get("default_format") or "TabSeparated"
        encoding = ""
        if parameters.get("enable_http_compression", "0") not in ("", "0"):
            encoding = choose_encoding(self.headers.get("Accept-Encoding") or "")
        whole = parameters.get("wait_end_of_query", "0") not in ("", "0")
        if not whole and name in STREAMED_FORMATS and word in ("SELECT", "WITH"):
            self._stream(connection, text, name, values, encoding)
            return
        try:
            result = connection.query(text, name, params=values)
            body = result.bytes()
            body = bytes(body) if body is not None else b""
        except Exception as e:
            raise ClickHouseError.of(e) from e
        summary = {
            "read_rows": str(result.storage_rows_read()),
            "read_bytes": str(result.storage_bytes_read()),
            "written_rows": "0",
            "written_bytes": "0",
            "result_rows": str(result.rows_read()),
            "result_bytes": str(result.bytes_read()),
            "elapsed_ns": str(int(result.elapsed() * 1e9)),
        }
        headers = self._headers(name if body or word in READING_WORDS else None, summary)
        if encoding and len(body) >= COMPRESS_BYTES_MIN:
            body = b"".join(encode(encoding, (body,)))
            headers["Content-Encoding"] = encoding
        self._answer(200, body, headers)

    def _stream(self, connection: Connection, text: str, name: str, values: dict[str, str], encoding: str) -> None:
        """Send the blocks as the engine makes them."""
        try:
            stream = connection.send_query(text, name, params=values)
        except Exception as e:
            raise ClickHouseError.of(e) from e
        tag = uuid.uuid4().hex[:16]
        try:
            blocks = iter(stream)
            try:
                # Most errors come with the first block: then they still get a status of their own.
                first = next(blocks, None)
            except Exception as e:
                raise ClickHouseError.of(e) from e
            headers = self._headers(name, {})
            headers["X-ClickHouse-Exception-Tag"] = tag
            headers["Transfer-Encoding"] = "chunked"
            if encoding:
                headers["Content-Encoding"] = encoding
            self._head(200, headers)

            def pieces() -> Iterator[bytes]:
                try:
                    block = first
                    while block is not None:
                        yield bytes(block.bytes())
                        block = next(blocks, None)
                except GeneratorExit:
                    raise
                except Exception as e:
                    # The status is out; ClickHouse then ends the body with the error between two marks.
                    message = self._text(ClickHouseError.of(e)).encode()
                    yield (
                        f"__exception__\r\n{tag}\r\n".encode()
                        + message
                        + f"\n{len(message)} {tag}\r\n__exception__\r\n".encode()
                    )

            for piece in encode(encoding, pieces()):
                if piece:
                    self.wfile.write(b"%x\r\n" % len(piece))
                    self.wfile.write(piece)
                    self.wfile.write(b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
        finally:
            stream.close()

    # --- what goes out

    def _headers(self, name: str | None, summary: dict[str, str]) -> dict[str, str]:
        headers = {
            "Content-Type": "text/plain; charset=UTF-8" if name != "JSON" else "application/json; charset=UTF-8",
            "X-ClickHouse-Server-Display-Name": "preservarium-embedded",
            "X-ClickHouse-Query-Id": self._query_id.encode("latin-1", "replace").decode("latin-1").replace("\n", " "),
            "X-ClickHouse-Timezone": self.server.engine.timezone,
        }
        if name is not None:
            headers["X-ClickHouse-Format"] = name
        if summary:
            headers["X-ClickHouse-Summary"] = json.dumps(summary, separators=(",", ":"))
        return headers

    def _text(self, error: ClickHouseError) -> str:
        text = str(error)
        return text if "(version " in text else f"{text} (version {self.server.engine.version})"

    def _fail(self, error: ClickHouseError) -> None:
        if self._sent:
            self.close_connection = True
            return
        self._drain()
        headers = self._headers(None, {})
        headers["X-ClickHouse-Exception-Code"] = str(error.code)
        self._answer(error.status, (self._text(error) + "\n").encode("utf-8", "replace"), headers)

    def _drain(self) -> None:
        """Read what is left of the body; a client that is still sending would not hear us."""
        if self._left is None:
            self._left = 0
            length = self.headers.get("Content-Length") or "0"
            if "chunked" in (self.headers.get("Transfer-Encoding") or "").lower():
                self._left = -1
            elif length.isdigit():
                self._left = int(length)
        if self._left < 0 or self._left > DRAIN_BYTES_MAX:
            # Where the rest begins is lost, or it is too long to wait for.
            self.close_connection = True
            self._read_away(DRAIN_BYTES_MAX)
            return
        while self._left > 0:
            piece = self.rfile.read1(min(self._left, READ_BYTES))
            if not piece:
                self.close_connection = True
                return
            self._left -= len(piece)

    def _read_away(self, bytes_max: int) -> None:
        """Take what the client still sends, until it falls silent."""
        self.connection.settimeout(0.2)
        try:
            while bytes_max > 0 and (piece := self.rfile.read1(READ_BYTES)):
                bytes_max -= len(piece)
        except (TimeoutError, OSError):
            return
        finally:
            self.connection.settimeout(IDLE_S)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self._sent = True
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, {**headers, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="chDB behind ClickHouse's HTTP interface, on loopback.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", required=True, help="data directory; one process at a time")
    parser.add_argument("--password-file", help="the password of the user `default`; none is asked where not given")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")

    signals = {signal.SIGTERM, signal.SIGINT}
    # Before the engine starts its threads: they inherit the mask, and the signal waits for sigwait.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    password = Path(options.password_file).read_text(encoding="utf-8").strip() if options.password_file else ""
    engine = Engine(str(Path(options.path).absolute()))
    server = Server(options.port, engine, password)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
    signal.sigwait(signals)
    server.shutdown()
    server.socket.shutdown(socket.SHUT_RDWR)
    if not server.wait_idle(STOP_S):
        log.warning("requests were still under way at the end")
    engine.close()
    # The connections' threads are daemons, and none is in the engine any more.
    sys.exit(0)


if __name__ == "__main__":
    main()
