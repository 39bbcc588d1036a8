"""The lineage graph as OpenLineage events: what catalogues of data understand (Marquez, DataHub, Atlan, …).

A batch is a run of the job `sink…`, that reads ranges of topics and writes tables; its run id is the batch's, so that whoever is sent an
event twice has one run. openlineage-python, an extra, makes the events and sends them.
"""

import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import UUID

from preservarium import __version__
from preservarium.domain.lineage_graph import SHORT, STORED, as_range
from preservarium.errors import PreservariumError
from preservarium.settings import Settings
from preservarium.stores import lineage_graph
from preservarium.stores.events import instant
from preservarium.stores.lineage_graph import Found
from preservarium.stores.tables import EVENT_TABLES

#: Who says so, in each event.
PRODUCER: Final = f"urn:preservarium:{__version__}"
#: Edges read at once.
EDGES_AT_ONCE: Final = 5_000
_LONG: Final = {short: topic for topic, short in SHORT.items()}
_TABLES: Final = {f"sink-{suffix}": declared.table for suffix, declared in EVENT_TABLES.items()}


class OpenLineageError(PreservariumError):
    """The events cannot be made or sent."""


@dataclass(slots=True)
class Batch:
    """A batch with what it read."""

    id: str
    sink: str
    at_us: int
    inputs: list[str] = field(default_factory=list)  #: names of ranges


async def batches(connection: Any, from_us: int, to_us: int) -> AsyncIterator[Batch]:
    """The batches that were stored in a time, in its order; µs since the epoch, UTC.

    The edges of one batch have one time, that of its transaction.
    """
    after = (from_us, "", "")
    waiting: dict[str, Batch] = {}
    at: int | None = None
    while found := await lineage_graph.between(connection, from_us, to_us, after, EDGES_AT_ONCE):
        for one in found:
            if one.created_at != at:
                for batch in waiting.values():
                    yield batch
                waiting.clear()
                at = one.created_at
            _take(waiting, one)
        last = found[-1]
        after = (last.created_at, last.edge.source_id, last.edge.target_id)
    for batch in waiting.values():
        yield batch


def _take(waiting: dict[str, Batch], one: Found) -> None:
    edge = one.edge
    if edge.relationship_type != STORED or not edge.target_id.startswith("batch:"):
        return
    identity = edge.target_id.removeprefix("batch:")
    batch = waiting.setdefault(identity, Batch(identity, edge.transformation_id, one.created_at))
    batch.inputs.append(edge.source_id)


def events(settings: Settings, found: Iterable[Batch], *, schema: str = "public") -> Iterator[Any]:
    """The events of batches, `RunEvent`s of openlineage-python.

    Args:
        settings: where Kafka and PostgreSQL are.
        found: the batches.
        schema: of the tables.

    Raises:
        OpenLineageError: the extra is not installed.
    """
    v2 = _client().event_v2
    kafka = f"kafka://{settings.kafka.bootstrap_servers.split(',')[0].strip()}"
    place = urlsplit(settings.postgres.dsn)
    postgres, database = f"postgres://{place.hostname or 'localhost'}:{place.port or 5432}", place.path.lstrip("/")
    for batch in found:
        names = dict.fromkeys(r.topic for name in batch.inputs if (r := as_range(name)) is not None)
        yield v2.RunEvent(
            eventType=v2.RunState.COMPLETE,
            eventTime=instant(batch.at_us).isoformat(timespec="microseconds"),
            run=v2.Run(runId=str(UUID(batch.id)), facets={"preservarium_ranges": _ranges(batch.inputs)}),
            job=v2.Job(namespace=settings.kafka.group, name=batch.sink),
            inputs=[
                v2.InputDataset(namespace=kafka, name=settings.kafka.topic_prefix + _LONG.get(name, name))
                for name in names
            ],
            outputs=[
                v2.OutputDataset(
                    namespace=postgres, name=f"{database}.{schema}.{_TABLES.get(batch.sink, 'measurements')}"
                )
            ],
            producer=PRODUCER,
        )


def _ranges(names: Sequence[str]) -> Any:
    """A facet of ours: which records the batch read."""
    from attr import define, field
    from openlineage.client.generated.base import RunFacet

    @define
    class RangesRunFacet(RunFacet):  # type: ignore[misc]
        ranges: list[str] = field(factory=list)

        @staticmethod
        def _get_schema() -> str:
            return f"{PRODUCER}:RangesRunFacet"

    facet: Any = RangesRunFacet  # its arguments come from classes that mypy does not see
    return facet(ranges=list(names), producer=PRODUCER)


def as_json(event: Any) -> str:
    """An event as it is sent."""
    with _told():
        from openlineage.client.serde import Serde

        text: str = Serde.to_json(event)
        return text


class Emitter:
    """Sends events to an OpenLineage server, or adds them to a file, a line each.

    Args:
        url: of the server, http(s)://…; None with a file.
        file: path; None with a server.
        api_key: of the server.

    Raises:
        OpenLineageError: the extra is not installed, or the address is none.
    """

    def __init__(self, *, url: str | None = None, file: str | None = None, api_key: str | None = None) -> None:
        self._client: Any = None
        self._file: Any = None
        if file is not None:
            _client()
            self._file = open(file, "a", encoding="utf-8")  # noqa: SIM115
            return
        if url is None or urlsplit(url).scheme not in ("http", "https"):
            message = f"{url!r} is no address of an OpenLineage server: http://… or https://…"
            raise OpenLineageError(message)
        client = _client()
        with _told():
            from openlineage.client.transport.http import ApiKeyTokenProvider, HttpConfig, HttpTransport

            key = {"auth": ApiKeyTokenProvider({"apiKey": api_key})} if api_key else {}
            self._client = client.OpenLineageClient(transport=HttpTransport(HttpConfig(url=url, **key)))

    def emit(self, event: Any) -> None:
        """Send one; returns when the server has taken it.

        Raises:
            OpenLineageError: it does not take it, after its client's own tries.
        """
        if self._file is not None:
            self._file.write(as_json(event) + "\n")
            return
        try:
            self._client.emit(event)
        except Exception as e:  # whatever its HTTP library raises
            message = f"the OpenLineage server does not take an event: {type(e).__name__}: {e}"
            raise OpenLineageError(message) from e

    def close(self) -> None:
        """Flush."""
        if self._file is not None:
            self._file.close()
        else:
            with contextlib.suppress(Exception):
                self._client.close(timeout=5)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except ImportError as e:
        message = "OpenLineage events need the extra: pip install 'preservarium[openlineage]'"
        raise OpenLineageError(message) from e


def _client() -> Any:
    with _told():
        import openlineage.client
        import openlineage.client.event_v2

        return openlineage.client
