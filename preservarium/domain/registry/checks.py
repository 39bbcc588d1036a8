"""Checks of what people edit: a collection of documents, and everything that is wrong with them, found at once.

A document is checked by itself (`check_shape`), among the others (`check_duplicates`), against what will exist
(`check_references`), and for what workers would make of it (`check_meaning`).
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

import orjson
from pydantic import ValidationError

from preservarium.domain.alarms.rules import compile_rule
from preservarium.domain.decoders import examples
from preservarium.domain.decoders.kinds import KINDS, compile_parser
from preservarium.domain.quality.checks import CheckCompiler
from preservarium.domain.readings import units
from preservarium.domain.readings.address import canonical_address
from preservarium.domain.registry.device import DatatypeDoc, RuleDoc, datatype_of
from preservarium.domain.registry.documents import (
    DOCUMENT_BYTES_MAX,
    MODELS,
    SCRIPT_KINDS,
    SECTIONS,
    Document,
    Rule,
    identity,
)
from preservarium.errors import PreservariumError, Reject

#: More lines than this help nobody to mend a file.
PROBLEMS_MAX: Final = 200

#: Where something stands in a file: (section, index, field, …).
Place = tuple[str | int, ...]
Level = Literal["error", "warning"]


class RegistryFileError(PreservariumError):
    """The registry file cannot be used."""


# --- findings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong in a file."""

    path: str  #: devices[3].rules.hot
    message: str
    line: int | None = None  #: 1 for the first; None where the file is JSON
    level: Level = "error"
    file: str | None = None  #: where it is not the registry file itself

    def __str__(self) -> str:
        """`file.yaml:12: devices[3].type: …`."""
        where = f"{self.file or ''}:{self.line}: " if self.line else f"{self.file}: " if self.file else ""
        return f"{where}{self.path}{': ' if self.path else ''}{self.message}"


@dataclass(slots=True)
class RegistryFile:
    """What a registry file says: checked documents by kind, in the file's order."""

    path: str
    #: the line of what stands at a path, 1 for the first; None where nobody knows
    line_of: Callable[[Place], int | None]
    documents: dict[str, list[Document]] = field(default_factory=dict)
    #: kinds whose section the file has; only those can be pruned
    sections: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    #: (kind, index) -> where the document stands, for problems that are found later
    places: dict[tuple[str, int], Place] = field(default_factory=dict)

    @property
    def errors(self) -> list[Problem]:
        """The problems that forbid applying the file."""
        return [p for p in self.problems if p.level == "error"]

    def raise_for_errors(self) -> None:
        """Raise where the file may not be applied.

        Raises:
            RegistryFileError: all errors, one a line.
        """
        if self.errors:
            raise RegistryFileError("\n".join(str(p) for p in self.errors))

    def add(self, kind: str, place: Place, document: Document) -> None:
        """Take a document that is right by itself, unless no record can hold it."""
        if len(orjson.dumps(document)) > DOCUMENT_BYTES_MAX:
            self.note(place, f"larger than {DOCUMENT_BYTES_MAX} bytes as one record")
            return
        documents = self.documents.setdefault(kind, [])
        self.places[kind, len(documents)] = place
        documents.append(document)

    def line(self, kind: str, index: int) -> int | None:
        """The line where a document begins."""
        return self.line_of(self.places[kind, index])

    def note(self, path: Place, message: str, level: Level = "error") -> None:
        """Note a problem at `path` in the file."""
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(Problem(path_text(path), message, self.line_of(path), level, self.path))

    def problem(self, kind: str, index: int, where: Place, message: str, level: Level = "error") -> None:
        """Note a problem at `where` in a document."""
        self.note((*self.places[kind, index], *where), message, level)


def path_text(path: Iterable[str | int]) -> str:
    """A path for people: `devices[3].rules.hot`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def resembling(name: str, known: Iterable[str]) -> str:
    """What a name that is not known may have been meant to be, or ""."""
    return next(iter(difflib.get_close_matches(name, list(known), 1)), "")


# --- a document by itself ------------------------------------------------------------------------------------------


def check_shape(file: RegistryFile, kind: str, place: Place, plain: Any) -> Document | None:
    """The document that plain JSON values are; None where they are none, which is noted.

    Args:
        file: its problems are added to.
        kind: what it should be.
        place: where it stands in the file.
        plain: what stands there.
    """
    model = MODELS[kind]
    try:
        parsed = model.model_validate(plain)
    except ValidationError as e:
        for error in e.errors():
            where = tuple(p for p in error["loc"] if not (isinstance(p, str) and p.startswith("function-")))
            file.note((*place, *where), _message(error, model.model_fields))
        return None
    # What the file leaves out or sets to null at the top is absent; deeper down null has a meaning (a field left out).
    document = {k: v for k, v in parsed.model_dump().items() if v is not None}
    for mapping in (document.get("mapping") or {}).values():
        if mapping is not None:
            for key in [k for k, v in mapping.items() if v is None]:
                del mapping[key]
    return document


def _message(error: Any, known: Iterable[str]) -> str:
    kind = error["type"]
    given = error.get("input")
    if kind == "extra_forbidden":
        key = str(error["loc"][-1])
        close = resembling(key, known)
        return "unknown key" + (f"; did you mean {close}?" if close else "")
    if kind == "missing":
        return "is missing"
    if kind == "string_type":
        hint = ": put it in quotes" if isinstance(given, int | float) else ""
        return f"text is needed, not {given!r}{hint}"
    if kind == "string_pattern_mismatch":
        return f"{given!r} has characters (or spaces at its ends) that are not allowed here"
    return str(error["msg"].removeprefix("Value error, ")) + (
        f" (given: {given!r})" if isinstance(given, str | int | float) else ""
    )


# --- among the others ----------------------------------------------------------------------------------------------


def check_duplicates(file: RegistryFile) -> None:
    """Note documents of one name; a parser may appear several times, with different versions.

    Devices of one address are one device, however they spell it.
    """
    for kind, documents in file.documents.items():
        seen: dict[tuple[str, Any], int] = {}
        for i, document in enumerate(documents):
            name = identity(kind, document)
            key = (
                canonical_address(name) if kind == "device" else name,
                document.get("version") if kind == "parser" else None,
            )
            first = seen.setdefault(key, i)
            if first != i:
                line = file.line(kind, first)
                there = f" (line {line})" if line else ""
                how = "" if identity(kind, documents[first]) == name else ", in another spelling"
                file.problem(kind, i, (), f"{name!r} is already {path_text(file.places[kind, first])}{there}{how}")
        if kind == "parser":
            names: dict[str, list[int]] = {}
            for i, document in enumerate(documents):
                names.setdefault(document["name"], []).append(i)
            for name, places in names.items():
                if len(places) > 1 and any("version" not in documents[i] for i in places):
                    file.problem(kind, places[-1], (), f"{name!r} appears several times: each needs its `version`")
                active = [i for i in places if documents[i]["status"] == "active"]
                if len(active) > 1:
                    file.problem(kind, active[-1], ("status",), f"{name!r} has two active versions")


# --- references ----------------------------------------------------------------------------------------------------


def check_references(file: RegistryFile, known: Mapping[str, Iterable[str]]) -> None:
    """Note every reference to something that will not exist.

    Args:
        file: the file; its problems are added to.
        known: kind -> names that will exist after the file is applied, its own among them.
    """
    names = {kind: set(known.get(kind, ())) for kind in SECTIONS.values()}

    def need(kind: str, name: str, owner: str, index: int, *where: str | int) -> None:
        if name not in names[kind]:
            close = resembling(name, names[kind])
            file.problem(
                owner, index, where, f"there is no {kind} {name!r}" + (f"; did you mean {close!r}?" if close else "")
            )

    def need_series(rule: Document, owner: str, index: int, *where: str | int) -> None:
        taken: dict[tuple[str, ...], Any] = {("reference",): rule.get("reference")}
        if isinstance(inputs := rule.get("inputs"), dict):
            taken.update({("inputs", name): series for name, series in inputs.items()})
        for place, series in taken.items():
            if isinstance(series, dict) and isinstance(series.get("component_type"), str):
                need("datatype", series["component_type"], owner, index, *where, *place)

    for i, doc in enumerate(file.documents.get("rule", ())):
        need("datatype", doc["component_type"], "rule", i, "component_type")
        for recipient in doc.get("recipients", ()):
            need("recipient", recipient, "rule", i, "recipients")
        for step in doc.get("escalation", ()):
            for recipient in step["recipients"]:
                need("recipient", recipient, "rule", i, "escalation")
        need_series(doc, "rule", i)
    for kind in ("type", "device"):
        for i, doc in enumerate(file.documents.get(kind, ())):
            for field_name, mapping in doc.get("mapping", {}).items():
                if mapping is not None:
                    need("datatype", mapping["component_type"], kind, i, "mapping", field_name)
            for name in doc.get("datatypes", {}):
                need("datatype", name, kind, i, "datatypes", name)
            for name in doc.get("rules", ()):
                need("rule", name, kind, i, "rules", name)
    for i, doc in enumerate(file.documents.get("type", ())):
        need("manufacturer", doc["manufacturer"], "type", i, "manufacturer")
        need("parser", doc["parser"], "type", i, "parser")
    own = {doc["device_id"] for doc in file.documents.get("device", ())}
    others = {canonical_address(name): name for name in names["device"] - own}
    for i, doc in enumerate(file.documents.get("device", ())):
        other = others.get(canonical_address(doc["device_id"]))
        if other is not None:
            text = f"the registry has this address as {other!r}: write it so, or remove that one (--prune)"
            file.problem("device", i, ("device_id",), text)
        need("type", doc["type"], "device", i, "type")
        for name, changed in doc.get("rules", {}).items():
            need_series(changed or {}, "device", i, "rules", name)
        if "experiment_id" in doc:
            need("experiment", doc["experiment_id"], "device", i, "experiment_id")


def check_meaning(
    file: RegistryFile,
    datatypes: Mapping[str, Document],
    rules: Mapping[str, Document],
    types: Mapping[str, Document],
) -> None:
    """Note what workers could not use although its shape is right: they compile the same documents the same way.

    Args:
        file: the file; its problems are added to.
        datatypes: the datatypes that will exist, by name.
        rules: the rules that will exist, by name.
        types: the device types that will exist, by name.
    """
    _check_parsers(file)
    for i, doc in enumerate(file.documents.get("datatype", ())):
        if not units.canonical(doc["unit"])[1]:
            file.problem(
                "datatype", i, ("unit",), f"{doc['unit']!r} is no known unit: nothing can be converted", "warning"
            )
    checks = CheckCompiler(lambda name: cast(DatatypeDoc | None, datatypes.get(name)))
    for i, doc in enumerate(file.documents.get("datatype", ())):
        checks.series(doc["name"], ())
        for problem in checks.take_problems():
            file.problem("datatype", i, (), problem)
    for kind in ("type", "device"):
        for i, doc in enumerate(file.documents.get(kind, ())):
            for name, changed in doc.get("datatypes", {}).items():
                checks.series(name, (changed,))
                for problem in checks.take_problems():
                    file.problem(kind, i, ("datatypes", name), problem)
            for field_name, mapping in doc.get("mapping", {}).items():
                _check_unit(file, kind, i, field_name, mapping, datatypes)
    for i, doc in enumerate(file.documents.get("rule", ())):
        _check_rule(file, "rule", i, (), doc, datatypes.get(doc["component_type"]))
    # A rule that was checked is another one where a type or a device has another datatype.
    for i, doc in enumerate(file.documents.get("type", ())):
        for name in doc.get("rules", ()):
            rule = rules.get(name)
            if rule and (component_type := rule["component_type"]) in (doc.get("datatypes") or {}):
                datatype = _effective(datatypes, component_type, doc, None)
                _check_rule(file, "type", i, ("datatypes", component_type), rule, datatype)
    for i, doc in enumerate(file.documents.get("device", ())):
        device_type, own = types.get(doc["type"]), doc.get("rules", {})
        inherited = (device_type or {}).get("rules") or ()
        for name in dict.fromkeys([*own, *inherited]):
            rule, changed = rules.get(name), own.get(name, {})
            if rule is None or changed is None:
                continue
            component_type = (merged := {**rule, **changed})["component_type"]
            if not changed and component_type not in (doc.get("datatypes") or {}) and name in inherited:
                continue
            where = ("rules", name) if name in own else ("datatypes", component_type)
            if changed and not _check_override(file, i, where, merged):
                continue
            datatype = _effective(datatypes, component_type, device_type, doc)
            _check_rule(file, "device", i, where, merged, datatype, doc.get("outages"))


#: Network servers, by whose names their codecs are called.
_NETWORKS: Final = frozenset({"ttn", "tts", "chirpstack", "thingpark", "helium"})


def _check_parsers(file: RegistryFile) -> None:
    known = {*KINDS, *SCRIPT_KINDS}
    for i, doc in enumerate(file.documents.get("parser", ())):
        if doc["kind"] not in known:
            close = resembling(doc["kind"], known)
            hint = f"did you mean {close}?" if close else f"there are {', '.join(sorted(known))}"
            if doc["kind"].lower() in _NETWORKS:
                hint = "a codec of that network is of kind javascript; what the network has decoded itself, of kind network"
            file.problem("parser", i, ("kind",), f"no such kind of parser; {hint}")
        elif doc["kind"] in KINDS:
            # Scripts run in the sandbox only; `preservarium decoders test` runs their examples there.
            # A draft may be wrong: it reaches no worker.
            level: Level = "error" if doc["status"] == "active" else "warning"
            try:
                compile_parser({"version": "new", **doc})
            except Reject as e:
                file.problem("parser", i, ("source",), str(e), level)
                continue
            for outcome in examples.run(doc):
                if outcome.differences:
                    file.problem("parser", i, ("examples", outcome.index), "; ".join(outcome.differences), level)


def _check_unit(
    file: RegistryFile,
    kind: str,
    index: int,
    field_name: str,
    mapping: Document | None,
    datatypes: Mapping[str, Document],
) -> None:
    if mapping is None or "unit" not in mapping or mapping["component_type"] not in datatypes:
        return
    wanted = datatypes[mapping["component_type"]]["unit"]
    if units.conversion(mapping["unit"], wanted) is None:
        where = ("mapping", field_name, "unit")
        file.problem(kind, index, where, f"{mapping['unit']!r} cannot be converted to {wanted!r}", "warning")


def _check_override(file: RegistryFile, index: int, where: Place, merged: Document) -> bool:
    """Whether a device's fields of a rule have the shapes that the rule's own must have."""
    try:
        Rule.model_validate({k: v for k, v in merged.items() if k in Rule.model_fields})
    except ValidationError as e:
        for error in e.errors():
            field_name = path_text(tuple(error["loc"]))
            text = _message(error, Rule.model_fields)
            file.problem("device", index, where, f"{field_name}: {text}" if field_name else text)
        return False
    return True


def _effective(
    datatypes: Mapping[str, Document], name: str, device_type: Document | None, device: Document | None
) -> Document | None:
    return cast(Document | None, datatype_of(cast(Any, datatypes.get(name)), name, device_type, device))


def _check_rule(
    file: RegistryFile,
    kind: str,
    index: int,
    where: Place,
    rule: Document,
    datatype: Document | None,
    outages: Any = None,
) -> None:
    try:
        compile_rule(cast(RuleDoc, {**rule, "rev": 0}), cast(DatatypeDoc | None, datatype), outages)
    except (KeyError, TypeError, ValueError) as e:
        file.problem(kind, index, where, f"{e} is missing" if isinstance(e, KeyError) else str(e))
        return
    if datatype is None:
        return
    if datatype["kind"] == "text" or (datatype["kind"] != "number" and rule.get("threshold") is not None):
        place = "threshold" if rule.get("threshold") is not None else "component_type"
        file.problem(kind, index, (*where, place), f"{datatype['name']} is {datatype['kind']}, not a number")
        return
    span = datatype.get("fail_span") or {}
    low, high = span.get("min"), span.get("max")
    # A reading outside the fail span is refused before the alarm stage sees it.
    found = [("threshold", rule.get("threshold")), *(("levels", one["threshold"]) for one in rule.get("levels") or ())]
    for place, threshold in found:
        if (rule["kind"] == "high" and high is not None and threshold >= high) or (
            rule["kind"] == "low" and low is not None and threshold <= low
        ):
            message = f"{threshold:g} can never be passed: {datatype['name']} fails outside {_span_text(low, high)}"
            file.problem(kind, index, (*where, place), message, "warning")


def _span_text(low: float | None, high: float | None) -> str:
    return f"{'…' if low is None else f'{low:g}'} to {'…' if high is None else f'{high:g}'}"
