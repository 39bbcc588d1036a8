"""CSV payloads: a row is a measurement (RFC 4180, with a delimiter and decimal mark of one's own).

```yaml
delimiter: ";"
decimal: ","
header: true             # the first row names the columns; otherwise `columns` does, in order
time: ts                 # the column with the instant; absent: the message's
time_unit: s
columns:                 # absent with a header: every column, named by it
  - {name: ts}
  - {name: temp, unit: °C}
  - null                 # not of interest
```
"""

import csv
import io
import math
from collections.abc import Mapping
from typing import Any, Final

from preservarium.domain.decoders.base import DECODED_MAX, Decoded, ParserError, Value, failed, source_of
from preservarium.domain.errors import ReasonCode, Reject
from preservarium.domain.instant import UNITS_US, instant_us
from preservarium.domain.reading import RawMessage

COLUMNS_MAX: Final = 1_000
NAME_CHARACTERS_MAX: Final = 200
_TRUE: Final = {"true", "TRUE", "True"}
_FALSE: Final = {"false", "FALSE", "False"}


class CsvDecoder:
    """Payloads are text or UTF-8 bytes. Empty cells give no field."""

    __slots__ = ("_columns", "_decimal", "_delimiter", "_header", "_time", "_time_unit")

    def __init__(self, source: Mapping[str, Any]) -> None:
        if unknown := source.keys() - {"delimiter", "decimal", "header", "time", "time_unit", "columns", "description"}:
            message = f"csv: {sorted(unknown)[0]} is not known"
            raise ParserError(message)
        self._delimiter = source.get("delimiter", ",")
        self._decimal = source.get("decimal", ".")
        self._header = source.get("header", "columns" not in source)
        self._time, self._time_unit = source.get("time"), source.get("time_unit")
        if not (isinstance(self._delimiter, str) and len(self._delimiter) == 1 and self._delimiter not in '"\r\n\0'):
            message = "csv: delimiter is one character"
            raise ParserError(message)
        if self._decimal not in {".", ","} or self._decimal == self._delimiter:
            message = "csv: decimal is . or , and not the delimiter"
            raise ParserError(message)
        if self._time_unit is not None and self._time_unit not in UNITS_US:
            message = f"csv: time_unit is one of {', '.join(UNITS_US)}"
            raise ParserError(message)
        columns = source.get("columns")
        if columns is None and not self._header:
            message = "csv: without a header, columns are needed"
            raise ParserError(message)
        self._columns: list[tuple[str, str | None, str | None] | None] | None = None
        if columns is not None:
            if not isinstance(columns, list) or len(columns) > COLUMNS_MAX:
                message = f"csv: columns is a list of at most {COLUMNS_MAX}"
                raise ParserError(message)
            self._columns = [_column(c, i) for i, c in enumerate(columns)]

    def decode(self, raw: RawMessage) -> list[Decoded]:
        """The cells of all rows.

        Raises:
            Reject: DECODE_FAILED, or DECODE_LIMIT.
        """
        payload = raw["payload"]
        if isinstance(payload, bytes):
            try:
                payload = payload.decode("utf-8-sig")
            except UnicodeDecodeError:
                message = "the payload is not UTF-8"
                raise failed(message) from None
        if not isinstance(payload, str):
            message = f"CSV is text, not {type(payload).__name__}"
            raise failed(message)
        columns = self._columns
        out: list[Decoded] = []
        try:
            for i, row in enumerate(csv.reader(io.StringIO(payload), delimiter=self._delimiter, strict=True)):
                if i == 0 and self._header:
                    if columns is None:
                        columns = [(c.strip()[:NAME_CHARACTERS_MAX], None, None) if c.strip() else None for c in row]
                    continue
                if any(cell.strip() for cell in row):
                    self._row(row, columns or [], out, i)
        except csv.Error as e:
            message = f"the payload is not CSV: {e}"
            raise failed(message) from None
        return out

    def _row(
        self, row: list[str], columns: list[tuple[str, str | None, str | None] | None], out: list[Decoded], index: int
    ) -> None:
        if len(row) > len(columns):
            message = f"row {index} has {len(row)} cells; there are {len(columns)} columns"
            raise failed(message)
        at: int | None = None
        for cell, column in zip(row, columns, strict=False):
            if column is not None and column[0] == self._time:
                at = instant_us(cell.strip(), self._time_unit)
                if at is None:
                    message = f"row {index}: {cell!r:.40} is no instant"
                    raise failed(message)
        for cell, column in zip(row, columns, strict=False):
            text = cell.strip()
            if column is None or not text or column[0] == self._time:
                continue
            out.append(Decoded(column[0], self._value(text), column[1], at, column[2]))
        if len(out) > DECODED_MAX:
            raise Reject(ReasonCode.DECODE_LIMIT, f"more than {DECODED_MAX} fields")

    def _value(self, text: str) -> Value:
        number = text.replace(self._decimal, ".") if self._decimal != "." else text
        try:
            value = float(number)
        except ValueError:
            return True if text in _TRUE else False if text in _FALSE else text
        return value if math.isfinite(value) or text.lower() in {"nan", "inf", "-inf"} else text


def _column(given: Any, index: int) -> tuple[str, str | None, str | None] | None:
    if given is None:
        return None
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, dict) or not isinstance(given.get("name"), str) or given.keys() - {"name", "unit", "pin"}:
        message = f"csv: columns[{index}] has a name, and may have unit and pin"
        raise ParserError(message)
    unit, pin = given.get("unit"), given.get("pin")
    return given["name"][:NAME_CHARACTERS_MAX], None if unit is None else str(unit), None if pin is None else str(pin)


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> CsvDecoder:
    """The decoder of a `csv` parser. Variables are not used.

    Raises:
        ParserError: the source is wrong.
    """
    return CsvDecoder(source_of(doc))
