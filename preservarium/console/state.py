"""State tables of all workers over HTTP: where each partition is, how large, and the value of a key from whichever worker has it.

| request | what it answers |
|---|---|
| `GET /api/state` | tables with their partitions: who owns each, who has a copy, keys and bytes of those that are here |
| `GET /api/state/{name}/{key}` | the value of a key |

Workers say in `worker_status` what they own. A key that another one owns is asked of it over HTTP, once, with a proof that a worker asks
(access.py); where that one cannot be reached, a copy that is here is shown, and the answer says so.
"""

import functools
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import orjson
from aiohttp import web
from yarl import URL

from preservarium.console import access
from preservarium.console.host import Host
from preservarium.console.replies import TEXT_MAX, answer, bad, missing, wrapped
from preservarium.console.tables import TableReader, TableUnknown
from preservarium.console.workers import Workers
from preservarium.errors import reason
from preservarium.serving.rights import Right

#: Another worker answers within this time, or is told as not to be reached.
PEER_TIMEOUT_S: Final = 3.0
#: A value is cut at 64 KiB, and is JSON around it.
PEER_BYTES_MAX: Final = 1_048_576


class StateViews:
    """The views of one worker.

    Args:
        host: the app.
        tables: of this worker.
        workers: what the others say.
        worker: this one's name.
    """

    def __init__(self, host: Host, tables: TableReader, workers: Workers, worker: str) -> None:
        self._host = host
        self._tables = tables
        self._workers = workers
        self._worker = worker

    def mount(self, application: web.Application) -> None:
        """Add the routes to an aiohttp application that has not started."""
        view = functools.partial(wrapped, right=Right.OPERATE, live=self._host.live, problems=True)
        application.router.add_get("/api/state", view(self.tables))
        application.router.add_get("/api/state/{name}/{key}", view(self.value, timeout_s=2 * PEER_TIMEOUT_S))

    async def tables(self, _request: web.Request) -> web.Response:
        """Every table, and who has which of its partitions."""
        others = self._others()
        found = []
        for table in self._tables.described():
            partitions: dict[int, dict[str, Any]] = {
                each["partition"]: {**each, "owner": self._worker if each["owned"] else None, "copies": []}
                for each in table["partitions"]
            }
            for each in table["partitions"]:
                if not each["owned"]:
                    partitions[each["partition"]]["copies"].append(self._worker)
            for worker in others:
                for how, numbers in _held(worker, table["name"]):
                    for number in numbers:
                        place = partitions.setdefault(
                            number, {"partition": number, "owned": False, "bytes": None, "keys": None, "owner": None, "copies": []}
                        )  # fmt: skip
                        if how == "owned":
                            place["owner"] = worker["worker"]
                        else:
                            place["copies"].append(worker["worker"])
            found.append({**table, "partitions": [partitions[p] for p in sorted(partitions)]})
        return answer(
            {
                "tables": found,
                "worker": self._worker,
                "workers": len(others) + 1,
                "note": self._workers.trouble or None,
                "at": self._host.clock.now_us(),
            }
        )

    async def value(self, request: web.Request) -> web.Response:
        """The value of a key: `{name, key, partition, value, bytes, worker, copy}`."""
        name, key = request.match_info["name"][:TEXT_MAX], request.match_info["key"]
        if len(key) > TEXT_MAX:
            bad(f"key is longer than {TEXT_MAX} characters")
        try:
            found = self._tables.get(name, key.encode())
        except TableUnknown as e:
            missing(str(e))
        if found["owned"] or (not found["held"] and not self._others()):
            return self._shown(found, self._worker, copy=False)
        owner = self._owner(name, found["partition"])
        why = "no worker says that it owns its partition"
        if owner is not None:
            asked = await self._ask(owner, name, key)
            if isinstance(asked, dict):
                return self._shown(asked, owner["worker"], copy=False)
            why = asked
        if found["held"]:
            return self._shown({**found, "note": f"A copy, which may be a little old: {why}."}, self._worker, copy=True)
        return answer({"error": f"another worker has it: {why}"}, 404)

    def _shown(self, found: dict[str, Any], worker: str, *, copy: bool) -> web.Response:
        document = {**found, "worker": worker, "copy": copy, "at": self._host.clock.now_us()}
        if found["value"] is None:
            return answer({**document, "error": "there is no such key"}, 404)
        return answer(document)

    def _others(self) -> list[dict[str, Any]]:
        now_us = self._host.clock.now_us()
        return [each for each in self._workers.all(now_us) if each["worker"] != self._worker and not each["gone"]]

    def _owner(self, name: str, partition: int) -> dict[str, Any] | None:
        for worker in self._others():
            if any(how == "owned" and partition in numbers for how, numbers in _held(worker, name)):
                return worker
        return None

    async def _ask(self, worker: dict[str, Any], name: str, key: str) -> dict[str, Any] | str:
        """What another worker says of a key, or why it does not."""
        host, _, port = str(worker.get("console", "")).rpartition(":")
        if host in ("0.0.0.0", "::", "[::]", ""):  # it listens everywhere: its machine's name leads there
            host = str(worker["worker"]).rpartition(":")[0]
        if not port.isdigit():
            return "it does not say where its console is"
        path = f"/api/tables/{_quoted(name)}/{_quoted(key)}"
        try:
            url = URL(f"http://{host}:{port}{path}", encoded=True)
            headers = access.as_worker(self._host.live().web, url.raw_path, self._host.clock.now_us())
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PEER_TIMEOUT_S)) as session,
                session.get(url, headers=headers, allow_redirects=False) as response,
            ):
                text = await response.content.read(PEER_BYTES_MAX)
                said = orjson.loads(text)
        except (aiohttp.ClientError, OSError, ValueError) as e:
            return f"{worker['worker']} cannot be asked ({reason(e)})"
        if not isinstance(said, dict) or "value" not in said or said.get("held") is not True:
            said_why = said.get("error", response.status) if isinstance(said, dict) else response.status
            return f"{worker['worker']} does not tell it ({said_why})"
        return said


def _held(worker: dict[str, Any], name: str) -> list[tuple[str, list[int]]]:
    """What a worker says that it has of a table: how, and which partitions. What is no list of ours is left out."""
    found: list[tuple[str, list[int]]] = []
    tables = worker.get("tables")
    for each in tables if isinstance(tables, list) else ():
        if isinstance(each, dict) and name in (each.get("names") or ()):
            for how in ("owned", "copies"):
                numbers = each.get(how)
                if isinstance(numbers, list):
                    found.append((how, [n for n in numbers if type(n) is int]))
    return found


def _quoted(text: str) -> str:
    return quote(text, safe="")
