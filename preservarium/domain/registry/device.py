"""Registry documents: what a device is, how it is decoded, checked and watched.

These are the values of `iot_device_registry` (a `DeviceDoc` per device address) and `iot_type_registry` (the other
documents, keyed "kind/name"), and the sections of a registry file. Instants are µs since the epoch, UTC.
"""

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict, cast

#: Kinds of document on `iot_type_registry`; the record's key is f"{kind}/{name}".
Kind = Literal["datatype", "parser", "type", "rule", "recipient"]


class Span(TypedDict):
    """A closed interval; None leaves the side open."""

    min: float | None
    max: float | None


class DatatypeDoc(TypedDict):
    """What can be measured: the `component_type` of a reading."""

    name: str
    rev: int
    kind: Literal["number", "text", "boolean"]
    unit: str  #: canonical unit; readings in others are converted
    description: NotRequired[str]
    fail_span: NotRequired[Span]  #: QARTOD gross range: outside is fail
    suspect_span: NotRequired[Span]  #: outside is suspect
    #: Further QARTOD tests and their parameters by name: spike, rate_of_change, flat_line, climatology, …
    tests: NotRequired[dict[str, dict[str, Any]]]
    counter: NotRequired[dict[str, Any]]  #: width (rollover modulus), swaps, tolerance; for meters
    circular: NotRequired[float]  #: period of a direction, orientation or phase, in `unit`
    stale_after_s: NotRequired[float]


class FieldMapping(TypedDict):
    """Where one decoded field goes."""

    component_type: str
    pin_position: NotRequired[str]  #: "-1" where there is one
    unit: NotRequired[str]  #: the unit the field comes in, where the parser does not say
    scale: NotRequired[float]
    offset: NotRequired[float]


class ParserDoc(TypedDict):
    """One version of a parser."""

    name: str
    version: int
    rev: int
    kind: str  #: table, json, senml, javascript, python, cayenne_lpp, …
    status: Literal["draft", "active", "retired"]
    source: Any  #: the field table or the JSON mapping as data; a script as text
    hash: str  #: SHA-256 of the canonical source, hexadecimal
    examples: NotRequired[list[dict[str, Any]]]  #: {hex|json, port?, expect}


class DeviceTypeDoc(TypedDict):
    """A device's type: a kind of hardware, how it is decoded, and what its devices have in common."""

    name: str
    rev: int
    manufacturer: str
    parser: str  #: name; the active version is used
    mode: NotRequired[str]  #: connector mode where the message names none
    #: decoded field -> datatype. A field that is not named keeps its own name; None leaves it out.
    mapping: NotRequired[dict[str, FieldMapping | None]]
    rules: NotRequired[list[str]]  #: names of the alarm rules that watch devices of this type
    datatypes: NotRequired[dict[str, dict[str, Any]]]  #: component_type -> fields that differ from the datatype
    lateness_s: NotRequired[float]  #: its messages are held back so long, and put into event-time order
    time_zone: NotRequired[str]  #: of its instants without an offset; overrides the parser's
    same_instant: NotRequired[
        Literal["first", "last", "both"]
    ]  #: which counts of two values at one instant of its clock
    description: NotRequired[str]
    downlink: NotRequired[dict[str, Any]]  #: how its devices take commands, see commands.check_downlink


class Escalation(TypedDict):
    """Who else is told where nobody has acknowledged in time."""

    after_s: float  #: since the alarm was detected
    recipients: list[str]


class RuleDoc(TypedDict):
    """An alarm rule. Thresholds are in the datatype's canonical unit."""

    name: str
    rev: int
    enabled: NotRequired[bool]
    component_type: str
    pin_position: NotRequired[str]  #: absent: each pin on its own
    kind: str  #: high, low, rate, deviation, expression, no_data
    severity: Literal["critical", "major", "minor", "warning", "indeterminate"]
    threshold: NotRequired[float]
    deadband: NotRequired[float]  #: clears only beyond threshold ∓ deadband
    on_delay_s: NotRequired[float]
    off_delay_s: NotRequired[float]
    message: NotRequired[str]  #: template: {device_id} {name} {value} {unit} {threshold}
    recipients: NotRequired[list[str]]
    escalation: NotRequired[list[Escalation]]
    parameters: NotRequired[dict[str, Any]]
    commands: NotRequired[
        list[dict[str, Any]]
    ]  #: what its transitions ask of devices, see commands.check_rule_commands
    #: graver levels, [{threshold, severity}], each beyond the one before
    levels: NotRequired[list[dict[str, Any]]]
    repeat: NotRequired[dict[str, Any]]  #: {count, within_s}: so many readings within the time meet the condition
    direction: NotRequired[Literal["either", "rise", "fall"]]  #: rate, deviation
    window_s: NotRequired[float]  #: rate: over which it is taken
    per_s: NotRequired[float]  #: rate: its unit of time
    setpoint: NotRequired[float]  #: deviation from a constant
    reference: NotRequired[dict[str, Any]]  #: deviation from another series: {component_type, pin_position?}
    expression: NotRequired[str]  #: over `value` and the names of `inputs`
    inputs: NotRequired[dict[str, dict[str, Any]]]  #: name -> {component_type, pin_position?}
    inputs_max_age_s: NotRequired[float]  #: an input that is older, compared with the newest, decides nothing
    no_data_s: NotRequired[float]
    schedule: NotRequired[dict[str, Any]]  #: {time_zone, hours: [{days, from, to}]}: outside it the rule is inactive
    outages: NotRequired[list[dict[str, int]]]  #: planned, [{from, to}], µs: the rule is inactive
    group: NotRequired[str]  #: alarms of a device that have one cause
    group_master: NotRequired[bool]  #: while it is raised, the others of the group are suppressed
    first_out_s: NotRequired[float]  #: within which the first alarm of a group is marked
    lateness_s: NotRequired[float]  #: how long readings wait to be put in order


class QuietHours(TypedDict):
    """Hours in which only severities that break through are told."""

    since: str  #: HH:MM, local
    until: str  #: HH:MM; over midnight where it is not later
    days: NotRequired[list[str]]  #: mon … sun, on which they begin; absent: all


class Digest(TypedDict):
    """Everything in one notice a period."""

    every: Literal["hour", "day"]
    at: NotRequired[str]  #: HH:MM, local, of a day; absent: midnight


class NoticeLimit(TypedDict):
    """At most so many notices in any window."""

    notices: int
    window_s: float


class RecipientDoc(TypedDict):
    """Who is told, and how. What is absent is as the settings say (`notices`)."""

    name: str
    rev: int
    channel: Literal["mail", "webhook", "apprise"]
    address: str  #: mail address; URL; URL as Apprise has it
    severities: NotRequired[list[str]]  #: absent: all
    group_by: NotRequired[list[str]]  #: of domain/notices.LABELS; empty: everything in one group
    group_wait_s: NotRequired[float]
    group_interval_s: NotRequired[float]
    repeat_interval_s: NotRequired[float]
    cleared: NotRequired[bool]  #: tell when alarms are over; absent: yes
    timezone: NotRequired[str]  #: of quiet hours, digest and the times in mails, e.g. Europe/Berlin
    quiet_hours: NotRequired[list[QuietHours]]
    through: NotRequired[list[str]]  #: severities that neither quiet hours nor a digest hold back; absent: critical
    digest: NotRequired[Digest]
    limit: NotRequired[NoticeLimit]


class DeviceDoc(TypedDict):
    """One device; the key is its address."""

    device_id: str  #: the address: EUI, MAC, topic part, serial
    rev: int  #: grows with every change
    type: str
    name: NotRequired[str]  #: for people
    enabled: bool
    mode: NotRequired[str]
    mapping: NotRequired[dict[str, FieldMapping | None]]  #: overrides the type's
    datatypes: NotRequired[dict[str, dict[str, Any]]]  #: overrides the datatypes' fields
    rules: NotRequired[dict[str, dict[str, Any] | None]]  #: rule -> fields that differ; None: the rule is off
    outages: NotRequired[list[dict[str, int]]]  #: planned, [{from, to}], µs: no rule watches the device
    variables: NotRequired[dict[str, Any]]  #: handed to scripts
    birth: NotRequired[int]  #: µs; readings before it are of another device
    lateness_s: NotRequired[float]  #: overrides the type's
    time_zone: NotRequired[str]  #: overrides the type's and the parser's
    experiment_id: NotRequired[str | None]
    meta: NotRequired[dict[str, Any]]
    downlink: NotRequired[dict[str, Any]]  #: overrides the type's


def overrides_of(owner: Mapping[str, Any] | None, component_type: str) -> Mapping[str, Any]:
    """What a device type or a device says of a datatype otherwise than the registry."""
    return (owner.get("datatypes") or {}).get(component_type) or {} if owner else {}


def datatype_of(
    datatype: DatatypeDoc | None,
    component_type: str,
    device_type: Mapping[str, Any] | None,
    device: Mapping[str, Any] | None,
) -> DatatypeDoc | None:
    """A datatype as it is for a device: under its type's and its own overrides, field by field. None where there is none."""
    overrides = {**overrides_of(device_type, component_type), **overrides_of(device, component_type)}
    return cast(DatatypeDoc, {**datatype, **overrides}) if datatype and overrides else datatype
