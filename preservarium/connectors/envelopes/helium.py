"""Helium Console: its HTTP and MQTT integrations. Source: Helium, "Integrations", JSON schema.

Routers that run ChirpStack write ChirpStack's events (chirpstack.py). `decoded.payload` is what the console's function made of the payload.
"""

from typing import Final

from preservarium.connectors.envelopes.base import Format, Table, paths, tabular

TABLE: Final = Table(
    "helium",
    device=paths("dev_eui"),
    payload=paths("payload"),
    port=paths("port"),
    time=paths("reported_at"),
    f_cnt=paths("fcnt"),
    name=paths("name"),
    decoded=paths("decoded.payload"),
    receptions=paths("hotspots"),
    rssi=paths("rssi"),
    snr=paths("snr"),
    gateway=paths("name", "id"),
)

FORMAT: Final = Format(
    "helium",
    "Helium Console",
    tabular(TABLE, lambda v: "dev_eui" in v and not {"hotspots", "app_eui", "reported_at"}.isdisjoint(v)),
    frozenset({"dev_eui"}),
)
