"""The chDB front, seen through clickhouse-connect and plain HTTP: what a ClickHouse server would answer."""

import asyncio
import gzip
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import clickhouse_connect
import pytest
from clickhouse_connect.driver.exceptions import DatabaseError, OperationalError, StreamFailureError

from preservarium.embedded.clickhouse import ClickHouse

pytestmark = pytest.mark.clickhouse

TABLE = """CREATE TABLE t (n UInt64, at DateTime64(6, 'UTC'), name LowCardinality(String), value Nullable(Float64))
ENGINE = ReplacingMergeTree ORDER BY n SETTINGS non_replicated_deduplication_window = 10000"""
ROW_AT = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)


def rows(count: int, start: int = 0) -> list[list[Any]]:
    return [[n, ROW_AT, f"ü'\t{n % 7}", None if n % 3 == 0 else n / 2] for n in range(start, start + count)]


COLUMNS = ["n", "at", "name", "value"]


def arguments(url: str, database: str) -> dict[str, Any]:
    u = urlsplit(url)
    return {
        "host": u.hostname,
        "port": u.port,
        "username": u.username or "default",
        "password": u.password or "",
        "database": database,
        "tz_mode": "aware",
    }


@pytest.fixture
def client(clickhouse: str, clickhouse_database: str) -> Iterator[Any]:
    c = clickhouse_connect.get_client(**arguments(clickhouse, clickhouse_database), dedicated_pool=True)
    yield c
    c.close()


@pytest.fixture
async def async_client(clickhouse: str, clickhouse_database: str) -> AsyncIterator[Any]:
    c = await clickhouse_connect.get_async_client(**arguments(clickhouse, clickhouse_database))
    yield c
    await c.close()


async def test_the_async_client_defines_inserts_and_reads(async_client: Any) -> None:
    await async_client.command(TABLE)
    summary = await async_client.insert("t", rows(1000), column_names=COLUMNS, settings={"async_insert": 0})
    assert summary.written_rows == 1000
    found = await async_client.query(
        "SELECT * FROM t WHERE n >= {low:UInt64} AND name = {name:String} ORDER BY n LIMIT 2",
        parameters={"low": 700, "name": "ü'\t1"},
    )
    assert found.column_names == tuple(COLUMNS)
    assert [tuple(r) for r in found.result_rows] == [tuple(rows(1, n)[0]) for n in (701, 708)]
    assert await async_client.command("SELECT count() FROM t") == 1000


async def test_the_async_client_runs_queries_in_parallel(async_client: Any) -> None:
    begun = time.monotonic()
    await asyncio.gather(*(async_client.query("SELECT sleep(0.5)") for _ in range(4)))
    assert time.monotonic() - begun < 1.7, "one after the other would take 2 s"


async def test_the_async_client_streams(async_client: Any) -> None:
    stream = await async_client.query_row_block_stream("SELECT number, toString(number) FROM numbers(300000)")
    total = count = 0
    async with stream:
        async for block in stream:
            count += len(block)
            total += sum(r[0] for r in block)
    assert (count, total) == (300_000, sum(range(300_000)))


async def test_the_async_client_hears_of_errors(async_client: Any) -> None:
    with pytest.raises(DatabaseError, match="UNKNOWN_TABLE") as e:
        await async_client.query("SELECT * FROM nothing")
    assert e.value.code == 60
    await async_client.command(TABLE)
    with pytest.raises(DatabaseError, match="CANNOT_PARSE") as e:
        await async_client.raw_insert("t", ["n"], b'{"n": 1}\n{"n": "x"}\n', fmt="JSONEachRow")
    assert e.value.code == 27
    assert await async_client.command("SELECT count() FROM t") == 0, "an insert is whole or not at all"


def test_what_the_table_refuses_is_an_error_and_not_silence(client: Any) -> None:
    """The engine's streaming insert reports such rows as written."""
    client.command(
        "CREATE TABLE c (n Int64, CONSTRAINT small CHECK n < 1000) ENGINE = MergeTree PARTITION BY n ORDER BY n"
    )
    with pytest.raises(DatabaseError, match="252"):
        client.insert("c", [[n] for n in range(101)], column_names=["n"])
    with pytest.raises(DatabaseError, match="469"):
        client.insert("c", [[1], [5000]], column_names=["n"])
    assert client.command("SELECT count() FROM c") == 0
    settings = {"max_partitions_per_insert_block": 0, "insert_deduplication_token": "t"}
    client.insert("c", [[n] for n in range(101)], column_names=["n"], settings=settings)
    assert client.command("SELECT count() FROM c") == 101


@pytest.mark.parametrize("compress", [False, "lz4", "zstd", "gzip", "deflate"])
def test_insert_and_query_with_every_encoding(clickhouse: str, clickhouse_database: str, compress: str | bool) -> None:
    c = clickhouse_connect.get_client(
        **arguments(clickhouse, clickhouse_database), compress=compress, dedicated_pool=True
    )
    c.command(TABLE)
    given = rows(20_000)
    # The client itself cannot send deflate, it only accepts it.
    if compress == "deflate":
        c.write_compression = None
    c.insert("t", given, column_names=COLUMNS)
    assert [list(r) for r in c.query("SELECT * FROM t ORDER BY n").result_rows] == given
    with c.query_rows_stream("SELECT * FROM t ORDER BY n") as stream:
        assert [list(r) for r in stream] == given
    c.close()


def test_a_token_makes_a_repeated_insert_a_no_op(client: Any) -> None:
    client.command(TABLE)
    for token, start in (("a", 0), ("a", 0), ("b", 1000), ("a", 5000)):
        client.insert(
            "t",
            rows(1000, start),
            column_names=COLUMNS,
            column_type_names=["UInt64", "DateTime64(6, 'UTC')", "LowCardinality(String)", "Nullable(Float64)"],
            settings={"insert_deduplication_token": token, "async_insert": 0},
        )
    assert client.command("SELECT count(), max(n) FROM t") == ["2000", "1999"]


def test_column_oriented_inserts(client: Any) -> None:
    client.command(TABLE)
    columns = [list(c) for c in zip(*rows(5000), strict=True)]
    client.insert("t", columns, column_names=COLUMNS, column_oriented=True)
    assert client.command("SELECT count(), sum(n), countIf(value IS NULL) FROM t") == ["5000", "12497500", "1667"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("JSONEachRow", b'{"n": 1, "name": "x"}\n{"n": 2, "name": "y"}\n'),
        ("CSV", b'1,"x"\n2,"y"\n'),
        ("TabSeparated", b"1\tx\n2\ty\n"),
        ("RowBinary", b"\x01" + bytes(7) + b"\x01x" + b"\x02" + bytes(7) + b"\x01y"),
        ("Values", b"(1, 'x'), (2, 'y')"),
    ],
)
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_raw_inserts_of_several_formats(client: Any, name: str, data: bytes, compression: str | None) -> None:
    client.command(TABLE)
    body = gzip.compress(data) if compression else data
    client.raw_insert("t", ["n", "name"], body, fmt=name, compression=compression)
    assert client.query("SELECT n, name FROM t ORDER BY n").result_rows == [(1, "x"), (2, "y")]


def test_a_generator_is_inserted_as_it_comes(client: Any) -> None:
    client.command(TABLE)
    client.raw_insert("t", ["n"], (b'{"n": %d}\n' % n for n in range(50_000)), fmt="JSONEachRow")
    assert client.command("SELECT count(), sum(n) FROM t") == ["50000", str(sum(range(50_000)))]


def test_values_and_select_inserts(client: Any) -> None:
    client.command(TABLE)
    client.command("INSERT INTO t (n, name) VALUES (1, 'FORMAT CSV'), (2, {x:String})", parameters={"x": "a'b\\c\n\t"})
    client.command("INSERT INTO t (n, name) SELECT n + 10, name FROM t")
    assert client.query("SELECT n, name FROM t ORDER BY n").result_rows == [
        (1, "FORMAT CSV"),
        (2, "a'b\\c\n\t"),
        (11, "FORMAT CSV"),
        (12, "a'b\\c\n\t"),
    ]


def test_parameters_too_long_for_a_url(client: Any) -> None:
    wanted = [f"ü{n}" for n in range(20_000)]
    found = client.query("SELECT length({names:Array(String)}), {names:Array(String)}[3]", parameters={"names": wanted})
    assert found.result_rows == [(20_000, "ü2")]


def test_an_error_in_the_middle_of_a_stream_is_told(client: Any) -> None:
    with (
        pytest.raises(StreamFailureError, match="throwIf"),
        client.query_row_block_stream("SELECT throwIf(number = 2000000) FROM numbers(3000000)") as stream,
    ):
        for _ in stream:
            pass
    assert client.command("SELECT 1") == 1


def test_settings_hold_for_their_request_only(client: Any) -> None:
    asked = "SELECT value FROM system.settings WHERE name = 'max_threads'"
    before = client.command(asked)
    assert client.command(asked, settings={"max_threads": 7}) == 7
    assert client.command(asked) == before
    with pytest.raises(DatabaseError, match="TIMEOUT_EXCEEDED"):
        client.query(
            "SELECT sleepEachRow(0.5) FROM numbers(20)", settings={"max_execution_time": 1, "max_block_size": 1}
        )


def test_a_session_keeps_what_was_set_and_made_in_it(clickhouse: str, clickhouse_database: str) -> None:
    one, two = (
        clickhouse_connect.get_client(
            **arguments(clickhouse, clickhouse_database), session_id=f"{clickhouse_database}-{n}", dedicated_pool=True
        )
        for n in (1, 2)
    )
    asked = "SELECT value FROM system.settings WHERE name = 'max_threads'"
    one.command("SET max_threads = 3")
    one.command("CREATE TEMPORARY TABLE mine (n Int32)")
    one.command("INSERT INTO mine VALUES (42)")
    assert one.command("SELECT n FROM mine") == 42
    assert one.command(asked, settings={"max_threads": 5}) == 5
    assert one.command(asked) == 3
    with pytest.raises(DatabaseError, match="UNKNOWN_TABLE"):
        two.command("SELECT n FROM mine")
    one.close()
    two.close()


def test_a_statement_without_rows_gives_a_summary_and_an_empty_result_text(client: Any) -> None:
    assert type(client.command(TABLE)).__name__ == "QuerySummary"
    assert client.command("SELECT n FROM t") == ""
    assert client.query("SELECT * FROM t LIMIT 0").column_names == tuple(COLUMNS)


class Plain:
    """HTTP as curl would speak it."""

    def __init__(self, url: str) -> None:
        u = urlsplit(url)
        self.connection = HTTPConnection(u.hostname or "", u.port, timeout=30)
        self.headers = {"X-ClickHouse-User": "default", "X-ClickHouse-Key": u.password or ""}

    def __call__(
        self, method: str = "POST", body: Any = None, headers: dict[str, str] | None = None, **parameters: str
    ) -> tuple[int, bytes, dict[str, str]]:
        self.connection.request(
            method, "/?" + urlencode(parameters), body, {**self.headers, **(headers or {})}, encode_chunked=False
        )
        answer = self.connection.getresponse()
        return answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}


@pytest.fixture
def plain(clickhouse: str) -> Iterator[Plain]:
    p = Plain(clickhouse)
    yield p
    p.connection.close()


def test_ping_needs_no_password_and_queries_do(plain: Plain) -> None:
    plain.connection.request("GET", "/ping")
    assert plain.connection.getresponse().read() == b"Ok.\n"
    plain.headers = {}
    status, body, headers = plain(body="SELECT 1")
    assert (status, headers["x-clickhouse-exception-code"]) == (403, "516")
    assert b"AUTHENTICATION_FAILED" in body


def test_a_get_reads_and_does_not_write(plain: Plain, clickhouse_database: str) -> None:
    assert plain("GET", query="SELECT 1 + 1")[:2] == (200, b"2\n")
    status, body, _ = plain("GET", query="CREATE TABLE t (n Int8) ENGINE = Memory", database=clickhouse_database)
    assert (status, b"READONLY" in body) == (500, True)


def test_formats_and_headers(plain: Plain) -> None:
    status, body, headers = plain(body="SELECT 1 AS a", default_format="JSONEachRow", wait_end_of_query="1")
    assert (status, json.loads(body)) == (200, {"a": 1})
    assert headers["x-clickhouse-format"] == "JSONEachRow"
    assert headers["x-clickhouse-timezone"] in ("UTC", "Etc/UTC")
    assert set(json.loads(headers["x-clickhouse-summary"])) >= {"read_rows", "written_rows", "elapsed_ns"}
    assert plain(body="SELECT 1 AS a FORMAT CSVWithNames")[1] == b'"a"\n1\n'
    assert plain(body="SELECT 1", query_id="mine")[2]["x-clickhouse-query-id"] == "mine"


@pytest.mark.parametrize(
    ("parameters", "body", "status", "code"),
    [
        ({}, "SELEC 1", 400, "62"),
        ({"database": "nowhere"}, "SELECT 1", 404, "81"),
        ({"max_threads": "many"}, "SELECT 1", 400, "27"),
        ({"no_such_setting": "1"}, "SELECT 1", 404, "115"),
        ({"a b": "1"}, "SELECT 1", 404, "115"),
        ({}, "SELECT {x:String}", 400, "456"),
        ({"decompress": "1"}, "SELECT 1", 501, "48"),
        ({"query": "INSERT INTO nothing FORMAT JSONEachRow"}, '{"a": 1}', 404, "60"),
    ],
)
def test_errors_have_code_status_and_text_and_leave_the_connection_usable(
    plain: Plain, parameters: dict[str, str], body: str, status: int, code: str
) -> None:
    got, text, headers = plain(body=body, **parameters)
    assert (got, headers["x-clickhouse-exception-code"]) == (status, code)
    assert text.startswith(f"Code: {code}. DB::Exception: ".encode())
    assert plain(body="SELECT 5")[1] == b"5\n"


def test_a_refused_insert_with_a_long_body_is_answered(plain: Plain) -> None:
    status, _, headers = plain(query="INSERT INTO nothing FORMAT JSONEachRow", body=b'{"a": 1}\n' * 500_000)
    assert (status, headers["x-clickhouse-exception-code"]) == (404, "60")
    assert plain(body="SELECT 5")[1] == b"5\n"


def test_a_statement_may_not_be_endless(plain: Plain) -> None:
    status, _, headers = plain(body=b"SELECT '" + b"x" * (17 * 1024 * 1024))
    assert (status, headers["x-clickhouse-exception-code"]) == (413, "162")


def test_an_insert_that_breaks_off_writes_nothing(client: Any, plain: Plain) -> None:
    client.command(TABLE)
    database = client.database
    c = plain.connection
    c.putrequest("POST", "/?" + urlencode({"query": "INSERT INTO t (n) FORMAT JSONEachRow", "database": database}))
    for name, value in plain.headers.items():
        c.putheader(name, value)
    c.putheader("Content-Length", "1000000")
    c.endheaders()
    c.send(b'{"n": 1}\n' * 1000)
    assert c.sock is not None
    c.sock.close()
    c.close()
    # The server reads the end of the connection in its own time.
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        assert client.command("SELECT count() FROM t") == 0
        time.sleep(0.1)


def test_many_clients_insert_at_once(clickhouse: str, clickhouse_database: str) -> None:
    made = clickhouse_connect.get_client(**arguments(clickhouse, clickhouse_database), dedicated_pool=True)
    made.command(TABLE)
    errors: list[BaseException] = []

    def write(worker: int) -> None:
        try:
            c = clickhouse_connect.get_client(**arguments(clickhouse, clickhouse_database), dedicated_pool=True)
            for batch in range(5):
                c.insert("t", rows(500, worker * 10_000 + batch * 500), column_names=COLUMNS)
            c.close()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    assert made.command("SELECT count(), uniqExact(n) FROM t") == ["20000", "20000"]
    made.close()


async def test_data_and_tokens_survive_stop_and_kill(tmp_path: Path) -> None:
    server = ClickHouse(tmp_path / "ch")
    await asyncio.to_thread(server.start)
    try:
        c = await clickhouse_connect.get_async_client(**arguments(server.url, "default"))

        async def put(token: str, start: int) -> None:
            settings = {"insert_deduplication_token": token, "async_insert": 0}
            await c.insert("t", rows(100, start), column_names=COLUMNS, settings=settings)

        await c.command(TABLE)
        await put("a", 0)
        await asyncio.to_thread(server.stop)
        with pytest.raises(OperationalError):
            await c.command("SELECT 1")
        await asyncio.to_thread(server.start)
        await put("a", 0)
        await put("b", 100)
        assert await c.command("SELECT count() FROM t") == 200
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        await put("b", 100)
        await put("c", 200)
        assert await c.command("SELECT count(), uniqExact(n) FROM t") == ["300", "300"]
        await c.close()
    finally:
        await asyncio.to_thread(server.stop)


def test_settings_within_the_statement_of_an_insert(plain: Plain, client: Any) -> None:
    client.command("CREATE TABLE settings (n Int64) ENGINE = MergeTree PARTITION BY n ORDER BY n")
    rows = b"\n".join(b'{"n": %d}' % n for n in range(150))
    query = (
        f"INSERT INTO {client.database}.settings (n) SETTINGS max_partitions_per_insert_block = 0 FORMAT JSONEachRow"
    )
    assert plain(query=query, body=rows)[0] == 200
    assert client.command("SELECT count() FROM settings") == 150
