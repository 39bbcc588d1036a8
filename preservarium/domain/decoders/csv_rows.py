"""CSV payloads: a row is a measurement (RFC 4180, with a delimiter and decimal mark of one's own).

```yaml
delimiter: ";"
decimal: ","             # absent: a point
thousands: "."           # absent: none
encoding: cp1252         # absent: UTF-8, or UTF-16 where a byte order mark says so
header: true             # the first row names the columns; otherwise `columns` does, in order
time: ts                 # the column with the instant; absent: the message's
time_unit: s
time_zone: Europe/Berlin # of instants without an offset; absent: UTC (a device's or a type's own counts first)
columns:                 # absent with a header: every column, named by it
  - {name: ts}
  - {name: temp, unit: °C}
  - null                 # not of interest
```

A row that has too many cells, no instant where one belongs, or a quote in the wrong place is refused by itself. Where a quote is not
closed, its row ends where the line ends, and the next one is read anew.

A cell is text with, perhaps, a number in it: which of the two counts is for its datatype to say (domain/readings/mapping.py).
"""

import csv
import io
from collections.abc import Mapping
from typing import Any, Final

from preservarium.domain.decoders.base import (
    DECODED_MAX,
    Decoded,
    ParserError,
    PartRefused,
    clock_of,
    encoding_of,
    failed,
    is_word,
    marks_of,
    sorted_out,
    source_of,
    text_of,
    zone_in,
)
from preservarium.domain.readings.instant import UNITS_US, instant_us
from preservarium.domain.readings.number import Written, number_of
from preservarium.domain.readings.reading import RawMessage
from preservarium.errors import ReasonCode, Reject

COLUMNS_MAX: Final = 1_000
NAME_CHARACTERS_MAX: Final = 200
_KEYS: Final = {
    "delimiter", "decimal", "thousands", "encoding", "header", "time", "time_unit", "time_zone", "columns", "description",
}  # fmt: skip
#: A truth value, where its datatype is a number.
_BOOLEANS: Final = {"true": 1, "TRUE": 1, "True": 1, "false": 0, "FALSE": 0, "False": 0}


class _Broken(Exception):
    """A row does not fit."""


class _Lines:
    """The lines of a text, each with its end, for a reader that may have to go back."""

    def __init__(self, text: str) -> None:
        self._lines = list(io.StringIO(text, newline=""))
        self.at = 0  #: lines read

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self.at == len(self._lines):
            raise StopIteration
        self.at += 1
        return self._lines[self.at - 1]

    def since(self, first: int) -> str:
        """The lines from `first` to those read last."""
        return "".join(self._lines[first : self.at])


class CsvDecoder:
    """Payloads are text or its bytes. Empty cells give no field."""

    __slots__ = (
        "_clock",
        "_columns",
        "_decimal",
        "_delimiter",
        "_encoding",
        "_header",
        "_thousands",
        "_time",
        "_time_unit",
    )

    def __init__(self, source: Mapping[str, Any], time_zone: Any = None) -> None:
        self._clock = clock_of(source, time_zone)
        if unknown := source.keys() - _KEYS:
            message = f"csv: {sorted(unknown)[0]} is not known"
            raise ParserError(message)
        self._delimiter = source.get("delimiter", ",")
        self._decimal, self._thousands = marks_of(source)
        self._header = source.get("header", "columns" not in source)
        self._time, self._time_unit = source.get("time"), source.get("time_unit")
        if not isinstance(self._header, bool) or not isinstance(self._time, str | None):
            message = "csv: header is true or false, and time the name of a column"
            raise ParserError(message)
        if not (isinstance(self._delimiter, str) and len(self._delimiter) == 1 and self._delimiter not in '"\r\n\0'):
            message = "csv: delimiter is one character"
            raise ParserError(message)
        if self._delimiter in {self._decimal, self._thousands}:
            message = "csv: decimal and thousands are not the delimiter"
            raise ParserError(message)
        try:
            self._encoding = encoding_of(source["encoding"]) if "encoding" in source else None
        except ValueError as e:
            message = f"csv: {e}"
            raise ParserError(message) from None
        if self._time_unit is not None and not is_word(self._time_unit, UNITS_US):
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

    def decode(self, raw: RawMessage) -> list[Decoded | Reject]:
        """The cells of all rows, and the rows that cannot be read.

        Raises:
            Reject: DECODE_FAILED, or DECODE_LIMIT.
        """
        lines = _Lines(text_of(raw["payload"], "CSV", self._encoding))
        rows = csv.reader(lines, delimiter=self._delimiter, strict=True)
        columns = self._columns
        header = ""
        out: list[Decoded | Reject] = []
        if self._header:
            try:
                names = next(rows, [])
            except csv.Error as e:
                message = f"the payload is not CSV: {e}"
                raise failed(message) from None
            header = lines.since(0)
            if columns is None:
                columns = [(c.strip()[:NAME_CHARACTERS_MAX], None, None) if c.strip() else None for c in names]
        index = int(self._header)
        last: int | None = None
        while True:
            first = lines.at
            try:
                row = next(rows, None)
                if row is None:
                    break
                if any(cell.strip() for cell in row):
                    last = self._row(row, columns or [], out, raw["received_at"], last)
            except (csv.Error, _Broken) as e:
                what = ""
                if isinstance(e, csv.Error):
                    what, lines.at = "not CSV: ", first + 1
                out.append(self._refused(f"row {index}: {what}{e}", header + lines.since(first)))
            if len(out) > DECODED_MAX:
                raise Reject(ReasonCode.DECODE_LIMIT, f"more than {DECODED_MAX} fields")
            index += 1
        sorted_out(out)
        return out

    def _refused(self, message: str, text: str) -> Reject:
        try:
            return PartRefused(message, text.encode(self._encoding or "utf-8"))
        except UnicodeEncodeError:  # it came as text, with characters that the encoding has not
            return failed(message)

    def _row(
        self,
        row: list[str],
        columns: list[tuple[str, str | None, str | None] | None],
        out: list[Decoded | Reject],
        received_at: int,
        last: int | None,
    ) -> int | None:
        """Read a row; its instant, or that of the one before it."""
        if len(row) > len(columns):
            message = f"{len(row)} cells; there are {len(columns)} columns"
            raise _Broken(message)
        at: int | None = None
        for cell, column in zip(row, columns, strict=False):
            if column is not None and column[0] == self._time:
                text = self._plain(cell.strip())
                if self._clock is None:
                    at = instant_us(text, self._time_unit)
                else:
                    at = self._clock.instant(text, self._time_unit, received_at, last)
                if at is None:
                    message = f"{cell!r:.40} is no instant"
                    raise _Broken(message)
        for cell, column in zip(row, columns, strict=False):
            text = cell.strip()
            if column is None or not text or column[0] == self._time:
                continue
            out.append(Decoded(column[0], self._value(text), column[1], at, column[2]))
        return last if at is None else at

    def _value(self, text: str) -> Written:
        number = number_of(text, self._decimal, self._thousands)
        return Written(text, _BOOLEANS.get(text) if number is None else number, typed=False)

    def _plain(self, text: str) -> str:
        """A number with its own marks as one with a point, so that none of its digits is lost; other text as it is."""
        if self._decimal == "." and not self._thousands:
            return text
        if number_of(text, self._decimal, self._thousands) is None:
            return text
        digits = [c for c in text if c in "+-0123456789eE" or c == self._decimal]
        return "".join(digits).replace(self._decimal, ".")


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
    """The decoder of a `csv` parser. Of the variables `time_zone` is used.

    Raises:
        ParserError: the source is wrong.
    """
    return CsvDecoder(source_of(doc), zone_in(variables))
