"""Messages as the platforms of the field publish them, each taken out of its envelope: one file a platform. Pure: no I/O, no clock.

An envelope is recognised by its shape: the keys of the object, and over MQTT the topic. The setting `connector.format` names those that are looked
for (`auto`: all), `POST /ingest/NAME` one of them. What comes out of it is the device, its payload (bytes, or what the platform decoded),
the LoRaWAN port, and `meta`: `network`, `time` (µs: when the network received it), `rssi` (dBm) and `snr` (dB) of the gateway that heard it best, `gateway`,
`gateways` (how many heard it), `f_cnt`, `dr` or `sf`, `frequency` (Hz), `name`, `application`, and `decoded`: what the network's own codec made of the
payload, for parsers of kind `network`.

What carries nothing of a device (joins, acknowledgements, states, uplinks of MAC commands alone, discovery, commands) is an event of the
network and no message: nothing is stored of it, and it is no fault.

Topics that name the device themselves (Tasmota, Zigbee2MQTT, …) are looked at only where the pattern of `mqtt.subscriptions` leaves them to the
format, that is, has no `{device}`, or where the setting names the format.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from preservarium.connectors.device_names import rule_of
from preservarium.connectors.envelopes import (
    aws_iot,
    azure_iot,
    chirpstack,
    esphome,
    helium,
    homie,
    kerlink,
    loriot,
    milesight,
    ngsi_ld,
    owntracks,
    ruuvi,
    sensor_community,
    shelly,
    sigfox,
    statestream,
    tasmota,
    telegraf,
    teltonika,
    thingpark,
    things_stack,
    zigbee2mqtt,
)
from preservarium.connectors.envelopes.base import DECODED, LORAWAN, NOT_UPLINK, Event, Format, Uplink, inner
from preservarium.domain.readings.address import same_address
from preservarium.errors import ReasonCode, Reject

__all__ = [
    "AUTO",
    "DECODED",
    "FORMATS",
    "LORAWAN",
    "NOT_UPLINK",
    "Event",
    "Format",
    "Formats",
    "Uplink",
    "comes_by",
    "formats_of",
]

#: All formats are looked for.
AUTO: Final = "auto"
#: The tags that name a device where the settings are not asked.
DEVICE_TAGS: Final = "device,device_id,host"

#: In the order in which they are tried: those that are sure of themselves first.
FORMATS: Final[Mapping[str, Format]] = {
    one.name: one
    for one in (
        things_stack.FORMAT, chirpstack.FORMAT, thingpark.FORMAT, helium.FORMAT, loriot.FORMAT, aws_iot.FORMAT, kerlink.FORMAT,
        azure_iot.FORMAT, milesight.FORMAT, sigfox.FORMAT, shelly.FORMAT, tasmota.FORMAT, zigbee2mqtt.FORMAT, homie.FORMAT,
        statestream.FORMAT, owntracks.FORMAT, ruuvi.FORMAT, sensor_community.FORMAT, teltonika.FORMAT, ngsi_ld.FORMAT,
        telegraf.format_of(rule_of(DEVICE_TAGS)), esphome.FORMAT,
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Formats:
    """The formats that are looked for."""

    by_key: Mapping[str, tuple[Format, ...]]  #: a key of an object -> formats that it may be of
    keys: frozenset[str]  #: those keys, where they are found fastest
    by_topic: tuple[Format, ...]
    always: tuple[Format, ...]  #: those of them that are looked at where the topic names the device, too
    forced: Format | None  #: the one that everything is of, where the setting names one

    def read(
        self, value: Any, levels: tuple[str, ...] = (), device: str | None = None, base: int = 0
    ) -> Sequence[Uplink] | None:
        """The messages in a parsed JSON value (or bytes); none of an event of the network; None where it is in no envelope.

        Args:
            value: what came.
            levels: of the MQTT topic; () where it came by another way.
            device: that the topic names, where its pattern has {device}.
            base: levels of the topic before what `#` stands for.

        Raises:
            Reject: it is in an envelope, and a field of it is broken.
        """
        if self.forced is not None:
            return self.forced.read(Event(value, levels, device, base, forced=True))
        if type(value) is dict and not self.keys.isdisjoint(value):
            event = Event(value, levels, device, base)
            tried: list[Format] = []
            for key in value:
                for one in self.by_key.get(key, ()):
                    if one not in tried:
                        tried.append(one)
            for one in sorted(tried, key=_order) if len(tried) > 1 else tried:
                if (found := one.read(event)) is not None:
                    return found
        for one in self.by_topic if device is None else self.always if levels else ():
            if (
                one.topic is not None
                and one.topic(levels)
                and (found := one.read(Event(value, levels, device, base))) is not None
            ):
                return found
        return None


_PLACES: Final = {name: i for i, name in enumerate(FORMATS)}


def _order(one: Format) -> int:
    return _PLACES[one.name]


@lru_cache(maxsize=64)
def formats_of(names: str, device_tags: str = DEVICE_TAGS) -> Formats:
    """The formats that a setting names, separated by commas.

    Args:
        names: `auto`, or names out of `FORMATS`; one alone: everything is of it.
        device_tags: see `device_names.rule_of`.

    Raises:
        ValueError: a name, or the rule, is none.
    """
    wanted = [name.strip().lower() for name in names.split(",") if name.strip()] or [AUTO]
    if unknown := [name for name in wanted if name != AUTO and name not in FORMATS]:
        message = f"{unknown[0]!r} is no format; there are {AUTO}, {', '.join(FORMATS)}"
        raise ValueError(message)
    rule = rule_of(device_tags)
    known = {**FORMATS, "telegraf": telegraf.format_of(rule)}
    chosen = list(known.values()) if AUTO in wanted else [one for name, one in known.items() if name in wanted]
    by_key: dict[str, tuple[Format, ...]] = {}
    for one in chosen:
        for key in one.keys:
            by_key[key] = (*by_key.get(key, ()), one)
    forced = chosen[0] if len(chosen) == 1 else None
    by_topic = tuple(one for one in chosen if one.topic is not None)
    return Formats(by_key, frozenset(by_key), by_topic, tuple(one for one in by_topic if one.always), forced)


def comes_by(topic: str, named: str, device: str, value: Any) -> bool:
    """Whether a message of `device` may come by an MQTT topic in which `named` stands for the device.

    Who may publish under the topic of one device must not speak for another by what it publishes there. The Things Stack's own topics,
    `v3/APPLICATION/devices/DEVICE/…`, name a device by the id that it has in its application; only that network server publishes there.
    """
    if same_address(named, device):
        return True
    event = things_stack.unwrapped(value) if isinstance(value, dict) else None
    levels, known_as = topic.split("/"), inner(event, "end_device_ids").get("device_id")
    return any(
        level == "v3" and levels[i + 2 : i + 4] == ["devices", known_as] and known_as == named
        for i, level in enumerate(levels)
    )


def required(found: Sequence[Uplink] | None, name: str) -> Sequence[Uplink]:
    """The messages of an event that must be of a format.

    Raises:
        Reject: ENVELOPE_INVALID, it is not.
    """
    if found is None:
        raise Reject(ReasonCode.ENVELOPE_INVALID, f"this is nothing that {FORMATS[name].title} publishes")
    return found
