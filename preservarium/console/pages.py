"""The console's pages, made of the templates in `page/`: one layout, one script and style for what they share."""

from collections.abc import Mapping
from importlib import resources
from typing import Any, Final

import jinja2

_templates: Final = jinja2.Environment(
    loader=jinja2.PackageLoader("preservarium.console", "page"), autoescape=True, undefined=jinja2.StrictUndefined
)

#: The page of one device, the same for all of them: which one it is, its script reads off the address.
DEVICE: Final = "/devices/{device_id}"
#: Path -> template, of the pages that are the same for everybody and at any time: what is theirs, their scripts ask for.
_PAGES: Final[Mapping[str, str]] = {
    "/": "index.html",
    "/devices": "devices.html",
    DEVICE: "device.html",
    "/alarms": "alarms.html",
    "/refusals": "refusals.html",
    "/commands": "commands.html",
}
#: What they load, under /console/.
_FILES: Final[Mapping[str, str]] = {
    "console.css": "text/css",
    "uplot.css": "text/css",
    "uplot.js": "text/javascript",
    "common.js": "text/javascript",
    "list.js": "text/javascript",
    "console.js": "text/javascript",
    "devices.js": "text/javascript",
    "device.js": "text/javascript",
    "plots.js": "text/javascript",
    "refusals.js": "text/javascript",
    "alarms.js": "text/javascript",
    "commands.js": "text/javascript",
}


def page(template: str, **values: Any) -> str:
    """A page as HTML. What is filled in is escaped.

    Raises:
        jinja2.UndefinedError: a value is missing.
    """
    return _templates.get_template(template).render(values)


def static() -> dict[str, tuple[bytes, str]]:
    """Path -> body and content type, of everything that does not change while a worker runs."""
    folder = resources.files("preservarium.console") / "page"
    pages = {path: (page(template).encode(), "text/html") for path, template in _PAGES.items()}
    files = {f"/console/{name}": ((folder / name).read_bytes(), kind) for name, kind in _FILES.items()}
    return pages | files
