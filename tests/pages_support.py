"""Stand-ins behind the pages of explore, registry, messages, tables, lineage and unknown devices, for tests in a browser."""

import math
import time
from types import SimpleNamespace

import orjson
from aiohttp import web

from preservarium.console.decoding import Bench, DecodeViews
from preservarium.console.explore import ExploreViews
from preservarium.console.messages import MessageViews
from preservarium.console.registry import RegistryViews
from preservarium.console.replies import answer
from preservarium.console.state import StateViews
from preservarium.console.tables import TableReader
from preservarium.console.unknown import UnknownViews
from preservarium.domain.registry.documents import source_hash
from preservarium.operations import browse
from preservarium.operations.dlq import Discarded, Letter, Redriven
from preservarium.registry.apply import Applied
from preservarium.serving.rights import Right, needs
from preservarium.stores import registry as store

AT = 1_760_000_000_000_000

SCRIPT = """function decodeUplink(input) {
  return {data: {temperature: ((input.bytes[0] << 8) | input.bytes[1]) / 10}};
}
"""


class Series:
    """What `SeriesReads` adds, made of the devices of the stand-in."""

    async def find_series(self, *, q="", type_name="", component="", label=None, after=None, limit):
        self._up()
        self.asked.append({"find": (q, type_name, component, label)})
        found = [
            {"device_id": d["device_id"], "name": d["name"], "type": d["type"], "connector_mode": "HTTP", "circular": None, **v}
            for d in self._devices()[:12]
            for v in d["values"]
            if v["value"] is not None and q.lower() in (d["name"] or "").lower() and type_name in ("", d["type"]) and component in ("", v["component_type"])
        ]  # fmt: skip
        return {"series": found[:limit], "next": None}

    async def components(self, limit):
        return [{"component_type": c, "unit": "", "series": n} for c, n in (("air-temperature", 60), ("pressure", 50))]

    async def curves_of(self, series, *, from_us, to_us, points, now_us):
        self.asked.append({"curves_of": [*series]})
        found = []
        for n, series_id in enumerate(series):
            step = (to_us - from_us) // 120
            at = [from_us + i * step for i in range(120) if not 40 <= i < 48]
            found.append(
                {
                    "series_id": series_id, "device_id": f"0018b200000{series_id // 10:05}", "name": f"Greenhouse {series_id // 10}", "component_type": "air-temperature",
                    "pin_position": "-1", "connector_mode": "HTTP", "unit": "°C", "circular": None, "level": "raw", "width_us": 0, "gap_us": 4 * step, "at": at,
                    "mean": [18 + n + 4 * math.sin(i / 9 + n / 3) for i in range(len(at))], "min": None, "max": None, "n": None, "quality": [1] * len(at),
                }
            )  # fmt: skip
        return found

    async def sparks(self, series, *, now_us):
        return {each: [None if 8 <= i < 12 else math.sin(i / 4 + each) for i in range(30)] for each in series}

    async def corrections(self, series, *, from_us, to_us, now_us):
        at = from_us + (to_us - from_us) // 3
        return [{"series_id": series[0], "timestamp": at, "value": 1.0, "quality": 3, "generation": 0, "revised": True}]

    async def news(self, device_id, *, since_us):
        news, self.news_to_tell = getattr(self, "news_to_tell", []), []
        return news


def _parser(version, status):
    return {
        "name": "ex-script", "version": version, "kind": "javascript", "status": status, "source": SCRIPT, "hash": source_hash("javascript", SCRIPT),
        "examples": [{"hex": "00d7", "port": 1, "output": {"data": {"temperature": 21.5}}}],
    }  # fmt: skip


class Registry:
    """A registry of a few documents."""

    def __init__(self):
        self.documents = {
            "parser": {"ex-script": _parser(2, "active")},
            "device": {"0018B20000000001": {"device_id": "0018B20000000001", "type": "EX-1", "name": "Greenhouse 1", "enabled": True}},
            "datatype": {"air-temperature": {"name": "air-temperature", "kind": "number", "unit": "°C", "fail_span": {"min": -50.0, "max": 85.0}}},
            "type": {"EX-1": {"name": "EX-1", "manufacturer": "Example", "parser": "ex-script", "mapping": {"temperature": {"component_type": "air-temperature", "unit": "°C"}}}},
        }  # fmt: skip

    async def counts(self):
        return {kind: len(self.documents.get(kind, {})) for kind in store.SECTIONS.values()}

    async def listed(self, kind, *, q, after, limit):
        found = [
            {"name": name, "about": d.get("type", d.get("kind")), "status": d.get("status"), "rev": 7, "updated_at": AT, "updated_by": "ann"}
            for name, d in sorted(self.documents.get(kind, {}).items())
            if q.lower() in name.lower() and name > after
        ]  # fmt: skip
        return {"documents": found[:limit], "next": None}

    async def document(self, kind, name):
        document = self.documents.get(kind, {}).get(name)
        if document is None:
            return None
        found = {"kind": kind, "name": name, "stream": store.stream_of(kind, document), "document": document, "rev": 7, "version": 2, "updated_at": AT, "updated_by": "ann"}  # fmt: skip
        if kind == "parser":
            found["parser_versions"] = [
                {"version": v, "status": s, "stream": f"parser/{name}@{v}", "updated_at": AT, "updated_by": "ann", "document": _parser(v, s)}
                for v, s in ((2, "active"), (1, "retired"))
            ]  # fmt: skip
        return found

    async def versions(self, stream):
        kind, _, name = stream.partition("/")
        document = self.documents[kind][name.partition("@")[0]]
        before = {**document, "name": "Greenhouse" if kind == "device" else document["name"]}
        return [
            {"version": 2, "at": AT + 60_000_000, "actor": "bob", "event": "Changed", "document": document},
            {"version": 1, "at": AT, "actor": "ann", "event": "Created", "document": before},
        ]

    async def parser(self, name, version=None):
        return self.documents["parser"].get(name)

    async def matching(self):
        return {kind: [*self.documents[kind].values()] for kind in ("parser", "type", "datatype")}

    async def registered(self, device_ids):
        return {each for each in device_ids if each in self.documents["device"]}

    async def export(self):
        return {kind: [*self.documents.get(kind, {}).values()] for kind in store.SECTIONS.values()}


class Table:
    key = "device address"

    def __init__(self, content):
        self.content = content

    def partitions(self):
        return sorted(self.content)

    def owned(self):
        return [p for p in sorted(self.content) if p != 1]

    def size(self, partition):
        return len(self.content[partition]), 4_096

    def peek(self, partition, key):
        return self.content[partition].get(key)

    def peek_items(self, partition):
        return iter(sorted(self.content[partition].items()))


def _record(n, value=None):
    value = orjson.dumps({"device_id": f"0018b200000{n:05}", "timestamp": AT + n, "readings": [{"component_type": "air-temperature", "value": 21.5 + n}]}) if value is None else value  # fmt: skip
    return SimpleNamespace(partition=n % 3, offset=1_000 + n, timestamp=AT // 1_000 + n, key=f"0018b200000{n:05}".encode(), value=value, headers=(("attempt", b"1"),))  # fmt: skip


TRACE = {
    "reading": {"device_id": "0018b20000000001", "connector_mode": "HTTP", "component_type": "air-temperature", "pin_position": "-1", "timestamp": AT},
    "derivation_id": "d", "raw": {"topic": "iot_raw_data", "partition": 3, "offset": 1000, "line": 0, "available": True, "kafka_time": AT, "connector": "http", "mode": "HTTP",
                                  "mqtt_topic": None, "port": 1, "device": "0018b20000000001", "received_at": AT, "attempt": 1, "meta": {}, "bytes": 3, "sha256": "ab" * 32, "b64": "ANf/"},
    "parser": {"parser": "ex-script@2", "kind": "javascript", "hash": "h", "status": "active"},
    "decoded": {"fields": [{"name": "temperature", "value": 21.5, "unit": "°C", "timestamp": None, "pin": None}], "more": 0, "refused": []},
    "mapping": {"field": "temperature", "by": "the type", "entry": {}, "component_type": "air-temperature", "pin_position": "-1", "value_before": 21.5, "unit_before": "°C", "unit": "°C",
                "kind": "number", "conversion": {"factor": "1", "offset": "0"}},
    "validated": {"value": 21.5, "value_text": None, "unit": "°C", "quality": 1, "quality_name": "good", "flags": [], "revised": False, "tests": {"range": "pass"}, "bounds": {"fail_min": -50.0}},
    "rederivation": {"status": "identical", "why": None, "text": "derived again from the raw bytes: bit by bit the same", "registry_as_of": AT, "differences": []},
    "windows": [], "rollups": [{"bucket": AT, "level": "1m"}], "alarms": [], "notices": [],
    "stored": {"postgres": {"value": 21.5, "value_text": None, "unit": "°C", "quality": 1, "generation": 0, "ingested_at": AT}, "clickhouse": {"row": None}},
}  # fmt: skip


def mount(application, host, refusals, reads, workers, monkeypatch, sent):
    """Mount the views on stand-ins; returns the registry, and what was asked of it."""
    registry = Registry()
    bench = Bench(host)
    tables = TableReader(
        lambda: {"device_configs": Table({0: {b"a1": b'{"device_id": "a1", "seen": 1760000000000000}'}, 1: {b"b1": b"7"}}), "series_states": Table({0: {}})},
        lambda key: 0 if key.startswith(b"a") else 1,
    )  # fmt: skip
    ExploreViews(host, reads).mount(application)
    StateViews(host, tables, workers, "worker-1:7").mount(application)
    application.router.add_get("/api/tables/{name}", needs(Right.OPEN, _page_of(tables)))
    MessageViews(host).mount(application)
    DecodeViews(host, registry, refusals, bench).mount(application)
    RegistryViews(host, registry, bench).mount(application)
    UnknownViews(host, registry, bench).mount(application)

    async def trace(request):
        return answer(TRACE)

    application.router.add_get("/api/trace", needs(Right.OPEN, trace))

    async def listed(settings):
        spans = [{"partition": p, "begin": 0, "end": 400} for p in range(3)]
        names = ("iot_raw_data", "iot_validated_data", "preservarium-device_configs-changelog")
        return [{"name": n, "full_name": n, "key": "device address", "record": "message", "partitions": 3, "records": 1_200, "spans": spans} for n in names]  # fmt: skip

    async def page(settings, name, wanted, at=None):
        sent.append(("browse", name, wanted, at))
        records = [_record(n) for n in range(40)] + [_record(40, b"\xff\x00"), _record(41, b"no json")]
        found = [browse.line_of(r) for r in records if wanted.takes(r)][: wanted.limit]
        return browse.Page(found, {0: 5, 1: 5} if at is None else None, 1_200, 3)

    async def live(settings, name, wanted):
        yield {"records": [], "left_out": 0}
        yield {"records": [browse.line_of(_record(77))], "left_out": 2}
        import asyncio

        await asyncio.sleep(60)

    monkeypatch.setattr(browse, "listed", listed)
    monkeypatch.setattr(browse, "page", page)
    monkeypatch.setattr(browse, "live", live)

    async def letters(settings, select):
        now = time.time_ns() // 1_000
        raw = orjson.dumps({"device": "stranger-1", "port": 1, "payload_b64": "ANc=", "connector": "http", "mode": "HTTP"}).decode()  # fmt: skip
        for n in range(3):
            yield Letter(f"0:{n}", {"code": "unknown_device", "device_id": "stranger-1", "first_seen": now, "topic": "iot_raw_data", "raw_partition": 0, "raw_offset": n, "raw": raw})  # fmt: skip

    async def redrive(settings, select, *, now_us, dry_run=False, discarded=False):
        sent.append(("redrive", [*select.codes], select.device, dry_run))
        return Redriven(matched=5, sent=4, already=1)

    async def discard(settings, select, *, actor, cause, now_us, dry_run=False):
        sent.append(("discard", [*select.codes], cause, actor, dry_run))
        return Discarded(matched=5, discarded=4, already=1)

    monkeypatch.setattr("preservarium.operations.dlq.letters", letters)
    monkeypatch.setattr("preservarium.operations.dlq.redrive", redrive)
    monkeypatch.setattr("preservarium.operations.dlq.discard", discard)

    async def apply_file(settings, file, *, actor, dry_run, expected):
        file.raise_for_errors()
        plan = store.Plan()
        for kind, documents in file.documents.items():
            for document in documents:
                name = document["device_id"] if kind == "device" else document["name"]
                before = registry.documents.get(kind, {}).get(name)
                after = document
                if kind == "parser":
                    after = {**document, "version": document.get("version") or (before["version"] + 1 if before else 1)}
                if before != after:
                    action = "create" if before is None else "change"
                    plan.changes.append(store.Change(kind, store.stream_of(kind, after), action, before, after, 2, "Changed", {"set": after}))  # fmt: skip
                if not dry_run:
                    registry.documents.setdefault(kind, {})[name] = after
        sent.append(("apply", actor, dry_run, [c.stream for c in plan.changes], expected))
        return Applied(file, plan, None, "none" if dry_run else "sent")

    monkeypatch.setattr("preservarium.console.registry.apply_file", apply_file)
    return SimpleNamespace(registry=registry, bench=bench)


def _page_of(tables):
    async def page(request: web.Request) -> web.Response:
        found = tables.page(request.match_info["name"], after=None, limit=25)
        return answer({"name": found["name"], "entries": found["entries"], "next_cursor": None})

    return page
