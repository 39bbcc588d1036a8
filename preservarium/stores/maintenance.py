"""ClickHouse for those who compare and mend tables: long statements, and inserts that no earlier token swallows."""

import uuid
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Final

from preservarium.errors import PreservariumError, reason
from preservarium.settings import Settings
from preservarium.stores.clickhouse import INFRASTRUCTURE_ERRORS

#: One statement over a day's rows, on a busy server.
STATEMENT_S: Final = 600.0

_QUERY_SETTINGS: Final = {
    # A key names its partition, so rows of different partitions never replace each other.
    "do_not_merge_across_partitions_select_final": 1,
}


class VerificationError(PreservariumError):
    """The stores cannot be compared."""


class Maintenance:
    """One connection. For one task at a time.

    Args:
        settings: where ClickHouse is.
    """

    def __init__(self, settings: Settings) -> None:
        long = settings.clickhouse.model_copy(update={"timeout_s": max(settings.clickhouse.timeout_s, STATEMENT_S)})
        self._settings = settings.model_copy(update={"clickhouse": long})
        self._client: Any = None

    async def connect(self) -> None:
        """Connect.

        Raises:
            MigrationError: ClickHouse cannot be reached.
        """
        from preservarium.stores.migrate import connect_clickhouse

        self._client = await connect_clickhouse(self._settings, database=self._settings.clickhouse.database)

    async def close(self) -> None:
        """Disconnect."""
        await self._client.close()

    async def query(self, query: str, parameters: Mapping[str, Any] | None = None) -> list[Any]:
        """Rows of a query.

        Raises:
            VerificationError: ClickHouse refuses it, or cannot be reached.
        """
        asked = self._client.query(query, parameters=dict(parameters or {}), settings=_QUERY_SETTINGS)
        return list((await _answer(asked)).result_rows)

    async def command(self, statement: str, **settings: Any) -> None:
        """Carry out a statement; raises as `query` does."""
        await _answer(self._client.command(statement, settings=settings))

    async def insert(self, table: str, types: Mapping[str, str], rows: Sequence[Sequence[Any]]) -> None:
        """Insert rows, values in the order of `types`, whatever was inserted before; raises as `query` does."""
        await _answer(
            self._client.insert(
                table,
                list(zip(*rows, strict=True)),
                column_names=list(types),
                column_type_names=list(types.values()),
                column_oriented=True,
                settings={
                    "async_insert": 0,
                    "insert_deduplication_token": new_token(),
                    # The views' blocks have tokens of their own, made of this one.
                    "deduplicate_blocks_in_dependent_materialized_views": 1,
                    "max_partitions_per_insert_block": 0,
                },
            )
        )


async def _answer(answer: Awaitable[Any]) -> Any:
    from clickhouse_connect.driver.exceptions import ClickHouseError

    try:
        return await answer
    except (ClickHouseError, *INFRASTRUCTURE_ERRORS) as e:
        message = f"ClickHouse: {reason(e)[:300]}"
        raise VerificationError(message) from e


def new_token() -> str:
    """A token that was never used: the engine would drop an insert that it remembers, also where its rows are gone."""
    return f"repair-{uuid.uuid4().hex}"


def literal(value: Any) -> str:
    """A text or an integer as it stands in a statement."""
    if isinstance(value, int):
        return str(value)
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
