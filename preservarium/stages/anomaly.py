"""The anomaly stage: validated messages in, the beginnings and ends of anomalies out.

How a series is judged is in domain/quality/anomaly.py; which ones are, the registry says (`tests: {anomaly: …}` of a datatype). A
device none of whose series is judged has no state.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Final

import orjson
import structlog

from preservarium import metrics, topics
from preservarium.domain.quality.anomaly import MODEL, Detector, Judgement, judge, new_series
from preservarium.domain.quality.checks import FAIL, SeriesCheck
from preservarium.domain.readings.json_text import to_bytes
from preservarium.domain.readings.lineage import generation_state, identity, take
from preservarium.registry.compiled import CompiledChecks
from preservarium.stages.keyed import CheckedStage, KeyedWork, OnDemand
from preservarium.stages.river_models import MODELS_PER_DEVICE_MAX, RiverModel
from preservarium.streaming.records import headers_of, pack
from preservarium.streaming.stage import Batch, Effects, Record, Send

log = structlog.get_logger(__name__)

STAGE: Final = "anomaly"

#: Version of the state document: {"v": 1, "g": {generation: {"m": marks, "s": {"mode\tcomponent\tpin": series}}}}.
STATE_VERSION: Final = 1

State = dict[str, Any]


def _new_generation() -> dict[str, Any]:
    return {"m": {}, "s": {}}


class Detection(CheckedStage[State]):
    """The stage's handler; made as every `KeyedStage`."""

    name = STAGE
    state_version = STATE_VERSION
    checks_name = "detectors"

    def _opened(self, partition: int, device_id: str, document: State | None) -> State:
        return document or {"v": STATE_VERSION, "g": {}}

    def warn(self, problem: str) -> None:
        """Log what of a model cannot be used, once."""
        if self._is_news(problem):
            log.warning("anomaly_model_unusable", problem=problem)

    async def __call__(self, batch: Batch) -> Effects:
        """Judge a batch.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        return await self._take(_Work(self, batch))


class _Work(KeyedWork[Detection, State]):
    """One batch."""

    def __init__(self, stage: Detection, batch: Batch) -> None:
        super().__init__(stage, batch)
        self._checks: dict[str, Mapping[str, SeriesCheck]] = OnDemand(partial(_checks, stage.checks, batch.partition))
        #: by the series' identity: (the series, its model, what it was made as)
        self._models: dict[int, tuple[list[Any], RiverModel, str]] = {}
        self._judged = self._began = 0
        self._series_max = stage._live().anomaly.series_per_device_max

    def record(self, record: Record, lines: list[dict[str, Any]]) -> None:
        """One record of validated messages."""
        alerts: list[dict[str, Any]] = []
        for index, message in enumerate(lines):
            checks = self._checks[message["device_id"]]
            for reading in message["readings"]:
                if checks[reading["component_type"]].anomaly is not None:
                    self._message(record, index, message, checks, alerts)
                    break
        if alerts:
            self._effects.sends.append(
                Send(topics.ANOMALIES, record.key, pack(alerts), self.batch.partition, headers_of(record))
            )

    def _message(
        self,
        record: Record,
        index: int,
        message: dict[str, Any],
        checks: Mapping[str, SeriesCheck],
        alerts: list[dict[str, Any]],
    ) -> None:
        device_id = message["device_id"]
        state = self._devices[device_id]
        generation = generation_state(state["g"], message["generation"], _new_generation)
        if not take(generation["m"], message):
            self._duplicates += 1
            return
        self._touched.add(device_id)
        for reading in message["readings"]:
            detector = checks[reading["component_type"]].anomaly
            value = reading.get("value")
            if (
                detector is None
                or value is None
                or type(value) not in (int, float)
                or reading.get("quality", 0) >= FAIL
                or reading.get("revised")
            ):
                continue
            key = f"{message['connector_mode']}\t{reading['component_type']}\t{reading['pin_position']}"
            series = generation["s"].get(key)
            if series is None:
                if len(generation["s"]) >= self._series_max:
                    if "limited" not in state:
                        state["limited"] = 1
                        text = f"more than {self._series_max} series: the others are not judged"
                        self._limited(record, index, text, message)
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

    def finish(self) -> Effects:
        """As of every stage; the models become part of their series' states."""
        for series, model, named in self._models.values():
            try:
                series[MODEL:] = [[named, model.dump()]]
            except ValueError as e:
                self._stage.warn(f"{named}: {e}")
                del series[MODEL:]  # it begins anew: better than a record that Kafka refuses
        return super().finish()

    def _document(self, device_id: str) -> bytes:
        return to_bytes(self._devices[device_id])

    def _after(self) -> None:
        super()._after()
        metrics.READINGS.labels(STAGE).inc(self._judged)
        metrics.ANOMALIES.inc(self._began)


def _checks(compiled: CompiledChecks, partition: int, device_id: str) -> Mapping[str, SeriesCheck]:
    return compiled.get(partition, device_id).by_type


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
