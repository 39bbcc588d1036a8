"""archive: raw records into Parquet files before Kafka deletes them.

No stage: a service that every worker runs, each at other partitions. Off unless `archive.url` says where to.
"""

from typing import Any

from mode import Service

from preservarium.operations.archive.archiver import Archiver, archived_topics
from preservarium.settings import SettingsError
from preservarium.stores.archive_files import ArchiveError, require
from preservarium.streaming.app import app


class ArchiveService(Service):
    """Runs an archiver for as long as the worker runs; whatever is down, it tries again."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._archiver = Archiver(app.live)

    @Service.task
    async def _work(self) -> None:
        await self._archiver.run(self.sleep, lambda: self.should_stop)

    async def on_stop(self) -> None:
        """Close the connections; what is under way is settled by whoever archives next."""
        await self._archiver.close()


if app.live().archive.url and app.live().archive.in_worker:
    archived_topics(app.live())  # a wrong name ends the start, and not the archive in silence
    try:
        require()
    except ArchiveError as e:
        message = f"PRESERVARIUM_ARCHIVE__URL is given, but {e}"
        raise SettingsError(message) from None
    app.add_dependency(ArchiveService())
