"""`/api/dashboards`: the queries that dashboards use (preservarium/stores/dashboards.sql), answered as JSON. For operators."""

from typing import Any, Protocol

from aiohttp import web

from preservarium.clock import Clock
from preservarium.console import access
from preservarium.console.replies import answer, bad, missing, wrapped
from preservarium.settings import LiveSettings
from preservarium.stores.breaker import Breaker
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.dashboards import (
    DASHBOARDS,
    Dashboards,
    DashboardUnknown,
    ParameterInvalid,
)


class Host(Protocol):
    """The parts of the app that these views need."""

    @property
    def live(self) -> LiveSettings: ...  # noqa: D102
    @property
    def clock(self) -> Clock: ...  # noqa: D102

    def resource(self, closable: Any) -> Any:
        """Close it when the worker has stopped, last first."""
        ...


class DashboardViews:
    """The views of one worker; they ask ClickHouse by connections of their own, so that no dashboard holds up an insert."""

    def __init__(self, host: Host) -> None:
        self._host = host
        live = host.live
        # Closed in the opposite order of their making: first what is under way, then the connections.
        store = host.resource(
            ClickHouseStore(
                live,
                breaker=Breaker("clickhouse-dashboards", lambda: live().breaker, clock=host.clock),
                clock=host.clock,
            )
        )
        self._dashboards = host.resource(Dashboards(store, live, clock=host.clock))

    def mount(self, application: web.Application) -> None:
        """Add the routes to an aiohttp application that has not started."""
        application.router.add_get("/api/dashboards", wrapped(self.list))
        application.router.add_get("/api/dashboards/{name}", wrapped(self.answer))

    def _enter(self, request: web.Request) -> None:
        settings = self._host.live()
        access.require_operator(request, settings.web.operator_token.get_secret_value())
        if not settings.clickhouse.enabled:
            missing("there is no ClickHouse: clickhouse.enabled is off")

    async def list(self, request: web.Request) -> web.Response:
        """Every dashboard with its meaning and parameters."""
        self._enter(request)
        return answer({"dashboards": [dashboard.document() for dashboard in DASHBOARDS.values()]})

    async def answer(self, request: web.Request) -> web.Response:
        """`{name, parameters, columns, rows}`; the query string has the parameters."""
        self._enter(request)
        try:
            text = await self._dashboards.answer(request.match_info["name"], dict(request.query))
        except DashboardUnknown as e:
            missing(str(e))
        except ParameterInvalid as e:
            bad(str(e))
        return web.Response(body=text, content_type="application/json", charset="utf-8")
