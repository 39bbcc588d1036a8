"""Sigfox: callbacks of the backend. Source: Sigfox, "Callbacks", UPLINK, BIDIR and DATA ADVANCED.

Who writes the callback chooses the names; these are those of the variables themselves: `{"device": "{device}", "data": "{data}", "time": "{time}",
"seqNumber": "{seqNumber}", …}`. Callbacks without `data` (status, geolocation, errors) are events of the network.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from preservarium.connectors.envelopes.base import Format, Table, from_hex, paths, tabular

TABLE: Final = Table(
    "sigfox",
    device=paths("device", "deviceId", "id"),
    payload=paths("data"),
    encoding=from_hex,
    time=paths("time"),
    time_unit=None,
    f_cnt=paths("seqNumber"),
    name=paths("deviceType"),
    receptions=paths("duplicates"),
    rssi=paths("rssi"),
    snr=paths("snr", "avgSnr"),
    gateway=paths("station", "bsId"),
    mode="Sigfox",
)
#: A device id is up to 32 bits in hexadecimal, a message 12 bytes.
_DEVICE: Final = re.compile(r"[0-9A-Fa-f]{4,8}")
_DATA: Final = re.compile(r"(?:[0-9A-Fa-f]{2}){0,12}")
_SURE: Final = frozenset(
    {"seqNumber", "station", "lqi", "duplicates", "computedLocation", "deviceType", "deviceTypeId"}
)


def _is_one(value: Mapping[str, Any]) -> bool:
    device, data = value.get("device"), value.get("data")
    return (
        isinstance(device, str)
        and _DEVICE.fullmatch(device) is not None
        and "payload" not in value
        and not _SURE.isdisjoint(value)
        and (data is None or (isinstance(data, str) and _DATA.fullmatch(data) is not None))
    )


FORMAT: Final = Format("sigfox", "Sigfox callbacks", tabular(TABLE, _is_one), _SURE)
