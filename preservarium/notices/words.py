"""What a notice says: one view of a delivery, for every channel and template."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, Final

import jinja2

from preservarium.domain.alarms.gone import Gone
from preservarium.domain.alarms.rule import measured
from preservarium.domain.notices import SEVERITIES

#: RFC 5322, 2.1.1: a line has 998 characters; subjects are cut where mail programs stop showing them anyway.
SUBJECT_CHARS_MAX: Final = 150

_templates: Final = jinja2.Environment(
    loader=jinja2.PackageLoader("preservarium.notices"),
    autoescape=jinja2.select_autoescape(["html"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

_HELD: Final = {
    "quiet_hours": "during quiet hours",
    "digest": "for this digest",
    "limit": "because the limit of notices was reached",
    "too_many": "because there were too many",
}

#: Why an alarm ended that nothing watches any more.
_ENDED: Final = {gone.code: gone.value for gone in Gone}

#: Of a line of a notice: where its alarm can be acknowledged; None: nowhere.
Link = Callable[[Mapping[str, Any]], str | None]


def instant(us: int) -> datetime:
    """µs since the epoch as a UTC datetime, exact."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)


@dataclass(frozen=True, slots=True)
class Told:
    """A notice in words."""

    subject: str
    text: str
    html: str


def subject_of(delivery: Mapping[str, Any]) -> str:
    """The subject: of one alarm, what it says; of several, how many and the worst."""
    lines = delivery["lines"]
    new = [line for line in lines if line["new"]] or lines
    more = sum(delivery["more"].values())
    severities = [s for s in SEVERITIES if any(line["severity"] == s for line in new)] or [*SEVERITIES[-1:]]
    if delivery["kind"] == "test":
        text = "Test: this is what a notice looks like"
    elif len(new) == 1 and not more:
        line = new[0]
        word = "ALARM" if line["status"] == "raised" else "cleared"
        again = "still " if delivery["kind"] == "repeat" else ""
        often = f" ({line['raised_count']} times)" if line["raised_count"] > 1 else ""
        text = f"[{line['severity']}] {again}{word}: {line.get('message') or line['rule']}{often}"
    else:
        counts = {
            "raised": 0,
            "cleared": 0,
            **{k: v for k, v in delivery["more"].items() if k in ("raised", "cleared")},
        }
        for line in new:
            counts[line["status"]] += 1
        words = [f"{counts['raised']} alarms"] if counts["raised"] else []
        words += [f"{counts['cleared']} cleared"] if counts["cleared"] else []
        label = ", ".join(value for value in delivery["group"].values() if value)
        about = f": {label}" if label else ""
        kind = {"repeat": "still ", "digest": "digest, "}.get(delivery["kind"], "")
        text = f"[{severities[0]}] {kind}{', '.join(words) or f'{more} more'}{about}"
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:SUBJECT_CHARS_MAX]


def tell(delivery: Mapping[str, Any], zone: tzinfo, link: Link, *, plot: str = "", plot_text: str = "") -> Told:
    """The words of a notice.

    Args:
        delivery: a line of `notices`.
        zone: its times are local to.
        link: where an alarm can be acknowledged.
        plot: URL of a picture for the HTML part; empty: none.
        plot_text: what the picture shows.
    """

    def shown(us: int | None) -> str:
        return "" if us is None else f"{instant(us).astimezone(zone):%Y-%m-%d %H:%M:%S %Z}"

    lines = [
        {
            **{
                name: line.get(name) for name in ("raw_partition", "raw_offset", "raw_index", "chattering", "first_out")
            },
            "raised": line["status"] == "raised",
            "word": "ALARM" if line["status"] == "raised" else "cleared",
            "new": line["new"],
            "severity": line["severity"],
            "title": line.get("message") or line["rule"],
            "often": line["raised_count"] if line["raised_count"] > 1 else 0,
            "first_at": shown(line["first_at"]),
            "occurred_at": shown(line["occurred_at"]),
            "cleared_at": shown(line.get("cleared_at")),
            "state": line["state"].replace("_", " "),
            "ended": _ENDED.get(line.get("reason") or "", ""),
            "device": line.get("device_name") or line["device_id"],
            "device_id": line["device_id"],
            "measured": line["component_type"]
            + (f", pin {line['pin_position']}" if line["pin_position"] != "-1" else ""),
            "value": measured(line.get("value"), line.get("unit") or ""),
            "rule": line["rule"],
            "threshold": measured(line.get("threshold"), line.get("unit") or ""),
            "alarm_id": line["alarm_id"],
            "transition_id": line["transition_id"],
            "link": link(line) if line["state"].endswith("unacknowledged") else None,
        }
        for line in delivery["lines"]
    ]
    held = delivery["held"]
    values = {
        "subject": subject_of(delivery),
        "kind": delivery["kind"],
        "lines": lines,
        "single": len(lines) == 1,
        "more": sum(delivery["more"].values()),
        "held": _HELD.get(held["why"], "") if held else "",
        "held_notices": held["notices"] if held else 0,
        "held_since": shown(held["since"]) if held else "",
        "group": {name: value for name, value in delivery["group"].items() if value and name != "alarm"},
        "planned_at": shown(delivery["planned_at"]),
        "recipient": delivery["recipient"],
        "delivery_id": delivery["delivery_id"],
        "plot": plot,
        "plot_text": plot_text,
    }
    text = _templates.get_template("notice.txt").render(values)
    return Told(values["subject"], text, _templates.get_template("notice.html").render(values))
