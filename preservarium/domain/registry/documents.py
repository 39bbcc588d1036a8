"""The shapes of the documents that people edit, as a registry file says them: checked by pydantic, field by field.

They are the documents of `preservarium/domain/registry/device.py` without `rev` and `hash`; a test holds both equal. What one
document says of another, and whether workers could use it, is in `preservarium/domain/registry/checks.py`.
"""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal
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

from preservarium.domain import notices
from preservarium.domain.alarms.schedule import compile_calendar
from preservarium.domain.commands.alarm_requests import check_rule_commands
from preservarium.domain.commands.profile import check_downlink
from preservarium.domain.decoders.scripts import FUNCTIONS
from preservarium.domain.readings.instant import iso_us
from preservarium.domain.readings.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US
from preservarium.domain.readings.wall_clock import wall_clock

Document = dict[str, Any]

#: A document becomes one Kafka record, and brokers take 1 MiB by default.
DOCUMENT_BYTES_MAX: Final = 900_000

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
#: Fields that the registry adds to what a file says.
DERIVED: Final = frozenset({"rev", "hash"})
#: Kinds of parser whose source is a program's text; all others are data.
SCRIPT_KINDS: Final = frozenset(FUNCTIONS)
#: Kinds that are nothing without a source; elsewhere the format says it all, and a source only adds to it.
SOURCE_KINDS: Final = SCRIPT_KINDS | {"table"}


def identity(kind: str, document: Mapping[str, Any]) -> str:
    """What names a document within its kind."""
    return str(document[IDENTITY.get(kind, "name")])


def source_hash(kind: str, source: Any) -> str:
    """SHA-256 of the canonical source, hexadecimal. The kind counts: the same text may be two programs."""
    return hashlib.sha256(orjson.dumps([kind, source], option=orjson.OPT_SORT_KEYS)).hexdigest()


# --- the parts of shapes ---------------------------------------------------------------------------------------------

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
        if iso_us(value) is None:
            message = "neither microseconds since the epoch nor an ISO 8601 instant"
            raise ValueError(message)
        at = iso_us(value, with_offset=True)
        if at is None:
            message = "an instant needs its offset from UTC, e.g. 2024-05-01T12:00:00Z"
            raise ValueError(message)
        return at
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


def _zone(value: str) -> str:
    wall_clock(value)
    return value


#: As the IANA database has it.
TimeZone = Annotated[str, AfterValidator(_zone)]


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
    circular: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    stale_after_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _numbers_only(self) -> "Datatype":
        if self.kind != "number" and (self.fail_span or self.suspect_span):
            message = f"a {self.kind} has no span"
            raise ValueError(message)
        if self.circular is not None and (self.kind != "number" or self.counter is not None):
            message = f"a {self.kind if self.kind != 'number' else 'counter'} is not circular"
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
    time_zone: TimeZone | None = None
    same_instant: Literal["first", "last", "both"] | None = None
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
    time_zone: TimeZone | None = None
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
