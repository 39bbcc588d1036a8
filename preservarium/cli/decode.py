"""`preservarium decode` and `preservarium decoders`: try a parser on a payload, run parsers' examples.

Scripts run in the sandbox, as in the stream.
"""

import asyncio
import binascii
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click
import orjson

from preservarium import topics
from preservarium.cli.output import print_json
from preservarium.cli.system import load, load_alone
from preservarium.domain.decoders import examples
from preservarium.domain.decoders.base import Decoded, Decoder, ParserError, sorted_out
from preservarium.domain.decoders.kinds import KINDS, compile_any
from preservarium.domain.decoders.mbus import MbusDecoder
from preservarium.domain.decoders.scripts import FUNCTIONS, ScriptParser
from preservarium.domain.readings import json_text
from preservarium.domain.readings.instant import instant_us
from preservarium.domain.readings.normalize import Normalized, compile_device, standardize
from preservarium.domain.readings.number import shown
from preservarium.domain.readings.reading import RawMessage
from preservarium.domain.registry.checks import RegistryFileError
from preservarium.domain.registry.device import DeviceDoc, DeviceTypeDoc, ParserDoc
from preservarium.domain.registry.documents import source_hash
from preservarium.errors import Reject, reason
from preservarium.registry import codecs
from preservarium.registry.file import read
from preservarium.registry.proving import prove
from preservarium.registry.yaml_tree import editor, parse, plain_file
from preservarium.sandbox.pool import Limits, Outcome, SandboxPool
from preservarium.stages.normalize import script_call, script_fields
from preservarium.streaming.records import parse_raw

if TYPE_CHECKING:
    from preservarium.operations.dlq import Letter

#: Compiled codecs kept in a batch run, which goes through thousands of examples of some hundreds of files.
CODECS_MAX: Final = 1_000
#: Lines of a batch whose scripts run in one round trip: their contexts are in the sandbox's memory together.
LINES_AT_ONCE: Final = 500
#: A person waits, not a stream: a script may take so many times the stream's limits.
PATIENCE: Final = 10

#: Names of the field for what a JavaScript codec is written to; their signatures are told apart by themselves.
DIALECTS: Final = ("ttn", "chirpstack", "thingpark")
FORMATS: Final = ("auto", *DIALECTS, *sorted({*KINDS, *FUNCTIONS}))


class _Refused(click.ClickException):
    """What was asked for cannot be used: one line, exit 2."""

    exit_code = 2


def parser_file(path: Path, kind: str = "auto", *, with_examples: bool = True) -> ParserDoc:
    """A parser document from a file: a parser file (`kind`, `source`, `examples`), a script or a codec bundle
    (`preservarium.registry.codecs`), or a bare source of `kind`.

    Args:
        path: the file.
        kind: what it must be; auto: as it says.
        with_examples: also look for a codec's examples in files beside it.

    Raises:
        click.ClickException: it cannot be read, or is of no known kind.
    """
    try:
        if path.suffix.lower() in codecs.SCRIPT_SUFFIXES:
            return _bundle(codecs.load(path, examples=with_examples), kind)
        content = plain_file(path)
        if codecs.is_bundle(content):
            return _bundle(codecs.load(path), kind)
    except RegistryFileError as e:
        raise _Refused(str(e)) from None
    if isinstance(content, dict) and "kind" in content:
        doc = dict(content)
        if kind not in {"auto", doc["kind"]}:
            message = f"{path}: is of kind {doc['kind']}, not {kind}"
            raise _Refused(message)
    elif isinstance(content, dict):
        doc = {"kind": _guessed(content) if kind == "auto" else kind, "source": content}
    else:
        message = f"{path}: a parser is a mapping"
        raise _Refused(message)
    if not isinstance(doc["kind"], str) or doc["kind"] not in {*KINDS, *FUNCTIONS}:
        message = f"{path}: kind {doc['kind']!r} is not one of {', '.join(sorted({*KINDS, *FUNCTIONS}))}"
        raise _Refused(message)
    if doc["kind"] in FUNCTIONS and isinstance(doc.get("file"), str):
        try:
            named = codecs.load(path.parent / doc["file"], examples="examples" not in doc and with_examples)
        except RegistryFileError as e:
            raise _Refused(str(e)) from None
        doc["source"] = named.source
        doc.setdefault("examples", named.examples)
    doc.setdefault("source", {})
    return {
        "name": str(doc.get("name", path.stem)),
        "version": doc["version"] if isinstance(doc.get("version"), int) else 1,
        "rev": 0,
        "kind": doc["kind"],
        "status": "draft",
        "source": doc["source"],
        "hash": source_hash(doc["kind"], doc["source"]),
        "examples": doc.get("examples") or [],
    }


def _bundle(bundle: codecs.Bundle, kind: str) -> ParserDoc:
    if kind not in {"auto", bundle.kind} and not (kind in DIALECTS and bundle.kind == "javascript"):
        message = f"{bundle.path}: is {bundle.kind}, not {kind}"
        raise _Refused(message)
    return {
        "name": bundle.path.stem, "version": 1, "rev": 0, "kind": bundle.kind, "status": "draft",
        "source": bundle.source, "hash": source_hash(bundle.kind, bundle.source), "examples": bundle.examples,
    }  # fmt: skip


def _guessed(source: dict[str, Any]) -> str:
    """The kind of a bare source, by what only that kind has."""
    fields = source.get("fields")
    if "ports" in source or any(
        "type" in f or "repeat" in f for f in (fields if isinstance(fields, list) else ()) if isinstance(f, dict)
    ):
        return "table"
    return "json" if "fields" in source or "each" in source else "table"


def parser_of(codec: str, kind: str) -> ParserDoc:
    """The parser of a path, or of a format that needs no file (`--format senml`).

    Raises:
        click.ClickException: see `parser_file`.
    """
    if codec:
        return parser_file(Path(codec), kind, with_examples=False)
    if kind == "auto" or kind in DIALECTS or kind in FUNCTIONS:
        message = (
            "give --codec FILE, or --format of a format that needs none (senml, json, cayenne_lpp, bthome, influx, …)"
        )
        raise _Refused(message)
    return {
        "name": kind, "version": 1, "rev": 0, "kind": kind, "status": "draft", "source": {}, "hash": source_hash(kind, {}),
    }  # fmt: skip


def as_data(decoded: Sequence[Decoded]) -> dict[str, Any]:
    """Decoded fields as one object; several of one name as a list, in their order."""
    counts: dict[str, int] = {}
    for field in decoded:
        counts[field.name] = counts.get(field.name, 0) + 1
    data: dict[str, Any] = {}
    for field in decoded:
        if counts[field.name] == 1:
            data[field.name] = shown(field.value)
        else:
            data.setdefault(field.name, []).append(shown(field.value))
    return data


@dataclass(slots=True)
class _Task:
    """A payload to decode, with the parser to do it; or why it cannot be."""

    doc: ParserDoc | None
    parser: Decoder | ScriptParser | None
    raw: RawMessage | None
    refused: str = ""


def _tasks_done(tasks: Sequence[_Task], outcomes: Sequence[Outcome], *, readings: bool) -> Iterator[bytes]:
    """What is printed for each task: JSON. A script's result is printed as it returned it, but for `--readings`."""
    ran = iter(outcomes)
    for task in tasks:
        if task.parser is None or task.doc is None or task.raw is None:
            yield orjson.dumps({"data": {}, "warnings": [], "errors": [task.refused]})
            continue
        result: Any = {"data": {}, "warnings": [], "errors": []}
        decoded: Sequence[Decoded | Reject]
        try:
            if isinstance(task.parser, ScriptParser):
                outcome = next(ran)
                if outcome.text is not None:
                    if not readings:
                        yield _strict(outcome.text)
                        continue
                    returned = json_text.loads(outcome.text.encode())
                    result = returned if isinstance(returned, dict) else {"data": returned}
                decoded = script_fields(task.parser, outcome, task.raw["received_at"])
            else:
                decoded = task.parser.decode(task.raw)
                # A frame's records say more than its fields.
                result["data"] = (
                    task.parser.records(task.raw)
                    if isinstance(task.parser, MbusDecoder)
                    else as_data(sorted_out(decoded)[0])
                )
            _, refused = sorted_out(decoded)
            if readings:
                done = _readings(task.doc, task.parser, task.raw, decoded)
                result["readings"] = done.message["readings"]
                refused = [*done.refused]
            if refused:
                result["warnings"] = [*(result.get("warnings") or ()), *map(str, refused)]
        except (Reject, orjson.JSONDecodeError) as e:
            # What the script itself reports stands in its result already.
            if not result.get("errors"):
                result["errors"] = [f"{e.code}: {e}" if isinstance(e, Reject) else str(e)]
            if readings:
                result["readings"] = []
        yield json_text.dumps(result, not_finite="null")


def _strict(text: str) -> bytes:
    """A script's result as it returned it, but for numbers that are not finite: they are null to whoever reads JSON."""
    if "NaN" in text or "Infinity" in text:
        with suppress(orjson.JSONDecodeError, UnicodeEncodeError):
            return json_text.dumps(json_text.loads(text.encode()), not_finite="null")
    return text.encode()


def _readings(
    doc: ParserDoc, parser: Decoder | ScriptParser, raw: RawMessage, decoded: Sequence[Decoded | Reject]
) -> Normalized:
    device: DeviceDoc = {"device_id": raw["device"], "rev": 0, "type": doc["name"], "enabled": True}
    kind: DeviceTypeDoc = {"name": doc["name"], "rev": 0, "manufacturer": "", "parser": doc["name"]}
    return standardize(raw, compile_device(device, kind, doc, lambda name: None, parser), decoded)


class _Runner:
    """Decodes tasks, scripts among them in one round trip."""

    def __init__(self) -> None:
        limits = Limits.of(load_alone())
        # Each payload stands for itself here: the sandbox sets no version aside before many of them were tried.
        self._limits = replace(
            limits,
            cpu_s=limits.cpu_s * PATIENCE,
            wall_s=limits.wall_s * PATIENCE,
            hard_faults_max=limits.hard_faults_max * PATIENCE,
            soft_faults_max=1 << 62,
        )
        self._pool: SandboxPool | None = None

    async def run(self, tasks: Sequence[_Task], *, readings: bool) -> list[bytes]:
        """What is printed for each task.

        Raises:
            Fatal: there are scripts among them, and the sandbox does not start.
        """
        calls = []
        for task in tasks:
            if isinstance(task.parser, ScriptParser) and task.raw is not None:
                try:
                    calls.append(script_call(task.parser, task.raw))
                except Reject as e:
                    task.parser, task.refused = None, f"{e.code}: {e}"
        outcomes: list[Outcome] = []
        if calls:
            self._pool = self._pool or SandboxPool(self._limits)
            outcomes = await self._pool.run(calls)
        return list(_tasks_done(tasks, outcomes, readings=readings))

    async def close(self) -> None:
        """End the sandbox."""
        if self._pool is not None:
            await self._pool.close()


async def _run_one(task: _Task, *, readings: bool) -> bytes:
    runner = _Runner()
    try:
        (line,) = await runner.run([task], readings=readings)
        return line
    finally:
        await runner.close()


def _compiled(doc: ParserDoc, variables: dict[str, Any] | None) -> Decoder | ScriptParser:
    try:
        return compile_any(doc, variables)
    except (Reject, ParserError) as e:
        raise _Refused(str(e)) from None


def _failed(line: bytes) -> bool:
    """Whether a printed result says that the payload was refused."""
    try:
        result = orjson.loads(line) if b'"errors"' in line else None
    except orjson.JSONDecodeError:
        return True  # half a surrogate pair, or nesting without end: no stage could read it either
    return isinstance(result, dict) and bool(result.get("errors"))


@click.command("decode")
@click.option("--codec", "-c", default="", help="Parser file (YAML or JSON), script (.js, .py) or codec bundle.")
@click.option(
    "--format", "kind", default="auto", show_default=True, type=click.Choice(FORMATS),
    help="Kind of the parser; auto: as the file says.",
)  # fmt: skip
@click.option("--port", "-p", type=click.IntRange(0, 255), help="LoRaWAN fPort.")
@click.option("--hex", "hex_text", help="The payload, hexadecimal.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, allow_dash=True), help="The payload, a JSON file.")
@click.option("--text", "text_file", type=click.Path(dir_okay=False, allow_dash=True), help="The payload, a text file.")
@click.option(
    "--batch", type=click.Path(dir_okay=False, allow_dash=True),
    help='NDJSON lines {"codec": path, "port": n, "hex": h}; one line of JSON for each.',
)  # fmt: skip
@click.option("--time", "time_text", help="When the payload was received: ISO 8601.")
@click.option("--var", "variables", multiple=True, metavar="NAME=VALUE", help="A variable of the device.")
@click.option("--readings", is_flag=True, help="Also print the readings that the fields become.")
def decode(
    codec: str,
    kind: str,
    port: int | None,
    hex_text: str | None,
    json_file: str | None,
    text_file: str | None,
    batch: str | None,
    time_text: str | None,
    variables: tuple[str, ...],
    readings: bool,
) -> None:
    """Decode a payload: {"data": …, "warnings": …, "errors": …}; of a script, exactly what it returns.

    Exit code 1 where the payload is refused, 2 where the parser or the arguments cannot be used.
    """
    if batch is not None:
        sys.exit(asyncio.run(_batch(batch, codec, kind, readings=readings)))
    given = [x for x in (hex_text, json_file, text_file) if x is not None]
    if len(given) != 1:
        message = "give one of --hex, --json, --text, --batch"
        raise click.UsageError(message)
    payload: Any
    if hex_text is not None:
        try:
            payload = bytes.fromhex(hex_text)
        except ValueError as e:
            message = f"--hex: {e}"
            raise click.UsageError(message) from None
    else:
        with click.open_file(given[0], "rb") as file:
            data = file.read()
        payload = data.decode("utf-8", "replace") if text_file is not None else data
    if json_file is not None:
        try:
            payload = json_text.loads(payload)
        except orjson.JSONDecodeError as e:
            message = f"{json_file}: {e}"
            raise _Refused(message) from None
    at = instant_us(time_text) if time_text else examples.RECEIVED_AT_US
    if at is None:
        message = f"--time: {time_text!r} is no instant"
        raise click.UsageError(message)
    doc = parser_of(codec, kind)
    raw = examples.raw_message(payload, port=port, received_at=at)
    task = _Task(doc, _compiled(doc, _variables(variables)), raw)
    line = asyncio.run(_run_one(task, readings=readings))
    if isinstance(task.parser, ScriptParser) and not readings:
        click.echo(line)
    else:
        print_json(json_text.loads(line))
    sys.exit(1 if _failed(line) else 0)


def _variables(given: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            message = f"--var: {text!r} is not NAME=VALUE"
            raise click.UsageError(message)
        try:
            found[name] = orjson.loads(value)
        except orjson.JSONDecodeError:
            found[name] = value
    return found


async def _batch(path: str, codec: str, kind: str, *, readings: bool) -> int:
    """Decode every line; 1 where any is refused. A line that cannot be used gives an error, and the run goes on."""
    compiled: dict[bytes, tuple[ParserDoc, Decoder | ScriptParser]] = {}
    docs: dict[str, ParserDoc] = {}
    worst = 0
    runner = _Runner()
    try:
        with click.open_file(path, "rb") as lines:
            filled = (line for line in lines if line.strip())
            while part := list(itertools.islice(filled, LINES_AT_ONCE)):
                tasks = [_task(line, codec, kind, docs, compiled) for line in part]
                results = await runner.run(tasks, readings=readings)
                worst |= any(map(_failed, results))
                click.echo(b"\n".join(results))
    finally:
        await runner.close()
    return worst


def _task(
    line: bytes,
    codec: str,
    kind: str,
    docs: dict[str, ParserDoc],
    compiled: dict[bytes, tuple[ParserDoc, Decoder | ScriptParser]],
) -> _Task:
    try:
        item = json_text.loads(line)
        path, variables = str(item.get("codec") or codec), item.get("variables")
        payload = bytes.fromhex(item["hex"]) if "hex" in item else item["json"]
        given = item.get("time", item.get("recvTime"))
        at = examples.RECEIVED_AT_US if given is None else instant_us(given)
        if at is None:
            message = f"{given!r} is no instant"
            raise ValueError(message)
        key = orjson.dumps([path, item.get("format"), variables])
        if key not in compiled:
            if len(compiled) >= CODECS_MAX:
                compiled.clear()
                docs.clear()
            if path not in docs:
                docs[path] = parser_of(path, item.get("format") or kind)
            compiled[key] = docs[path], _compiled(docs[path], variables)
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, click.ClickException) as e:
        text = e.message if isinstance(e, click.ClickException) else reason(e)
        return _Task(None, None, None, text)
    doc, parser = compiled[key]
    return _Task(doc, parser, examples.raw_message(payload, port=item.get("port", item.get("fPort")), received_at=at))


@click.group("decoders")
def decoders_group() -> None:
    """Parsers: prove them by their examples."""


@decoders_group.command("test")
@click.argument("target", default="examples")
@click.option("--registry", type=click.Path(dir_okay=False), default="examples/registry.yaml", show_default=True,
              help="Registry file in which a NAME is looked up.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def test(target: str, registry: str, as_json: bool) -> None:
    """Run the examples of parsers: of a file, of all parser files and codec bundles in a folder, or of the parser NAME.

    Scripts run in the sandbox with the stream's limits.

    Exit code 1 where an example does not hold, 2 where a parser cannot be used.
    """
    report: list[dict[str, Any]] = []
    targets = list(_targets(target, registry))
    for (doc, place), outcomes in zip(targets, asyncio.run(_proven([d for d, _ in targets])), strict=True):
        report.append(
            {
                "parser": f"{doc['name']}@{doc['version']}",
                "file": place,
                "examples": len(outcomes),
                "failed": [{"example": o.index, "differences": list(o.differences)} for o in outcomes if not o.ok],
            }
        )
    failed = sum(len(entry["failed"]) for entry in report)
    total = sum(entry["examples"] for entry in report)
    if as_json:
        print_json({"parsers": report, "examples": total, "failed": failed})
    else:
        for entry in report:
            for failure in entry["failed"]:
                click.echo(f"{entry['parser']} ({entry['file']}): example {failure['example']} does not hold")
                for line in failure["differences"]:
                    click.echo(f"  {line}")
            if not entry["examples"]:
                click.echo(f"{entry['parser']} ({entry['file']}): has no examples")
        click.echo(f"{len(report)} parsers, {total} examples, {failed} do not hold")
    sys.exit(1 if failed else 0)


@decoders_group.command("add-example")
@click.option(
    "--from-error", "identity", required=True, metavar="ID", help="Error line, as `preservarium dlq list` names it."
)
@click.option("--codec", "-c", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Parser file, script or codec bundle that shall decode it.")  # fmt: skip
def add_example(identity: str, codec: Path) -> None:
    """Turn a payload that was refused into an example of the parser CODEC.

    What the parser makes of it now is what the example expects: look at it. A parser file (YAML with `kind`) gets it at the
    end of its `examples`; elsewhere it is printed.
    """
    from preservarium.operations.dlq import letter

    found = asyncio.run(letter(load(), identity))
    raw = _captured(found)
    doc = parser_file(codec, with_examples=False)
    task = _Task(doc, _compiled(doc, None), raw)
    example = asyncio.run(_example(task))
    example["description"] = f"{found.line['code']}: {found.line['message']}"[:200]
    if codec.suffix.lower() in {".yaml", ".yml"} and not codecs.is_bundle(plain_file(codec)):
        _append_example(codec, example)
        click.echo(f"{codec}: example {len(doc.get('examples') or [])} added.")
    else:
        print_json(example)


def _captured(found: "Letter") -> RawMessage:
    """The message of an error line.

    Raises:
        click.ClickException: its input is not kept, or is no message.
    """
    data = found.input
    if data is None:
        message = f"error {found.id} carries no payload of a device: it is of another stage, or was too large"
        raise _Refused(message)
    key = str(found.line["device_id"]).encode()
    record = _Kept(0, int(found.line.get("first_seen", 0)) // 1_000, key, data, ())
    messages, _ = parse_raw(record, topics.RAW.name, 0, payload_bytes_max=len(data))
    if len(messages) != 1:
        message = f"error {found.id}: its input is no message: {found.line.get('message')}"
        raise _Refused(message)
    return messages[0]


class _Kept(NamedTuple):
    """A record, as far as its input is kept."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]


async def _example(task: _Task) -> dict[str, Any]:
    """The example that expects what the parser makes of the task's payload now."""
    assert task.raw is not None
    raw, payload = task.raw, task.raw["payload"]
    at = datetime.fromtimestamp(raw["received_at"] // 1_000 / 1e3, UTC).isoformat(timespec="milliseconds")
    example: dict[str, Any] = {"hex": payload.hex()} if isinstance(payload, bytes) else {"json": payload}
    example["time"] = at.replace("+00:00", "Z")
    if raw["port"] is not None:
        example["port"] = raw["port"]
    if isinstance(task.parser, ScriptParser):
        result = orjson.loads(await _run_one(task, readings=False))
        broken = isinstance(result, dict) and any(str(e).startswith("script_") for e in result.get("errors") or ())
        return {**example, "reject": True} if broken else {**example, "output": result}
    try:
        decoded, _ = sorted_out(task.parser.decode(raw) if task.parser is not None else ())
    except Reject:
        return {**example, "reject": True}
    expect: dict[str, Any] = {}
    for field in decoded:
        entry: dict[str, Any] = {"value": shown(field.value)}
        if field.unit:
            entry["unit"] = field.unit
        if field.pin is not None:
            entry["pin"] = field.pin
        expect.setdefault(field.name, []).append(entry)
    return {**example, "expect": {n: entries[0] if len(entries) == 1 else entries for n, entries in expect.items()}}


def _append_example(path: Path, example: dict[str, Any]) -> None:
    """Put an example at the end of a parser file's, and leave the rest of the file as it is written."""
    yaml = editor()
    tree = parse(yaml, path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict) or "kind" not in tree:
        message = f"{path}: a bare source has no place for examples; give it `kind` and `source`"
        raise _Refused(message)
    if tree.get("examples") is None:
        tree["examples"] = []
    tree["examples"].append(example)
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8") as out:
        yaml.dump(tree, out)
    beside.replace(path)


async def _proven(docs: Sequence[ParserDoc]) -> list[list[examples.Outcome]]:
    # A failing example is a finding, not a reason to set its script aside.
    sandbox = SandboxPool(replace(Limits.of(load_alone()), hard_faults_max=1_000, soft_faults_max=1 << 62))
    try:
        return await prove(docs, sandbox)
    finally:
        await sandbox.close()


def _targets(target: str, registry: str) -> Iterator[tuple[ParserDoc, str]]:
    path = Path(target)
    if path.is_file():
        yield parser_file(path), str(path)
        return
    if path.is_dir():
        found = False
        for file in sorted(path.rglob("*.yaml")):
            content = plain_file(file)
            # A registry file in the folder is a mapping of sections, not a parser.
            if codecs.is_bundle(content) or (
                isinstance(content, dict) and "kind" in content and ("source" in content or "file" in content)
            ):
                found = True
                yield parser_file(file), str(file)
        if not found:
            message = f"{path}: there is no parser file in it"
            raise _Refused(message)
        return
    try:
        parsers = read(registry).documents.get("parser", [])
    except RegistryFileError as e:
        raise _Refused(str(e)) from None
    chosen = [p for p in parsers if p["name"] == target]
    if not chosen:
        message = f"{target}: neither a file, a folder, nor a parser in {registry}"
        raise _Refused(message)
    for parser in chosen:
        yield {"version": 1, "rev": 0, **parser}, registry  # type: ignore[typeddict-item]


commands: list[click.Command] = [decode, decoders_group]
