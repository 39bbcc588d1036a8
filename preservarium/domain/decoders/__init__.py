"""Parsers: one payload format a file, one contract, one registry of kinds.

`compile_parser` turns a parser document into a `Decoder`. A kind that runs scripts is not compiled here: scripts run in
killable processes outside the domain (`preservarium/sandbox/`), and what comes back is a list of `Decoded` all the same.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from preservarium.domain.decoders import bthome, cayenne_lpp, csv_rows, field_table, influx, json_paths, senml
from preservarium.domain.decoders.base import Decoded, Decoder, ParserError
from preservarium.domain.errors import ReasonCode, Reject

__all__ = ["KINDS", "Decoded", "Decoder", "ParserError", "compile_parser"]

#: kind -> compiler of (parser document, the device's variables).
KINDS: Final[dict[str, Callable[[Mapping[str, Any], Mapping[str, Any] | None], Decoder]]] = {
    "table": field_table.compile_parser,
    "json": json_paths.compile_parser,
    "senml": senml.compile_parser,
    "senml_cbor": senml.compile_parser,
    "cayenne_lpp": cayenne_lpp.compile_parser,
    "csv": csv_rows.compile_parser,
    "bthome": bthome.compile_parser,
    "influx": influx.compile_parser,
}


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> Decoder:
    """Compile one version of a parser, once; the result is shared by all devices with the same variables.

    Args:
        doc: a `ParserDoc`.
        variables: the device's, for parsers that have parameters.

    Raises:
        Reject: NO_PARSER, the kind is not known here, or the parser itself is wrong.
    """
    compiler = KINDS.get(doc["kind"])
    if compiler is None:
        message = f"parser {doc.get('name')}: kind {doc['kind']!r} is not one of {', '.join(sorted(KINDS))}"
        raise Reject(ReasonCode.NO_PARSER, message)
    try:
        return compiler(doc, variables)
    except ParserError as e:
        message = f"parser {doc.get('name')}@{doc.get('version')} cannot be used: {e}"
        raise Reject(ReasonCode.NO_PARSER, message) from None
