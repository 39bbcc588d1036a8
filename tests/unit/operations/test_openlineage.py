"""Batches as OpenLineage events: as its published schema wants them, and the same when they are made again."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from preservarium.operations import openlineage
from preservarium.operations.openlineage import Batch, Emitter, OpenLineageError
from preservarium.settings import load

pytest.importorskip("openlineage", reason="missing: openlineage-python")

SCHEMA: Any = json.loads((Path(__file__).parent / "openlineage_schema.json").read_text())
NOW_US = 1_772_359_200_123_456


def made(*found: Batch) -> list[dict[str, Any]]:
    settings = load(
        kafka={"bootstrap_servers": "kafka-1:9092,kafka-2:9092", "topic_prefix": "x."},
        postgres={"url": "postgresql://someone:secret@db.example:5433/iot"},
    )
    return [json.loads(openlineage.as_json(event)) for event in openlineage.events(settings, found)]


def test_events_are_as_the_published_schema_wants_them() -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker())
    batches = [
        Batch("0" * 32, "sink", NOW_US, ["validated:3:100-149", "validated:4:7-9"]),
        Batch("a" * 32, "sink-alarms", NOW_US, ["iot_alerts:1:4-8"]),
    ]
    events = made(*batches)
    for event in events:
        validator.validate(event)
        assert "secret" not in json.dumps(event)
    first, second = events
    assert first["run"]["runId"] == "00000000-0000-0000-0000-000000000000"
    assert first["eventTime"] == "2026-03-01T10:00:00.123456+00:00"
    read, written = [[(one["namespace"], one["name"]) for one in first[side]] for side in ("inputs", "outputs")]
    assert read == [("kafka://kafka-1:9092", "x.iot_validated_data")]
    assert written == [("postgres://db.example:5433", "iot.public.measurements")]
    assert first["run"]["facets"]["preservarium_ranges"]["ranges"] == batches[0].inputs
    job = second["job"]
    assert (job["namespace"], job["name"]) == ("preservarium", "sink-alarms")
    assert second["outputs"][0]["name"] == "iot.public.alarm_events"
    assert made(*batches) == events
    broken = {**first, "run": {"facets": {}}}
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(broken)


def test_they_are_added_to_a_file_and_sent_to_no_other_address(tmp_path: Path) -> None:
    file = tmp_path / "events"
    for _ in range(2):
        emitter = Emitter(file=str(file))
        for event in openlineage.events(load(), [Batch("b" * 32, "sink", NOW_US, [])]):
            emitter.emit(event)
        emitter.close()
    assert [json.loads(line)["run"]["runId"][:8] for line in file.read_text().splitlines()] == ["bbbbbbbb"] * 2
    for url in ("ftp://x", "", "x:1", None):
        with pytest.raises(OpenLineageError, match="no address"):
            Emitter(url=url)
