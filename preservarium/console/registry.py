"""The registry over HTTP: looking at it, for viewers; checking what is typed, for operators; saving it as the same event as a file, for engineers.

| request | what it does |
|---|---|
| `GET /api/registry` | kinds of documents and how many there are; whether they may be changed here |
| `GET /api/registry/{kind}` | documents of a kind: `?q`, `?limit`, `?cursor` |
| `GET /api/registry/{kind}/{name}` | one document as YAML, with its versions |
| `GET /api/registry/{kind}/{name}/versions` | the document after each of its events: `?stream` |
| `GET /api/registry.yaml` | everything as a registry file |
| `POST /api/registry/check` | what is wrong with a text, and what its examples show, in the sandbox |
| `POST /api/registry/plan` | what saving it would change |
| `POST /api/registry/save` | the change, under the name of who asks |

A text is a registry file, of one document or of many. `web.registry_editing` off: nothing is saved here.
"""

import asyncio
import functools
import io
from collections.abc import Mapping
from time import perf_counter
from typing import Any, Final

import structlog
from aiohttp import web

from preservarium.console import access
from preservarium.console.acting import actor_of, body_of, only, string
from preservarium.console.decoding import Bench
from preservarium.console.host import Host
from preservarium.console.replies import (
    CALLER,
    TEXT_MAX,
    answer,
    bad,
    cursor_of,
    limit_of,
    missing,
    pack,
    text_of,
    wrapped,
)
from preservarium.domain.registry.checks import RegistryFile, RegistryFileError
from preservarium.domain.registry.documents import DERIVED, SECTIONS
from preservarium.errors import Fatal, Retry
from preservarium.registry.apply import Applied, apply_file
from preservarium.registry.file import dump, read_text
from preservarium.registry.proving import prove
from preservarium.serving.rights import Right
from preservarium.stores import registry as store
from preservarium.stores.events import ConflictError
from preservarium.stores.migrate import MigrationError
from preservarium.stores.registry_reads import KINDS, RegistryReads

log = structlog.get_logger(__name__)

#: A text that is typed; whole fleets are applied from files. Parsing a megabyte of YAML takes some seconds.
TEXT_CHARS_MAX: Final = 1_000_000
BODY_BYTES_MAX: Final = 4_194_304
CHECK_TIMEOUT_S: Final = 20.0
SAVE_TIMEOUT_S: Final = 60.0
EXPORT_TIMEOUT_S: Final = 60.0
#: Problems, changes, examples that are told.
TOLD_MAX: Final = 200

_SECTION_OF: Final[Mapping[str, str]] = {kind: section for section, kind in SECTIONS.items()}


class RegistryViews:
    """The views of one worker."""

    def __init__(self, host: Host, reads: RegistryReads, bench: Bench) -> None:
        self._host = host
        self._reads = reads
        self._bench = bench
        self._saving = asyncio.Lock()
        self._checks = asyncio.Semaphore(2)

    def mount(self, application: web.Application) -> None:
        """Add the routes to an aiohttp application that has not started."""
        view = functools.partial(wrapped, right=Right.READ, live=self._host.live)
        act = functools.partial(wrapped, right=Right.OPERATE, live=self._host.live)
        change = functools.partial(wrapped, right=Right.ENGINEER, live=self._host.live)
        get, post = application.router.add_get, application.router.add_post
        get("/api/registry", view(self.kinds))
        get("/api/registry.yaml", view(self.export, timeout_s=EXPORT_TIMEOUT_S))
        get("/api/registry/{kind}", view(self.documents))
        get("/api/registry/{kind}/{name}", view(self.show))
        get("/api/registry/{kind}/{name}/versions", view(self.versions))
        post("/api/registry/check", act(self.check, timeout_s=CHECK_TIMEOUT_S))
        post("/api/registry/plan", act(self.plan, timeout_s=SAVE_TIMEOUT_S))
        post("/api/registry/save", change(self.save, timeout_s=SAVE_TIMEOUT_S))

    # --- looking

    async def kinds(self, request: web.Request) -> web.Response:
        """Kinds of documents, in the order in which they depend on each other."""
        counts = await self._reads.counts()
        kinds = [{"kind": kind, "section": _SECTION_OF[kind], "count": counts[kind]} for kind in KINDS]
        return answer(
            {"kinds": kinds, "editing": self._editing(request), "in_files": not self._host.live().web.registry_editing}
        )

    async def documents(self, request: web.Request) -> web.Response:
        """Documents of a kind, by name."""
        kind = _kind(request)
        cursor, after = cursor_of(request), ""
        if cursor is not None:
            if len(cursor) != 1 or not isinstance(cursor[0], str) or "\0" in cursor[0]:
                bad("cursor is not one of ours")
            after = cursor[0]
        found = await self._reads.listed(kind, q=text_of(request, "q"), after=after, limit=limit_of(request))
        return answer(
            {
                "kind": kind,
                "documents": found["documents"],
                "next_cursor": pack([found["next"]]) if found["next"] else None,
                "at": self._host.clock.now_us(),
            }
        )

    async def show(self, request: web.Request) -> web.Response:
        """One document; of a parser the version in force, else the newest."""
        kind = _kind(request)
        found = await self._reads.document(kind, _name(request))
        if found is None:
            missing(f"the registry has no such {kind}")
        # A changed source is a new version, which the registry numbers: with the number of this one it would be refused.
        found["yaml"] = _yaml(
            kind, {key: value for key, value in found["document"].items() if (kind, key) != ("parser", "version")}
        )
        for each in found.get("parser_versions", ()):
            each["yaml"] = _yaml(kind, each.pop("document"))
        return answer({**found, "editing": self._editing(request), "at": self._host.clock.now_us()})

    async def versions(self, request: web.Request) -> web.Response:
        """What became of a document, newest first, each as YAML."""
        kind, name = _kind(request), _name(request)
        stream = text_of(request, "stream") or f"{kind}/{name}"
        if stream != f"{kind}/{name}" and not stream.startswith(f"{kind}/{name}@"):
            bad("stream is the document's own, of a parser with its version: parser/name@2")
        found = await self._reads.versions(stream)
        if not found:
            missing("nothing is known of it")
        for each in found:
            document = each.pop("document")
            each["yaml"] = "" if document is None else _yaml(kind, document)
        return answer({"stream": stream, "versions": found, "at": self._host.clock.now_us()})

    async def export(self, _request: web.Request) -> web.Response:
        """Everything as a file that `preservarium registry apply` takes."""
        documents = await self._reads.export()

        def written() -> bytes:
            stream = io.StringIO()
            dump(documents, stream)
            return stream.getvalue().encode()

        # The writer of YAML is slow and pure Python.
        body = await asyncio.to_thread(written)
        headers = {**access.HEADERS, "Content-Disposition": 'attachment; filename="registry.yaml"'}
        return web.Response(body=body, content_type="application/yaml", charset="utf-8", headers=headers)

    # --- changing

    async def check(self, request: web.Request) -> web.Response:
        """What is wrong with a text by itself, and what its examples show: `{ok, problems, examples, took_ms}`. Nothing is read of the registry."""
        asked = await body_of(request, BODY_BYTES_MAX)
        only(asked, frozenset(("yaml",)))
        text = string(asked, "yaml", TEXT_CHARS_MAX)
        began_s = perf_counter()
        async with self._checks:
            try:
                file = await asyncio.to_thread(read_text, text)
            except RegistryFileError as e:
                return answer(_unreadable(e, began_s))
            shown: list[dict[str, Any]] = []
            if not file.errors:
                try:
                    shown = await self._proven(file)
                except Fatal as e:
                    raise Retry(str(e)) from None
        return answer(
            {
                "ok": not file.errors and all(each["ok"] for each in shown),
                "problems": _problems(file),
                "examples": shown,
                "took_ms": round((perf_counter() - began_s) * 1_000, 1),
            }
        )

    async def _proven(self, file: RegistryFile) -> list[dict[str, Any]]:
        parsers = file.documents.get("parser", [])
        docs = [{"version": 1, "rev": 0, **each} for each in parsers]
        shown: list[dict[str, Any]] = []
        for i, (doc, outcomes) in enumerate(zip(docs, await prove(docs, self._bench), strict=True)):
            for outcome in outcomes[: TOLD_MAX - len(shown)]:
                place = (*file.places["parser", i], "examples", outcome.index)
                shown.append(
                    {
                        "parser": doc["name"],
                        "index": outcome.index,
                        "ok": outcome.ok,
                        "differences": [*outcome.differences],
                        "line": file.line_of(place),
                    }
                )
        return shown

    async def plan(self, request: web.Request) -> web.Response:
        """What saving a text would change, or what forbids it."""
        return await self._apply(await body_of(request, BODY_BYTES_MAX), request, dry_run=True)

    async def save(self, request: web.Request) -> web.Response:
        """Save a text: the same event as by a file."""
        if not self._host.live().web.registry_editing:
            return answer({"error": "the registry is kept in files: web.registry_editing is off"}, 403)
        return await self._apply(await body_of(request, BODY_BYTES_MAX), request, dry_run=False)

    async def _apply(self, asked: dict[str, Any], request: web.Request, *, dry_run: bool) -> web.Response:
        only(asked, frozenset(("yaml", "actor", "expected")))
        text = string(asked, "yaml", TEXT_CHARS_MAX)
        actor = None if dry_run else actor_of(request, asked)
        expected = asked.get("expected", {})
        if not isinstance(expected, dict) or not all(type(version) is int for version in expected.values()):
            bad("expected is the version of each stream as it was looked at")
        if self._saving.locked():
            message = "another change is being made through this worker"
            raise Retry(message)
        settings = self._host.live()
        began_s = perf_counter()

        async def work() -> Applied:
            file = await asyncio.to_thread(read_text, text)
            try:
                return await apply_file(settings, file, actor=actor, dry_run=dry_run, expected=expected)
            except RegistryFileError as e:
                raise _Wrong(file) from e

        async with self._saving:
            try:
                # In a loop of its own: comparing with a fleet of 100,000 devices takes seconds, and this one carries the stream.
                done = await asyncio.to_thread(asyncio.run, work())
            except _Wrong as e:
                return answer({"ok": False, "problems": _problems(e.file), "changes": [], "saved": False}, 200)
            except RegistryFileError as e:
                return answer({**_unreadable(e, began_s), "changes": [], "saved": False}, 200)
            except ConflictError as e:
                return answer({"error": str(e)}, 409)
            except store.RegistryError as e:
                bad(str(e))
            except MigrationError as e:
                raise Retry(str(e)) from None
        if not dry_run:
            changed = [change.stream for change in done.plan.changes[:TOLD_MAX]]
            log.info("registry_saved_by_hand", actor=actor, changes=len(done.plan.changes), streams=changed[:20])
        return answer(
            {
                "ok": True,
                "problems": _problems(done.file),
                "changes": [_change(change) for change in done.plan.changes[:TOLD_MAX]],
                "counts": done.plan.counts(),
                "saved": not dry_run,
                "records": done.records,
                "relay_error": done.relay_error or None,
                "took_ms": round((perf_counter() - began_s) * 1_000, 1),
            }
        )

    def _editing(self, request: web.Request) -> bool:
        """Whether who asks may change it here."""
        return self._host.live().web.registry_editing and Right.ENGINEER in request[CALLER].rights


class _Wrong(Exception):
    """A text that cannot be saved; its problems are in the file."""

    def __init__(self, file: RegistryFile) -> None:
        super().__init__("the text has errors")
        self.file = file


def _kind(request: web.Request) -> str:
    kind = request.match_info["kind"]
    if kind not in KINDS:
        missing(f"there is no kind {kind[:40]!r}; there are {', '.join(KINDS)}")
    return kind


def _name(request: web.Request) -> str:
    name = request.match_info["name"]
    if len(name) > TEXT_MAX or "\0" in name:
        bad(f"a name is at most {TEXT_MAX} characters, without NUL")
    return name


def _yaml(kind: str, document: Mapping[str, Any]) -> str:
    """A document as a registry file of its own."""
    stream = io.StringIO()
    dump({kind: [{key: value for key, value in document.items() if key not in DERIVED}]}, stream)
    return stream.getvalue()


def _unreadable(error: RegistryFileError, began_s: float) -> dict[str, Any]:
    """A text that is no YAML: its error names the line as `registry.yaml:12: …`."""
    text = str(error).removeprefix("registry.yaml").lstrip(":")
    number, _, rest = text.partition(":")
    line = int(number) if number.strip().isdigit() else None
    problem = {"level": "error", "line": line, "path": "", "message": (rest if line else text).strip()}
    return {"ok": False, "problems": [problem], "examples": [], "took_ms": round((perf_counter() - began_s) * 1_000, 1)}


def _problems(file: RegistryFile) -> list[dict[str, Any]]:
    return [
        {"level": each.level, "line": each.line, "path": each.path, "message": each.message}
        for each in file.problems[:TOLD_MAX]
    ]


def _change(change: store.Change) -> dict[str, Any]:
    return {
        "stream": change.stream,
        "action": change.action,
        "version": change.expected_version,
        "fields": change.fields,
        "before": None if change.before is None else _yaml(change.kind, change.before),
        "after": None if change.after is None else _yaml(change.kind, change.after),
    }
