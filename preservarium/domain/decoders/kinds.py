"""The kinds of parsers, by name.

`compile_parser` turns a parser document into a `Decoder`. A kind that runs scripts has none: scripts run in killable
processes outside the domain (`preservarium/sandbox/`). `compile_any` gives a `ScriptParser` for those, whose two pure ends
make the call and read its result.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from preservarium.domain.decoders import (
    bthome,
    cayenne_lpp,
    csv_rows,
    dsmr,
    influx,
    json_paths,
    mbus,
    network,
    senml,
    sparkplug,
)
from preservarium.domain.decoders.base import Decoded, Decoder, ParserError
from preservarium.domain.decoders.field_table import decoder as field_table
from preservarium.domain.decoders.scripts import FUNCTIONS, ScriptParser, compile_script
from preservarium.domain.readings import json_text
from preservarium.errors import ReasonCode, Reject

__all__ = ["KINDS", "Decoded", "Decoder", "ParserError", "ScriptParser", "compile_any", "compile_parser"]

#: kind -> compiler of (parser document, the device's variables).
KINDS: Final[dict[str, Callable[[Mapping[str, Any], Mapping[str, Any] | None], Decoder]]] = {
    "table": field_table.compile_parser,
    "json": json_paths.compile_parser,
    "network": network.compile_parser,
    "senml": senml.compile_parser,
    "senml_cbor": senml.compile_parser,
    "cayenne_lpp": cayenne_lpp.compile_parser,
    "csv": csv_rows.compile_parser,
    "bthome": bthome.compile_parser,
    "influx": influx.compile_parser,
    "mbus": mbus.compile_parser,
    "sparkplug_b": sparkplug.compile_parser,
    "dsmr": dsmr.compile_parser,
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
        return compiler(doc, _mapping(variables))
    except ParserError as e:
        message = f"parser {doc.get('name')}@{doc.get('version')} cannot be used: {e}"
        raise Reject(ReasonCode.NO_PARSER, message) from None


def _mapping(variables: Any) -> Mapping[str, Any] | None:
    """The variables, which a line of a file may say to be anything.

    Raises:
        ParserError: they are no mapping.
    """
    if not isinstance(variables, Mapping | None):
        message = f"the variables are an object, not {json_text.kind_of(variables)}"
        raise ParserError(message)
    return variables


def compile_any(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> Decoder | ScriptParser:
    """Compile one version of a parser of any kind; a script's source is compiled by the sandbox, when it is first called.

    Raises:
        Reject: NO_PARSER, the kind is not known here, or the parser itself is wrong.
    """
    if doc["kind"] not in FUNCTIONS:
        return compile_parser(doc, variables)
    try:
        return compile_script(doc, _mapping(variables))
    except ParserError as e:
        message = f"parser {doc.get('name')}@{doc.get('version')} cannot be used: {e}"
        raise Reject(ReasonCode.NO_PARSER, message) from None
