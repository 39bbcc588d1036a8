"""Telegraf's JSON: metrics of `outputs.http` and `outputs.mqtt` with `data_format = "json"`. Source: Telegraf, "JSON serializer".

Which tag names the device says the setting `connector.device_tags`; the payload is `{NAME: fields}`.
"""

from collections.abc import Sequence
from typing import Any, Final

from preservarium.connectors.device_names import Rule
from preservarium.connectors.envelopes.base import (
    Event,
    Format,
    Uplink,
    inner,
    instant,
    limited,
    objects,
    put,
    required_device,
)


def read_with(rule: Rule, event: Event) -> Sequence[Uplink] | None:
    """The messages of a batch or of one metric.

    Args:
        rule: which tag names the device.
        event: what came.
    """
    value = event.value
    if not isinstance(value, dict):
        return None
    metrics = objects(value, "metrics") if isinstance(value.get("metrics"), list) else [value]
    if not metrics or not all(isinstance(m.get("fields"), dict) and isinstance(m.get("name"), str) for m in metrics):
        return None
    if not all(isinstance(m.get("tags"), dict) for m in metrics):
        return None
    return limited((_metric(rule, m) for m in metrics if m["fields"]), "a batch")


def _metric(rule: Rule, metric: Any) -> Uplink:
    tags = {k: v for k, v in inner(metric, "tags").items() if isinstance(v, str)}
    meta: dict[str, Any] = {"network": "telegraf"}
    put(meta, "time", instant(metric.get("timestamp")))
    return Uplink(
        required_device(rule.device(metric["name"], tags), f"none of the tags {rule.text}"),
        {metric["name"]: metric["fields"]}, None, meta,
    )  # fmt: skip


KEYS: Final = frozenset({"metrics", "fields"})


def format_of(rule: Rule) -> Format:
    """The format, with the rule of the settings."""
    return Format("telegraf", "Telegraf JSON", lambda event: read_with(rule, event), KEYS)
