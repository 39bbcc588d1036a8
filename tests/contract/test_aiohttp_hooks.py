"""The private parts of aiohttp, and of Faust's driver for it, that preservarium/serving/server.py leans on."""

import inspect

from aiohttp import web
from faust.web.drivers import aiohttp as driver


def source(thing: object) -> str:
    return " ".join(inspect.getsource(thing).split())  # type: ignore[arg-type]


def test_a_runner_asks_for_its_server_and_the_application_makes_it() -> None:
    assert list(inspect.signature(web.AppRunner._make_server).parameters) == ["self"]
    assert "self._server = await self._make_server()" in source(web.AppRunner.__mro__[1].setup)  # type: ignore[attr-defined]
    assert "return self._app._make_handler(loop=loop, **self._kwargs)" in source(web.AppRunner._make_server)
    made = source(web.Application._make_handler)
    assert "return Server( self._handle," in made
    assert "request_factory=self._make_request" in made
    assert "self._kwargs = kwargs" in source(web.Server.__init__)


def test_a_server_makes_a_handler_for_each_connection() -> None:
    assert "RequestHandler(self, loop=self._loop, **self._kwargs)" in source(web.Server.__call__)
    parameters = inspect.signature(web.RequestHandler.__init__).parameters
    assert {"auto_decompress", "keepalive_timeout", "access_log"} <= set(parameters)


def test_a_connection_says_whether_it_waits_for_a_request_and_how_many_it_had() -> None:
    started = source(web.RequestHandler.start)
    assert "self._waiter = loop.create_future() await self._waiter finally: self._waiter = None" in started
    assert "self._request_count += 1" in source(web.RequestHandler.data_received)
    assert list(inspect.signature(web.RequestHandler.finish_response).parameters) == [
        "self",
        "request",
        "resp",
        "start_time",
    ]
    assert list(inspect.signature(web.RequestHandler.handle_error).parameters) == [
        "self",
        "request",
        "status",
        "exc",
        "message",
    ]
    assert "self.transport = None" in source(web.RequestHandler.force_close)


def test_fausts_driver_runs_its_application_by_its_runner() -> None:
    assert "self._runner: AppRunner = AppRunner(self.web_app, access_log=None)" in source(driver.Web.__init__)
    assert "await self._runner.setup()" in source(driver.Web.start_server)
    assert "TCPSite( self._runner," in source(driver.Web._new_transport_tcp)
    assert "await self._runner.cleanup()" in source(driver.Web.stop_server)
