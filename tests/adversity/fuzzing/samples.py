"""What is damaged: payloads with their parsers, messages, lines and files as they come. Published ones (tests/cases, examples) where there are."""

from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import cbor2
import orjson
from meter_messages import METRICS, RECORDS, mbus, payload, telegram
from network_messages import B64, CHIRPSTACK_V3, CHIRPSTACK_V4, TTN

from preservarium.registry.yaml_tree import plain_file

ROOT: Final = Path(__file__).parents[3]
CASES: Final = ROOT / "tests/cases"
#: Of the 68 sensor types that are one language, every so many is enough.
EVERY: Final = 6


class Sample(NamedTuple):
    """A payload that a parser takes."""

    source: Any
    payload: bytes
    port: int | None = None


def _jsonl(path: Path) -> list[Any]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def _of_file(path: Path) -> list[tuple[str, Sample]]:
    """(kind, sample) of each example of a parser file."""
    doc = plain_file(path)
    found = []
    for example in doc["examples"]:
        if "hex" in example:
            data = bytes.fromhex(example["hex"])
        else:
            data = orjson.dumps(example["json"]) if "json" in example else example["text"].encode()
        found.append((doc["kind"], Sample(doc["source"], data, example.get("port"))))
    return found


@cache
def payloads() -> dict[str, list[Sample]]:
    """Kind of parser -> payloads that it takes."""
    found: dict[str, list[Sample]] = {}
    files = [*sorted((ROOT / "examples/decentlab").glob("*.yaml"))[::EVERY], *sorted((CASES / "table").glob("*.yaml"))]
    files += [ROOT / "examples" / name for name in ("csv/logger.yaml", "json/power-meter.yaml", "json/weather-station.yaml", "tables/tracker.yaml")]  # fmt: skip
    for path in files:
        for kind, sample in _of_file(path):
            found.setdefault(kind, []).append(sample)
    for case in _jsonl(CASES / "doors/text.jsonl"):
        data = bytes.fromhex(case["hex"]) if "hex" in case else case["text"].encode()
        found.setdefault(case["parser"]["kind"], []).append(Sample(case["parser"].get("source", {}), data))
    packs = [case["pack"] for case in _jsonl(CASES / "senml/rfc8428.jsonl")]
    found.setdefault("senml", []).extend(Sample({}, orjson.dumps(pack)) for pack in packs)
    found["senml_cbor"] = [Sample({}, cbor2.dumps(labelled(pack))) for pack in packs]
    found["cayenne_lpp"] = [Sample({}, bytes.fromhex(t)) for t in ("03670110056700ff", "0167ffd7067104d2fb2e0000", "01880 6765ff2960a0003e8".replace(" ", ""), "0073272906020000")]  # fmt: skip
    found["bthome"] = [Sample({}, bytes.fromhex(t)) for t in ("4002c40903bf13", "40016104138a011a01", "44 0a 13 8a 14", "4053 0c 48656c6c6f20576f726c6421", "400c02 0c3a 0102")]  # fmt: skip
    found["influx"] += [
        Sample({}, b'room,channel=2,site=a\\ b temperature=21.5,co2=612i,n=5u,on=t,label="Lab \\"3\\"" 1717243200000000000\nm f=1'),
        Sample({"measurement": False, "pin_tag": "channel", "precision": "s"}, b"# c\nm,channel=1 a=1,b=-2.5e3 1717243200\r\nm,channel=2 a=3 1717243260\n"),
    ]  # fmt: skip
    found["mbus"] = [Sample({}, mbus(RECORDS)), Sample({}, mbus(bytes.fromhex("066d1e2d0adf2c00027b2e01")))]
    found["sparkplug_b"] = [Sample({}, payload(*METRICS)), Sample({"aliases": {"1": "a", "2": {"name": "b", "type": "Int16"}}}, payload(METRICS[0], METRICS[1]))]  # fmt: skip
    found["dsmr"] = [Sample({}, telegram().encode())]
    found["json"] += [
        Sample({"time": "at", "time_zone": "Europe/Berlin"}, orjson.dumps([{"at": f"2026-10-25 0{h}:30:00", "t": [1, 2.5, None]} for h in (1, 2, 2, 3)])),
        Sample({"fields": [{"path": "ENERGY.Power"}, {"path": "V", "scale": 0.1}]}, b'{"ENERGY":{"Power":[52,5]},"V":[2350]}'),
    ]  # fmt: skip
    found["csv"].append(
        Sample({"time": "at", "time_zone": "America/St_Johns"}, b"at,t\n2026-11-01 01:30:00,1\n2026-11-01 01:10:00,2\n")
    )
    decoded = [
        (c["message"]["object"], {})
        for c in _jsonl(CASES / "envelopes/published.jsonl")
        if "object" in c.get("message", ())
    ]
    decoded += [
        ({"t": {"value": 21.5, "unit": "V"}, "list": [1, {"a": "x"}]}, {}),
        ({"a": {"b": [3]}}, {"fields": [{"path": "a.b", "name": "c"}]}),
    ]
    found["network"] = [Sample(source, orjson.dumps(one)) for one, source in decoded if one is not None]
    return found


#: SenML's labels in CBOR (RFC 8428, 6).
_LABELS: Final = {"bver": -1, "bn": -2, "bt": -3, "bu": -4, "bv": -5, "bs": -6, "n": 0, "u": 1, "v": 2, "vs": 3, "vb": 4, "s": 5, "t": 6, "ut": 7, "vd": 8}  # fmt: skip


def labelled(pack: Any) -> Any:
    """A SenML pack with the labels that it has in CBOR."""
    if not isinstance(pack, list):
        return pack
    return [{_LABELS.get(k, k): v for k, v in record.items()} if isinstance(record, dict) else record for record in pack]  # fmt: skip


ENVELOPES: Final[list[Any]] = [
    {"device": "d1", "payload": {"temperature": 21.5, "humidity": 48}},
    {"device": "70B3D57ED0000001", "payload_b64": B64, "port": 2, "mode": "LoRaWAN", "meta": {"rssi": -80, "time": "2024-06-01T12:00:00Z"}, "topic": "a/b", "experiment_id": "e1"},
    {"device": "d1", "payload": [{"n": "t", "v": 1}], "received_at": 1_717_243_200_000_000},
    [{"device": "d1", "payload": {"t": 1}}, {"device": "d2", "payload": 5}, {"device": None, "payload": "x"}],
]  # fmt: skip
#: What platforms publish in JSON (tests/cases/envelopes).
PUBLISHED: Final[list[Any]] = [
    case["message"]
    for case in map(orjson.loads, (CASES / "envelopes/published.jsonl").read_bytes().splitlines())
    if "message" in case
]
EVENTS: Final[list[Any]] = [
    TTN, CHIRPSTACK_V4, CHIRPSTACK_V3, *PUBLISHED,
    {"end_device_ids": {"device_id": "a"}, "join_accept": {"session_key_id": "x"}}, {"deviceInfo": {"devEui": "0101010101010101"}, "margin": 7, "batteryLevel": 90.5},
    {"deviceInfo": {"devEui": "0101010101010101"}, "queueItemId": "5ad3e8f4-9f2b-4f5e-8d5a-0a0b0c0d0e0f", "acknowledged": True},
    {"deviceInfo": {"devEui": "0101010101010101"}, "queueItemId": "5ad3e8f4-9f2b-4f5e-8d5a-0a0b0c0d0e0f", "downlinkId": 1},
    {"end_device_ids": {"device_id": "a", "dev_eui": "0004A30B001C0530"}, "correlation_ids": ["preservarium:downlink:5ad3e8f49f2b4f5e8d5a0a0b0c0d0e0f"], "downlink_failed": {"error": {"message_format": "no gateway"}, "downlink": {"correlation_ids": []}}},
]  # fmt: skip
COMMANDS: Final[list[Any]] = [
    {"command": "fan_on", "fields": {"fan": 1}, "port": 2, "confirmed": True, "confirm": {"component_type": "fan", "equals": 1}, "timeout_s": 60, "tries": 3, "expires_s": 600, "priority": 5, "idempotency_key": "k1", "actor": "ann", "at": 1_717_243_200_000_000, "device_id": "d1"},
    {"kind": "cancel", "command_id": "c1", "device_id": "d1"}, {"kind": "wake", "device_id": "d1"}, {"command": "x", "payload": {"a": 1}, "confirm": "delivered"}, {"payload_b64": "AQI=", "port": 1, "confirm": {"component_type": "fan", "field": "fan"}},
    {"kind": "report", "device_id": "d1", "downlink_id": "5ad3e8f49f2b4f5e8d5a0a0b0c0d0e0f", "report": "sent", "reason": "x"}, {"command": "x", "confirm": {"expr": "fan > 0 and light < 2"}},
]  # fmt: skip
ACTIONS: Final[list[Any]] = [
    {"action": "acknowledge", "device_id": "d1", "rule": "hot", "pin_position": "-1", "actor": "ann", "at": 1_717_243_200_000_000, "comment": "seen", "alarm_id": "a1", "action_id": "x1"},
    {"action": "shelve", "device_id": "d1", "rule": "hot", "actor": "ann", "at": 1_717_243_200_000_000, "duration_s": 600, "one_shot": True},
    {"action": "comment", "device_id": "d1", "rule": "hot", "actor": "ann", "at": 1_717_243_200_000_000, "comment": "µ"},
]  # fmt: skip
LEGACY: Final[list[Any]] = [
    {"mac_address": "AA:BB", "mode": "LoRa", "data_point_label": "temp", "pin": 3, "value": "21.5", "unit": "C", "original_topic": "a/b", "timestamp": 1_717_243_200},
    {"mac_address": "AA:BB", "value": 1, "timestamp": "2024-06-01T12:00:00"},
]  # fmt: skip
_TASK: Final = {"file_id": "f1", "stage": "review", "status": "done", "employee_code": "e1", "employee_name": "Ann", "assigned_at": 1_717_243_200_000_000, "started_at": None, "completed_at": "2024-06-01T13:00:00Z", "updated_at": 1_717_243_200, "task_id": "t1", "event_id": "1717243200000000-17"}  # fmt: skip
TASKS: Final[list[Any]] = [
    _TASK, {"payload": {"before": None, "after": _TASK, "op": "c", "ts_ms": 1_717_243_200_000, "source": {"lsn": 17, "txId": 5}}}, {"before": _TASK, "after": None, "op": "d", "source": {"file": "mysql-bin.1", "pos": 4}},
    {"employee_code": "e1", "name": "Ann", "email": "a@example.org", "department": "x", "active": True, "updated_at": 1_717_243_200, "deleted": False}, {"file_id": "f1", "deleted": True, "assigned_at": 1_717_243_200_000_000},
]  # fmt: skip
SCRIPT_RESULTS: Final[list[Any]] = [
    {"data": {"temperature": {"value": 21.5, "unit": "°C"}, "list": [1, {"a": 2}], "on": True}, "warnings": ["w"], "errors": []}, {"errors": ["unknown FPort"]}, {"bytes": [1, 2, 255], "fPort": 5, "warnings": []},
    [{"name": "t", "value": 21.5, "unit": "V", "timestamp": 1_717_243_200, "pin": 1}, {"name": "x", "value": "on"}], {"a": 1, "b": {"c": [1, 2]}}, [1, 2, 3],
]  # fmt: skip
#: What encoders return.
ENCODER_RESULTS: Final[list[Any]] = [
    *SCRIPT_RESULTS[2:3],
    {"bytes": [1.0, 0], "port": 3},
    SCRIPT_RESULTS[-1],
    SCRIPT_RESULTS[1],
]
EXPRESSIONS: Final = (
    "x * 9 / 5 + 32", "x ** 2 if x > 0 else -x", "bits(x, 0, 3) | (y << 2)", "round(log(x), 2)", "min(x, y, 10) % 3", "signed(x, 16) and not y", "'a' if x in (1, 2) else 'b'", "angle_diff(x, y, 360)", "~x & 0xff", "max(abs(x), sqrt(y))",
)  # fmt: skip
CSV_FILES: Final = (
    b'device,time,temperature,note\r\nd1,2024-06-01T12:00:00Z,21.5,"a ""b"",\r\nc"\r\n007,1717243200,-1e1,x\r\n',
    b'serial;at;payload;port\nd1;1717243200;"{""t"":1}";2\nd2;;0102;\n', "\ufeffdevice\tvalue\nd1\t1\n".encode(), "device,value\nd1,Küche\n".encode("utf-16"), b"device,value\nd1,K\xfcche\n",
)  # fmt: skip
NDJSON_FILES: Final = (
    b'{"device":"d1","payload":{"t":1},"received_at":1717243200000000}\n{"device":"d2","payload_b64":"AQI="}\n\n', b'{"serial":"d1","at":"2024-06-01T12:00:00Z","temperature":21.5}\n{"serial":7,"at":5}\n',
)  # fmt: skip
REGISTRY_FILES: Final = (
    b"""manufacturers:
  - name: Acme
datatypes:
  - {name: temperature, kind: number, unit: degC, fail_span: {min: -40, max: 125}, suspect_span: {min: -20, max: 80}}
  - {name: state, kind: text, unit: ""}
parsers:
  - {name: acme, kind: table, source: {endian: little, fields: [{name: t, type: i16, div: 10, unit: "\xc2\xb0C"}, {name: f, expr: t * 2}]}, examples: [{hex: "d700", expect: {t: 21.5, f: 43.0}}]}
  - {name: js, kind: json, source: {fields: [{path: "a.b[*].c", name: t, unit: V}], time: at}}
recipients:
  - {name: ops, channel: mail, address: ops@example.org, quiet_hours: [{since: "22:00", until: "06:00"}], timezone: Europe/Berlin}
rules:
  - {name: hot, kind: high, component_type: temperature, severity: major, threshold: 60, deadband: 2, on_delay_s: 10, recipients: [ops]}
  - {name: odd, kind: expression, component_type: temperature, severity: minor, inputs: {a: {component_type: temperature}}, expression: "a > 5 and a < 9", inputs_max_age_s: 60}
device_types:
  - {name: T1, manufacturer: Acme, parser: acme, mapping: {t: {component_type: temperature}, battery: null}, rules: [hot]}
experiments:
  - {name: run-1, started_at: 2024-05-01T14:00:00.25+02:00}
devices:
  - {device_id: 70B3D57BA0000001, type: T1, experiment_id: run-1, rules: {hot: null}, variables: {gain: 2}}
  - &a {device_id: d2, type: T1, rules: {hot: {threshold: 5}}}
  - {<<: *a, device_id: d3}
""",
    b'{"datatypes": [{"name": "t", "kind": "number", "unit": "V"}], "rules": [{"name": "hot", "component_type": "t", "kind": "rate", "severity": "major", "threshold": 3, "per_s": 60, "window_s": 60}]}',
)  # fmt: skip
PARSER_FILES: Final = (
    b"name: p\nversion: 1\nkind: table\nsource:\n  fields:\n    - {name: a, type: u16, scale: 0.1, unit: V}\n    - repeat: end\n      fields: [{name: b, type: u8, bits: [{name: x, bit: 0}]}]\nexamples:\n  - hex: '0102 01'\n    expect: {a: 25.8, x: true}\n  - {hex: '00', reject: true}\n",
    b"kind: json\nsource:\n  time: t\n  each: [{path: rows, pin: '{n}', fields: [{path: v, unit_path: u}]}]\nexamples:\n  - json: {t: 1717243200, rows: [{v: 1, u: V, n: 2}]}\n    expect: {v: {value: 1, unit: V, pin: '2'}}\n",
    b"kind: csv\nsource: {delimiter: ';', decimal: ',', columns: [t, {name: x, unit: V, pin: 1}], time: t}\nexamples:\n  - text: '2024-06-01T12:00:00Z;1,5'\n    expect: {x: 1.5}\n",
    b"fields:\n  - {name: a, type: u8}\n",
    b"uplinkDecoder:\n  fileName: codec.js\n  examples:\n    - {description: open, input: {fPort: 1, bytes: [1, 215]}, output: {data: {valve: On}}}\n",
    b'[{"type": "uplink", "description": "a", "input": {"bytes": "01d7", "fPort": 1}, "output": {"data": {"a": 1}}}]',
)  # fmt: skip
BATCH_FILES: Final = (
    b'{"hex": "4002c40903bf13", "format": "bthome"}\n{"json": [{"n": "t", "v": 1, "u": "Cel"}], "format": "senml", "time": "2024-06-01T12:00:00Z"}\n{"hex": "01", "port": 1, "format": "cayenne_lpp", "variables": {"a": 1}}\n{"hex": "zz"}\n',
)  # fmt: skip
ENVIRONMENTS: Final = (
    b"PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS=a:9092,b:9092\nPRESERVARIUM_KAFKA__PARTITIONS=12\nPRESERVARIUM_POSTGRES__URL=postgresql://u:p%40w@h:5432/d?sslmode=verify-full\nPRESERVARIUM_WEB__OPERATORS=ann:secret-1,bob:secret-2\n",
    b"PRESERVARIUM_CLICKHOUSE__URL=https://u:p@h:8443\nPRESERVARIUM_MQTT__URL=mqtts://u:p@h:8883\nPRESERVARIUM_MQTT__SUBSCRIPTIONS=devices/{device}/up,$share/g/lora/{mode}/{device}/{port}/#\nPRESERVARIUM_HTTP__TOKEN='a b'\nKAFKA_INPUT_TOPIC=x\nBATCH_SIZE=5\n",
    b"PRESERVARIUM_NORMALIZE__PAYLOAD_BYTES_MAX=1000\nPRESERVARIUM_WEB__PUBLIC_URL=https://x.example.org\nPRESERVARIUM_WEB__LINK_TTL_S=1e3\nPRESERVARIUM_WINDOWS__SIZES_S=60,300\nexport PRESERVARIUM_LOG_LEVEL=\"info\" # c\n",
)  # fmt: skip
#: More of how clients of a port begin.
HEADS: Final = (
    b'POST /ingest?device=d1 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 7\r\n\r\n{"t":1}', b"GET /api/alarms?limit=5 HTTP/1.1\r\nHost: 127.0.0.1:6066\r\nAccept: */*\r\n\r\n",
    b"POST /ingest HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{}{}{\r\n0\r\n\r\n", b"GET /metrics HTTP/1.0\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
)  # fmt: skip
