"""The views of people beside others in tests: what is told at the door is kept in a list."""

from typing import Any

from aiohttp import web

from preservarium.console import api
from preservarium.console.people import PeopleViews


class Told:
    """In the place of the event store."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, dict[str, Any]]] = []
        self.waiting = 0

    def tell(self, event: str, name: str, **data: Any) -> None:
        self.told.append((event, name, data))

    async def newest(self, *, before: int | None, limit: int, name: str) -> list[dict[str, Any]]:
        return []


def mount_people(application: web.Application, host: Any) -> Told:
    """The views of people, and then everything that is there under the API's version."""
    told: Any = Told()
    PeopleViews(host, told, told).mount(application)
    api.mount(application)
    return told
