"""The anomaly stage: validated messages in, the beginnings and ends of anomalies out.

How a series is judged is in domain/anomaly.py; which ones are, the registry says (`tests: {anomaly: …}` of a datatype). Each
device's state is read once and put once a batch; a device none of whose series is judged has none.
"""

from collections.abc import Iterable
from typing import Any, Final

import orjson
import structlog

from preservarium import metrics, topics
from preservarium.clock import Clock
from preservarium.compiled import CompiledChecks, Documents, Known
from preservarium.domain.anomaly import MODEL, Detector, Judgement, judge, new_series
from preservarium.domain.errors import ReasonCode
from preservarium.domain.lineage import applied, generation_state, identity, is_applied, position_of
from preservarium.domain.quality import FAIL, DeviceChecks
from preservarium.domain.reading import ErrorLine
from preservarium.records import headers_of, message_error, pack, parse_trusted, refuse
from preservarium.river_models import MODELS_PER_DEVICE_MAX, RiverModel
from preservarium.settings import LiveSettings
from preservarium.stage import Batch, Effects, Record, Send, in_turns
from preservarium.state import Table, load_state

log = structlog.get_logger(__name__)

STAGE: Final = "anomaly"

#: Texts of problems that were logged; a registry with more has one line too many anyway.
PROBLEMS_LOGGED_MAX: Final = 100

#: Version of the state document: {"v": 1, "g": {generation: {"m": marks, "s": {"mode\tcomponent\tpin": series}}}}.
STATE_VERSION: Final = 1


def _new_generation() -> dict[str, Any]:
    return {"m": {}, "s": {}}


class Detection:
    """The stage's handler.

    Args:
        table: the state table.
        known: the device's document.
        documents: the catalogue.
        live: settings.
        clock: for error lines and caches.
    """

    def __init__(self, table: Table, known: Known, documents: Documents, live: LiveSettings, clock: Clock) -> None:
        self._table = table
        self._documents = documents
        self._live = live
        self._clock = clock
        self._warned: set[str] = set()
        self.checks = CompiledChecks("detectors", known, documents, live, clock)

    def warn(self, problem: str) -> None:
        """Log what of a model cannot be used, once."""
        if problem not in self._warned and len(self._warned) < PROBLEMS_LOGGED_MAX:
            self._warned.add(problem)
            log.warning("anomaly_model_unusable", problem=problem)

    async def __call__(self, batch: Batch) -> Effects:
        """Judge a batch.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        parsed, errors = parse_trusted(batch, stage=STAGE)
        work = _Work(self, batch, errors)
        async for record, lines in in_turns(zip(batch.records, parsed, strict=True)):
            work.record(record, lines)
        return work.finish()


class _Work:
    """One batch."""

    def __init__(self, stage: Detection, batch: Batch, errors: list[ErrorLine]) -> None:
        self._stage = stage
        self._batch = batch
        self._errors = errors
        self._effects = Effects()
        self._checks: dict[str, DeviceChecks] = {}
        self._states: dict[str, dict[str, Any]] = {}
        #: by the series' identity: (the series, its model, what it was made as)
        self._models: dict[int, tuple[list[Any], RiverModel, str]] = {}
        self._judged = self._began = self._duplicates = 0
        self._series_max = stage._live().anomaly.series_per_device_max

    def record(self, record: Record, lines: list[dict[str, Any]]) -> None:
        """One record of validated messages."""
        alerts: list[dict[str, Any]] = []
        for index, message in enumerate(lines):
            device_id = message["device_id"]
            checks = self._checks.get(device_id)
            if checks is None:
                checks = self._checks[device_id] = self._stage.checks.get(self._batch.partition, device_id)
            judged = [r for r in message["readings"] if checks.series(r["component_type"]).anomaly is not None]
            if judged:
                self._message(record, index, message, checks, judged, alerts)
        if alerts:
            self._effects.sends.append(
                Send(topics.ANOMALIES, record.key, pack(alerts), self._batch.partition, headers_of(record))
            )

    def _message(
        self,
        record: Record,
        index: int,
        message: dict[str, Any],
        checks: DeviceChecks,
        readings: list[dict[str, Any]],
        alerts: list[dict[str, Any]],
    ) -> None:
        device_id = message["device_id"]
        state = self._states.get(device_id)
        if state is None:
            value = self._stage._table.get(self._batch.partition, device_id.encode())
            state = self._states[device_id] = load_state(value, STATE_VERSION) or {"v": STATE_VERSION, "g": {}}
        generation = generation_state(state["g"], message["generation"], _new_generation)
        position = position_of(message)
        if is_applied(generation["m"], *position):
            self._duplicates += 1
            return
        applied(generation["m"], *position)
        for reading in readings:
            value = reading.get("value")
            if (
                value is None
                or type(value) not in (int, float)
                or reading.get("quality", 0) >= FAIL
                or reading.get("revised")
            ):
                continue
            detector = checks.series(reading["component_type"]).anomaly
            assert detector is not None
            key = f"{message['connector_mode']}\t{reading['component_type']}\t{reading['pin_position']}"
            series = generation["s"].get(key)
            if series is None:
                if len(generation["s"]) >= self._series_max:
                    if "limited" not in state:
                        state["limited"] = 1
                        self._limited(record, index, message)
                    continue
                series = generation["s"][key] = new_series()
            at = reading.get("timestamp", message["timestamp"])
            model = self._model(series, detector, generation["s"].values()) if detector.model else None
            judgement = judge(series, at, value, detector, model)
            self._judged += 1
            if judgement is not None:
                self._began += judgement.begins
                alerts.append(_alert(message, reading, at, judgement, detector.threshold))

    def _model(self, series: list[Any], detector: Detector, others: Iterable[list[Any]]) -> RiverModel | None:
        """The series' model, loaded once a batch; None where it cannot be made: then the series is judged without."""
        known = self._models.get(id(series))
        if known is not None:
            return known[1]
        if len(series) <= MODEL:
            made = sum(len(one) > MODEL or id(one) in self._models for one in others)
            if made >= MODELS_PER_DEVICE_MAX:
                self._stage.warn(f"more than {MODELS_PER_DEVICE_MAX} series of a device with a model: judged without")
                return None
        assert detector.model is not None
        named = f"{detector.model} {orjson.dumps(dict(detector.model_parameters)).decode()}"
        # Behind the series' own state: [what it was made as, its text].
        kept = series[MODEL] if len(series) > MODEL else ["", ""]
        try:
            model = RiverModel(detector.model, detector.model_parameters, kept[1] if kept[0] == named else "")
        except (ImportError, ValueError) as e:
            self._stage.warn(str(e))
            return None
        self._models[id(series)] = (series, model, named)
        return model

    def _limited(self, record: Record, index: int, message: dict[str, Any]) -> None:
        self._errors.append(
            message_error(
                STAGE,
                ReasonCode.STATE_LIMIT,
                f"more than {self._series_max} series: the others are not judged",
                self._batch,
                record,
                index,
                message,
                raw=None,
                now_us=self._stage._clock.now_us(),
            )
        )

    def finish(self) -> Effects:
        """State, errors and metrics of the whole batch."""
        effects = self._effects
        for series, model, named in self._models.values():
            try:
                series[MODEL:] = [[named, model.dump()]]
            except ValueError as e:
                self._stage.warn(f"{named}: {e}")
                del series[MODEL:]  # it begins anew: better than a record that Kafka refuses
        for device_id, state in self._states.items():
            effects.put(self._stage._table.name, device_id.encode(), orjson.dumps(state))
        for line in self._errors:
            refuse(effects, line)
        effects.after.append(self._count)
        return effects

    def _count(self) -> None:
        metrics.READINGS.labels(STAGE).inc(self._judged)
        metrics.ANOMALIES.inc(self._began)
        if self._duplicates:
            metrics.DUPLICATES.labels(STAGE).inc(self._duplicates)


def _alert(
    message: dict[str, Any], reading: dict[str, Any], at: int, judgement: Judgement, threshold: float
) -> dict[str, Any]:
    """A line of `anomaly_alerts`; its id is the same for the same reading in the same generation."""
    device_id, generation = message["device_id"], message["generation"]
    series = (device_id, message["connector_mode"], reading["component_type"], reading["pin_position"])
    return {
        "anomaly_id": identity("anomaly", *series, at, judgement.begins, generation),
        "device_id": device_id,
        "connector_mode": message["connector_mode"],
        "component_type": reading["component_type"],
        "pin_position": reading["pin_position"],
        "state": "begins" if judgement.begins else "ends",
        "timestamp": at,
        "value": reading["value"],
        "unit": reading["unit"],
        "expected": judgement.expected,
        "score": judgement.score,
        "threshold": threshold,
        "raw_partition": message["raw_partition"],
        "raw_offset": message["raw_offset"],
        "raw_index": message["raw_index"],
        "generation": generation,
    }
