"""What the owner of workers learns from their consoles."""

import asyncio
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from preservarium.embedded import supervise
from preservarium.embedded.service import ServiceError
from preservarium.embedded.supervise import Workers


@pytest.mark.parametrize(("token", "found"), [("s3cret", {"worker-0": {"lag": 3}}), ("wrong", {}), ("", {})])
async def test_a_console_is_asked_with_an_operators_token_and_a_refusal_is_no_status(token: str, found: Any) -> None:
    async def status(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != "Bearer s3cret":
            return web.json_response({"error": "operator token missing or wrong"}, status=401)
        return web.json_response({"lag": 3})

    application = web.Application()
    application.router.add_get("/api/status", status)
    async with TestServer(application) as server, aiohttp.ClientSession() as http:
        worker: Any = SimpleNamespace(name="worker-0", url=f"http://127.0.0.1:{server.port}", alive=True)
        assert await Workers([worker], print, token=token).statuses(http) == found


async def test_how_workers_are_is_what_their_consoles_say():
    made = Workers([SimpleNamespace(name=f"worker-{n}", pid=None, alive=True) for n in (0, 1, 2)], lambda line: None)

    async def said(_http: Any) -> dict[str, Any]:
        return {"worker-0": {"lag": 5}, "worker-2": {"lag": 2}}

    made.statuses = said
    standing = await made.standing(None)
    assert (standing.lag, standing.alive, standing.rss_bytes) == (7, 2, 0)


class Mortal:
    """A worker that is dead, and dies in its first starts."""

    name, pid, number = "worker-0", 7, 0

    def __init__(self, deaths: int) -> None:
        self.alive = False
        self.deaths = deaths

    def stop(self) -> None:
        """Nothing is left of it."""

    def start(self) -> None:
        if self.deaths:
            self.deaths -= 1
            message = "worker-0 ended while it started"
            raise ServiceError(message)
        self.alive = True

    def log_tail(self) -> str:
        return "; its last words"


async def test_a_worker_that_dies_while_it_starts_is_started_again(monkeypatch):
    monkeypatch.setattr(supervise, "WATCH_S", 0.01)
    monkeypatch.setattr(supervise, "RESTART_S", 0.01)
    worker: Any = Mortal(deaths=supervise.DEATHS_MAX - 1)
    workers = Workers([worker], lambda line: None)
    watching = asyncio.create_task(workers.watch())
    async with asyncio.timeout(20):
        while not worker.alive:
            await asyncio.sleep(0.01)
    assert workers.restarts == supervise.DEATHS_MAX
    watching.cancel()


async def test_a_worker_that_never_starts_ends_the_watch_with_its_last_words(monkeypatch):
    monkeypatch.setattr(supervise, "WATCH_S", 0.01)
    monkeypatch.setattr(supervise, "RESTART_S", 0.01)
    worker: Any = Mortal(deaths=100)
    with pytest.raises(ServiceError, match="worker-0 keeps dying, 6 times in 120 s; its last words"):
        await Workers([worker], lambda line: None).watch()
