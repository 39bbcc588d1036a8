"""What a codec made of a payload that ran at the network server: `decoded_payload` of The Things Stack, `object` of ChirpStack, …

The envelope's `meta.decoded` is read, or the payload itself where the network sends nothing else. Without a source its fields are those that the
same codec would give if it ran here (`outer.inner`, `list.0`, `{value, unit}` as one field), so that it may move. A source is that of a
`json` parser.
"""

from collections.abc import Mapping
from typing import Any, Final

from preservarium.domain.decoders.base import DECODED_MAX, Decoded, failed, source_of, zone_in
from preservarium.domain.decoders.json_paths import JsonDecoder
from preservarium.domain.decoders.scripts import flat
from preservarium.domain.readings.reading import RawMessage
from preservarium.errors import ReasonCode, Reject

#: Where envelopes put it.
DECODED: Final = "decoded"


class NetworkDecoder(JsonDecoder):
    """A compiled path mapping over what the network decoded."""

    __slots__ = ("_as_codec",)

    def __init__(self, source: Mapping[str, Any], time_zone: Any = None) -> None:
        super().__init__(source, time_zone)
        self._as_codec = not source.keys() - {"description"}

    def _given(self, raw: RawMessage) -> Any:
        decoded = raw["meta"].get(DECODED) if raw["meta"] else None
        return raw["payload"] if decoded is None else decoded

    def decode(self, raw: RawMessage) -> list[Decoded | Reject]:
        """The fields of what the network decoded.

        Raises:
            Reject: DECODE_FAILED, or DECODE_LIMIT.
        """
        given = self._given(raw)
        if isinstance(given, bytes):
            message = "the network sent the payload alone, and nothing decoded: is a codec set for the device there?"
            raise failed(message)
        if not self._as_codec or not isinstance(given, dict):
            return super().decode(raw)
        found: list[Decoded | Reject] = []
        for one in flat("", given, None, 0):
            found.append(one)
            if len(found) > DECODED_MAX:
                raise Reject(ReasonCode.DECODE_LIMIT, f"more than {DECODED_MAX} fields")
        if not found:
            message = "what the network decoded holds no value"
            raise failed(message)
        return found


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> NetworkDecoder:
    """The decoder of a `network` parser; of the variables `time_zone` is used.

    Raises:
        ParserError: the mapping is wrong.
    """
    return NetworkDecoder(source_of(doc), zone_in(variables))
