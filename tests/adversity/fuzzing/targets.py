"""What reads what strangers write, by itself: decoders, parsers, envelopes, lines of topics, files. Pure calls, thousands a second."""

import contextlib
import gzip
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import cbor2
import orjson
from click.testing import CliRunner
from meter_messages import mbus
from record_fakes import RawRec

from fuzzing import samples
from fuzzing.mutate import Mutator, dumped
from fuzzing.run import Broken, Target, worded
from preservarium.__main__ import cli
from preservarium.connectors.base import Limits, refused_send
from preservarium.connectors.files import Columns, FileError, Position, Positions, Reader
from preservarium.connectors.mqtt import patterns_of, sends_of
from preservarium.domain import expressions
from preservarium.domain.alarms.action import parse_action
from preservarium.domain.commands.downlinks import DownlinkError, encoded, envelope
from preservarium.domain.commands.lines import parse_line
from preservarium.domain.decoders import examples
from preservarium.domain.decoders.base import encoding_of
from preservarium.domain.decoders.dsmr import crc16
from preservarium.domain.decoders.kinds import KINDS, compile_any, compile_parser
from preservarium.domain.decoders.scripts import ScriptParser, compile_script
from preservarium.domain.quality.checks import compile_checks
from preservarium.domain.quality.validation import Limits as QualityLimits
from preservarium.domain.quality.validation import new_state, validate
from preservarium.domain.readings.address import canonical_address
from preservarium.domain.readings.instant import instant_us
from preservarium.domain.readings.legacy import legacy_message
from preservarium.domain.readings.normalize import CompiledDevice, compile_device, normalize, standardize
from preservarium.domain.readings.number import number_of
from preservarium.domain.readings.units import canonical, conversion
from preservarium.domain.registry.checks import RegistryFileError
from preservarium.domain.tasks import employee_row, task_rows
from preservarium.embedded import running
from preservarium.errors import ReasonCode, Reject
from preservarium.extract.named import SourceError, mapping
from preservarium.operations.backtest import BacktestError, rules_of
from preservarium.registry import codecs
from preservarium.registry.file import read
from preservarium.settings import SettingsError, load
from preservarium.stores.registry import check
from preservarium.streaming.records import RECORD_BYTES_MAX, error_send, loads, parse_raw

NOW_US: Final = 1_795_993_300_000_000
LIMITS: Final = Limits(payload_bytes_max=100_000, record_bytes_max=1_000_000)
#: YAML with the lines of its values takes the library some 30 µs a character, so that larger files are slow, and no hang.
YAML_BYTES_MAX: Final = 16_384
DATATYPES: Final[dict[str, Any]] = {
    name: {"name": name, "rev": 1, "kind": kind, "unit": unit, **more}
    for name, kind, unit, more in (
        ("temperature", "number", "°C", {"fail_span": {"min": -60, "max": 85}}),
        ("humidity", "number", "%", {"fail_span": {"min": 0, "max": 100}}),
        ("energy", "number", "kWh", {"counter": {}}),
        ("battery_voltage", "number", "V", {}),
        ("wind_direction", "number", "°", {"circular": 360}),
        ("state", "text", "", {}),
        ("door", "boolean", "", {}),
    )
}  # fmt: skip
TYPE: Final[Any] = {
    "name": "t",
    "rev": 1,
    "manufacturer": "m",
    "parser": "p",
    "mapping": {"temp": {"component_type": "temperature"}},
}
DEVICE: Final[Any] = {"device_id": "d1", "rev": 1, "type": "t", "enabled": True}
FAR: Final = QualityLimits(future_skew_us=10**15, store_failed=False, series_max=500)
CHECKS: Final = compile_checks(None, DATATYPES.get)
#: Why normalize refuses a message that it understood as far as it goes.
OF_PAYLOADS: Final = frozenset(
    (ReasonCode.DECODE_FAILED, ReasonCode.DECODE_LIMIT, ReasonCode.MAPPING_FAILED, ReasonCode.VALUE_TYPE, ReasonCode.VALUE_NOT_FINITE, ReasonCode.TIMESTAMP_INVALID)
)  # fmt: skip
ENVELOPE: Final = frozenset(code for code in ReasonCode if code.startswith("envelope_")) | {
    ReasonCode.TIMESTAMP_INVALID
}


def why(e: Reject, codes: Iterable[ReasonCode]) -> str:
    """The reason of a refusal, whose code must be one of those that stand for this."""
    if e.code not in codes:
        message = f"code {e.code} does not belong here: {e}"
        raise Broken(message)
    return worded(str(e))


# --- decoders ---------------------------------------------------------------------------------------------------------


def document(kind: str, source: Any) -> Any:
    """A parser document."""
    return {"name": "p", "version": 1, "rev": 1, "status": "active", "hash": "h", "kind": kind, "source": source}


def compiled(kind: str, source: Any, decoder: Any = None) -> CompiledDevice:
    """A device with that parser."""
    return compile_device(DEVICE, TYPE, document(kind, source), DATATYPES.get, decoder)


def becomes(raw: Any, device: CompiledDevice) -> str | None:
    """A raw message through normalize and validate: what comes out can be sent, and each refusal says why."""
    try:
        message, refused = normalize(raw, device, NOW_US)
    except Reject as e:
        return why(e, OF_PAYLOADS)
    for each in refused:
        why(each, OF_PAYLOADS)
    line = orjson.loads(orjson.dumps(message))
    outcome = validate(line, CHECKS, new_state(), FAR)
    for failure in outcome.failures:
        worded(failure.text)
    orjson.dumps(line)
    return None


def _mended(kind: str, data: bytes, m: Mutator) -> Any:
    """A payload whose checksum is right more often than chance would have it, so that what is behind is read."""
    if kind == "mbus" and m.often(0.8):
        return mbus(data[19:-2][:230])
    if kind == "dsmr" and m.often(0.7) and (end := data.rfind(b"!")) >= 0:
        return data[: end + 1] + (b"%04X\r\n" % crc16(data[: end + 1]) if m.often(0.5) else b"")
    return data


def _payload(kind: str, given: Sequence[bytes], m: Mutator) -> Any:
    if kind in {"json", "senml", "network"}:
        trees = [tree for tree in map(_loaded, given) if tree is not None]
        if trees and m.often(0.6):
            text = m.json(trees)
            # Between the stages JSON is data; as bytes it is where a device has sent it so.
            tree = _loaded(text) if m.often(0.5) else None
            return text if tree is None else tree
    if kind == "senml_cbor" and m.often(0.6):
        try:
            return m.data([cbor2.dumps(m.tree([cbor2.loads(one) for one in given]))], most=1)
        except (cbor2.CBOREncodeError, OverflowError, UnicodeEncodeError, RecursionError):
            pass
    data = _mended(kind, m.data(given), m)
    return data.decode("utf-8", "replace") if m.often(0.1) else data


def _loaded(data: bytes) -> Any:
    """What the envelope's reader makes of a text; None where it is none."""
    try:
        return loads(data)
    except Reject:
        return None


def decoder(kind: str, share: int) -> Target:
    """Payloads of a kind, for all sources that its samples have."""
    found: list[tuple[CompiledDevice, list[bytes], list[int | None]]] = []
    by_source: dict[bytes, list[samples.Sample]] = {}
    for sample in samples.payloads()[kind]:
        by_source.setdefault(orjson.dumps(sample.source), []).append(sample)
    for given in by_source.values():
        found.append((compiled(kind, given[0].source), [s.payload for s in given], [s.port for s in given]))

    def make(m: Mutator) -> Any:
        device, given, ports = m.one(found)
        meta = {"time": m.one((None, 1_717_243_200, "2024-06-01T12:00:00Z", "x", 2**70))} if m.often(0.1) else {}
        port = m.one(ports) if m.often(0.9) else m.one((None, 0, 1, 2, 255))
        if kind == "network" and m.often(0.7):
            # Beside the bytes that the device sent, as the envelopes put it.
            meta["decoded"] = m.tree([tree for tree in map(_loaded, given) if tree is not None])
        return device, {**examples.raw_message(_payload(kind, given, m), device="d1", port=port), "meta": meta}

    return Target(f"decoder {kind}", share, make, lambda given: becomes(given[1], given[0]))


def parser(kind: str, share: int) -> Target:
    """Sources of a kind of parser, damaged; what can be compiled is given a payload."""
    given = samples.payloads()[kind]
    sources = [sample.source for sample in given]
    data = [sample.payload for sample in given]

    def make(m: Mutator) -> Any:
        variables = (
            m.tree([{"gain": 2, "aliases": {"1": "a"}}, {"time_zone": "Europe/Berlin"}]) if m.often(0.2) else None
        )
        return m.tree(sources), variables, m.one(data), m.one((None, 1, 2))

    def run(given: Any) -> str | None:
        source, variables, payload, port = given
        try:
            made = compile_parser(document(kind, source), variables)
        except Reject as e:
            return why(e, (ReasonCode.NO_PARSER,))
        becomes(
            examples.raw_message(_loaded(payload) if kind == "network" else payload, device="d1", port=port),
            compiled(kind, {}, made),
        )
        return None

    return Target(f"parser {kind}", share, make, run)


def script_results() -> Target:
    """What parser scripts return, as JSON text."""
    parsers = [
        compile_script({"kind": kind, "name": "p", "version": 3, "source": "…"}, {})
        for kind in ("javascript", "python")
    ]
    devices = [compiled("json", {}, parser) for parser in parsers]
    raw = examples.raw_message(b"\1\2", device="d1")

    def run(given: Any) -> str | None:
        which, text = given
        try:
            fields = parsers[which].fields(text)
            message, refused = standardize(raw, devices[which], fields)
        except Reject as e:
            return why(e, OF_PAYLOADS)
        for each in refused:
            why(each, OF_PAYLOADS)
        orjson.dumps(message)
        return None

    return Target(
        "script results",
        15_000,
        lambda m: (int(m.often(0.5)), m.json(samples.SCRIPT_RESULTS).decode("utf-8", "replace")),
        run,
    )


def script_arguments() -> Target:
    """Raw messages on their way to a script."""
    parsers = [
        compile_script({"kind": kind, "name": "p", "version": 3, "source": "…"}, {})
        for kind in ("javascript", "python")
    ]

    def make(m: Mutator) -> Any:
        record = RawRec(m.json(samples.ENVELOPES), b"d1")
        return m.one(parsers), parse_raw(record, "iot_raw_data", 0, payload_bytes_max=100_000)[0]

    def run(given: tuple[ScriptParser, list[Any]]) -> str | None:
        for raw in given[1]:
            try:
                orjson.loads(given[0].arguments(raw))
            except Reject as e:
                return why(e, (ReasonCode.TIMESTAMP_INVALID,))
        return None if given[1] else "no message"

    return Target("script arguments", 10_000, make, run)


# --- envelopes and lines of topics --------------------------------------------------------------------------------------


def raw_records() -> Target:
    """Records of iot_raw_data, which anyone may write who may write to Kafka."""
    trees = [*samples.ENVELOPES, *samples.EVENTS, {"t": 1}]
    lines = [b"\n".join(map(dumped, samples.ENVELOPES[:3])), b"\x01\x02\xff", b'{"t":1}\n{"t":2}\n']

    def make(m: Mutator) -> Any:
        value = m.json(trees) if m.often(0.6) else m.data([*lines, *map(dumped, trees)])
        key = b"d1" if m.often(0.8) else m.one((None, b"", m.data([b"d1", b"70B3D57ED0000001"])))
        headers = (("generation", m.data([b"1", b"2147483648"])), ("attempt", m.data([b"2"])), ("x", b""))
        timestamp = 1_717_243_200_000 if m.often(0.9) else m.one((0, -1, 2**62, -(2**62)))
        return RawRec(value if m.often(0.98) else None, key, timestamp=timestamp, headers=headers)

    device = compiled("json", {})

    def run(record: Any) -> str | None:
        messages, errors = parse_raw(record, "iot_raw_data", 0, payload_bytes_max=100_000)
        for line in errors:
            if line["code"] not in ENVELOPE:
                raise Broken(f"code {line['code']}")
            worded(line["message"])
            if len(error_send(line).value or b"") > RECORD_BYTES_MAX:
                raise Broken("an error line larger than a record may be")
        for raw in messages:
            becomes(raw, device)
        if not messages and not errors:
            raise Broken("a record that vanishes")
        return None if messages else errors[0]["message"]

    return Target("records of iot_raw_data", 60_000, make, run)


def mqtt_messages() -> Target:
    """MQTT topics and what is published to them."""
    entrances = [
        (patterns_of(text), topic)
        for text, topic in (
            ("devices/{device}/up", "devices/d1/up"), ("lora/{mode}/{device}/{port}/#,gw/+", "lora/LoRaWAN/d1/2/x"), ("lora/{mode}/{device}/{port}/#,gw/+", "gw/a"),
            ("application/+/device/{device}/event/up,v3/+/devices/{device}/up", "application/7/device/0101010101010101/event/up"), ("v3/+/devices/{device}/up", "v3/app@ttn/devices/soil-1/up"), ("#", "x"),
            ("#", "tele/plug/SENSOR"), ("#", "stat/plug/POWER1"), ("shellies/#", "shellies/a/relay/0/power"), ("zigbee2mqtt/#", "zigbee2mqtt/kitchen/lamp"), ("#", "hall/sensor/t/state"),
            ("#", "homie/5/a/b/c"), ("#", "homeassistant/sensor/a/state"), ("owntracks/+/{device}", "owntracks/ann/phone"), ("ruuvi/#", "ruuvi/a/CBB8334C884F"), ("+/data", "352093081452251/data"),
        )
    ]  # fmt: skip
    trees = [*samples.EVENTS, *samples.ENVELOPES, {"temperature": 21.5}]

    def make(m: Mutator) -> Any:
        patterns, topic = m.one(entrances)
        if m.often(0.3):
            topic = m.text([topic, *(other for _, other in entrances)])
        return patterns, topic, m.json(trees) if m.often(0.8) else m.data([b"\1\2\3", *map(dumped, trees)])

    def run(given: Any) -> str | None:
        try:
            sends = sends_of(*given, LIMITS, "MQTT", lambda: NOW_US)
        except Reject as e:
            said = why(e, ENVELOPE)
            refused_send("mqtt", e, LIMITS, raw=given[2], device=None, source=given[1], index=0, now_us=NOW_US)
            return said
        _readable(sends)
        named = next(found for pattern in given[0] if (found := pattern.match(given[1])) is not None).get("device")
        own = None if named is None or given[1].startswith("v3/") else canonical_address(named).encode()
        if own is not None and any(send.key != own for send in sends):
            raise Broken("under one device's topic another one speaks")
        return None

    return Target("MQTT messages", 80_000, make, run)


def _readable(sends: Iterable[Any]) -> None:
    """What a connector writes is read again without an error."""
    for send in sends:
        if send.topic.name == "iot_raw_data":
            _, errors = parse_raw(
                RawRec(send.value, send.key), "iot_raw_data", 0, payload_bytes_max=LIMITS.payload_bytes_max
            )
            if errors:
                message = f"what a connector wrote is refused: {errors[0]['code']}: {errors[0]['message']}"
                raise Broken(message)
        elif send.value is not None:
            _command(orjson.loads(send.value))


def _command(line: Any) -> str | None:
    try:
        parse_line(line, device_id="d1", at=NOW_US, key="k")
    except Reject as e:
        return why(e, (ReasonCode.COMMAND_INVALID,))
    return None


def line(name: str, share: int, trees: Sequence[Any], codes: Iterable[ReasonCode], run: Callable[[Any], Any]) -> Target:
    """Lines of a topic that strangers write, as records bring them."""
    allowed = frozenset(codes) | ENVELOPE

    def read_line(text: bytes) -> str | None:
        try:
            run(loads(text))
        except Reject as e:
            return why(e, allowed)
        return None

    return Target(name, share, lambda m: m.json(trees), read_line)


def _action(given: Any) -> None:
    if not isinstance(given, dict):
        raise Reject(ReasonCode.ACTION_INVALID, "a line is an object")
    parse_action(given, "d1")


def _tasks(given: Any) -> None:
    key = orjson.dumps(given)[:200] if isinstance(given, str | None) else b'{"file_id":"f1"}'
    for row in task_rows(key, given, offset=5, index=0, recorded_at=NOW_US):
        orjson.dumps({name: str(value) if name == "version" else value for name, value in row.items()})


def _employee(given: Any) -> None:
    employee_row(b'{"employee_code":"e1"}', given, offset=5, index=0, recorded_at=NOW_US)


def encoder_results() -> Target:
    """What encoders of downlinks return, in the envelope of each network server."""
    downlink = {
        "downlink_id": "5ad3e8f49f2b4f5e8d5a0a0b0c0d0e0f",
        "device_id": "d1",
        "command_id": "c1",
        "attempt": 1,
        "expires_at": NOW_US,
        "confirmed": True,
    }

    def make(m: Mutator) -> Any:
        content = {"port": 2} if m.often(0.3) else {}
        return (
            m.json(samples.ENCODER_RESULTS).decode("utf-8", "replace"),
            content,
            m.one(("plain", "http", "chirpstack", "things_stack")),
        )

    def run(given: Any) -> str | None:
        text, content, shape = given
        try:
            envelope({**downlink, "format": shape}, encoded(text, content))
        except DownlinkError as e:
            return str(e)
        return None

    return Target("encoder results", 10_000, make, run)


def words() -> Target:
    """Numbers, instants and units out of texts."""
    numbers = ["21.5", "-1e5", "1.234,56", "1'000", "12345678901234567890"]
    instants = [
        "2024-06-01T12:00:00Z",
        "2024-06-01 12:00:00.123456789+02:00",
        "1717243200",
        "1717243200000",
        "20240601T120000Z",
        "2024-W22-6",
        "1.7172432e9",
    ]
    units = ["°C", "degF", "kWh", "m3/h", "µS/cm", "µmol/m²/s", "%RH", "mg/m**3", "km/h", "1/cm³", "W·h", "Ω"]

    def make(m: Mutator) -> Any:
        return (
            m.text(numbers, most=3),
            m.one((m.text(instants, most=3), m.tree([1_717_243_200, 1.5, "x"]))),
            m.text(units, most=2),
            m.text(units, most=1),
        )

    def run(given: Any) -> str | None:
        number, instant, unit, other = given
        found = (
            number_of(number, m_decimal := "," if "," in number else ".", "" if m_decimal == "," else ","),
            instant_us(instant),
            canonical(unit),
        )
        conversion(unit, other)
        return (
            "neither a number nor an instant nor a unit"
            if found[0] is None and found[1] is None and not found[2][1]
            else None
        )

    return Target("numbers, instants, units", 30_000, make, run)


def expression() -> Target:
    """Expressions of rules, parsers and commands, evaluated with numbers that allow no answer."""

    def make(m: Mutator) -> Any:
        value = m.one((0, 1, -1, 2.5, 1e308, 2**63, float("nan")))
        return m.text(samples.EXPRESSIONS, most=3), value, m.one((0, 3, -7.5, 2**40))

    def run(given: Any) -> str | None:
        text, x, y = given
        try:
            function = expressions.compile_expression(text, ("x", "y"))
        except expressions.ExpressionError as e:
            return str(e)
        with contextlib.suppress(expressions.ARITHMETIC_ERRORS):
            function(x, y)
        return None

    return Target("expressions", 40_000, make, run)


# --- files --------------------------------------------------------------------------------------------------------------


class Files:
    """Files that a person gives to a command, written anew for each input.

    Args:
        directory: where.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _written(self, name: str, data: bytes) -> Path:
        path = self._directory / name
        path.write_bytes(data)
        return path

    def rows(self) -> Target:
        """Back-filled CSV and NDJSON."""
        table, semicolons, tabs, utf16, latin = samples.CSV_FILES
        envelopes, named = samples.NDJSON_FILES
        entrances = [
            ("csv", Columns(device="device", time="time"), table), ("csv", Columns(device="device"), utf16), ("csv", Columns(device_id="d1", delimiter=";", payload="payload"), semicolons),
            ("csv", Columns(device="serial", delimiter=";", time="at", port="port", payload_hex="payload"), semicolons), ("csv", Columns(device="device", delimiter="\t", columns=("value",)), tabs),
            ("csv", Columns(device="device", encoding="cp1252"), latin), ("csv", Columns(device="device", encoding=encoding_of("utf-16")), utf16),
            ("ndjson", Columns(), envelopes), ("ndjson", Columns(device="serial", time="at"), named), ("ndjson", Columns(device="device", payload_b64="payload_b64"), envelopes),
        ]  # fmt: skip

        def make(m: Mutator) -> Any:
            form, columns, sample = m.one(entrances)
            data = m.data([sample] if m.often(0.9) else [*samples.CSV_FILES, *samples.NDJSON_FILES], most=3)
            if m.often(0.15):
                data = m.data([gzip.compress(data, 1)], most=1)
            return form, columns, data, Position(m.one((5, 40, 10_000)), 1) if m.often(0.05) else Position()

        def run(given: Any) -> str | None:
            form, columns, data, start = given
            taken, last = 0, "no row"
            try:
                reader = Reader(self._written(f"rows.{form}", data), form, columns, start)
            except FileError as e:
                return str(e)
            try:
                for row in reader.rows():
                    try:
                        _readable([reader.message(row, LIMITS, NOW_US)])
                        taken += 1
                    except Reject as e:
                        last = why(e, ENVELOPE)
                        refused_send(
                            "files", e, LIMITS, raw=row.raw, device=None, source="rows", index=row.line, now_us=NOW_US
                        )
            except FileError as e:
                last = worded(str(e))
            finally:
                reader.close()
            return None if taken else last

        return Target("rows of files", 40_000, make, run)

    def registry(self) -> Target:
        """Registry files: all that `registry apply` asks before it writes."""

        def make(m: Mutator) -> Any:
            sample = m.one((0, 0, 1))
            name = ("r.yaml", "r.json")[sample] if m.often(0.95) else "r.txt"
            return name, m.data([samples.REGISTRY_FILES[sample]], most=3)[:YAML_BYTES_MAX]

        def run(given: Any) -> str | None:
            try:
                file = read(self._written(*given))
            except RegistryFileError as e:
                return str(e)
            check(file)
            for problem in file.problems:
                worded(str(problem))
            return "; ".join(map(str, file.errors)) or None

        return Target("registry files", 8_000, make, run)

    def trees(self) -> Target:
        """Registry files whose YAML or JSON is whole, and whose documents are not."""
        sections = orjson.loads(dumped(_plain(self._written("whole.yaml", samples.REGISTRY_FILES[0]))))

        def run(given: Any) -> str | None:
            try:
                file = read(self._written("t.json", dumped(given)))
            except RegistryFileError as e:
                return str(e)
            check(file)
            for problem in file.problems:
                worded(str(problem))
            return "; ".join(map(str, file.errors)) or None

        return Target("registry documents", 25_000, lambda m: m.tree([sections], most=3), run)

    def rules(self) -> Target:
        """Files of `alarms backtest --rule`."""

        def run(data: bytes) -> str | None:
            try:
                rules_of(self._written("rules.json", data), ())
            except (RegistryFileError, BacktestError) as e:
                return str(e)
            return None

        trees = [_loaded(samples.REGISTRY_FILES[1])]
        return Target("rule files", 15_000, lambda m: m.json(trees), run)

    def parsers(self) -> Target:
        """Parser files and codec bundles: read, compiled, their examples run."""
        self._written("codec.js", b"function decodeUplink(i) { return {data: {a: 1}} }")

        def make(m: Mutator) -> Any:
            data = m.data(samples.PARSER_FILES, most=2)[:YAML_BYTES_MAX]
            return "p.json" if data.lstrip()[:1] in (b"[", b"{") and m.often(0.7) else "p.yaml", data

        def run(given: Any) -> str | None:
            from preservarium.cli.decode import _Refused, parser_file

            path = self._written(*given)
            try:
                doc = parser_file(path)
                made = compile_any(doc)
            except (_Refused, RegistryFileError, Reject) as e:
                return e.message if isinstance(e, _Refused) else str(e)
            if isinstance(made, ScriptParser):
                codecs.load(self._directory / "codec.js")
                _, outcomes = examples.ask(doc)
            else:
                outcomes = examples.run(doc)
            said = [worded(text) for outcome in outcomes for text in outcome.differences]
            return said[0] if said else None

        return Target("parser files", 8_000, make, run)

    def environments(self) -> Target:
        """`.env` files."""

        def run(data: bytes) -> str | None:
            os.environ["PRESERVARIUM_ENV_FILE"] = str(self._written("env", data))
            try:
                load()
            except SettingsError as e:
                for secret in ("p%40w", "p@w", "secret-1", "u:p@"):
                    if secret in str(e):
                        raise Broken(f"a secret is told: {e}") from None
                return str(e)
            finally:
                os.environ["PRESERVARIUM_ENV_FILE"] = os.devnull
            return None

        return Target(".env files", 6_000, lambda m: m.data(samples.ENVIRONMENTS, most=3), run)

    def notes(self) -> Target:
        """Saved positions, the note of a running system, and the setting that names columns: a damaged one is none."""
        note = {
            "pid": 1,
            "started_at": "x",
            "state": "running",
            "web": "",
            "addresses": {},
            "variables": {"A": "b"},
            "secretive": [],
        }
        position = {
            "path": "/a",
            "fingerprint": "x",
            "fingerprint_bytes": 1,
            "offset": 1,
            "line": 1,
            "rows": 1,
            "refused": 0,
        }
        columns = ["file_id=id, stage=step", "a = b,c=d"]
        rows = self._written("some.csv", b"a\n1\n")
        positions = Positions(self._directory)

        def run(given: tuple[bytes, bytes, str]) -> str | None:
            self._written(running.FILE, given[0])
            positions._file(rows).write_bytes(given[1])
            running.find(self._directory)
            positions.load(rows)
            try:
                mapping(given[2])
            except SourceError as e:
                return str(e)
            return None

        return Target(
            "notes and positions", 5_000, lambda m: (m.json([note]), m.json([position]), m.text(columns)), run
        )

    def commands(self) -> Target:
        """The command line itself, with files of all kinds: an exit code and words, never a traceback."""
        given = (
            (("decode", "--batch"), "batch.ndjson", samples.BATCH_FILES),
            (("decode", "--format", "senml", "--readings", "--json"), "payload.json", [s.payload for s in samples.payloads()["senml"]]),
            (("decode", "--format", "influx", "--text"), "payload.txt", [s.payload for s in samples.payloads()["influx"]]),
            (("decode", "--hex", "0102", "--codec"), "codec.yaml", samples.PARSER_FILES[:4]),
            (("registry", "check"), "r.yaml", samples.REGISTRY_FILES), (("simulate", "--devices", "2", "--print-devices", "--registry"), "s.yaml", samples.REGISTRY_FILES),
            (("connect", "files", "--dry-run", "--device", "device"), "rows.csv", samples.CSV_FILES), (("connect", "files", "--dry-run"), "rows.ndjson", samples.NDJSON_FILES),
            (("connect", "files", "--dry-run"), "rows.ndjson.gz", [gzip.compress(data) for data in samples.NDJSON_FILES]), (("decoders", "test"), "p.yaml", samples.PARSER_FILES[:4]),
        )  # fmt: skip

        def make(m: Mutator) -> Any:
            arguments, name, data = m.one(given)
            return arguments, name, m.data(data, most=2)[:YAML_BYTES_MAX]

        def run(given: Any) -> str | None:
            arguments, name, data = given
            result = CliRunner().invoke(cli, [*arguments, str(self._written(name, data))])
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise result.exception
            if result.exit_code not in (0, 1, 2):
                raise Broken(f"exit code {result.exit_code}")
            return worded(result.output) if result.exit_code else None

        return Target("command line", 1_500, make, run)


def _plain(path: Path) -> Any:
    from preservarium.registry.yaml_tree import plain_file

    return plain_file(path)


#: Kind of parser -> inputs of the run at length: payloads, sources.
SHARES: Final[Mapping[str, tuple[int, int]]] = {
    "table": (90_000, 40_000), "json": (60_000, 30_000), "senml": (45_000, 2_000), "senml_cbor": (35_000, 2_000), "cayenne_lpp": (35_000, 1_000), "csv": (50_000, 15_000), "bthome": (35_000, 1_000),
    "influx": (50_000, 6_000), "network": (40_000, 10_000), "mbus": (20_000, 1_000), "sparkplug_b": (45_000, 6_000), "dsmr": (20_000, 1_000),
}  # fmt: skip
assert SHARES.keys() == KINDS.keys()


def targets(directory: Path) -> list[Target]:
    """All of them.

    Args:
        directory: where files are written.
    """
    files = Files(directory)
    return [
        *(decoder(kind, payloads) for kind, (payloads, _) in SHARES.items()),
        *(parser(kind, sources) for kind, (_, sources) in SHARES.items()),
        script_results(), script_arguments(), encoder_results(), raw_records(), mqtt_messages(),
        line("lines of device_commands", 25_000, samples.COMMANDS, [ReasonCode.COMMAND_INVALID], _command_line),
        line("lines of alarm_actions", 20_000, samples.ACTIONS, [ReasonCode.ACTION_INVALID], _action),
        line("lines of decoded_iot_data", 15_000, samples.LEGACY, [ReasonCode.LEGACY_INVALID], lambda g: legacy_message(g, received_at=NOW_US, partition=0, offset=5, index=0)),
        line("lines of task_events", 20_000, samples.TASKS, [], _tasks), line("lines of employees", 15_000, samples.TASKS, [], _employee),
        words(), expression(), files.rows(), files.registry(), files.trees(), files.rules(), files.parsers(), files.environments(), files.notes(), files.commands(),
    ]  # fmt: skip


def _command_line(given: Any) -> None:
    parse_line(given, device_id="d1", at=NOW_US, key="k")
