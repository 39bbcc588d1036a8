"""Actility ThingPark: the reports of its tunnel interface, as JSON. Source: ThingPark, "LRC-AS tunnel interface".

Reports of anything but an uplink (`DevEUI_downlink_Sent`, `DevEUI_location`, `DevEUI_notification`, …) are events of the network.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from preservarium.connectors.envelopes.base import Event, Format, Table, Uplink, from_hex, paths

#: One object, or, in a report for several gateways, `Lrrs: {Lrr: [...]}`.
TABLE: Final = Table(
    "thingpark",
    device=paths("DevEUI"),
    payload=paths("payload_hex"),
    encoding=from_hex,
    port=paths("FPort"),
    time=paths("Time"),
    f_cnt=paths("FCntUp"),
    sf=paths("SpFact"),
    frequency=paths("Frequency"),
    name=paths("CustomerData.name", "DevName"),
    application=paths("CustomerID"),
    decoded=paths("payload"),
    receptions=paths("Lrrs.Lrr"),
    rssi=paths("LrrRSSI"),
    snr=paths("LrrSNR"),
    gateway=paths("Lrrid"),
)
_PREFIX: Final = "DevEUI_"
UPLINK: Final = "DevEUI_uplink"
#: What ThingPark reports besides.
_OTHERS: Final = frozenset(
    f"{_PREFIX}{word}"
    for word in (
        "downlink_Sent", "downlink_Rejected", "location", "notification", "device_status_report", "multicast_summary",
        "downlink_group_status", "meta",
    )
)  # fmt: skip


def report_of(value: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The uplink report in an object; an empty one for another report; None where it is none."""
    found = value.get(UPLINK)
    if isinstance(found, dict):
        return found
    return {} if not _OTHERS.isdisjoint(value) else None


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of a report."""
    if not isinstance(event.value, dict):
        return None
    report = report_of(event.value)
    if report is None and event.forced and "DevEUI" in event.value:
        report = event.value
    if report is None:
        return None
    uplink = TABLE.uplink(report) if report else None
    return [] if uplink is None else [uplink]


FORMAT: Final = Format("thingpark", "Actility ThingPark", read, frozenset({UPLINK, *_OTHERS}))
