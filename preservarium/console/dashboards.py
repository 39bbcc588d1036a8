"""`/api/dashboards`: the queries that dashboards use (preservarium/stores/dashboards.sql), answered as JSON. For operators."""

from typing import Any, Protocol

from aiohttp import web

from preservarium.breaker import Breaker
from preservarium.console.host import Host
from preservarium.console.replies import answer, bad, missing, wrapped
from preservarium.serving.rights import Right
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.dashboards import (
    DASHBOARDS,
    Dashboards,
    DashboardUnknown,
    ParameterInvalid,
)


class Owner(Host, Protocol):
    """The app, which also closes what these views open."""

    def resource(self, closable: Any) -> Any:
        """Close it when the worker has stopped, last first."""
        ...


class DashboardViews:
    """The views of one worker; they ask ClickHouse by connections of their own, so that no dashboard holds up an insert."""

    def __init__(self, host: Owner) -> None:
        self._host = host
        live = host.live
        # Closed in the opposite order of their making: first what is under way, then the connections.
        store = host.resource(
            ClickHouseStore(
                live,
                breaker=Breaker("clickhouse-dashboards", lambda: live().breaker, clock=host.clock, server="clickhouse"),
                clock=host.clock,
            )
        )
        self._dashboards = host.resource(Dashboards(store, live, clock=host.clock))

    def mount(self, application: web.Application) -> None:
        """Add the routes to an aiohttp application that has not started."""
        live = self._host.live
        application.router.add_get("/api/dashboards", wrapped(self.list, Right.OPERATE, live))
        application.router.add_get("/api/dashboards/{name}", wrapped(self.answer, Right.OPERATE, live))

    def _enter(self) -> None:
        if not self._host.live().clickhouse.enabled:
            missing("there is no ClickHouse: clickhouse.enabled is off")

    async def list(self, _request: web.Request) -> web.Response:
        """Every dashboard with its meaning and parameters."""
        self._enter()
        return answer({"dashboards": [dashboard.document() for dashboard in DASHBOARDS.values()]})

    async def answer(self, request: web.Request) -> web.Response:
        """`{name, parameters, columns, rows}`; the query string has the parameters."""
        self._enter()
        try:
            text = await self._dashboards.answer(request.match_info["name"], dict(request.query))
        except DashboardUnknown as e:
            missing(str(e))
        except ParameterInvalid as e:
            bad(str(e))
        return web.Response(body=text, content_type="application/json", charset="utf-8")
