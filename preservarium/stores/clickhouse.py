"""Columns into ClickHouse over HTTP: a server, a cluster or the embedded engine, the same code.

An insert carries a token made of the Kafka range that its rows come from; the engine drops a second insert with the same
token. So an insert whose answer was lost is simply made again.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import aiohttp
from clickhouse_connect.driver import options
from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError, OperationalError

from preservarium import metrics
from preservarium.breaker import Breaker
from preservarium.clock import Clock, SystemClock
from preservarium.errors import Retry, reason
from preservarium.settings import Settings

#: Error codes (ClickHouse, ErrorCodes.cpp) that say that the data is at fault. Everything else is the server's state: a
#: missing table, a read-only replica, too many parts, no memory; waiting loses nothing.
DATA_CODES: Final = frozenset({
    6,    # CANNOT_PARSE_TEXT
    27,   # CANNOT_PARSE_INPUT_ASSERTION_FAILED
    33,   # CANNOT_READ_ALL_DATA
    53,   # TYPE_MISMATCH
    69,   # ARGUMENT_OUT_OF_BOUND
    117,  # INCORRECT_DATA
    321,  # VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE
    349,  # CANNOT_INSERT_NULL_IN_ORDINARY_COLUMN
    407,  # DECIMAL_OVERFLOW
    469,  # VIOLATED_CONSTRAINT
})  # fmt: skip


def _without_pandas() -> None:
    # At its first insert the client imports pandas, numpy and pyarrow where they happen to be installed, only to ask whether
    # the data is theirs: seconds in which the event loop stands still, and 100 MiB. Ours are lists.
    for name in ("pd", "pd_time_test", "np", "arrow", "pl"):
        vars(options).setdefault(name, None)


_without_pandas()

#: A server that has not answered a ping for so long is down.
PING_S: Final = 5.0

#: What says nothing about the rows.
INFRASTRUCTURE_ERRORS: Final = (OperationalError, aiohttp.ClientError, OSError, TimeoutError)


class ClickHouseStore:
    """Inserts of columns, each once. For one event loop; inserts may run side by side.

    Args:
        settings: asked at each connection.
        breaker: shared by all that use the server; its own where none is given.
        clock: for the metrics.
    """

    def __init__(
        self, settings: Callable[[], Settings], *, breaker: Breaker | None = None, clock: Clock | None = None
    ) -> None:
        self._settings = settings
        self._clock = clock or SystemClock()
        self.breaker = breaker or Breaker("clickhouse", lambda: settings().breaker, clock=clock)
        self._client: Any = None
        self._connecting = asyncio.Lock()

    async def insert(
        self, table: str, columns: Mapping[str, Sequence[Any]], types: Mapping[str, str], *, token: str
    ) -> None:
        """Insert columns of equal length; once, however often it is called with the same token.

        Args:
            table: of the settings' database.
            columns: column name -> values.
            types: ClickHouse's type of each column; saves asking the server.
            token: names the range of input that the rows come from; always with the same rows.

        Raises:
            Retry: the server cannot be reached or cannot take it now; whether the rows are stored is not known.
            DatabaseError: it refuses the data; keeping bad values out is the caller's part.
        """
        names = list(columns)
        rows = len(columns[names[0]])
        data = [columns[n] for n in names]
        started = self._clock.monotonic_s()
        async with self.breaker:
            client = await self._connected()
            try:
                await client.insert(
                    table,
                    data,
                    column_names=names,
                    column_type_names=[types[n] for n in names],
                    column_oriented=True,
                    settings={
                        "insert_deduplication_token": token,
                        # A repetition also completes what an insert that broke off left out of its views' tables.
                        "deduplicate_blocks_in_dependent_materialized_views": 1,
                        # On by default in current servers; it would answer for a buffer that tokens do not cover.
                        "async_insert": 0,
                        # A back-fill is one batch over many days, and its partition would wait for ever.
                        "max_partitions_per_insert_block": 0,
                    },
                )
            except (ClickHouseError, *INFRASTRUCTURE_ERRORS) as e:
                if isinstance(e, DatabaseError) and _code(e) in DATA_CODES:
                    raise
                await self._forget(client)
                message = f"ClickHouse: {_short(e)}"
                raise Retry(message) from e
        # The client's own note of an insert goes in a circle, so it stays until the cycle collector comes; without the rows.
        data.clear()
        metrics.STORE_SECONDS.labels("clickhouse").observe(self._clock.monotonic_s() - started)
        metrics.STORE_ROWS.labels("clickhouse", "stored").inc(rows)

    async def query(self, text: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Rows of a query; raises as `select` does."""
        return (await self.select(text, parameters))[1]

    async def select(
        self, text: str, parameters: Mapping[str, Any] | None = None
    ) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Names of columns, and rows.

        Raises:
            Retry: the server cannot be reached.
            DatabaseError: the query is wrong.
        """
        async with self.breaker:
            client = await self._connected()
            try:
                result = await client.query(text, parameters=dict(parameters or {}))
            except INFRASTRUCTURE_ERRORS as e:
                await self._forget(client)
                message = f"ClickHouse: {_short(e)}"
                raise Retry(message) from e
        return list(result.column_names), list(result.result_rows)

    async def ask(self, text: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Rows of a query of ours that an insert depends on: whatever keeps the server from answering, no record is at fault.

        Raises:
            Retry: the server cannot be reached, or refuses.
        """
        try:
            return await self.query(text, parameters)
        except ClickHouseError as e:
            message = f"ClickHouse: {_short(e)}"
            raise Retry(message) from e

    async def close(self) -> None:
        """Close every connection."""
        if self._client is not None:
            await self._forget(self._client)

    async def _connected(self) -> Any:
        if self._client is not None:
            return self._client
        async with self._connecting:
            if self._client is None:
                s = self._settings()
                try:
                    self._client = await _connect(s, database=s.clickhouse.database, connections=s.clickhouse.pool_max)
                except (ClickHouseError, *INFRASTRUCTURE_ERRORS) as e:
                    host, port, *_ = s.clickhouse.parts
                    message = f"ClickHouse cannot be reached at {host}:{port}: {_short(e)}"
                    raise Retry(message) from e
        return self._client

    async def _forget(self, client: Any) -> None:
        """Connect anew next time: what comes back may be another server."""
        if self._client is client:
            self._client = None
        with contextlib.suppress(Exception):
            await client.close()


class ClickHousePing:
    """Whether the server answers, asked over a connection of its own: the store's may all be at work.

    Args:
        settings: asked when it connects.
    """

    def __init__(self, settings: Callable[[], Settings]) -> None:
        self._settings = settings
        self._client: Any = None

    async def __call__(self) -> None:
        """Return when it has answered.

        Raises:
            ClickHouseError, aiohttp.ClientError, OSError, TimeoutError: it does not, or lets nobody in.
        """
        if self._client is None:
            self._client = await _connect(self._settings(), database="default", connections=1)
        if not await self._client.ping(PING_S):
            message = "it does not answer a ping"
            raise OSError(message)

    async def close(self) -> None:
        """Close the connection."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):
                await client.close()


async def _connect(settings: Settings, *, database: str, connections: int) -> Any:
    import clickhouse_connect

    s = settings.clickhouse
    host, port, user, password, secure = s.parts
    return await clickhouse_connect.get_async_client(
        interface="https" if secure else "http",
        host=host,
        port=port,
        username=user,
        password=password,
        ca_cert=s.ssl_ca_file or None,
        database=database,
        compress="lz4",
        connect_timeout=min(10, s.timeout_s),
        send_receive_timeout=s.timeout_s,
        # A request that fails is made again by the feed, which knows of pauses and breakers.
        query_retries=0,
        autogenerate_session_id=False,
        connector_limit=connections,
        connector_limit_per_host=connections,
    )


def _code(error: BaseException) -> int | None:
    text = str(error)
    marker = "code: "
    at = text.find(marker)
    digits = text[at + len(marker) :].split(",")[0].split(".")[0].strip() if at >= 0 else ""
    return int(digits) if digits.isdigit() else None


def _short(error: BaseException) -> str:
    return reason(error)[:300]
