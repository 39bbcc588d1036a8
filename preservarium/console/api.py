"""One API: everything that stands under `/api/` is served under `/api/v1/`; the path without the version stays, as an alias.

What is described in `/api/v1/openapi.json` is kept as it is within a version: fields are added, none is taken away or means something else.
"""

from typing import Final

from aiohttp import web

BASE: Final = "/api"
VERSION: Final = "/api/v1"
#: InfluxDB's, whose clients know no other path.
_FOREIGN: Final = "/api/v2/"


def versioned(path: str) -> str:
    """A path of the API under its version."""
    if not path.startswith(f"{BASE}/") or path.startswith((f"{VERSION}/", _FOREIGN)):
        return path
    return VERSION + path.removeprefix(BASE)


def mount(application: web.Application) -> None:
    """Serve every route that is there under `/api/` under its version too; call it when all of them are."""
    router = application.router
    there = {(route.method, route.resource.canonical) for route in router.routes() if route.resource is not None}
    for route in [*router.routes()]:
        path = route.resource.canonical if route.resource is not None else ""
        # aiohttp makes HEAD of GET by itself.
        if route.method == "HEAD" or versioned(path) == path or (route.method, versioned(path)) in there:
            continue
        if route.method == "GET":
            router.add_get(versioned(path), route.handler)
        else:
            router.add_route(route.method, versioned(path), route.handler)


def base_of(request: web.Request) -> str:
    """Under which of both a request came: what is said in an answer to it stands there, too."""
    return VERSION if request.path.startswith(f"{VERSION}/") else BASE
