"""`preservarium decode` and `preservarium decoders`: try a parser on a payload, run parsers' examples."""

import binascii
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click
import orjson

from preservarium.cli.output import print_json
from preservarium.domain.decoders import KINDS, Decoded, Decoder, ParserError, compile_parser, examples
from preservarium.domain.device import DeviceDoc, DeviceTypeDoc, ParserDoc
from preservarium.domain.errors import Reject
from preservarium.domain.instant import instant_us
from preservarium.domain.normalize import compile_device, standardize
from preservarium.domain.reading import RawMessage
from preservarium.registry_file import RegistryFileError, plain_file, read, source_hash

#: Compiled codecs kept in a batch run, which goes through thousands of examples of some hundreds of files.
CODECS_MAX: Final = 1_000


class _Refused(click.ClickException):
    """What was asked for cannot be used: one line, exit 2."""

    exit_code = 2


def parser_file(path: Path, kind: str = "auto") -> ParserDoc:
    """A parser document from a file: a parser file (`kind`, `source`, `examples`), or a bare source of `kind`.

    Raises:
        click.ClickException: it cannot be read, or is of no known kind.
    """
    try:
        content = plain_file(path)
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
    if not isinstance(doc["kind"], str) or doc["kind"] not in KINDS:
        message = f"{path}: kind {doc['kind']!r} is not one of {', '.join(sorted(KINDS))}"
        raise _Refused(message)
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


def _guessed(source: dict[str, Any]) -> str:
    """The kind of a bare source, by what only that kind has."""
    if "ports" in source or any(
        "type" in f or "repeat" in f for f in source.get("fields") or [] if isinstance(f, dict)
    ):
        return "table"
    return "json" if "fields" in source or "each" in source else "table"


def parser_of(codec: str, kind: str) -> ParserDoc:
    """The parser of a path, or of a format that needs no file (`--format senml`).

    Raises:
        click.ClickException: see `parser_file`.
    """
    if codec:
        return parser_file(Path(codec), kind)
    if kind == "auto":
        message = (
            "give --codec FILE, or --format of a format that needs none (senml, json, cayenne_lpp, bthome, influx, …)"
        )
        raise _Refused(message)
    return {
        "name": kind, "version": 1, "rev": 0, "kind": kind, "status": "draft", "source": {}, "hash": source_hash(kind, {}),
    }  # fmt: skip


def as_data(decoded: list[Decoded]) -> dict[str, Any]:
    """Decoded fields as one object; several of one name as a list, in their order."""
    counts: dict[str, int] = {}
    for field in decoded:
        counts[field.name] = counts.get(field.name, 0) + 1
    data: dict[str, Any] = {}
    for field in decoded:
        if counts[field.name] == 1:
            data[field.name] = field.value
        else:
            data.setdefault(field.name, []).append(field.value)
    return data


def decode_one(decoder: Decoder, doc: ParserDoc, raw: RawMessage, *, readings: bool) -> dict[str, Any]:
    """What `decode` prints for one payload."""
    result: dict[str, Any] = {"data": {}, "warnings": [], "errors": []}
    try:
        decoded = decoder.decode(raw)
        result["data"] = as_data(decoded)
        if readings:
            device: DeviceDoc = {"device_id": raw["device"], "rev": 0, "type": doc["name"], "enabled": True}
            kind: DeviceTypeDoc = {"name": doc["name"], "rev": 0, "manufacturer": "", "parser": doc["name"]}
            compiled = compile_device(device, kind, doc, lambda name: None, decoder)
            done = standardize(raw, compiled, decoded)
            result["readings"] = done.message["readings"]
            result["warnings"] += [str(r) for r in done.refused]
    except Reject as e:
        result["errors"].append(f"{e.code}: {e}")
        if readings:
            result["readings"] = []
    return result


def _compiled(doc: ParserDoc, variables: dict[str, Any] | None) -> Decoder:
    try:
        return compile_parser(doc, variables)
    except (Reject, ParserError) as e:
        raise _Refused(str(e)) from None


@click.command("decode")
@click.option("--codec", "-c", default="", help="Parser file (YAML or JSON).")
@click.option(
    "--format", "kind", default="auto", show_default=True, type=click.Choice(["auto", *sorted(KINDS)]),
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
    """Decode a payload: {"data": …, "warnings": …, "errors": …}.

    Exit code 1 where the payload is refused, 2 where the parser or the arguments cannot be used.
    """
    if batch is not None:
        sys.exit(_batch(batch, codec, kind, readings=readings))
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
            payload = orjson.loads(payload)
        except orjson.JSONDecodeError as e:
            message = f"{json_file}: {e}"
            raise _Refused(message) from None
    at = instant_us(time_text) if time_text else examples.RECEIVED_AT_US
    if at is None:
        message = f"--time: {time_text!r} is no instant"
        raise click.UsageError(message)
    doc = parser_of(codec, kind)
    decoder = _compiled(doc, _variables(variables))
    result = decode_one(decoder, doc, examples.raw_message(payload, port=port, received_at=at), readings=readings)
    print_json(result)
    sys.exit(1 if result["errors"] else 0)


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


def _batch(path: str, codec: str, kind: str, *, readings: bool) -> int:
    """Decode every line; 1 where any is refused. A line that cannot be used gives an error, and the run goes on."""
    docs: dict[str, ParserDoc | str] = {}
    decoders: dict[str, Decoder] = {}
    worst = 0
    with click.open_file(path, "rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            result = _batch_line(line, codec, kind, docs, decoders, readings=readings)
            worst |= bool(result["errors"])
            click.echo(orjson.dumps(result, option=orjson.OPT_NON_STR_KEYS))
    return worst


def _batch_line(
    line: bytes,
    codec: str,
    kind: str,
    docs: dict[str, ParserDoc | str],
    decoders: dict[str, Decoder],
    *,
    readings: bool,
) -> dict[str, Any]:
    try:
        item = orjson.loads(line)
        path = str(item.get("codec") or codec)
        if "hex" in item:
            payload: Any = bytes.fromhex(item["hex"])
        else:
            payload = item["json"]
        if path not in decoders:
            if len(decoders) >= CODECS_MAX:
                decoders.clear()
            doc = parser_of(path, kind)
            docs[path] = doc
            decoders[path] = _compiled(doc, item.get("variables"))
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, click.ClickException) as e:
        text = e.message if isinstance(e, click.ClickException) else f"{type(e).__name__}: {e}"
        return {"data": {}, "warnings": [], "errors": [text]}
    known = docs[path]
    assert not isinstance(known, str)
    raw = examples.raw_message(payload, port=item.get("port"))
    return decode_one(decoders[path], known, raw, readings=readings)


@click.group("decoders")
def decoders_group() -> None:
    """Parsers: prove them by their examples."""


@decoders_group.command("test")
@click.argument("target", default="examples")
@click.option("--registry", type=click.Path(dir_okay=False), default="examples/registry.yaml", show_default=True,
              help="Registry file in which a NAME is looked up.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def test(target: str, registry: str, as_json: bool) -> None:
    """Run the examples of parsers: of a file, of all parser files in a folder, or of the parser NAME.

    Exit code 1 where an example does not hold, 2 where a parser cannot be used.
    """
    report: list[dict[str, Any]] = []
    for doc, place in _targets(target, registry):
        outcomes = examples.run(doc)
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
            if isinstance(content, dict) and "kind" in content and "source" in content:
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
