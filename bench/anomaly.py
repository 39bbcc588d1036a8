"""How well the anomaly detector does on the Numenta Anomaly Benchmark: recall and false alarms a week.

    python bench/anomaly.py DIRECTORY    # a copy of NAB with its folders data/ and labels/

A labelled window counts as found where an anomaly begins in it; an anomaly that begins in none is a false alarm. Windows
that end before the warm-up are left out. The data are not ours (MIT license) and not part of this checkout.
"""

import csv
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import orjson

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preservarium.domain.quality.anomaly import detector_of, judge, new_series
from preservarium.stages.river_models import RiverModel

WEEK_US = 7 * 86_400 * 1_000_000


def instant(text: str) -> int:
    return round(datetime.fromisoformat(text[:19]).replace(tzinfo=UTC).timestamp()) * 1_000_000


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--groups", default="realKnownCause,realAWSCloudwatch,realTraffic,artificialWithAnomaly", show_default=True
)
@click.option("--detector", default="{}", help="Parameters that differ from the defaults, as JSON.")
def main(directory: Path, groups: str, detector: str) -> None:
    """Evaluate."""
    chosen = detector_of(orjson.loads(detector))
    labels: dict[str, Any] = orjson.loads((directory / "labels" / "combined_windows.json").read_bytes())
    click.echo(f"{'group':26}{'found':>10}{'false alarms':>14}{'weeks':>8}{'a week':>8}")
    for group in groups.split(","):
        found = labelled = false = 0
        weeks = 0.0
        for name, spans in labels.items():
            if not name.startswith(group + "/"):
                continue
            with (directory / "data" / name).open(encoding="utf-8") as file:
                rows = [(instant(row["timestamp"]), float(row["value"])) for row in csv.DictReader(file)]
            series = new_series()
            model = RiverModel(chosen.model, chosen.model_parameters) if chosen.model else None
            judgements = ((at, judge(series, at, value, chosen, model)) for at, value in rows)  # used at once
            begins = [at for at, judgement in judgements if judgement is not None and judgement.begins]
            start = rows[min(chosen.warm_up * (2 if chosen.model else 1), len(rows) - 1)][0]
            windows = [(instant(first), instant(last)) for first, last in spans if instant(last) > start]
            labelled += len(windows)
            found += sum(any(first <= at <= last for at in begins) for first, last in windows)
            false += sum(not any(first <= at <= last for first, last in windows) for at in begins)
            weeks += (rows[-1][0] - start) / WEEK_US
        click.echo(f"{group:26}{f'{found}/{labelled}':>10}{false:>14}{weeks:>8.0f}{false / weeks:>8.2f}")


if __name__ == "__main__":
    main()
