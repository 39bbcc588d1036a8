"""Both databases, one runner at a time over them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from preservarium.settings import Settings
from preservarium.stores.migrate.clickhouse import migrate_clickhouse
from preservarium.stores.migrate.files import MIGRATIONS, Store
from preservarium.stores.migrate.postgres import connect_postgres, migrate_postgres, runner_lock
from preservarium.stores.migrate.progress import Report


async def migrate_all(
    settings: Settings,
    *,
    stores: Sequence[Store] = ("postgres", "clickhouse"),
    directory: Path = MIGRATIONS,
    dry_run: bool = False,
    allow_blocking: bool = True,
    wait_s: float = 0.0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Report]:
    """Bring the databases up to date, one runner at a time over both.

    ClickHouse is left out where it is not enabled. Arguments and errors as in `migrate_postgres`.
    """
    reports: list[Report] = []
    if "postgres" in stores:
        reports.append(
            await migrate_postgres(
                settings,
                directory=directory,
                dry_run=dry_run,
                allow_blocking=allow_blocking,
                wait_s=wait_s,
                progress=lambda f: progress(f"postgres/{f}"),
            )
        )
    if "clickhouse" in stores and settings.clickhouse.enabled:

        async def clickhouse() -> Report:
            return await migrate_clickhouse(
                settings,
                directory=directory,
                dry_run=dry_run,
                wait_s=wait_s,
                progress=lambda f: progress(f"clickhouse/{f}"),
            )

        if dry_run or "postgres" not in stores:
            reports.append(await clickhouse())
        else:
            connection = await connect_postgres(settings, wait_s=wait_s)
            try:
                async with runner_lock(connection):
                    reports.append(await clickhouse())
            finally:
                await connection.close(timeout=5)
    return reports
