"""Samples as monitoring tools push them (Prometheus remote write, OTLP): each has a name, labels, a value and a time.

```yaml
kind: metrics
source:
  pin: [cpu, mode]          # labels whose values tell series of one name apart, joined with a comma; absent: all that `without` does not name
  without: [job, instance]  # labels that are none of a pin: absent: those that name the device or the source of the sample
```

A field is called as the sample. Times are µs. Two samples of one name and pin at one instant are told as such by normalize.
"""

from collections.abc import Mapping
from typing import Any, Final

from preservarium.domain.decoders.base import DECODED_MAX, Decoded, ParserError, failed, source_of
from preservarium.domain.readings.reading import RawMessage
from preservarium.errors import ReasonCode, Reject

#: Labels and attributes that say where a sample was taken, which the device says already.
WITHOUT: Final = frozenset({
    "device", "device_id", "host", "host_name", "instance", "job", "service_name", "service_instance_id", "service_namespace",
    "service_version", "telemetry_sdk_language", "telemetry_sdk_name", "telemetry_sdk_version", "process_pid", "monitor", "replica",
})  # fmt: skip
#: Labels that a parser names.
LABELS_MAX: Final = 50
#: A pin is a part of a row's key.
PIN_CHARS_MAX: Final = 200


class MetricsDecoder:
    """Payloads are `{"metrics": [{name, value, labels?, time?, unit?}, …]}`.

    Args:
        pin: labels that make the pin, in their order; None: all but `without`, by name.
        without: see `pin`.
    """

    def __init__(self, pin: tuple[str, ...] | None, without: frozenset[str]) -> None:
        self._pin = pin
        self._without = without

    def decode(self, raw: RawMessage) -> list[Decoded | Reject]:
        """The samples, and why others cannot be read.

        Raises:
            Reject: DECODE_FAILED, these are no samples; DECODE_LIMIT.
        """
        payload = raw["payload"]
        samples = payload.get("metrics") if isinstance(payload, dict) else None
        if not isinstance(samples, list) or not samples:
            message = "no samples: {metrics: [{name, value, …}, …]} is expected"
            raise failed(message)
        if len(samples) > DECODED_MAX:
            raise Reject(ReasonCode.DECODE_LIMIT, f"{len(samples)} samples, more than {DECODED_MAX}")
        return [self._field(i, sample) for i, sample in enumerate(samples)]

    def _field(self, i: int, sample: Any) -> Decoded | Reject:
        name = sample.get("name") if isinstance(sample, dict) else None
        if not isinstance(name, str) or not name:
            return failed(f"sample {i} has no name")
        value, at, unit = sample.get("value"), sample.get("time"), sample.get("unit")
        if isinstance(value, bool) or not isinstance(value, int | float):
            return failed(f"sample {i} ({name:.80}) has no number")
        if at is not None and (isinstance(at, bool) or not isinstance(at, int)):
            return failed(f"sample {i} ({name:.80}) has no time in µs")
        return Decoded(
            name, value, unit if isinstance(unit, str) and unit else None, at, self._pin_of(sample.get("labels"))
        )

    def _pin_of(self, labels: Any) -> str | None:
        if not isinstance(labels, dict):
            return None
        names = self._pin if self._pin is not None else sorted(labels.keys() - self._without)
        found = ",".join(str(labels.get(name, "")) for name in names)
        return found[:PIN_CHARS_MAX] if found.strip(",") else None


def _labels(source: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    given = source.get(key)
    if given is None:
        return None
    if not isinstance(given, list) or len(given) > LABELS_MAX or not all(isinstance(one, str) and one for one in given):
        message = f"{key} is a list of up to {LABELS_MAX} labels"
        raise ParserError(message)
    return tuple(given)


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> MetricsDecoder:
    """The decoder of a `metrics` parser.

    Raises:
        ParserError: the source is wrong.
    """
    source = source_of(doc)
    if unknown := source.keys() - {"description", "pin", "without"}:
        message = f"a metrics parser has no {sorted(unknown)[0]!r}; it has pin and without"
        raise ParserError(message)
    without = _labels(source, "without")
    return MetricsDecoder(_labels(source, "pin"), WITHOUT if without is None else frozenset(without))
