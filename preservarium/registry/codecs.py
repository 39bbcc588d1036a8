"""Codec bundles as the field publishes them: a script, and beside it a YAML or JSON file with examples.

Read are
- The Things Network's device repository: `NAME-codec.yaml` with `uplinkDecoder: {fileName, examples}`, `downlinkEncoder` and
  `downlinkDecoder` likewise,
- ChirpStack's device profiles: `test_decode_NAME.json` and `test_encode_NAME.json`, a list of `{name, input, expected}`,
- the LoRa Alliance's and ThingPark's `examples.json`: a list of `{type: uplink, description, input, output}` (or `downlink-encode`,
  `downlink-decode`), or with `bytes`, `fPort` and `data` at the top; so do files `*.examples.json` in its folder `examples`. The script beside it is the one that
  `package.json` names, else `index.js` or `main.js`.

JSON that is not quite (comments, hexadecimal numbers, a comma too many) is read as JSON5.

Examples become those of `preservarium.domain.decoders.examples`: `{hex, port, output}`, and `{call, input, output}` for downlinks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from preservarium.domain.readings.instant import instant_us
from preservarium.domain.registry.checks import RegistryFileError
from preservarium.registry.yaml_tree import FILE_BYTES_MAX, plain_file

#: How a script's file name ends -> the kind of its parser.
SCRIPT_SUFFIXES: Final = {".js": "javascript", ".mjs": "javascript", ".cjs": "javascript", ".py": "python"}
DATA_SUFFIXES: Final = frozenset({".yaml", ".yml", ".json"})
#: Files beside a script that are opened to see whether they name it: a vendor's folder has some hundreds.
BESIDE_MAX: Final = 500


@dataclass(frozen=True, slots=True)
class Bundle:
    """A script and the examples that its publisher gives."""

    path: Path  #: of the script
    kind: str
    source: str
    examples: list[dict[str, Any]] = field(default_factory=list)


#: Files that a catalogue's checkout has at most: The Things Network's has some ten thousand.
FILES_MAX: Final = 200_000
#: Kinds of published examples -> the function that they call; uplinks are our own `hex`.
_CALLS: Final = {"downlink-encode": "encodeDownlink", "downlink-decode": "decodeDownlink"}


def scripts_in(folder: Path) -> Iterator[Path]:
    """What of a folder's files has examples as publishers write them: scripts, and YAML files that name one. Sorted, each codec once.

    A folder with `examples.json` or `driver.yaml` is one codec, of many scripts; elsewhere each script with examples beside it is one.

    Raises:
        RegistryFileError: there are more files than a catalogue has.
    """
    taken: set[Path] = set()
    for number, path in enumerate(sorted(folder.rglob("*"))):
        if number > FILES_MAX:
            message = f"{folder}: more than {FILES_MAX} files"
            raise RegistryFileError(message)
        if "node_modules" in path.parts or not path.is_file():
            continue
        if path.name in ("examples.json", "driver.yaml") or path.name.endswith(".examples.json"):
            home = path.parent.parent if path.parent.name == "examples" else path.parent
            script = main_script(home)
            if script is not None and home not in taken:
                taken.add(home)
                yield script
        elif path.name.endswith(("-codec.yaml", "-codec.yml")) and is_bundle(plain_file(path)):
            yield path
        elif path.suffix in SCRIPT_SUFFIXES and path.parent not in taken and path not in taken:
            stem = path.name.removesuffix(path.suffix)
            if any((path.parent / f"test_{way}_{stem}.json").is_file() for way in ("decode", "encode")):
                taken.add(path)
                yield path


def main_script(folder: Path) -> Path | None:
    """The script of a folder that is one codec: that of `package.json`, else `index.js` or `main.js`, else the only one."""
    names = ["index.js", "main.js"]
    manifest = folder / "package.json"
    if manifest.is_file():
        content = _loose(manifest)
        if isinstance(content, dict) and isinstance(content.get("main"), str):
            names.insert(0, content["main"])
    base = folder.resolve()
    for name in names:
        script = (base / name).resolve()
        if script.is_file() and script.is_relative_to(base) and script.suffix in SCRIPT_SUFFIXES:
            return folder / script.relative_to(base)
    alone = [p for p in folder.iterdir() if p.suffix in SCRIPT_SUFFIXES and not p.name.startswith("extractPoints")]
    return alone[0] if len(alone) == 1 else None


def _loose(path: Path) -> Any:
    """The content of a JSON file, JSON5 where it is none.

    Raises:
        RegistryFileError: it is neither, or is too large.
    """
    try:
        return plain_file(path)
    except RegistryFileError:
        text = _text(path)
        try:
            import json5
        except ImportError:
            raise
        try:
            return json5.loads(text)
        except ValueError as e:
            message = f"{path}: neither JSON nor JSON5: {str(e)[:200]}"
            raise RegistryFileError(message) from None


def is_bundle(content: Any) -> bool:
    """Whether a YAML or JSON file's content names a codec script."""
    decoder = content.get("uplinkDecoder") if isinstance(content, dict) else None
    return isinstance(decoder, dict) and isinstance(decoder.get("fileName"), str)


def load(path: Path, *, examples: bool = True) -> Bundle:
    """The bundle of a script, or of a YAML or JSON file that names one.

    Args:
        path: either of the two.
        examples: also look for examples; where only a payload is to be decoded, they cost more than that.

    Raises:
        RegistryFileError: a file cannot be read, or names no script beside it.
    """
    kind = SCRIPT_SUFFIXES.get(path.suffix.lower())
    if kind is not None:
        return Bundle(path, kind, _text(path), _beside(path) if examples else [])
    content = plain_file(path)
    if not is_bundle(content):
        message = f"{path}: it names no script (uplinkDecoder.fileName)"
        raise RegistryFileError(message)
    decoder = content["uplinkDecoder"]
    base = path.parent.resolve()
    script = (base / decoder["fileName"]).resolve()
    kind = SCRIPT_SUFFIXES.get(script.suffix.lower())
    if kind is None or not script.is_relative_to(base):
        message = f"{path}: {decoder['fileName']} is no script in its folder"
        raise RegistryFileError(message)
    found = published(decoder.get("examples"))
    for section, call in (("downlinkEncoder", "encodeDownlink"), ("downlinkDecoder", "decodeDownlink")):
        other = content.get(section)
        if isinstance(other, dict) and other.get("fileName") == decoder["fileName"]:
            found += _called(other.get("examples"), call)
    return Bundle(script, kind, _text(script), found)


def published(entries: Any) -> list[dict[str, Any]]:
    """Published examples as ours; what is none is left out."""
    if isinstance(entries, dict):
        entries = entries.get("examples", [])
    found: list[dict[str, Any]] = []
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        kind = entry.get("type", "uplink")
        example = None
        if kind in _CALLS:
            example = _call(entry, _CALLS[kind])
        elif kind == "downlink":
            # The older form of ThingPark's: what is encoded, and what comes of it.
            older = {"input": {"data": entry.get("data"), "fPort": entry.get("fPort")}}
            output = {key: entry[key] for key in ("bytes", "fPort", "errors", "warnings") if key in entry}
            example = _call({**older, "output": output}, "encodeDownlink") if "bytes" in entry else None
        elif kind == "uplink":
            example = _uplink(entry)
        if example is not None:
            description = entry.get("description", entry.get("name"))
            if isinstance(description, str):
                example["description"] = description
            found.append(example)
    return found


def _uplink(entry: dict[str, Any]) -> dict[str, Any] | None:
    given = entry["input"] if isinstance(entry.get("input"), dict) else entry
    payload = _hex(given.get("bytes"))
    output = next((entry[key] for key in ("output", "expected") if key in entry), None)
    if output is None and "data" in entry:
        output = {"data": entry["data"]}
    if payload is None or output is None:
        return None
    if not isinstance(output, dict) or not output.keys() & {"data", "errors"}:
        output = {"data": output}  # ThingPark's older signatures return the data alone
    example: dict[str, Any] = {"hex": payload, "output": output}
    if isinstance(given.get("fPort"), int):
        example["port"] = given["fPort"]
    for key in ("recvTime", "time"):
        # Some are no instants, and their codecs do not look at them.
        if isinstance(given.get(key), str) and instant_us(given[key]) is not None:
            example["time"] = given[key]
    if isinstance(given.get("variables"), dict):
        example["variables"] = given["variables"]
    return example


def _called(entries: Any, call: str) -> list[dict[str, Any]]:
    return [
        example
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict) and (example := _call(entry, call)) is not None
    ]


def _call(entry: dict[str, Any], call: str) -> dict[str, Any] | None:
    """An example of a downlink."""
    given = entry.get("input")
    output = entry.get("output", entry.get("expected"))
    if not isinstance(given, dict) or not output:
        return None
    if call == "decodeDownlink":
        payload = _hex(given.get("bytes"))
        if payload is None:
            return None
        given = {**given, "bytes": list(bytes.fromhex(payload))}
        if not isinstance(output, dict) or not output.keys() & {"data", "errors"}:
            output = {"data": output}
    return {"call": call, "input": given, "output": output}


def _beside(script: Path) -> list[dict[str, Any]]:
    """Examples in a file beside the script: one named after it, or one that names it."""
    stem = script.name.removesuffix(script.suffix)
    for name in (f"{stem}-codec.yaml", f"{stem}.yaml", f"{stem}.yml", f"{stem}.json"):
        if found := _examples_of(script.parent / name, script):
            return found
    decoding = _examples_of(script.parent / f"test_decode_{stem}.json", script)
    encoding = script.parent / f"test_encode_{stem}.json"
    if found := [*decoding, *(_called(_loose(encoding), "encodeDownlink") if encoding.is_file() else ())]:
        return found
    if main_script(script.parent) == script:
        if found := _examples_of(script.parent / "examples.json", script):
            return found
        older = sorted((script.parent / "examples").glob("*.examples.json"))[:BESIDE_MAX]
        if older:
            return [example for path in older for example in published(_loose(path))]
    for i, path in enumerate(sorted(script.parent.glob("*.y*ml"))):
        if i == BESIDE_MAX:
            break
        # Most of a vendor's files describe other devices: reading all of them as YAML would take minutes.
        if script.name in _text(path) and (found := _examples_of(path, script)):
            return found
    return []


def _examples_of(path: Path, script: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    content = _loose(path) if path.suffix == ".json" else plain_file(path)
    if not is_bundle(content):
        return published(content) if path.suffix == ".json" else []
    named = content["uplinkDecoder"]["fileName"] == script.name
    return published(content["uplinkDecoder"].get("examples")) if named else []


def _hex(given: Any) -> str | None:
    if isinstance(given, list) and all(isinstance(b, int) and 0 <= b <= 255 for b in given):
        return bytes(given).hex()
    if isinstance(given, str):
        text = given.removeprefix("0x").replace(" ", "")
        try:
            return bytes.fromhex(text).hex()
        except ValueError:
            return None
    return None


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            message = f"{path}: larger than {FILE_BYTES_MAX} bytes"
            raise RegistryFileError(message)
        # A byte order mark is no JavaScript; a comment in Latin-1 is common, and harms nothing.
        return path.read_bytes().decode("utf-8-sig", "replace")
    except OSError as e:
        message = f"{path}: {e.strerror or e}"
        raise RegistryFileError(message) from e
