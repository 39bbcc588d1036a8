"""What monitoring tools push: Prometheus remote write 1.0 and 2.0, and OpenTelemetry's metrics (OTLP over HTTP), without a change of theirs.

| request | what it is |
|---|---|
| `POST /api/v1/write` | Prometheus remote write, protobuf packed with snappy: `prometheus.WriteRequest` (1.0) or `io.prometheus.write.v2.Request` |
| `POST /v1/metrics` | OTLP's `ExportMetricsServiceRequest`, protobuf or JSON |

Which label, or attribute of the resource or of the point, names the device says the setting `connector.device_tags`; dots of attributes may be
written as underscores there. The samples of a device are one raw message (or several, where they are many), in their order, for a parser of kind
`metrics`:

    {"metrics": [{"name": "node_load1", "labels": {"job": "node"}, "value": 0.5, "time": 1795200000123000, "unit": "1"}, …]}

`time` is in µs. A sample that says that its series has ended (Prometheus' stale marker), and one without a number, is none. Of a histogram
come `NAME_count`, `NAME_sum`, `NAME_min`, `NAME_max` and `NAME_bucket` with the label `le`, of a summary its quantiles; exponential and
native histograms give their count and sum.

Answers are those of the protocols: 204 (or, of OTLP, 200 with what was refused) after Kafka has acknowledged; 400 is not sent again, 503 is.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import orjson
from aiohttp import hdrs, web
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.message import DecodeError

from preservarium.connectors.device_names import Rule, rule_of
from preservarium.connectors.influx_write import PAUSE, Pause
from preservarium.errors import ReasonCode, Reject
from preservarium.settings import Settings

#: Samples of one raw message: half of what a message may become.
SAMPLES_MAX: Final = 2_000
#: Series, or points, read between two looks at the event loop.
SLICE_SAMPLES: Final = 500
#: Labels of a series that are kept.
LABELS_MAX: Final = 60
_NAME: Final = "__name__"
#: Where a request keeps how many samples were taken of it.
WRITTEN: Final = web.RequestKey("written", int)


class Metrics(NamedTuple):
    """Samples of one device out of a request: a message."""

    device: str
    payload: dict[str, Any]


class _Sample(NamedTuple):
    name: str
    labels: Mapping[str, str]
    value: float | int
    time: int  #: µs; 0 where it has none
    unit: str


# --- the protobufs of Prometheus, declared as its repository has them (prompb/remote.proto, io/prometheus/write/v2/types.proto) ---

_F = descriptor_pb2.FieldDescriptorProto
_ONE, _MANY = _F.LABEL_OPTIONAL, _F.LABEL_REPEATED


def _declared() -> tuple[Any, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="preservarium/remote_write.proto", package="rw", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, int, str]) -> None:
        made = file.message_type.add(name=name)
        for label, number, kind, count, of in fields:
            made.field.add(name=label, number=number, type=kind, label=count, type_name=f".rw.{of}" if of else None)

    message("Label", ("name", 1, _F.TYPE_STRING, _ONE, ""), ("value", 2, _F.TYPE_STRING, _ONE, ""))
    message("Sample", ("value", 1, _F.TYPE_DOUBLE, _ONE, ""), ("timestamp", 2, _F.TYPE_INT64, _ONE, ""))
    message("Histogram", ("count_int", 1, _F.TYPE_UINT64, _ONE, ""), ("count_float", 2, _F.TYPE_DOUBLE, _ONE, ""),
            ("sum", 3, _F.TYPE_DOUBLE, _ONE, ""), ("timestamp", 15, _F.TYPE_INT64, _ONE, ""))  # fmt: skip
    message("Series", ("labels", 1, _F.TYPE_MESSAGE, _MANY, "Label"), ("samples", 2, _F.TYPE_MESSAGE, _MANY, "Sample"),
            ("histograms", 4, _F.TYPE_MESSAGE, _MANY, "Histogram"))  # fmt: skip
    message("Request1", ("timeseries", 1, _F.TYPE_MESSAGE, _MANY, "Series"))
    message("Metadata2", ("type", 1, _F.TYPE_INT32, _ONE, ""), ("unit_ref", 4, _F.TYPE_UINT32, _ONE, ""))
    message("Series2", ("labels_refs", 1, _F.TYPE_UINT32, _MANY, ""), ("samples", 2, _F.TYPE_MESSAGE, _MANY, "Sample"),
            ("histograms", 3, _F.TYPE_MESSAGE, _MANY, "Histogram"), ("metadata", 5, _F.TYPE_MESSAGE, _ONE, "Metadata2"))  # fmt: skip
    message("Request2", ("symbols", 4, _F.TYPE_STRING, _MANY, ""), ("timeseries", 5, _F.TYPE_MESSAGE, _MANY, "Series2"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    first, second = (
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"rw.{name}")) for name in ("Request1", "Request2")
    )
    return first, second


Request1, Request2 = _declared()


def remote_write(
    request: web.Request, body: bytes, settings: Settings, payload_bytes_max: int
) -> Iterator[Metrics | Reject | Pause]:
    """The messages of a request of Prometheus, unpacked.

    Raises:
        Reject: it is none.
    """
    second = "io.prometheus.write.v2.Request" in request.headers.get(hdrs.CONTENT_TYPE, "")
    samples = _second(body) if second else _first(body)
    return messages_of(samples, rule_of(settings.connector.device_tags), payload_bytes_max)


def _parsed(kind: Any, body: bytes, what: str) -> Any:
    try:
        return kind.FromString(body)
    except DecodeError:
        message = f"the body is no {what}"
        raise Reject(ReasonCode.ENVELOPE_INVALID, message) from None


def _first(body: bytes) -> Iterator[_Sample | Reject]:
    for series in _parsed(Request1, body, "prometheus.WriteRequest").timeseries:
        yield from _series({label.name: label.value for label in series.labels}, series, "")


def _second(body: bytes) -> Iterator[_Sample | Reject]:
    request = _parsed(Request2, body, "io.prometheus.write.v2.Request")
    symbols = list(request.symbols)
    for series in request.timeseries:
        refs = series.labels_refs
        if len(refs) % 2 or any(ref >= len(symbols) for ref in (*refs, series.metadata.unit_ref)):
            yield Reject(ReasonCode.ENVELOPE_INVALID, "a series refers to symbols that are not there")
            continue
        labels = {symbols[refs[i]]: symbols[refs[i + 1]] for i in range(0, len(refs), 2)}
        yield from _series(labels, series, symbols[series.metadata.unit_ref] if symbols else "")


def _series(labels: dict[str, str], series: Any, unit: str) -> Iterator[_Sample | Reject]:
    name = labels.pop(_NAME, "")
    if not name or len(labels) > LABELS_MAX:
        yield Reject(ReasonCode.ENVELOPE_INVALID, f"a series without a name, or with more than {LABELS_MAX} labels")
        return
    for sample in series.samples:
        yield _Sample(name, labels, sample.value, sample.timestamp * 1_000, unit)
    for histogram in series.histograms:
        count = histogram.count_float or histogram.count_int
        yield _Sample(f"{name}_count", labels, count, histogram.timestamp * 1_000, "")
        yield _Sample(f"{name}_sum", labels, histogram.sum, histogram.timestamp * 1_000, unit)


# --- OpenTelemetry -----------------------------------------------------------------------------------------------------


def otlp(
    request: web.Request, body: bytes, settings: Settings, payload_bytes_max: int
) -> Iterator[Metrics | Reject | Pause]:
    """The messages of an export of OpenTelemetry, unpacked.

    Raises:
        Reject: it is none.
    """
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    if request.content_type == "application/json":
        if not body.lstrip().startswith(b"{"):
            message = "the body is no ExportMetricsServiceRequest in JSON: an object is expected"
            raise Reject(ReasonCode.ENVELOPE_INVALID, message)
        try:
            export = json_format.Parse(
                body, ExportMetricsServiceRequest(), ignore_unknown_fields=True, max_recursion_depth=20
            )
        except (json_format.ParseError, UnicodeDecodeError, RecursionError) as e:
            message = f"the body is no ExportMetricsServiceRequest in JSON: {str(e)[:200]}"
            raise Reject(ReasonCode.ENVELOPE_INVALID, message) from None
    else:
        export = _parsed(ExportMetricsServiceRequest, body, "ExportMetricsServiceRequest")
    rule = rule_of(settings.connector.device_tags)
    return messages_of(_exported(export), rule, payload_bytes_max)


def _exported(export: Any) -> Iterator[_Sample | Reject]:
    for resource in export.resource_metrics:
        common = _attributes(resource.resource.attributes)
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                yield from _metric(metric, common)


def _metric(metric: Any, common: Mapping[str, str]) -> Iterator[_Sample | Reject]:
    kind = metric.WhichOneof("data")
    if not metric.name or kind is None:
        yield Reject(ReasonCode.ENVELOPE_INVALID, "a metric without a name or without data")
        return
    for point in getattr(metric, kind).data_points:
        if point.flags & 1:
            continue  # FLAG_NO_RECORDED_VALUE: as a stale marker
        labels = {**common, **_attributes(point.attributes)}
        if len(labels) > LABELS_MAX:
            yield Reject(ReasonCode.ENVELOPE_INVALID, f"{metric.name:.80}: more than {LABELS_MAX} attributes")
            continue
        at = point.time_unix_nano // 1_000
        if kind in ("gauge", "sum"):
            value = point.as_int if point.WhichOneof("value") == "as_int" else point.as_double
            yield _Sample(metric.name, labels, value, at, metric.unit)
            continue
        yield _Sample(f"{metric.name}_count", labels, point.count, at, "")
        if kind == "summary" or point.HasField("sum"):
            yield _Sample(f"{metric.name}_sum", labels, point.sum, at, metric.unit)
        if kind == "summary":
            for quantile in point.quantile_values:
                yield _Sample(
                    metric.name, {**labels, "quantile": f"{quantile.quantile:g}"}, quantile.value, at, metric.unit
                )
            continue
        for name in ("min", "max"):
            if point.HasField(name):
                yield _Sample(f"{metric.name}_{name}", labels, getattr(point, name), at, metric.unit)
        if kind == "histogram":
            total = 0
            for i, count in enumerate(point.bucket_counts):
                total += count
                bound = f"{point.explicit_bounds[i]:g}" if i < len(point.explicit_bounds) else "+Inf"
                yield _Sample(f"{metric.name}_bucket", {**labels, "le": bound}, total, at, "")


def _attributes(given: Any) -> dict[str, str]:
    """Attributes as texts, by their names and, where these have dots, with underscores as Prometheus writes them."""
    found: dict[str, str] = {}
    for attribute in given:
        which = attribute.value.WhichOneof("value")
        if which in ("string_value", "int_value", "double_value", "bool_value"):
            value = getattr(attribute.value, which)
            found[attribute.key.replace(".", "_")] = ("false", "true")[value] if which == "bool_value" else str(value)
    return found


# --- both --------------------------------------------------------------------------------------------------------------


def messages_of(
    samples: Iterator[_Sample | Reject], rule: Rule, payload_bytes_max: int
) -> Iterator[Metrics | Reject | Pause]:
    """Samples as messages of their devices, and what cannot be taken; `PAUSE` in between.

    Raises:
        Reject: the request as a whole is none.
    """
    collected: dict[str, list[dict[str, Any]]] = {}
    sizes: dict[str, int] = {}
    for number, sample in enumerate(samples):
        if number % SLICE_SAMPLES == SLICE_SAMPLES - 1:
            yield PAUSE
        if isinstance(sample, Reject):
            yield sample
            continue
        if _none(sample.value):
            continue
        device = rule.device(sample.name, sample.labels)
        if device is None:
            message = f"none of the labels {rule.text} names the device: {sample.name:.80}"
            yield Reject(ReasonCode.ENVELOPE_NO_DEVICE, message)
            continue
        document: dict[str, Any] = {"name": sample.name, "labels": dict(sample.labels), "value": sample.value}
        if sample.time:
            document["time"] = sample.time
        if sample.unit:
            document["unit"] = sample.unit
        size = len(orjson.dumps(document)) + 1
        held = collected.setdefault(device, [])
        if held and (len(held) >= SAMPLES_MAX or sizes[device] + size > payload_bytes_max - 20):
            yield Metrics(device, {"metrics": held})
            collected[device] = held = []
        sizes[device] = size + (sizes[device] if held else 0)
        held.append(document)
    for device, held in collected.items():
        yield Metrics(device, {"metrics": held})


def _none(value: float | int) -> bool:
    """Whether a value is no number: NaN (a stale marker is one), or infinite."""
    return isinstance(value, float) and not math.isfinite(value)


def prometheus_answer(samples: int, refused: Sequence[Mapping[str, Any]], refused_count: int) -> web.StreamResponse:
    """What Prometheus wants to hear: 204 with how many samples were written, or 400 with why not all."""
    headers = {
        "X-Prometheus-Remote-Write-Samples-Written": str(samples),
        "X-Prometheus-Remote-Write-Histograms-Written": "0",
        "X-Prometheus-Remote-Write-Exemplars-Written": "0",
    }
    if not refused_count:
        return web.Response(status=204, headers=headers)
    text = f"{refused_count} series or samples cannot be taken: {refused[0]['message']}"
    return web.Response(status=400, text=text, headers=headers)


def otlp_answer(request: web.Request, refused: Sequence[Mapping[str, Any]], refused_count: int) -> web.StreamResponse:
    """An ExportMetricsServiceResponse, with what was refused as its partial success; in the form of the request."""
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

    said = ExportMetricsServiceResponse()
    if refused_count:
        said.partial_success.rejected_data_points = refused_count
        said.partial_success.error_message = str(refused[0]["message"])
    if request.content_type == "application/json":
        return web.Response(text=json_format.MessageToJson(said, indent=None), content_type="application/json")
    return web.Response(body=said.SerializeToString(), content_type="application/x-protobuf")
