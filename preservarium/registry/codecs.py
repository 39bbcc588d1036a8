"""Codec bundles as the field publishes them: a script, and beside it a YAML or JSON file with examples.

Read are
- The Things Network's device repository: `NAME-codec.yaml` with `uplinkDecoder: {fileName, examples}`,
- ChirpStack's device profiles: `test_decode_NAME.json`, a list of `{name, input, expected}`,
- the LoRa Alliance's and ThingPark's `examples.json`: a list of `{type: uplink, description, input, output}`, or with
  `bytes`, `fPort` and `data` at the top.

Examples become those of `preservarium.domain.decoders.examples`: `{hex, port, output}`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

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
    return Bundle(script, kind, _text(script), published(decoder.get("examples")))


def published(entries: Any) -> list[dict[str, Any]]:
    """Published examples of uplinks as ours; what is none (a downlink's) is left out."""
    if isinstance(entries, dict):
        entries = entries.get("examples", [])
    found: list[dict[str, Any]] = []
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict) or entry.get("type", "uplink") != "uplink":
            continue
        given = entry["input"] if isinstance(entry.get("input"), dict) else entry
        payload = _hex(given.get("bytes"))
        output = next((entry[key] for key in ("output", "expected") if key in entry), None)
        if output is None and "data" in entry:
            output = {"data": entry["data"]}
        if payload is None or output is None:
            continue
        example: dict[str, Any] = {"hex": payload, "output": output}
        if isinstance(given.get("fPort"), int):
            example["port"] = given["fPort"]
        for key in ("recvTime", "time"):
            if isinstance(given.get(key), str):
                example["time"] = given[key]
        if isinstance(given.get("variables"), dict):
            example["variables"] = given["variables"]
        description = entry.get("description", entry.get("name"))
        if isinstance(description, str):
            example["description"] = description
        found.append(example)
    return found


def _beside(script: Path) -> list[dict[str, Any]]:
    """Examples in a file beside the script: one named after it, or one that names it."""
    stem = script.name.removesuffix(script.suffix)
    for name in (f"{stem}-codec.yaml", f"{stem}.yaml", f"{stem}.yml", f"{stem}.json", f"test_decode_{stem}.json"):
        if found := _examples_of(script.parent / name, script):
            return found
    alone = [p for p in script.parent.iterdir() if p.suffix.lower() in SCRIPT_SUFFIXES] == [script]
    if alone and (found := _examples_of(script.parent / "examples.json", script)):
        return found
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
    content = plain_file(path)
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
