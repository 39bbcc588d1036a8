"""The console's web views: its pages, health, metrics, and the facts as JSON.

Every list is limited and paged. Nothing here waits on a database without a time limit, and no answer is cached.
The pages themselves are static; they escape what they show, so these views return names as they are stored.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, Protocol

import structlog
from aiohttp import web
from prometheus_client import REGISTRY
from prometheus_client.exposition import choose_encoder

from preservarium import __version__
from preservarium.console import health, pages, samples
from preservarium.console.host import Host
from preservarium.console.replies import (
    LIMIT_DEFAULT,
    TEXT_MAX,
    answer,
    bad,
    cursor_of,
    limit_of,
    missing,
    pack,
    wrapped,
)
from preservarium.console.tables import TableReader, TableUnknown
from preservarium.console.workers import REASONS_MAX, Workers
from preservarium.serving.rights import Right

log = structlog.get_logger(__name__)

#: The counters are sampled this often; the page asks as often.
SAMPLE_INTERVAL_S: Final = 1.0


class Worker(Host, Protocol):
    """The app, as far as the console judges and shows it."""

    def health_report(self) -> Mapping[str, Any]:
        """Membership, stages and dependencies as the engine sees them."""
        ...

    def guards(self) -> Mapping[str, Any]:
        """Breakers by dependency and fuses by stage."""
        ...

    def reset_fuse(self, stage: str) -> bool:
        """Close a stage's fuse; whether there is such a stage."""
        ...


class Console:
    """The views of one worker."""

    def __init__(self, host: Worker, tables: TableReader, workers: Workers | None = None) -> None:
        self._host = host
        self._workers = workers or Workers()
        self._started_us = host.clock.now_us()
        self._tables = tables
        self._history = samples.History()
        self._started_s = host.clock.monotonic_s()
        self._worker = f"{socket.gethostname()}:{os.getpid()}"
        self._static = pages.static()

    def mount(self, application: web.Application) -> None:
        """Add every route to an aiohttp application that has not started.

        Call it before Faust adds its own: the first route that matches wins, and Faust too wants `/`.
        """
        live = self._host.live
        for path, handler, right in (
            *((path, self.page, Right.OPEN) for path in self._static),
            ("/health", self.health, Right.OPEN),
            ("/ready", self.ready, Right.OPEN),
            ("/metrics", self.metrics, Right.OPEN),
            ("/api/status", self.status, Right.READ),
            ("/api/errors", self.errors, Right.READ),
            ("/api/tables", self.tables, Right.OPERATE),
            ("/api/tables/{name}", self.table, Right.OPERATE),
            ("/api/tables/{name}/{key}", self.table_key, Right.OPERATE),
        ):
            application.router.add_get(path, wrapped(handler, right, live))
        application.router.add_post("/api/fuses/{stage}/reset", wrapped(self.reset_fuse, Right.OPERATE, live))
        application.cleanup_ctx.append(self._sampling)

    async def _sampling(self, _application: web.Application) -> AsyncIterator[None]:
        """Sample the counters while the web server runs."""

        async def sample() -> None:
            while True:
                self.sample()
                await self._host.clock.sleep(SAMPLE_INTERVAL_S)

        task = asyncio.create_task(sample(), name="console-sampling")
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    def sample(self) -> samples.Sample:
        """Take a sample of the counters now and keep it."""
        sample = samples.read(self._host.clock.monotonic_s())
        self._history.add(sample)
        return sample

    def state(self) -> dict[str, Any]:
        """How this worker is, for the other ones."""
        h = self._health()
        return {
            "worker": self._worker,
            "version": __version__,
            "started_at": self._started_us,
            "console": f"{self._host.live().web.host}:{self._host.live().web.port}",
            "alive": h.alive,
            "ready": h.ready,
            "reasons": h.reasons[:REASONS_MAX],
            "guards": self._host.guards(),
        }

    # --- page, health, metrics ---

    async def page(self, request: web.Request) -> web.Response:
        """A page, or a file that it loads."""
        body, content_type = self._static.get(request.path) or self._static[pages.DEVICE]
        return web.Response(body=body, content_type=content_type, charset="utf-8")

    def _health(self) -> health.Health:
        return health.judge(self._host.health_report(), health.dependencies())

    async def health(self, _request: web.Request) -> web.Response:
        """Whether this worker should live: 200, or 503 with the reasons. A dependency that is down is no reason."""
        h = self._health()
        return answer({"alive": h.alive, "reasons": h.alive_reasons}, status=200 if h.alive else 503)

    async def ready(self, _request: web.Request) -> web.Response:
        """Whether this worker and what it depends on can work now: 200, or 503 with the reasons."""
        h = self._health()
        return answer(
            {"ready": h.ready, "reasons": h.reasons, "dependencies": _needs(h)}, status=200 if h.ready else 503
        )

    async def metrics(self, request: web.Request) -> web.Response:
        """The metrics for Prometheus, in the text format that it asks for."""
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        response = web.Response(body=encode(REGISTRY))
        # The content type carries parameters that web.Response(content_type=…) does not take.
        response.headers["Content-Type"] = content_type
        return response

    # --- facts ---

    async def status(self, _request: web.Request) -> web.Response:
        """Stages with rates, lag and errors; stores; dependencies; health; errors by code. One poll of the page."""
        sample = self._history.last or self.sample()
        report = self._host.health_report()
        h = health.judge(report, health.dependencies())
        stages: list[dict[str, Any]] = []
        for name in health.in_order({*sample.stages, *report["stages"]}):
            stage = sample.stages.get(name, samples.StageSample())
            feed = report["stages"].get(name, {})
            rates = self._history.rates(name)
            stages.append(
                {
                    "name": name,
                    "topic": feed.get("topic"),
                    "group": feed.get("group"),
                    "received_total": int(stage.received),
                    "sent_total": int(stage.sent),
                    "readings_total": int(stage.readings),
                    "errors_total": int(stage.errors),
                    "retries_total": int(stage.retries),
                    "received_per_s": rates["received"],
                    "sent_per_s": rates["sent"],
                    "readings_per_s": rates["readings"],
                    "errors_per_s": rates["errors"],
                    "lag": int(stage.lag),
                    "pending": int(stage.pending),
                    "paused": int(stage.paused),
                    "commit_age_s": round(stage.commit_age_s, 1),
                    "fuse_blown": stage.fuse_blown,
                    "stalled": name in h.stalled,
                    "curve": self._history.curve(name),
                }
            )
        by_name = {s["name"]: s for s in stages}
        return answer(
            {
                "at": self._host.clock.now_us(),
                "version": __version__,
                "worker": {"id": self._worker, "uptime_s": self._host.clock.monotonic_s() - self._started_s},
                # What comes in is what the first stage makes of it: raw messages hold any number of readings.
                "readings_per_s": by_name.get("normalize", {}).get("readings_per_s", 0.0),
                "errors_per_s": round(sum(s["errors_per_s"] for s in stages), 1),
                "lag": sum(s["lag"] for s in stages),
                "stages": stages,
                "arriving_per_s": self._history.arriving("normalize"),
                "connectors": self._history.connectors(),
                "stores": self._history.stores(),
                "dependencies": _needs(h),
                "guards": self._host.guards(),
                "workers": [w for w in self._workers.all(self._host.clock.now_us()) if w["worker"] != self._worker],
                "workers_note": self._workers.trouble or None,
                "health": {"alive": h.alive, "ready": h.ready, "reasons": h.reasons},
                "errors": self._history.errors()[:LIMIT_DEFAULT],
                "errors_span_s": round(self._history.span_s, 1),
            }
        )

    async def errors(self, _request: web.Request) -> web.Response:
        """Refused inputs by stage and code, of the last minutes and since the worker started."""
        if self._history.last is None:
            self.sample()
        return answer({"errors": self._history.errors(), "span_s": round(self._history.span_s, 1)})

    # --- for operators: fuses, tables ---

    async def reset_fuse(self, request: web.Request) -> web.Response:
        """Close a blown fuse of this worker, once its cause is mended: its partitions go on. For operators."""
        if request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType(
                text='{"error": "send application/json"}', content_type="application/json"
            )
        stage = request.match_info["stage"][:TEXT_MAX]
        if not self._host.reset_fuse(stage):
            missing("there is no stage of that name")
        return answer({"stage": stage, "reset": True})

    async def tables(self, _request: web.Request) -> web.Response:
        """The state tables of this worker. For operators."""
        return answer({"tables": self._tables.list()})

    async def table(self, request: web.Request) -> web.Response:
        """Keys and values of the partitions that this worker holds: `?limit`, `?cursor`. For operators."""
        cursor = cursor_of(request)
        if cursor is not None and (
            len(cursor) != 2 or not isinstance(cursor[0], int) or not isinstance(cursor[1], str)
        ):
            bad("cursor is not one of ours")
        try:
            after = None if cursor is None else (int(cursor[0]), bytes.fromhex(cursor[1]))
        except ValueError:
            bad("cursor is not one of ours")
        try:
            page = self._tables.page(request.match_info["name"][:TEXT_MAX], after=after, limit=limit_of(request))
        except TableUnknown as e:
            missing(str(e))
        if page["next"]:
            partition, key = page["next"]
            page["next_cursor"] = pack([partition, key.hex()])
        else:
            page["next_cursor"] = None
        del page["next"]
        return answer(page)

    async def table_key(self, request: web.Request) -> web.Response:
        """The value of one key, where this worker holds its partition. For operators."""
        key = request.match_info["key"]
        if len(key) > TEXT_MAX:
            bad(f"key is longer than {TEXT_MAX} characters")
        try:
            found = self._tables.get(request.match_info["name"][:TEXT_MAX], key.encode())
        except TableUnknown as e:
            missing(str(e))
        if found["value"] is None:
            return answer(
                {**found, "error": "no such key" if found["held"] else "another worker holds its partition"}, 404
            )
        return answer(found)


def _needs(h: health.Health) -> list[dict[str, str]]:
    return [{"name": d.name, "state": d.state, "detail": d.detail} for d in h.dependencies]
