"""The declarative registry file: reading it (YAML by the 1.2 rules, or JSON) and checking it.

What a file may say is what preservarium/domain/device.py describes, without `rev` and `hash`. A check finds everything
that is wrong at once, with the line where it stands; nothing of a file with an error is applied.
"""

import difflib
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from preservarium.domain import notices, quality, units
from preservarium.domain.commands import check_downlink, check_rule_commands
from preservarium.domain.decoders import KINDS, compile_parser, examples
from preservarium.domain.decoders.scripts import FUNCTIONS
from preservarium.domain.device import DatatypeDoc, RuleDoc
from preservarium.domain.errors import PreservariumError, Reject
from preservarium.domain.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US
from preservarium.domain.rules import compile_rule
from preservarium.domain.schedule import compile_calendar

Document = dict[str, Any]

#: A registry file is read into memory as a tree; a fleet of 100,000 devices is about 20 MB.
FILE_BYTES_MAX: Final = 64_000_000
#: A document becomes one Kafka record, and brokers take 1 MiB by default.
DOCUMENT_BYTES_MAX: Final = 900_000
#: More lines than this help nobody to mend a file.
PROBLEMS_MAX: Final = 200

#: Sections of a file in the order in which they depend on each other, and the kind of their documents.
SECTIONS: Final[Mapping[str, str]] = {
    "manufacturers": "manufacturer",
    "datatypes": "datatype",
    "parsers": "parser",
    "recipients": "recipient",
    "rules": "rule",
    "device_types": "type",
    "experiments": "experiment",
    "devices": "device",
}
#: The field that names a document, where it is not `name`.
IDENTITY: Final[Mapping[str, str]] = {"device": "device_id"}


class RegistryFileError(PreservariumError):
    """The registry file cannot be used."""


# --- shapes --------------------------------------------------------------------------------------------------------

_TEXT = r"^[^\x00-\x1f\x7f]+$"
#: Names appear in record keys ("parser/name"), in `name@version` and in messages: no slash, no @, no edge spaces.
Name = Annotated[str, Field(pattern=r"^[^\x00-\x20\x7f/@]([^\x00-\x1f\x7f/@]*[^\x00-\x20\x7f/@])?$", max_length=120)]
#: As the device sends it: anything but control characters. Kafka's key and part of a stream's name.
Address = Annotated[str, Field(pattern=_TEXT, max_length=255)]
Line = Annotated[str, Field(pattern=r"^[^\x00-\x08\x0a-\x1f\x7f]*$", max_length=1_000)]
Text = Annotated[str, Field(max_length=100_000)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Unit = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=40)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _instant(value: Any) -> Any:
    """An ISO 8601 instant with its offset becomes µs since the epoch."""
    if isinstance(value, str):
        try:
            at = datetime.fromisoformat(value)
        except ValueError:
            message = "neither microseconds since the epoch nor an ISO 8601 instant"
            raise ValueError(message) from None
        if at.tzinfo is None:
            message = "an instant needs its offset from UTC, e.g. 2024-05-01T12:00:00Z"
            raise ValueError(message)
        return round(at.replace(microsecond=0).timestamp()) * 1_000_000 + at.microsecond
    return value


Instant = Annotated[int, BeforeValidator(_instant), Field(ge=TIMESTAMP_MIN_US, lt=TIMESTAMP_MAX_US)]


def _outages(value: Any) -> Any:
    """Planned outages: their instants as µs, checked."""
    if not isinstance(value, list):
        return value
    found = []
    for outage in value:
        if not isinstance(outage, dict) or set(outage) != {"from", "to"}:
            message = "an outage has from and to"
            raise ValueError(message)
        found.append({key: _instant(at) for key, at in outage.items()})
    compile_calendar(None, found)
    return found


Outages = Annotated[list[dict[str, int]], BeforeValidator(_outages)]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Span(_Model):
    """A closed interval."""

    min: Finite | None = None
    max: Finite | None = None

    @model_validator(mode="after")
    def _ordered(self) -> "Span":
        if self.min is None and self.max is None:
            message = "a span needs min or max"
            raise ValueError(message)
        if self.min is not None and self.max is not None and self.min >= self.max:
            message = f"min {self.min:g} is not below max {self.max:g}"
            raise ValueError(message)
        return self


#: Messages are held back so long to be put into order; a day is what the setting may say, too.
Lateness = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]


class Manufacturer(_Model):
    """Who makes devices."""

    name: Name
    description: Text | None = None
    url: Line | None = None
    meta: dict[str, Any] | None = None


class Datatype(_Model):
    """DatatypeDoc as a file says it."""

    name: Name
    kind: Literal["number", "text", "boolean"]
    unit: Unit
    description: Text | None = None
    fail_span: Span | None = None
    suspect_span: Span | None = None
    tests: dict[str, dict[str, Any]] | None = None
    counter: dict[str, Any] | None = None
    stale_after_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _numbers_only(self) -> "Datatype":
        if self.kind != "number" and (self.fail_span or self.suspect_span):
            message = f"a {self.kind} has no span"
            raise ValueError(message)
        fail, suspect = self.fail_span, self.suspect_span
        if fail and suspect:
            low = fail.min is not None and suspect.min is not None and suspect.min < fail.min
            high = fail.max is not None and suspect.max is not None and suspect.max > fail.max
            if low or high:
                message = "suspect_span reaches beyond fail_span"
                raise ValueError(message)
        return self


def _overrides(value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for name, changed in value.items():
        unknown = changed.keys() - (Datatype.model_fields.keys() - {"name"})
        if unknown:
            message = f"{name}: a datatype has no field {sorted(unknown)[0]!r}"
            raise ValueError(message)
        for span in ("fail_span", "suspect_span"):
            if changed.get(span) is not None:
                try:
                    changed[span] = Span.model_validate(changed[span]).model_dump()
                except ValidationError as e:
                    message = f"{name}.{span}: {e.errors()[0]['msg'].removeprefix('Value error, ')}"
                    raise ValueError(message) from None
    return value


#: Fields of datatypes that a device type or a device says otherwise.
Overrides = Annotated[dict[str, dict[str, Any]], AfterValidator(_overrides)]


#: How devices take commands, and what alarms ask of them.
Downlink = Annotated[dict[str, Any], AfterValidator(check_downlink)]
RuleCommands = Annotated[list[dict[str, Any]], AfterValidator(check_rule_commands)]


class FieldMapping(_Model):
    """Where a decoded field goes."""

    component_type: Name
    pin_position: Line | None = None
    unit: Unit | None = None
    scale: Finite | None = None
    offset: Finite | None = None


class Parser(_Model):
    """ParserDoc as a file says it: with `source`, or with `file`, a path relative to the registry file."""

    name: Name
    version: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    kind: Name
    status: Literal["draft", "active", "retired"] = "active"
    source: Any = None
    file: Line | None = None
    examples: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "Parser":
        if self.source is not None and self.file is not None:
            message = "give `source` or `file`, not both"
            raise ValueError(message)
        return self


class DeviceType(_Model):
    """DeviceTypeDoc as a file says it."""

    name: Name
    manufacturer: Name
    parser: Name
    mode: Line | None = None
    mapping: dict[str, FieldMapping | None] | None = None
    lateness_s: Lateness | None = None
    rules: list[Name] | None = None
    datatypes: Overrides | None = None
    description: Text | None = None
    downlink: Downlink | None = None


class Escalation(_Model):
    """Who else is told where nobody has acknowledged in time."""

    after_s: Annotated[float, Field(gt=0, le=7 * 86_400, allow_inf_nan=False)]
    recipients: Annotated[list[Name], Field(min_length=1)]


class Series(_Model):
    """A series of the same device that a rule takes in."""

    component_type: Name
    pin_position: Line | None = None


class Rule(_Model):
    """RuleDoc as a file says it."""

    name: Name
    enabled: bool | None = None
    component_type: Name
    pin_position: Line | None = None
    kind: Name
    severity: Literal["critical", "major", "minor", "warning", "indeterminate"]
    threshold: Finite | None = None
    deadband: NotNegative | None = None
    on_delay_s: NotNegative | None = None
    off_delay_s: NotNegative | None = None
    message: Line | None = None
    recipients: list[Name] | None = None
    escalation: Annotated[list[Escalation], Field(max_length=10)] | None = None
    parameters: dict[str, Any] | None = None
    commands: RuleCommands | None = None
    levels: list[dict[str, Any]] | None = None
    repeat: dict[str, Any] | None = None
    direction: Literal["either", "rise", "fall"] | None = None
    window_s: NotNegative | None = None
    per_s: NotNegative | None = None
    setpoint: Finite | None = None
    reference: Series | None = None
    expression: Line | None = None
    inputs: dict[str, Series] | None = None
    inputs_max_age_s: NotNegative | None = None
    no_data_s: NotNegative | None = None
    schedule: dict[str, Any] | None = None
    outages: Outages | None = None
    group: Name | None = None
    group_master: bool | None = None
    first_out_s: NotNegative | None = None
    lateness_s: NotNegative | None = None

    @model_validator(mode="after")
    def _has_threshold(self) -> "Rule":
        if self.kind in {"high", "low"} and self.threshold is None:
            message = f"a rule of kind {self.kind} needs a threshold"
            raise ValueError(message)
        return self


Severity = Literal["critical", "major", "minor", "warning", "indeterminate"]
#: Up to a month; a group that is looked at more often than each second is looked at with each record.
Interval = Annotated[float, Field(ge=1, le=31 * 86_400, allow_inf_nan=False)]


def _time_of_day(value: str) -> str:
    notices.minute_of_day(value)
    return value


#: HH:MM. YAML's 1.2 rules leave it a text.
TimeOfDay = Annotated[str, AfterValidator(_time_of_day)]


class QuietHours(_Model):
    """Hours in which only severities that break through are told."""

    since: TimeOfDay
    until: TimeOfDay
    days: Annotated[list[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]], Field(min_length=1)] | None = None


class Digest(_Model):
    """Everything in one notice a period."""

    every: Literal["hour", "day"]
    at: TimeOfDay | None = None


class NoticeLimit(_Model):
    """At most so many notices in any window."""

    notices: Annotated[int, Field(ge=1, le=notices.LIMIT_MAX)]
    window_s: Interval


class Recipient(_Model):
    """RecipientDoc as a file says it."""

    name: Name
    channel: Literal["mail", "webhook", "apprise"]
    address: Line
    severities: list[Severity] | None = None
    group_by: list[Literal[notices.LABELS]] | None = None  # type: ignore[valid-type]
    group_wait_s: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] | None = None
    group_interval_s: Interval | None = None
    repeat_interval_s: Interval | None = None
    cleared: bool | None = None
    timezone: Line | None = None
    quiet_hours: Annotated[list[QuietHours], Field(max_length=20)] | None = None
    through: list[Severity] | None = None
    digest: Digest | None = None
    limit: NoticeLimit | None = None

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                ZoneInfo(value)
            except (ZoneInfoNotFoundError, ValueError, OSError):
                message = f"there is no time zone {value!r}; they are named like Europe/Berlin"
                raise ValueError(message) from None
        return value

    @model_validator(mode="after")
    def _address(self) -> "Recipient":
        if self.channel == "mail" and "@" not in self.address:
            message = "a mail address has an @"
            raise ValueError(message)
        if self.channel == "webhook" and not self.address.startswith(("http://", "https://")):
            message = "a webhook's address starts with http:// or https://"
            raise ValueError(message)
        if self.channel == "apprise" and "://" not in self.address:
            message = "an Apprise address is a URL, e.g. ntfy://host/topic"
            raise ValueError(message)
        return self


class Experiment(_Model):
    """A laboratory experiment that devices and tasks can belong to."""

    name: Name
    title: Line | None = None
    description: Text | None = None
    started_at: Instant | None = None
    ended_at: Instant | None = None
    meta: dict[str, Any] | None = None


class Device(_Model):
    """DeviceDoc as a file says it."""

    device_id: Address
    type: Name
    name: Line | None = None
    enabled: bool = True
    mode: Line | None = None
    mapping: dict[str, FieldMapping | None] | None = None
    datatypes: Overrides | None = None
    rules: dict[str, dict[str, Any] | None] | None = None
    outages: Outages | None = None
    variables: dict[str, Any] | None = None
    birth: Instant | None = None
    lateness_s: Lateness | None = None
    experiment_id: Name | None = None
    meta: dict[str, Any] | None = None
    downlink: Downlink | None = None

    @field_validator("rules")
    @classmethod
    def _rules(cls, value: dict[str, dict[str, Any] | None] | None) -> dict[str, dict[str, Any] | None] | None:
        for name, changed in (value or {}).items():
            if unknown := (changed or {}).keys() - (Rule.model_fields.keys() - {"name"}):
                message = f"{name}: a rule has no field {sorted(unknown)[0]!r}"
                raise ValueError(message)
            if (changed or {}).get("commands") is not None:
                check_rule_commands((changed or {})["commands"])
            if changed and changed.get("outages") is not None:
                try:
                    changed["outages"] = _outages(changed["outages"])
                except ValueError as e:
                    message = f"{name}: {e}"
                    raise ValueError(message) from None
        return value


MODELS: Final[Mapping[str, type[_Model]]] = {
    "manufacturer": Manufacturer,
    "datatype": Datatype,
    "parser": Parser,
    "recipient": Recipient,
    "rule": Rule,
    "type": DeviceType,
    "experiment": Experiment,
    "device": Device,
}

# --- findings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong in a file."""

    path: str  #: devices[3].rules.hot
    message: str
    line: int | None = None  #: 1 for the first; None where the file is JSON
    level: Literal["error", "warning"] = "error"
    file: str | None = None  #: where it is not the registry file itself

    def __str__(self) -> str:
        """`file.yaml:12: devices[3].type: …`."""
        where = f"{self.file or ''}:{self.line}: " if self.line else f"{self.file}: " if self.file else ""
        return f"{where}{self.path}{': ' if self.path else ''}{self.message}"


@dataclass(slots=True)
class RegistryFile:
    """What a registry file says: checked documents by kind, in the file's order."""

    path: str
    documents: dict[str, list[Document]] = field(default_factory=dict)
    #: kinds whose section the file has; only those can be pruned
    sections: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    #: (kind, index) -> where the document stands, for problems that are found later
    places: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)
    tree: Any = None  #: as the YAML library gave it, with line numbers

    @property
    def errors(self) -> list[Problem]:
        """The problems that forbid applying the file."""
        return [p for p in self.problems if p.level == "error"]

    def raise_for_errors(self) -> None:
        """Raise where the file may not be applied.

        Raises:
            RegistryFileError: all errors, one a line.
        """
        if self.errors:
            raise RegistryFileError("\n".join(str(p) for p in self.errors))

    def line(self, kind: str, index: int) -> int | None:
        """The line where a document begins."""
        return _line(self.tree, self.places[kind, index])

    def problem(
        self,
        kind: str,
        index: int,
        where: tuple[str | int, ...],
        message: str,
        level: Literal["error", "warning"] = "error",
    ) -> None:
        """Note a problem at `where` in a document."""
        path = (*self.places[kind, index], *where)
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(Problem(_path_text(path), message, _line(self.tree, path), level, self.path))


# --- reading -------------------------------------------------------------------------------------------------------


class _Constructor(RoundTripConstructor):
    """YAML 1.2's core schema has no timestamps: they stay text, with their offset."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", lambda self, node: self.construct_scalar(node))


def _load_tree(path: Path) -> Any:
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
        return yaml.load(text)
    except MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = f":{mark.line + 1}" if mark else ""
        message = f"{path}{line}: {' '.join(str(e.problem or e.context).split())}"
        raise RegistryFileError(message) from e
    except YAMLError as e:
        message = f"{path}: {' '.join(str(e).split())}"
        raise RegistryFileError(message) from e


class _Plain(Exception):
    def __init__(self, path: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.path = path


#: Deeper than anything a person writes, and below what orjson and the database's JSON parser take.
DEPTH_MAX: Final = 64


def _plain(node: Any, path: tuple[str | int, ...] = ()) -> Any:
    """Ruamel's tree as plain JSON values.

    Whole numbers as keys become text: JSON objects have no others (`enum: {0: off, 1: on}`).
    """
    if len(path) > DEPTH_MAX:
        raise _Plain(path, f"nested deeper than {DEPTH_MAX}")
    if isinstance(node, Mapping):
        plain: Document = {}
        for key, value in node.items():
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise _Plain((*path, str(key)), f"the key {key!r} is not text")
            plain[str(key)] = _plain(value, (*path, key))
        return plain
    if isinstance(node, list | tuple):
        return [_plain(value, (*path, i)) for i, value in enumerate(node)]
    if node is None or isinstance(node, bool):
        return node
    if isinstance(node, ScalarBoolean):
        return bool(node)  # an anchored boolean: to Python an int
    if isinstance(node, int):
        if not -(2**63) <= node < 2**64:
            raise _Plain(path, "a whole number of more than 64 bits")
        return int(node)
    if isinstance(node, float):
        if not math.isfinite(node):
            raise _Plain(path, f"{node} is no JSON number")
        return float(node)
    if isinstance(node, str):
        text = str(node)
        if "\x00" in text:
            raise _Plain(path, "NUL in text")
        return text
    # Tagged and binary values end here.
    raise _Plain(path, f"a value of type {type(node).__name__} cannot be used")


def _line(tree: Any, path: Iterable[str | int]) -> int | None:
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


def _path_text(path: Iterable[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _message(error: Any, known: Iterable[str]) -> str:
    kind = error["type"]
    given = error.get("input")
    if kind == "extra_forbidden":
        key = str(error["loc"][-1])
        close = difflib.get_close_matches(key, list(known), 1)
        return "unknown key" + (f"; did you mean {close[0]}?" if close else "")
    if kind == "missing":
        return "is missing"
    if kind == "string_type":
        hint = ": put it in quotes" if isinstance(given, int | float) else ""
        return f"text is needed, not {given!r}{hint}"
    if kind == "string_pattern_mismatch":
        return f"{given!r} has characters (or spaces at its ends) that are not allowed here"
    return str(error["msg"].removeprefix("Value error, ")) + (
        f" (given: {given!r})" if isinstance(given, str | int | float) else ""
    )


def read(path: str | Path) -> RegistryFile:
    """Read and check one file by itself: shapes, names, sources. References are checked by `check_references`.

    Never raises for what the file says: see `problems`.

    Raises:
        RegistryFileError: the file cannot be read, or is no YAML or JSON.
    """
    path = Path(path)
    tree = _load_tree(path)
    result = RegistryFile(str(path), tree=tree)

    def problem(where: tuple[str | int, ...], message: str) -> None:
        if len(result.problems) < PROBLEMS_MAX:
            result.problems.append(Problem(_path_text(where), message, _line(tree, where), file=str(path)))

    if tree is None:
        problem((), "the file is empty")
        return result
    if not isinstance(tree, Mapping):
        problem((), "a registry file is a mapping of sections")
        return result
    for section, entries in tree.items():
        kind = SECTIONS.get(section)
        if kind is None:
            close = difflib.get_close_matches(str(section), list(SECTIONS), 1)
            problem(
                (section,),
                "unknown section" + (f"; did you mean {close[0]}?" if close else f"; there are {', '.join(SECTIONS)}"),
            )
            continue
        result.sections.add(kind)
        if entries is None:
            continue
        if not isinstance(entries, list):
            problem((section,), "a section is a list")
            continue
        documents = result.documents.setdefault(kind, [])
        for i, entry in enumerate(entries):
            try:
                plain = _plain(entry)
            except _Plain as e:
                problem((section, i, *e.path), str(e))
                continue
            place = _At(problem, (section, i))
            document = _document(kind, plain, place)
            if document is None or (kind == "parser" and not _load_source(document, path, place)):
                continue
            if len(orjson.dumps(document)) > DOCUMENT_BYTES_MAX:
                problem((section, i), f"larger than {DOCUMENT_BYTES_MAX} bytes as one record")
                continue
            result.places[kind, len(documents)] = (section, i)
            documents.append(document)
    _check_duplicates(result)
    return result


@dataclass(frozen=True, slots=True)
class _At:
    """Notes problems of one document."""

    note: Callable[[tuple[str | int, ...], str], None]
    place: tuple[str | int, ...]

    def __call__(self, where: tuple[str | int, ...], message: str) -> None:
        self.note((*self.place, *where), message)


def _document(kind: str, plain: Any, problem: _At) -> Document | None:
    model = MODELS[kind]
    try:
        parsed = model.model_validate(plain)
    except ValidationError as e:
        for error in e.errors():
            where = tuple(p for p in error["loc"] if not (isinstance(p, str) and p.startswith("function-")))
            problem(where, _message(error, model.model_fields))
        return None
    # What the file leaves out or sets to null at the top is absent; deeper down null has a meaning (a field left out).
    document = {k: v for k, v in parsed.model_dump().items() if v is not None}
    for mapping in (document.get("mapping") or {}).values():
        if mapping is not None:
            for key in [k for k, v in mapping.items() if v is None]:
                del mapping[key]
    return document


def plain_file(path: str | Path) -> Any:
    """The content of a YAML or JSON file as plain JSON values.

    Raises:
        RegistryFileError: the file cannot be read, is no YAML or JSON, or holds what JSON cannot.
    """
    try:
        return _plain(_load_tree(Path(path)))
    except _Plain as e:
        message = f"{path}: {_path_text(e.path)}: {e}"
        raise RegistryFileError(message) from None


#: Kinds of parser whose source is a program's text; all others are data.
SCRIPT_KINDS: Final = frozenset(FUNCTIONS)
#: Kinds that are nothing without a source; elsewhere the format says it all, and a source only adds to it.
SOURCE_KINDS: Final = SCRIPT_KINDS | {"table"}


def _load_source(document: Document, registry: Path, problem: _At) -> bool:
    """Put the source in the place of `file`, and the hash beside it."""
    name = document.pop("file", None)
    if name is not None:
        base = registry.parent.resolve()
        path = (base / name).resolve()
        if not path.is_relative_to(base):
            problem(("file",), "leads out of the registry file's folder")
            return False
        try:
            if document["kind"] in SCRIPT_KINDS:
                _load_script(document, path)
            elif path.suffix in {".yaml", ".yml", ".json"}:
                content = _plain(_load_tree(path))
                if isinstance(content, dict) and "source" in content and content.get("kind") == document["kind"]:
                    # A parser file: its source with its examples, as `preservarium decoders test` runs them.
                    if "examples" in content:
                        document.setdefault("examples", content["examples"])
                    content = content["source"]
                document["source"] = content
            else:
                document["source"] = path.read_text(encoding="utf-8")
        except (RegistryFileError, _Plain) as e:
            problem(("file",), str(e))
            return False
        except (OSError, UnicodeDecodeError) as e:
            problem(("file",), f"{path}: {getattr(e, 'strerror', None) or 'not UTF-8'}")
            return False
    if document["kind"] in SCRIPT_KINDS and not isinstance(document.get("source"), str):
        problem(("source",), f"a {document['kind']} parser's source is its text")
        return False
    if "source" not in document and document["kind"] in SOURCE_KINDS:
        problem((), f"a parser of kind {document['kind']} needs `source` or `file`")
        return False
    document.setdefault("source", {})
    document["hash"] = source_hash(document["kind"], document["source"])
    return True


def _load_script(document: Document, path: Path) -> None:
    """Put the source and, where the document has none of its own, the published examples in.

    Raises:
        RegistryFileError: the file cannot be read, or is no script of this kind.
    """
    from preservarium import codecs

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


def source_hash(kind: str, source: Any) -> str:
    """SHA-256 of the canonical source, hexadecimal. The kind counts: the same text may be two programs."""
    return hashlib.sha256(orjson.dumps([kind, source], option=orjson.OPT_SORT_KEYS)).hexdigest()


def identity(kind: str, document: Mapping[str, Any]) -> str:
    """What names a document within its kind."""
    return str(document[IDENTITY.get(kind, "name")])


def _check_duplicates(file: RegistryFile) -> None:
    for kind, documents in file.documents.items():
        seen: dict[tuple[str, Any], int] = {}
        for i, document in enumerate(documents):
            # A parser may appear several times with different versions.
            key = (identity(kind, document), document.get("version") if kind == "parser" else None)
            first = seen.setdefault(key, i)
            if first != i:
                line = file.line(kind, first)
                there = f" (line {line})" if line else ""
                file.problem(kind, i, (), f"{key[0]!r} is already {_path_text(file.places[kind, first])}{there}")
        if kind == "parser":
            names: dict[str, list[int]] = {}
            for i, document in enumerate(documents):
                names.setdefault(document["name"], []).append(i)
            for name, places in names.items():
                if len(places) > 1 and any("version" not in documents[i] for i in places):
                    file.problem(kind, places[-1], (), f"{name!r} appears several times: each needs its `version`")
                active = [i for i in places if documents[i]["status"] == "active"]
                if len(active) > 1:
                    file.problem(kind, active[-1], ("status",), f"{name!r} has two active versions")


# --- references ----------------------------------------------------------------------------------------------------


def check_references(file: RegistryFile, known: Mapping[str, Iterable[str]]) -> None:
    """Note every reference to something that will not exist.

    Args:
        file: the file; its problems are added to.
        known: kind -> names that will exist after the file is applied, its own among them.
    """
    names = {kind: set(known.get(kind, ())) for kind in SECTIONS.values()}

    def need(kind: str, name: str, owner: str, index: int, *where: str | int) -> None:
        if name not in names[kind]:
            close = difflib.get_close_matches(name, names[kind], 1)
            file.problem(
                owner, index, where, f"there is no {kind} {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )

    def need_series(rule: Document, owner: str, index: int, *where: str | int) -> None:
        taken: dict[tuple[str, ...], Any] = {("reference",): rule.get("reference")}
        if isinstance(inputs := rule.get("inputs"), dict):
            taken.update({("inputs", name): series for name, series in inputs.items()})
        for place, series in taken.items():
            if isinstance(series, dict) and isinstance(series.get("component_type"), str):
                need("datatype", series["component_type"], owner, index, *where, *place)

    for i, doc in enumerate(file.documents.get("rule", ())):
        need("datatype", doc["component_type"], "rule", i, "component_type")
        for recipient in doc.get("recipients", ()):
            need("recipient", recipient, "rule", i, "recipients")
        for step in doc.get("escalation", ()):
            for recipient in step["recipients"]:
                need("recipient", recipient, "rule", i, "escalation")
        need_series(doc, "rule", i)
    for kind in ("type", "device"):
        for i, doc in enumerate(file.documents.get(kind, ())):
            for field_name, mapping in doc.get("mapping", {}).items():
                if mapping is not None:
                    need("datatype", mapping["component_type"], kind, i, "mapping", field_name)
            for name in doc.get("datatypes", {}):
                need("datatype", name, kind, i, "datatypes", name)
            for name in doc.get("rules", ()):
                need("rule", name, kind, i, "rules", name)
    for i, doc in enumerate(file.documents.get("type", ())):
        need("manufacturer", doc["manufacturer"], "type", i, "manufacturer")
        need("parser", doc["parser"], "type", i, "parser")
    for i, doc in enumerate(file.documents.get("device", ())):
        need("type", doc["type"], "device", i, "type")
        for name, changed in doc.get("rules", {}).items():
            need_series(changed or {}, "device", i, "rules", name)
        if "experiment_id" in doc:
            need("experiment", doc["experiment_id"], "device", i, "experiment_id")


def check_meaning(file: RegistryFile, datatypes: Mapping[str, Document], rules: Mapping[str, Document]) -> None:
    """Note what workers could not use although its shape is right: they compile the same documents the same way.

    Args:
        file: the file; its problems are added to.
        datatypes: the datatypes that will exist, by name.
        rules: the rules that will exist, by name.
    """
    _check_parsers(file)
    for i, doc in enumerate(file.documents.get("datatype", ())):
        if not units.canonical(doc["unit"])[1]:
            file.problem(
                "datatype", i, ("unit",), f"{doc['unit']!r} is no known unit: nothing can be converted", "warning"
            )
    checks = quality.CheckCompiler(lambda name: cast(DatatypeDoc | None, datatypes.get(name)))
    for i, doc in enumerate(file.documents.get("datatype", ())):
        checks.series(doc["name"], ())
        for problem in checks.take_problems():
            file.problem("datatype", i, (), problem)
    for kind in ("type", "device"):
        for i, doc in enumerate(file.documents.get(kind, ())):
            for name, changed in doc.get("datatypes", {}).items():
                checks.series(name, (changed,))
                for problem in checks.take_problems():
                    file.problem(kind, i, ("datatypes", name), problem)
            for field_name, mapping in doc.get("mapping", {}).items():
                _check_unit(file, kind, i, field_name, mapping, datatypes)
    for i, doc in enumerate(file.documents.get("rule", ())):
        _check_rule(file, "rule", i, (), doc, datatypes)
    for i, doc in enumerate(file.documents.get("device", ())):
        for name, changed in doc.get("rules", {}).items():
            if changed and name in rules:
                merged = {**rules[name], **changed}
                if _check_override(file, i, ("rules", name), merged):
                    _check_rule(file, "device", i, ("rules", name), merged, datatypes, doc.get("outages"))


def _check_parsers(file: RegistryFile) -> None:
    known = {*KINDS, *SCRIPT_KINDS}
    for i, doc in enumerate(file.documents.get("parser", ())):
        if doc["kind"] not in known:
            close = difflib.get_close_matches(doc["kind"], known, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known))}"
            file.problem("parser", i, ("kind",), f"no such kind of parser; {hint}")
        elif doc["kind"] in KINDS:
            # Scripts run in the sandbox only; `preservarium decoders test` runs their examples there.
            # A draft may be wrong: it reaches no worker.
            level: Literal["error", "warning"] = "error" if doc["status"] == "active" else "warning"
            try:
                compile_parser({"version": "new", **doc})
            except Reject as e:
                file.problem("parser", i, ("source",), str(e), level)
                continue
            for outcome in examples.run(doc):
                if outcome.differences:
                    file.problem("parser", i, ("examples", outcome.index), "; ".join(outcome.differences), level)


def _check_unit(
    file: RegistryFile,
    kind: str,
    index: int,
    field_name: str,
    mapping: Document | None,
    datatypes: Mapping[str, Document],
) -> None:
    if mapping is None or "unit" not in mapping or mapping["component_type"] not in datatypes:
        return
    wanted = datatypes[mapping["component_type"]]["unit"]
    if units.conversion(mapping["unit"], wanted) is None:
        where = ("mapping", field_name, "unit")
        file.problem(kind, index, where, f"{mapping['unit']!r} cannot be converted to {wanted!r}", "warning")


def _check_override(file: RegistryFile, index: int, where: tuple[str | int, ...], merged: Document) -> bool:
    """Whether a device's fields of a rule have the shapes that the rule's own must have."""
    try:
        Rule.model_validate({k: v for k, v in merged.items() if k in Rule.model_fields})
    except ValidationError as e:
        for error in e.errors():
            field_name = _path_text(tuple(error["loc"]))
            text = _message(error, Rule.model_fields)
            file.problem("device", index, where, f"{field_name}: {text}" if field_name else text)
        return False
    return True


def _check_rule(
    file: RegistryFile,
    kind: str,
    index: int,
    where: tuple[str | int, ...],
    rule: Document,
    datatypes: Mapping[str, Document],
    outages: Any = None,
) -> None:
    datatype = datatypes.get(rule["component_type"])
    try:
        compile_rule(cast(RuleDoc, {**rule, "rev": 0}), cast(DatatypeDoc | None, datatype), outages)
    except (KeyError, TypeError, ValueError) as e:
        file.problem(kind, index, where, f"{e} is missing" if isinstance(e, KeyError) else str(e))
        return
    if datatype is None:
        return
    if datatype["kind"] == "text" or (datatype["kind"] != "number" and rule.get("threshold") is not None):
        place = "threshold" if rule.get("threshold") is not None else "component_type"
        file.problem(kind, index, (*where, place), f"{datatype['name']} is {datatype['kind']}, not a number")
        return
    span = datatype.get("fail_span") or {}
    low, high = span.get("min"), span.get("max")
    # A reading outside the fail span is refused before the alarm stage sees it.
    found = [("threshold", rule.get("threshold")), *(("levels", one["threshold"]) for one in rule.get("levels") or ())]
    for place, threshold in found:
        if (rule["kind"] == "high" and high is not None and threshold >= high) or (
            rule["kind"] == "low" and low is not None and threshold <= low
        ):
            message = f"{threshold:g} can never be passed: {datatype['name']} fails outside {_span_text(low, high)}"
            file.problem(kind, index, (*where, place), message, "warning")


def _span_text(low: float | None, high: float | None) -> str:
    return f"{'…' if low is None else f'{low:g}'} to {'…' if high is None else f'{high:g}'}"


# --- writing -------------------------------------------------------------------------------------------------------

#: Fields that the registry adds to what a file says.
DERIVED: Final = frozenset({"rev", "hash"})


def dump(documents: Mapping[str, Iterable[Document]], stream: Any) -> None:
    """Write documents by kind as a registry file; `read` gives the same documents back."""
    from ruamel.yaml.scalarstring import LiteralScalarString

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

    yaml = YAML()
    yaml.version = None
    yaml.width = 160
    yaml.indent(mapping=2, sequence=4, offset=2)
    tree = {
        section: [pretty({k: v for k, v in doc.items() if k not in DERIVED}) for doc in documents[kind]]
        for section, kind in SECTIONS.items()
        if documents.get(kind)
    }
    yaml.dump(tree, stream)
