"""How a device takes commands: the `downlink` section of the registry, checked and compiled."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from preservarium.domain.commands.fields import refuse
from preservarium.domain.commands.lines import CONTENTS, PRESETS, check_settings
from preservarium.domain.registry.device import DeviceDoc, DeviceTypeDoc

#: Shape of a downlink -> topic where neither the device nor its type names one; plain MQTT's is a setting.
TOPICS: Final[Mapping[str, str]] = {
    "plain": "",
    "chirpstack": "application/{application}/device/{device}/command/down",
    "things_stack": "v3/{application}/devices/{device}/down/push",
    "http": "{device}",
}
#: MQTT quality of service, where it is not 1: The Things Stack's broker knows 0 only (its documentation, "MQTT Server").
QOS: Final[Mapping[str, int]] = {"things_stack": 0}
_PLACEHOLDER: Final = re.compile(r"\{(\w+)\}")
_DOWNLINK_FIELDS: Final = frozenset({"format", "topic", "qos", "sleeps", "lorawan_class", "commands"})


@dataclass(frozen=True, slots=True)
class Profile:
    """How a device takes commands: its own `downlink` section over that of its type."""

    problem: str = ""  #: why it can take none, for people
    format: str = "plain"
    topic: str = ""  #: MQTT topic, complete
    qos: int = 1  #: of MQTT; with 0 nobody says that the broker has taken it
    parser: str = ""  #: its type's, whose encoder makes the bytes
    variables: Mapping[str, Any] = field(default_factory=dict)
    sleeps: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)  #: what a command may say differently
    commands: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    known: bool = True  #: whether the registry has it; one that is not known (yet) keeps what waits


def compile_profile(device: DeviceDoc | None, device_type: DeviceTypeDoc | None, topic: str) -> Profile:
    """The profile of a device.

    Args:
        device: its document; None where it is not registered.
        device_type: its type's.
        topic: template of the MQTT topic of plain devices.
    """
    if device is None:
        return Profile("the device is not registered", known=False)
    if not device["enabled"]:
        return Profile("the device is switched off")
    if device_type is None:
        return Profile(f"there is no device type {device['type']!r}")
    common: dict[str, Any] = device_type.get("downlink") or {}
    own: dict[str, Any] = device.get("downlink") or {}
    given = {**common, **own}
    shape = given.pop("format", "plain")
    variables = device.get("variables") or {}
    known = {**variables, "device": device["device_id"]}
    template = given.pop("topic", None) or TOPICS.get(shape) or topic
    commands = {**common.get("commands", {}), **own.get("commands", {})}
    given.pop("commands", None)
    lorawan_class = given.pop("lorawan_class", None)
    sleeps = bool(given.pop("sleeps", lorawan_class == "A" or shape == "http"))
    missing = [name for name in _PLACEHOLDER.findall(template) if not isinstance(known.get(name), str | int)]
    full = _PLACEHOLDER.sub(lambda m: str(known.get(m[1])), template)
    problem = ""
    if missing:
        problem = f"its downlink topic {template!r} wants the variable {missing[0]!r}, which the device has not"
    elif shape != "http" and (not full or any(c in full for c in "+#\0")):
        # A wildcard or NUL cannot be in a topic that is published to (MQTT 3.1.1, 4.7.1).
        problem = f"{full!r:.200} is no topic to publish to"
    qos = given.pop("qos", QOS.get(shape, 1))
    return Profile(problem, shape, full, qos, device_type["parser"], variables, sleeps, given, commands)


def check_downlink(value: dict[str, Any]) -> dict[str, Any]:
    """The `downlink` section of a device type or a device: how it takes commands.

    `format` (plain, chirpstack, things_stack, http), `topic` with placeholders `{device}` and the device's variables, `qos`,
    `sleeps`, `lorawan_class` (A, which sleeps, B or C), what a command has where it says nothing (`PRESETS`), and
    `commands`: name -> presets and content.

    Raises:
        ValueError: the message names the field.
    """
    if unknown := value.keys() - _DOWNLINK_FIELDS - PRESETS:
        refuse(f"there is no {sorted(unknown)[0]!r:.100}")
    if value.get("format", "plain") not in TOPICS:
        refuse(f"format: not one of {', '.join(TOPICS)}")
    if not isinstance(value.get("topic", ""), str):
        refuse("topic: no text")
    if type(value.get("qos", 1)) is not int or value.get("qos", 1) not in (0, 1):
        refuse("qos: neither 0 nor 1")
    if not isinstance(value.get("sleeps", False), bool):
        refuse("sleeps: neither true nor false")
    if value.get("lorawan_class", "A") not in ("A", "B", "C"):
        refuse("lorawan_class: not one of A, B, C")
    check_settings({name: preset for name, preset in value.items() if name in PRESETS})
    commands = value.get("commands", {})
    if not isinstance(commands, dict):
        refuse("commands: not an object")
    for name, preset in commands.items():
        if not isinstance(preset, dict):
            refuse(f"commands.{name}: not an object")
        if unknown := preset.keys() - PRESETS - set(CONTENTS):
            refuse(f"commands.{name}: there is no {sorted(unknown)[0]!r:.100}")
        try:
            check_settings(preset)
        except ValueError as e:
            refuse(f"commands.{name}.{e}")
    return value
