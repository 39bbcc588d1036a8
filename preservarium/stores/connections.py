"""Connections to PostgreSQL, made in one place, because they differ with what stands before the server.

A pooler in transaction mode (PgBouncer's `pool_mode=transaction`) hands each transaction to whichever server connection is free.
Whatever belongs to a session is then lost, or meets another's: prepared statements, settings, temporary tables, session
locks, LISTEN. So what we find there is looked at once (`look`), and

- a `Pool` puts each use of a connection into one transaction, in which all of that holds: statements are not remembered
  beyond it, settings are those of the transaction, the temporary table is made in it and goes with it;
- `connect` gives a session, or refuses in a sentence: where there is `postgres.direct_url`, it is taken.

On a direct connection nothing of it costs anything.
"""

import asyncio
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Final, NoReturn

import asyncpg

from preservarium.errors import PreservariumError
from preservarium.settings import Postgres

#: Two connections are compared so often. A pooler gives the connection that was given back last, or all of them in turn; both
#: show at the first comparison as a rule. Where others use the pooler meanwhile, such as a worker's stores that all look at once,
#: many a comparison shows nothing, and three missed it now and then. A comparison is a few round trips.
LOOKS: Final = 32
#: Of the whole look: it is a dozen round trips, and some hundred where a pooler in session mode stands.
LOOK_TIMEOUT_S: Final = 10.0

_DIRECT_URL: Final = "PRESERVARIUM_POSTGRES__DIRECT_URL"


class Link(StrEnum):
    """What stands between us and the server; the text is for people."""

    DIRECT = "directly"
    SESSION = "through a pooler in session mode"
    TRANSACTION = "through a pooler in transaction mode"


class NeedsSession(PreservariumError, ConnectionError):
    """Only a pooler in transaction mode is there, and what is to be done needs a session of its own."""


#: What a default for transactions to come is called in the one that has begun.
_OF_TRANSACTION: Final = {"default_transaction_read_only": "transaction_read_only"}

#: What each address turned out to be: asked once a process.
_found: dict[str, Link] = {}


async def look(dsn: str, *, timeout: float) -> Link:
    """What stands before the server; asked once a process for each address.

    A pooler does not say that it is one. But its connections have ids of its own, and in transaction mode, unlike in any
    other, two connections that stand at once are given the same process of the server, or one of them another in its next
    transaction.

    Raises:
        OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError: it cannot be asked.
    """
    known = _found.get(dsn)
    if known is None:
        async with asyncio.timeout(max(timeout, LOOK_TIMEOUT_S)):
            known = _found[dsn] = await _look(dsn, timeout)
    return known


def forget() -> None:
    """Look again: what stands there may be another one now."""
    _found.clear()


async def _look(dsn: str, timeout: float) -> Link:
    first = await _open(dsn, timeout)
    try:
        process = await _process(first)
        if process == first.get_server_pid():
            return Link.DIRECT
        second = await _open(dsn, timeout)
        try:
            for _ in range(LOOKS):
                async with second.transaction():
                    other = await second.fetchval("SELECT pg_backend_pid()")
                    if other == process or await _process(first) != process:
                        return Link.TRANSACTION
        finally:
            second.terminate()
    finally:
        first.terminate()
    return Link.SESSION


async def _open(dsn: str, timeout: float) -> Any:
    return await asyncpg.connect(dsn, timeout=timeout, command_timeout=timeout, statement_cache_size=0)


async def _process(connection: Any) -> int:
    async with connection.transaction():
        found: int = await connection.fetchval("SELECT pg_backend_pid()")
    return found


async def connect(
    dsn: str,
    *,
    what: str,
    timeout: float,
    is_direct: bool = False,
    command_timeout: float | None = None,
    server_settings: Mapping[str, str] | None = None,
) -> Any:
    """A connection that is a session: for locks, LISTEN, and whatever is more than one transaction.

    Args:
        dsn: of the server, or of a pooler.
        what: is to be done, for people.
        timeout: seconds until it must stand.
        is_direct: it is `postgres.direct_url`.
        command_timeout: seconds of a statement.
        server_settings: of the session.

    Raises:
        NeedsSession: a pooler in transaction mode is all there is.
        OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError: it cannot be made.
    """
    link = await look(dsn, timeout=timeout)
    if link is Link.TRANSACTION:
        _refuse(what, is_direct)
    wanted = dict(server_settings or {})
    # A pooler knows few settings of a start; a session can be told all of them afterwards.
    started = wanted if link is Link.DIRECT else {}
    connection = await asyncpg.connect(
        dsn, timeout=timeout, command_timeout=command_timeout, server_settings=started or None
    )
    if wanted and not started:
        try:
            await _set(connection, wanted, local=False)
        except BaseException:
            connection.terminate()
            raise
    return connection


def session(postgres: Postgres, what: str, *, command_timeout: float | None = None) -> Any:
    """`connect` to the settings' database; to be awaited."""
    return connect(
        postgres.session_dsn,
        what=what,
        timeout=postgres.connect_timeout_s,
        is_direct=bool(postgres.direct_url.get_secret_value()),
        command_timeout=command_timeout,
    )


def _refuse(what: str, is_direct: bool) -> NoReturn:
    text = (
        f"{_DIRECT_URL} leads to a pooler in transaction mode, too: {what} needs a session of its own"
        if is_direct
        else f"{what} needs a session of its own, and this is a pooler in transaction mode: set {_DIRECT_URL}"
        " to the server itself, or to a pool in session mode"
    )
    raise NeedsSession(text)


async def _set(connection: Any, wanted: Mapping[str, str], *, local: bool) -> None:
    for name, value in wanted.items():
        await connection.execute("SELECT set_config($1, $2, $3)", name, value, local)


class Pool:
    """A pool of connections, made when first needed and again after `close`.

    Args:
        dsn: asked when the pool is made.
        connections_max: asked then.
        connect_timeout_s: within which a connection must stand; asked each time.
        command_timeout_s: of a statement; asked when the pool is made.
        server_settings: of each connection, `application_name` among them.
        temporary: name and definition of a table that each use of a connection finds empty, such as `t (LIKE s)`.
        idle_s: a connection that was not used for so long is closed.
    """

    def __init__(
        self,
        dsn: Callable[[], str],
        *,
        connections_max: Callable[[], int],
        connect_timeout_s: Callable[[], float],
        command_timeout_s: Callable[[], float],
        server_settings: Mapping[str, str],
        temporary: str = "",
        idle_s: float = 300.0,
    ) -> None:
        self._dsn = dsn
        self._connections_max = connections_max
        self._connect_timeout_s = connect_timeout_s
        self._command_timeout_s = command_timeout_s
        self._server_settings = dict(server_settings)
        self._temporary = temporary
        self._idle_s = idle_s
        self._pool: Any = None
        self._lock = asyncio.Lock()
        self.link = Link.DIRECT  #: once connected

    def acquire(self) -> "Use":
        """A connection for an `async with` block, given back at its end, closed where it failed."""
        return Use(self)

    @property
    def connect_timeout_s(self) -> float:
        """How long a connection may take to be had."""
        return self._connect_timeout_s()

    async def ready(self) -> Any:
        """The asyncpg pool; makes it where there is none."""
        if self._pool is not None:
            return self._pool
        async with self._lock:
            if self._pool is None:
                dsn, timeout = self._dsn(), self.connect_timeout_s
                self.link = await look(dsn, timeout=timeout)
                pool = await self._make(dsn, timeout)
                try:
                    await self._made(pool)
                except BaseException:
                    pool.terminate()
                    raise
                self._pool = pool
        return self._pool

    async def _make(self, dsn: str, timeout: float) -> Any:
        settings = self._server_settings
        # PgBouncer takes this one, and of the others only those that it is told to.
        started = settings if self.link is Link.DIRECT else {"application_name": settings["application_name"]}
        cache = {"statement_cache_size": 0} if self.link is Link.TRANSACTION else {}
        return await asyncpg.create_pool(
            dsn,
            min_size=0,
            max_size=self._connections_max(),
            max_inactive_connection_lifetime=self._idle_s,
            timeout=timeout,
            command_timeout=self._command_timeout_s(),
            # Connections are given back clean or closed, so the round trip of RESET ALL is saved.
            reset=_no_reset,
            init=self._init,
            server_settings=started,
            **cache,
        )

    async def _made(self, pool: Any) -> None:
        """What is to be known of the database before the pool is used."""

    async def _init(self, connection: Any) -> None:
        """Prepare a connection that is a session."""
        if self.link is Link.TRANSACTION:
            return
        if self.link is Link.SESSION:
            await _set(connection, self._server_settings, local=False)
        if self._temporary:
            await connection.execute(f"CREATE TEMP TABLE IF NOT EXISTS {self._temporary} ON COMMIT DELETE ROWS")

    async def begin(self, connection: Any) -> Any:
        """The transaction of a whole use, where that is what a connection is; None where it is a session."""
        if self.link is not Link.TRANSACTION:
            return None
        transaction = connection.transaction()
        await transaction.start()
        await _set(connection, {_OF_TRANSACTION.get(k, k): v for k, v in self._server_settings.items()}, local=True)
        if self._temporary:
            await connection.execute(f"CREATE TEMP TABLE {self._temporary} ON COMMIT DROP")
        return transaction

    def is_clean(self, error: BaseException) -> bool:
        """Whether a connection may be handed on after an error within its use."""
        return isinstance(error, PreservariumError)

    async def close(self) -> None:
        """Close every connection."""
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                await asyncio.wait_for(pool.close(), self.connect_timeout_s)
            except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
                pool.terminate()

    def terminate(self) -> None:
        """Close every connection at once, whatever it does."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.terminate()


async def _no_reset(_connection: Any) -> None:
    return None


class Use:
    """One use of a pooled connection. Behind a pooler in transaction mode it is one transaction, committed at its end."""

    def __init__(self, pool: Pool) -> None:
        self._owner = pool
        self._pool: Any = None
        self._connection: Any = None
        self._transaction: Any = None

    async def __aenter__(self) -> Any:
        return await self.of(await self._owner.ready())

    async def of(self, pool: Any) -> Any:
        """Begin, with a pool that is being made."""
        self._pool = pool
        self._connection = await pool.acquire(timeout=self._owner.connect_timeout_s)
        try:
            self._transaction = await self._owner.begin(self._connection)
        except BaseException:
            self._connection.terminate()
            await pool.release(self._connection)
            raise
        return self._connection

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        connection, transaction = self._connection, self._transaction
        try:
            if error is not None and not self._owner.is_clean(error):
                # Cancelled in the middle, or broken, or nobody knows: not a connection to hand on.
                connection.terminate()
            elif transaction is not None:
                try:
                    await (transaction.commit() if error is None else transaction.rollback())
                except BaseException:
                    connection.terminate()
                    raise
        finally:
            await self._pool.release(connection)
