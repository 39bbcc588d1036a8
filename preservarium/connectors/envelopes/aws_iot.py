"""AWS IoT Core for LoRaWAN and for Amazon Sidewalk. Source: AWS IoT Wireless, "Uplink message format".

A device is called by its DevEUI where there is one, else by its `WirelessDeviceId`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from preservarium.connectors.envelopes.base import Event, Format, Table, Uplink, inner, paths

LORAWAN_TABLE: Final = Table(
    "aws_iot",
    device=paths("WirelessMetadata.LoRaWAN.DevEui", "WirelessDeviceId"),
    payload=paths("PayloadData"),
    port=paths("WirelessMetadata.LoRaWAN.FPort"),
    time=paths("WirelessMetadata.LoRaWAN.Timestamp"),
    f_cnt=paths("WirelessMetadata.LoRaWAN.FCnt"),
    sf=paths("WirelessMetadata.LoRaWAN.SpreadingFactor"),
    dr=paths("WirelessMetadata.LoRaWAN.DataRate"),
    frequency=paths("WirelessMetadata.LoRaWAN.Frequency"),
    name=paths("WirelessDeviceId"),
    receptions=paths("WirelessMetadata.LoRaWAN.Gateways"),
    rssi=paths("Rssi"),
    snr=paths("Snr"),
    gateway=paths("GatewayEui"),
)
SIDEWALK_TABLE: Final = replace(
    LORAWAN_TABLE,
    device=paths("WirelessMetadata.Sidewalk.SidewalkId", "WirelessDeviceId"),
    port=(),
    time=paths("WirelessMetadata.Sidewalk.Timestamp"),
    f_cnt=paths("WirelessMetadata.Sidewalk.Seq"),
    receptions=(),
    mode="Sidewalk",
)


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of an event of AWS IoT Wireless."""
    value = event.value
    if not isinstance(value, dict) or not ("WirelessDeviceId" in value or "WirelessMetadata" in value):
        return None
    table = SIDEWALK_TABLE if inner(inner(value, "WirelessMetadata"), "Sidewalk") else LORAWAN_TABLE
    uplink = table.uplink(value)
    return [] if uplink is None else [uplink]


FORMAT: Final = Format("aws_iot", "AWS IoT Core for LoRaWAN", read, frozenset({"WirelessDeviceId", "WirelessMetadata"}))
