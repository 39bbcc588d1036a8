"""The decoder of a `table` parser."""

from collections.abc import Mapping
from typing import Any

from preservarium.domain import expressions
from preservarium.domain.decoders.base import Decoded, base_time, failed, payload_bytes, source_of
from preservarium.domain.decoders.field_table.compiler import compile_table
from preservarium.domain.readings.reading import RawMessage
from preservarium.errors import Reject, reason


class TableDecoder:
    """A compiled field table. Payloads are bytes, or their hexadecimal or base64 text."""

    __slots__ = ("_parse", "generated")

    def __init__(self, source: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> None:
        self.generated, self._parse = compile_table(source, variables)

    def decode(self, raw: RawMessage) -> list[Decoded]:
        """The fields of a payload.

        Raises:
            Reject: DECODE_FAILED or DECODE_LIMIT.
        """
        payload = raw["payload"]
        try:
            return self._parse(
                payload if type(payload) is bytes else payload_bytes(payload), raw["port"], base_time(raw)
            )
        except Reject:
            raise
        except expressions.ARITHMETIC_ERRORS as e:
            # A length, count or tag of this payload has no answer.
            message = f"the payload's numbers allow no answer ({reason(e)})"
            raise failed(message) from None


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> TableDecoder:
    """The decoder of a `table` parser.

    Raises:
        ParserError: the table is wrong.
    """
    return TableDecoder(source_of(doc), variables)
