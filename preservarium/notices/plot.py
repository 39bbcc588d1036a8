"""The picture in a mail: the series of an alarm over the last hours, with its threshold.

Readings are asked of PostgreSQL, with a short time limit, behind a breaker of its own; where it does not answer, or where the
extra `plots` is not installed, the mail goes without a picture. matplotlib draws in a thread, one picture at a time.
"""

import asyncio
import io
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, tzinfo
from importlib.util import find_spec
from typing import Any, Final

import structlog

from preservarium.breaker import Breaker
from preservarium.clock import Clock
from preservarium.errors import Retry, reason
from preservarium.notices.mail import Picture
from preservarium.notices.words import instant
from preservarium.settings import LiveSettings
from preservarium.stores.postgres import INFRASTRUCTURE_ERRORS, PostgresPool

log = structlog.get_logger(__name__)

#: Readings of a picture, the last ones: three for each pixel of its width.
POINTS_MAX: Final = 2_000
#: 640 × 240 pixels at twice the resolution, for sharp screens; some 40 KB.
WIDTH_IN, HEIGHT_IN, DPI = 6.4, 2.4, 200
#: A picture that is larger is left out: it would be most of the mail.
PNG_BYTES_MAX: Final = 300_000

_QUERY: Final = """
SELECT timestamp, value FROM iot_measurements
WHERE device_id = $1 AND component_type = $2 AND pin_position = $3 AND timestamp >= $4 AND timestamp <= $5
  AND value IS NOT NULL ORDER BY timestamp DESC LIMIT $6"""

Point = tuple[datetime, float]


class Plotter:
    """Draws the first alarm of a notice that measures something.

    Args:
        live: settings.
        clock: for the breaker, and the end of the picture.
        zone: of a recipient.
    """

    def __init__(self, live: LiveSettings, clock: Clock, zone: Callable[[str], tzinfo]) -> None:
        self._live = live
        self._clock = clock
        self._zone = zone
        self._pool = PostgresPool(live, "preservarium-plots")
        self._breaker = Breaker("plots", lambda: live().breaker, clock=clock, optional=True, server="postgres")
        self._turn = asyncio.Lock()
        self._can_draw = find_spec("matplotlib") is not None
        self._said = False

    async def __call__(self, delivery: Mapping[str, Any]) -> Picture | None:
        """The picture; None where there is none. Never raises for want of a database."""
        settings = self._live().notices
        lines = [line for line in delivery["lines"] if line.get("value") is not None]
        if not lines or not settings.plot_hours:
            return None
        if not self._can_draw:
            if not self._said:
                self._said = True
                log.info("no_pictures", reason="needs the extra `plots`: pip install 'preservarium[plots]'")
            return None
        line = lines[0]
        try:
            points = await self._readings(line, settings.plot_hours, settings.plot_timeout_s)
        except (Retry, TimeoutError) as e:
            log.info("mail_without_picture", error=str(e) or "no answer in time")
            return None
        if len(points) < 2:
            return None
        zone = self._zone(delivery["recipient"])
        async with self._turn:  # matplotlib's fonts and caches are shared
            png = await asyncio.to_thread(draw, line, points, zone)
        if len(png) > PNG_BYTES_MAX:
            return None
        return Picture(png, _described(line, points, zone))

    async def _readings(self, line: Mapping[str, Any], hours: float, timeout_s: float) -> list[Point]:
        end = instant(max(self._clock.now_us(), line["occurred_at"]))
        async with self._breaker:
            try:
                async with asyncio.timeout(timeout_s), self._pool.acquire() as connection:
                    rows = await connection.fetch(
                        _QUERY, line["device_id"], line["component_type"], line["pin_position"],
                        end - timedelta(hours=hours), end, POINTS_MAX,
                    )  # fmt: skip
            except INFRASTRUCTURE_ERRORS as e:
                message = f"PostgreSQL: {reason(e)}"
                raise Retry(message) from e
        return [(row[0], row[1]) for row in reversed(rows)]

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.close()


def _title(line: Mapping[str, Any]) -> str:
    pin = f", pin {line['pin_position']}" if line["pin_position"] != "-1" else ""
    return f"{line.get('device_name') or line['device_id']}: {line['component_type']}{pin}"


def _described(line: Mapping[str, Any], points: Sequence[Point], zone: tzinfo) -> str:
    values = [value for _, value in points]
    unit = line.get("unit") or ""
    first, last = (at.astimezone(zone) for at in (points[0][0], points[-1][0]))
    return (
        f"{_title(line)} from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M %Z}: "
        f"{min(values):.6g} to {max(values):.6g} {unit}, last {values[-1]:.6g} {unit}"
    )


def draw(line: Mapping[str, Any], points: Sequence[Point], zone: tzinfo) -> bytes:
    """A PNG of the series; blocks for some 100 ms.

    Args:
        line: of a notice; its threshold and when it was raised and cleared are drawn.
        points: readings in the order of time.
        zone: of the axis.
    """
    from matplotlib import dates
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it keeps every figure, and asks for a display.
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), dpi=DPI, layout="constrained")
    axes: Any = figure.add_subplot()
    times = [at for at, _ in points]
    axes.plot(times, [value for _, value in points], color="#1a5fb4", linewidth=1.2, marker=".", markersize=2.5)
    if (threshold := line.get("threshold")) is not None:
        axes.axhline(threshold, color="#b3261e", linewidth=1, linestyle="--", label=f"threshold {threshold:.6g}")
    for key, color in (("occurred_at", "#b3261e"), ("cleared_at", "#2e7d32")):
        at = line.get(key)
        if at is not None and times[0] <= instant(at) <= times[-1]:
            word = "raised" if key == "occurred_at" else "cleared"
            axes.axvline(instant(at), color=color, linewidth=1, label=word)
    # A $ would begin a formula, and what a device is called is no formula.
    axes.set_title(_title(line).replace("$", r"\$"), fontsize=9, loc="left")
    axes.set_ylabel((line.get("unit") or "").replace("$", r"\$"), fontsize=8)
    locator = dates.AutoDateLocator(tz=zone, maxticks=8)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator, tz=zone))
    axes.tick_params(labelsize=8)
    axes.xaxis.get_offset_text().set_fontsize(8)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0.5, 1.0), ncols=3)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
