"""The declarative registry file: reading it, with what it names, and writing it.

What a file may say is in `preservarium/domain/registry/documents.py`. Reading finds everything that is wrong at once, with the line
where it stands; nothing of a file with an error is applied.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ruamel.yaml.scalarstring import LiteralScalarString

from preservarium.domain.registry.checks import (
    Place,
    RegistryFile,
    RegistryFileError,
    check_duplicates,
    check_shape,
    resembling,
)
from preservarium.domain.registry.documents import (
    DERIVED,
    SCRIPT_KINDS,
    SECTIONS,
    SOURCE_KINDS,
    Document,
    source_hash,
)
from preservarium.registry import codecs
from preservarium.registry.yaml_tree import PlainError, editor, line_of, load_tree, plain, plain_file


def read(path: str | Path) -> RegistryFile:
    """Read and check one file by itself: shapes, names, sources. References are checked by `check_references`.

    Never raises for what the file says: see `problems`.

    Raises:
        RegistryFileError: the file cannot be read, or is no YAML or JSON.
    """
    path = Path(path)
    tree = load_tree(path)
    result = RegistryFile(str(path), partial(line_of, tree))
    if tree is None:
        result.note((), "the file is empty")
        return result
    if not isinstance(tree, Mapping):
        result.note((), "a registry file is a mapping of sections")
        return result
    for section, entries in tree.items():
        kind = SECTIONS.get(section)
        if kind is None:
            close = resembling(str(section), SECTIONS)
            hint = f"did you mean {close}?" if close else f"there are {', '.join(SECTIONS)}"
            result.note((section,), f"unknown section; {hint}")
            continue
        result.sections.add(kind)
        if entries is None:
            continue
        if not isinstance(entries, list):
            result.note((section,), "a section is a list")
            continue
        result.documents.setdefault(kind, [])
        for i, entry in enumerate(entries):
            place = (section, i)
            try:
                document = check_shape(result, kind, place, plain(entry))
            except PlainError as e:
                result.note((*place, *e.path), str(e))
                continue
            if document is not None and (kind != "parser" or _load_source(result, place, document)):
                result.add(kind, place, document)
    check_duplicates(result)
    return result


def _load_source(registry: RegistryFile, place: Place, document: Document) -> bool:
    """Put the source in the place of `file`, and the hash beside it; False where there is none to be had, which is noted."""
    name = document.pop("file", None)
    if name is not None:
        base = Path(registry.path).parent.resolve()
        path = (base / name).resolve()
        if not path.is_relative_to(base):
            registry.note((*place, "file"), "leads out of the registry file's folder")
            return False
        try:
            if document["kind"] in SCRIPT_KINDS:
                _load_script(document, path)
            elif path.suffix in {".yaml", ".yml", ".json"}:
                content = plain_file(path)
                if isinstance(content, dict) and "source" in content and content.get("kind") == document["kind"]:
                    # A parser file: its source with its examples, as `preservarium decoders test` runs them.
                    if "examples" in content:
                        document.setdefault("examples", content["examples"])
                    content = content["source"]
                document["source"] = content
            else:
                document["source"] = path.read_text(encoding="utf-8")
        except RegistryFileError as e:
            registry.note((*place, "file"), str(e))
            return False
        except (OSError, UnicodeDecodeError) as e:
            registry.note((*place, "file"), f"{path}: {getattr(e, 'strerror', None) or 'not UTF-8'}")
            return False
    if document["kind"] in SCRIPT_KINDS and not isinstance(document.get("source"), str):
        registry.note((*place, "source"), f"a {document['kind']} parser's source is its text")
        return False
    if "source" not in document and document["kind"] in SOURCE_KINDS:
        registry.note(place, f"a parser of kind {document['kind']} needs `source` or `file`")
        return False
    document.setdefault("source", {})
    document["hash"] = source_hash(document["kind"], document["source"])
    return True


def _load_script(document: Document, path: Path) -> None:
    """Put the source and, where the document has none of its own, the published examples in.

    Raises:
        RegistryFileError: the file cannot be read, or is no script of this kind.
    """
    if path.suffix.lower() not in codecs.DATA_SUFFIXES | codecs.SCRIPT_SUFFIXES.keys():
        document["source"] = path.read_text(encoding="utf-8")
        return
    content = plain_file(path) if path.suffix.lower() in codecs.DATA_SUFFIXES else None
    if isinstance(content, dict) and isinstance(content.get("source"), str) and content.get("kind") == document["kind"]:
        document["source"] = content["source"]
        found = content.get("examples")
    else:
        bundle = codecs.load(path, examples="examples" not in document)
        if bundle.kind != document["kind"]:
            message = f"{path}: is {bundle.kind}, not {document['kind']}"
            raise RegistryFileError(message)
        document["source"] = bundle.source
        found = bundle.examples
    if found:
        document.setdefault("examples", found)


def dump(documents: Mapping[str, Iterable[Document]], stream: Any) -> None:
    """Write documents by kind as a registry file; `read` gives the same documents back."""

    def pretty(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: pretty(v) for k, v in value.items()}
        if isinstance(value, list):
            return [pretty(v) for v in value]
        # A block keeps a program readable; YAML cannot put all text into one (trailing spaces, control characters).
        if (
            isinstance(value, str)
            and "\n" in value
            and all(c.isprintable() or c == "\n" for c in value)
            and " \n" not in value
        ):
            return LiteralScalarString(value)
        return value

    tree = {
        section: [pretty({k: v for k, v in doc.items() if k not in DERIVED}) for doc in documents[kind]]
        for section, kind in SECTIONS.items()
        if documents.get(kind)
    }
    editor().dump(tree, stream)
