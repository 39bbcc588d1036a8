"""YAML by the 1.2 rules, or JSON, from files: as a tree that knows its lines, and as plain JSON values.

A YAML file may say much with little: an alias stands for all that its anchor names, and aliases within it for more. What aliases
stand for is counted while the file is parsed, and a file is refused before any of it is made.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import orjson
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.constructor import ConstructorError, RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import Node, ScalarNode
from ruamel.yaml.scalarbool import ScalarBoolean
from ruamel.yaml.scanner import RoundTripScanner, ScannerError

from preservarium.domain.registry.checks import Place, RegistryFileError, path_text

#: A registry file is read into memory as a tree; a fleet of 100,000 devices is about 20 MB.
FILE_BYTES_MAX: Final = 64_000_000
#: Deeper than anything a person writes, and below what orjson and the database's JSON parser take.
DEPTH_MAX: Final = 64
#: The same of a whole file, whatever it is: a document stands within its section. Python's stack holds some 300.
TREE_DEPTH_MAX: Final = 100
#: Values and characters that aliases may stand for in any file: a second's work. A parser has some hundred.
ALIASED_MAX: Final = 100_000
#: … and more for each character of the file: a fleet whose devices have nearly all from one anchor needs 6 to 8. To make
#: that takes a few times as long as to parse the file, not more.
ALIASED_PER_CHARACTER_MAX: Final = 10

#: What PostgreSQL's text or UTF-8 has no place for.
_UNUSABLE: Final = re.compile(r"[\0\ud800-\udfff]")


class PlainError(Exception):
    """A value that JSON has not; `path` says where."""

    def __init__(self, path: Place, message: str) -> None:
        super().__init__(message)
        self.path = path


class _Map(CommentedMap):
    """A map that tells nobody of its changes: the library's compares every map that merges it with all before."""

    def add_referent(self, cm: Any) -> None:
        pass


class _Constructor(RoundTripConstructor):
    """YAML 1.2's core schema has no timestamps: they stay text, with their offset."""

    def construct_yaml_map(self, node: Any) -> Iterator[CommentedMap]:
        data = _Map()
        data._yaml_set_line_col(node.start_mark.line, node.start_mark.column)
        yield data
        self.construct_mapping(node, data, deep=True)
        self.set_collection_style(data, node)


def _scalar(constructor: RoundTripConstructor, node: ScalarNode) -> Any:
    """A number or truth value; the library's errors for one that is none name no line."""
    try:
        return RoundTripConstructor.yaml_constructors[node.tag](constructor, node)
    except (ValueError, LookupError):
        message = f"{node.value!r:.60} cannot be read as {str(node.tag).rpartition(':')[2]}"
        raise ConstructorError(None, None, message, node.start_mark) from None


for _kind in ("int", "float", "bool"):
    _Constructor.add_constructor(f"tag:yaml.org,2002:{_kind}", _scalar)
_Constructor.add_constructor("tag:yaml.org,2002:timestamp", _Constructor.construct_scalar)
_Constructor.add_constructor("tag:yaml.org,2002:map", _Constructor.construct_yaml_map)


class _Scanner(RoundTripScanner):
    """Refuses brackets within brackets before it looks for a key behind each: that takes the square of their number."""

    def fetch_flow_collection_start(self, *args: Any, **named: Any) -> None:
        if len(self.flow_context) >= TREE_DEPTH_MAX:
            message = f"nested deeper than {TREE_DEPTH_MAX}"
            raise ScannerError(None, None, message, self.reader.get_mark())
        super().fetch_flow_collection_start(*args, **named)


class _Composer(Composer):
    """Bounds what a file becomes before it becomes anything: by its depth, and by what its aliases stand for."""

    def __init__(self, loader: Any = None, *, aliased_max: int) -> None:
        super().__init__(loader)
        self._aliased_max = aliased_max
        self._size = 0  # values and characters so far, those that aliases stand for among them
        self._aliased = 0  # the latter alone
        self._sizes: dict[Node, int] = {}  # of what an anchor names, once it is complete

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        if isinstance(event, AliasEvent):
            node = super().compose_node(parent, index)
            size = self._sizes.get(node)
            if size is None:
                message = f"the alias *{event.anchor} stands within what it stands for"
                raise ComposerError(None, None, message, event.start_mark)
            self._size += size
            self._aliased += size
            if self._aliased > self._aliased_max:
                message = (
                    f"with *{event.anchor}, aliases stand for more than {self._aliased_max} values and characters; "
                    "a file of this length may have no more"
                )
                raise ComposerError(None, None, message, event.start_mark)
            return node
        if self.depth >= TREE_DEPTH_MAX:
            message = f"nested deeper than {TREE_DEPTH_MAX}"
            raise ComposerError(None, None, message, event.start_mark)
        # An anchor may be given again and means the later one from there: the library warns of it.
        self.anchors.pop(event.anchor, None)
        before = self._size
        node = super().compose_node(parent, index)
        self._size += 1 + (len(node.value) if isinstance(node, ScalarNode) else 0)
        if node.anchor is not None:
            self._sizes[node] = self._size - before
        return node


def parse(yaml: YAML, text: str) -> Any:
    """The tree of a text, which may be hostile.

    Args:
        yaml: makes it.
        text: the whole of it.

    Raises:
        YAMLError: it is no YAML, or more than a file may be.
    """
    composer: Any = partial(_Composer, aliased_max=ALIASED_MAX + ALIASED_PER_CHARACTER_MAX * len(text))
    yaml.Composer = composer  # it is only called
    yaml.Scanner = _Scanner
    return yaml.load(text)


def editor() -> YAML:
    """YAML that is written as people would write it; what was read with it keeps its comments."""
    yaml = YAML()
    yaml.width = 160
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def load_tree(path: Path) -> Any:
    """The file as ruamel's tree with line numbers, or plain where it is JSON.

    Raises:
        RegistryFileError: it cannot be read or is no YAML or JSON.
    """
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            message = f"{path}: larger than {FILE_BYTES_MAX} bytes"
            raise RegistryFileError(message)
        data = path.read_bytes()
        text = data.decode("utf-8")
    except OSError as e:
        message = f"{path}: {e.strerror or e}"
        raise RegistryFileError(message) from e
    except UnicodeDecodeError as e:
        message = f"{path}: not UTF-8 at byte {e.start}"
        raise RegistryFileError(message) from e
    if path.suffix == ".json":
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError as e:
            message = f"{path}:{e.lineno}: {e.msg}"
            raise RegistryFileError(message) from e
    yaml = YAML(typ="rt")
    yaml.version = (1, 2)
    yaml.Constructor = _Constructor
    try:
        return parse(yaml, text)
    except TypeError as e:  # the library looks a key up as it is
        message = f"{path}: a key is a mapping or holds one, and keys are text"
        raise RegistryFileError(message) from e
    except MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = f":{mark.line + 1}" if mark else ""
        message = f"{path}{line}: {' '.join(str(e.problem or e.context).split())}"
        raise RegistryFileError(message) from e
    except YAMLError as e:
        message = f"{path}: {' '.join(str(e).split())}"
        raise RegistryFileError(message) from e


def plain(node: Any, path: Place = ()) -> Any:
    """Ruamel's tree as plain JSON values.

    Whole numbers as keys become text: JSON objects have no others (`enum: {0: off, 1: on}`).

    Raises:
        PlainError: a value that JSON has not, or nesting without end.
    """
    if len(path) > DEPTH_MAX:
        raise PlainError(path, f"nested deeper than {DEPTH_MAX}")
    if isinstance(node, Mapping):
        found: dict[str, Any] = {}
        for key, value in node.items():
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise PlainError((*path, str(key)), f"the key {key!r} is not text")
            found[str(key)] = plain(value, (*path, key))
        return found
    if isinstance(node, list | tuple):
        return [plain(value, (*path, i)) for i, value in enumerate(node)]
    if node is None or isinstance(node, bool):
        return node
    if isinstance(node, ScalarBoolean):
        return bool(node)  # an anchored boolean: to Python an int
    if isinstance(node, int):
        if not -(2**63) <= node < 2**64:
            raise PlainError(path, "a whole number of more than 64 bits")
        return int(node)
    if isinstance(node, float):
        if not math.isfinite(node):
            raise PlainError(path, f"{node} is no JSON number")
        return float(node)
    if isinstance(node, str):
        text = str(node)
        if unusable := _UNUSABLE.search(text):
            raise PlainError(path, "NUL in text" if unusable[0] == "\0" else "half a character (a surrogate) in text")
        return text
    # Tagged and binary values end here.
    raise PlainError(path, f"a value of type {type(node).__name__} cannot be used")


def line_of(tree: Any, path: Iterable[str | int]) -> int | None:
    """The line of the deepest part of `path` that the tree has."""
    node = tree
    line: int | None = None
    for part in path:
        try:
            if isinstance(node, CommentedMap):
                key: Any = part if part in node else int(part) if str(part).isdigit() and int(part) in node else part
                line = node.lc.key(key)[0] + 1
                node = node[key]
            elif isinstance(node, CommentedSeq) and isinstance(part, int):
                line = node.lc.item(part)[0] + 1
                node = node[part]
            else:
                break
        except (KeyError, IndexError, AttributeError, TypeError):
            break
    return line


def plain_file(path: str | Path) -> Any:
    """The content of a YAML or JSON file as plain JSON values.

    Raises:
        RegistryFileError: the file cannot be read, is no YAML or JSON, or holds what JSON cannot.
    """
    try:
        return plain(load_tree(Path(path)))
    except PlainError as e:
        message = f"{path}: {path_text(e.path)}: {e}"
        raise RegistryFileError(message) from None
