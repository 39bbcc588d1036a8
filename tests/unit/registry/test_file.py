"""The registry file: shapes, lines, references, YAML by the 1.2 rules, and the way back."""

import io
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.registry import device as documents
from preservarium.domain.registry.checks import Problem, RegistryFileError, check_references
from preservarium.domain.registry.documents import MODELS, SECTIONS, identity, source_hash
from preservarium.registry.file import dump, read
from preservarium.stores.registry import check

GOOD = """\
manufacturers:
  - name: Acme
datatypes:
  - {name: temperature, kind: number, unit: degC, fail_span: {min: -40, max: 125}}
parsers:
  - {name: acme, kind: table, source: {fields: []}}
recipients:
  - {name: ops, channel: mail, address: ops@example.org}
rules:
  - {name: hot, kind: high, component_type: temperature, severity: major, threshold: 60, recipients: [ops]}
device_types:
  - name: T1
    manufacturer: Acme
    parser: acme
    mapping:
      t: {component_type: temperature}
      battery: null
    rules: [hot]
experiments:
  - {name: run-1, started_at: 2024-05-01T14:00:00.25+02:00}
devices:
  - {device_id: 70B3D57BA0000001, type: T1, experiment_id: run-1, rules: {hot: null}}
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def one(text: str, name: str = "registry.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return one


def problems(path: Path) -> list[Problem]:
    file = read(path)
    check(file)
    return file.problems


def test_a_good_file_has_no_problems(write: Any) -> None:
    file = read(write(GOOD))
    check(file)
    assert file.problems == []
    assert file.sections == set(SECTIONS.values())
    device = file.documents["device"][0]
    assert device == {
        "device_id": "70B3D57BA0000001", "type": "T1", "enabled": True, "rules": {"hot": None}, "experiment_id": "run-1",
    }  # fmt: skip
    assert file.documents["type"][0]["mapping"] == {"t": {"component_type": "temperature"}, "battery": None}
    assert file.documents["experiment"][0]["started_at"] == 1_714_564_800_250_000
    assert file.documents["parser"][0]["hash"] == source_hash("table", {"fields": []})


@pytest.mark.parametrize(
    ("old", "new", "line", "path", "message"),
    [
        ("max: 125", "max: -41", 4, "datatypes[0].fail_span", "min -40 is not below max -41"),
        ("unit: degC", "units: degC", 4, "datatypes[0].units", "unknown key; did you mean unit?"),
        ("kind: number, unit: degC,", "kind: number,", 4, "datatypes[0].unit", "is missing"),
        ("kind: number", "kind: real", 4, "datatypes[0].kind", "'number', 'text' or 'boolean'"),
        ("devices:\n", "devises:\n", 21, "devises", "unknown section; did you mean devices?"),
        ("70B3D57BA0000001", "1234567890", 22, "devices[0].device_id", "text is needed, not 1234567890: put it in quotes"),
        ("70B3D57BA0000001", "12e5", 22, "devices[0].device_id", "put it in quotes"),
        ("type: T1,", "type: TT1,", 22, "devices[0].type", "there is no type 'TT1'; did you mean 'T1'?"),
        ("experiment_id: run-1", "experiment_id: run-2", 22, "devices[0].experiment_id", "there is no experiment 'run-2'"),
        ("rules: {hot: null}", "rules: {hott: null}", 22, "devices[0].rules.hott", "did you mean 'hot'?"),
        ("rules: {hot: null}", "rules: {hot: {treshold: 1}}", 22, "devices[0].rules", "has no field 'treshold'"),
        ("manufacturer: Acme", "manufacturer: Acne", 13, "device_types[0].manufacturer", "did you mean 'Acme'?"),
        ("parser: acme", "parser: other", 14, "device_types[0].parser", "there is no parser 'other'"),
        ("t: {component_type: temperature}", "t: {component_type: temp}", 16, "device_types[0].mapping.t", "no datatype 'temp'"),
        ("    rules: [hot]", "    rules: [cold]", 18, "device_types[0].rules.cold", "there is no rule 'cold'"),
        ("threshold: 60,", "", 10, "rules[0]", "a rule of kind high needs a threshold"),
        ("threshold: 60", "threshold: .nan", 10, "rules[0].threshold", "no JSON number"),
        ("threshold: 60", "threshold: '60'", 10, "rules[0].threshold", "valid number"),
        ("threshold: 60", "threshold: 130", 10, "rules[0].threshold", "can never be passed"),
        ("recipients: [ops]", "recipients: [opps]", 10, "rules[0].recipients", "there is no recipient 'opps'"),
        ("kind: high,", "kind: high, levels: 5,", 10, "rules[0].levels", "valid list"),
        ("kind: high,", "kind: high, outages: [{from: 2024-05-01T12:00:00Z}],", 10, "rules[0].outages", "an outage has from and to"),
        ("kind: high,", "kind: high, outages: [{from: 2024-05-01, to: 2024-05-02}],", 10, "rules[0].outages", "offset from UTC"),
        ("rules: {hot: null}", "rules: {hot: {outages: [{from: 5, to: 4}]}}", 22, "devices[0].rules", "to is not after from"),
        ("rules: {hot: null}", "outages: [{from: 5, to: 4}]", 22, "devices[0].outages", "to is not after from"),
        (
            "kind: high,", "kind: deviation, inputs_max_age_s: 60, reference: {component_type: temp},", 10,
            "rules[0].reference", "there is no datatype 'temp'",
        ),
        ("ops@example.org", "example.org", 8, "recipients[0]", "a mail address has an @"),
        ("source: {fields: []}", "source: {}, file: x.yaml", 6, "parsers[0]", "not both"),
        (", source: {fields: []}", "", 6, "parsers[0]", "needs `source` or `file`"),
        ("2024-05-01T14:00:00.25+02:00", "2024-05-01", 20, "experiments[0].started_at", "offset from UTC"),
        ("name: Acme\n", "name: Acme \n  - name: Acme\n", 3, "manufacturers[1]", "already manufacturers[0] (line 2)"),
        ("name: Acme\n", 'name: "Ac/me"\n', 2, "manufacturers[0].name", "not allowed here"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(write: Any, old: str, new: str, line: int, path: str, message: str) -> None:
    assert old in GOOD
    found = problems(write(GOOD.replace(old, new, 1)))
    matching = [p for p in found if p.line == line and p.path.startswith(path) and message in p.message]
    assert matching, [str(p) for p in found]


@pytest.mark.parametrize(
    "spelled", ["70b3d57ba0000001", "70-B3-D5-7B-A0-00-00-01", "70B3.D57B.A000.0001", "70 b3 d5 7b a0 00 00 01"]
)
def test_one_device_is_not_registered_in_two_spellings(write: Any, spelled: str) -> None:
    found = problems(write(GOOD + f'  - {{device_id: "{spelled}", type: T1}}\n'))
    assert [str(p.message) for p in found] == [f"'{spelled}' is already devices[0] (line 22), in another spelling"]
    assert problems(write(GOOD + '  - {device_id: "70B3D57BA0000002", type: T1}\n')) == []


def test_a_device_of_the_registry_is_not_registered_once_more_in_another_spelling(write: Any) -> None:
    file = read(write(GOOD))
    known = {kind: [identity(kind, d) for d in documents] for kind, documents in file.documents.items()}
    check_references(file, {**known, "device": [*known["device"], "70-B3-D5-7B-A0-00-00-01"]})
    (problem,) = file.problems
    assert (problem.path, problem.line) == ("devices[0].device_id", 22)
    assert "'70-B3-D5-7B-A0-00-00-01'" in problem.message


@pytest.mark.parametrize(
    ("old", "new", "path", "message", "level"),
    [
        ("kind: table", "kind: tabel", "parsers[0].kind", "did you mean table?", "error"),
        ("{fields: []}", "{fields: [{name: t, type: u7x}]}", "parsers[0].source", "acme@new cannot be used", "error"),
        ("{fields: []}", "{fields: [{name: t, type: u8}]}, examples: [{hex: '05', expect: {t: 6}}]", "parsers[0].examples[0]", "6", "error"),
        ("unit: degC", "unit: zorgs", "datatypes[0].unit", "no known unit", "warning"),
        ("max: 125}", "max: 125}, tests: {spike: {suspect_threshold: -1}}", "datatypes[0]", "spike", "error"),
        ("temperature}", "temperature, unit: V}", "device_types[0].mapping.t.unit", "cannot be converted to 'degC'", "warning"),
        ("kind: high", "kind: sideways", "rules[0]", "there is no kind 'sideways'", "error"),
        ("rules: {hot: null}", "rules: {hot: {deadband: -1}}", "devices[0].rules.hot", "deadband", "error"),
        ("kind: high,", "kind: high, window_s: 60,", "rules[0]", "window_s: a rule of kind high has none", "error"),
        ("kind: high,", "kind: high, schedule: {time_zone: Berlin, hours: []},", "rules[0]", "'Berlin' is no time zone", "error"),
        ("kind: high,", "kind: high, levels: [{threshold: 200, severity: critical}],", "rules[0].levels", "can never be passed", "warning"),
        ("kind: high,", "kind: expression, expression: value > x,", "rules[0]", "x is not known here", "error"),
        ("rules: {hot: null}", "rules: {hot: {levels: 5}}", "devices[0].rules.hot", "levels: Input should be a valid list", "error"),
        ("rules: {hot: null}", "rules: {hot: {on_delay_s: soon}}", "devices[0].rules.hot", "on_delay_s: Input should be a", "error"),
        ("rules: {hot: null}", "rules: {hot: {repeat: {count: 0, within_s: 5}}}", "devices[0].rules.hot", "from 2 to 20", "error"),
        ("rules: {hot: null}", "rules: {hot: {threshold: 200}}", "devices[0].rules.hot.threshold", "can never be passed", "warning"),
    ],
)  # fmt: skip
def test_what_workers_could_not_use_is_a_problem(
    write: Any, old: str, new: str, path: str, message: str, level: str
) -> None:
    assert old in GOOD
    found = problems(write(GOOD.replace(old, new, 1)))
    matching = [p for p in found if p.path.startswith(path) and message in p.message and p.level == level and p.line]
    assert matching, [str(p) for p in found]


@pytest.mark.parametrize(
    ("new", "path", "message", "level"),
    [
        # The type's own datatype, for a rule that is right by the registry's.
        (("rules: [hot]", "rules: [hot]\n    datatypes: {temperature: {fail_span: {min: -40, max: 50}}}"), "device_types[0].datatypes.temperature.threshold", "60 can never be passed", "warning"),
        (("rules: [hot]", "rules: [off]\n    datatypes: {temperature: {circular: 360, counter: {}}}"), "device_types[0].datatypes.temperature", "a counter is not circular", "error"),
        # The device's, for a rule of its type, and for one of its own.
        (("rules: {hot: null}", "datatypes: {temperature: {fail_span: {min: -40, max: 50}}}"), "devices[0].datatypes.temperature.threshold", "60 can never be passed", "warning"),
        (("rules: {hot: null}", "rules: {hot: {}}, datatypes: {temperature: {fail_span: {min: -40, max: 50}}}"), "devices[0].rules.hot.threshold", "60 can never be passed", "warning"),
        (("rules: {hot: null}", "rules: {off: {}}, datatypes: {temperature: {circular: 360, counter: {}}}"), "devices[0].rules.off", "a counter is not circular", "error"),
    ],
)  # fmt: skip
def test_a_rule_is_checked_with_the_datatype_as_it_is_for_who_has_it(
    write: Any, new: tuple[str, str], path: str, message: str, level: str
) -> None:
    off = "  - {name: off, kind: deviation, component_type: temperature, severity: minor, setpoint: 5, threshold: 60}\ndevice_types:"
    text = GOOD.replace("device_types:", off)
    assert [p for p in problems(write(text)) if p.level == "error"] == []
    assert new[0] in text
    found = problems(write(text.replace(*new)))
    matching = [p for p in found if p.path == path and message in p.message and p.level == level and p.line]
    assert matching, [str(p) for p in found]


def test_a_rule_that_a_device_switches_off_is_not_checked_for_it(write: Any) -> None:
    text = GOOD.replace(
        "rules: {hot: null}", "rules: {hot: null}, datatypes: {temperature: {fail_span: {min: -40, max: 50}}}"
    )
    assert problems(write(text)) == []


def test_every_mistake_is_found_at_once(write: Any) -> None:
    text = GOOD.replace("max: 125", "max: -41").replace("ops@example.org", "nowhere").replace("70B3D57BA0000001", "5")
    assert len(problems(write(text))) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("devices: [", r":1: "),
        ("a: 1\na: 2\n", "duplicate key"),
        ("devices:\n\t- x", ":2: "),
    ],
)
def test_what_is_no_yaml_is_refused_with_its_line(write: Any, text: str, message: str) -> None:
    with pytest.raises(RegistryFileError, match=message):
        read(write(text))


@pytest.mark.parametrize("text", ["", "[]", "just words", "devices: 7"])
def test_other_shapes_are_problems(write: Any, text: str) -> None:
    assert len(problems(write(text))) == 1


def test_a_file_that_is_not_there_or_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RegistryFileError, match="No such file"):
        read(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"manufacturers: [{name: M\xfcller}]")
    with pytest.raises(RegistryFileError, match="not UTF-8"):
        read(tmp_path / "latin.yaml")


def test_yaml_is_read_by_the_1_2_rules(write: Any) -> None:
    text = "parsers:\n  - {name: p, kind: table, source: {a: On, b: no, c: 0o17, d: 12:30:45, e: 2024-01-01, 1: x, f: 017}}\n"
    source = read(write(text)).documents["parser"][0]["source"]
    assert source == {"a": "On", "b": "no", "c": 15, "d": "12:30:45", "e": "2024-01-01", "1": "x", "f": 17}


def test_sources_come_from_files_beside_the_registry(write: Any, tmp_path: Path) -> None:
    (tmp_path / "parsers").mkdir()
    (tmp_path / "parsers" / "a.yaml").write_text("fields: [{name: t}]")
    (tmp_path / "parsers" / "b.js").write_text("function decodeUplink(i) {}\n")
    file = read(
        write(
            "parsers:\n  - {name: a, kind: table, file: parsers/a.yaml}\n"
            "  - {name: b, kind: javascript, file: parsers/b.js, status: draft}\n"
        )
    )
    a, b = file.documents["parser"]
    assert a["source"] == {"fields": [{"name": "t"}]}
    assert b["source"] == "function decodeUplink(i) {}\n"
    assert "file" not in a
    assert a["hash"] == source_hash("table", {"fields": [{"name": "t"}]})


@pytest.mark.parametrize("name", ["../outside.yaml", "/etc/hostname", "missing.yaml"])
def test_a_source_outside_or_missing_is_a_problem(write: Any, name: str) -> None:
    found = problems(write(f"parsers:\n  - name: a\n    kind: table\n    file: {name}\n"))
    assert [(p.path, p.line) for p in found] == [("parsers[0].file", 4)]


def test_a_parser_may_appear_twice_only_with_versions(write: Any) -> None:
    text = "parsers:\n  - {name: a, kind: json, version: 1}\n  - {name: a, kind: json, version: 2, status: draft}\n"
    assert problems(write(text)) == []
    assert "already" in problems(write(text.replace("version: 2", "version: 1")))[0].message
    assert "two active" in problems(write(text.replace(", status: draft", "")))[0].message
    assert "needs its `version`" in problems(write(text.replace(", version: 1", "")))[0].message


def test_a_json_file_is_as_good(write: Any) -> None:
    path = write('{"manufacturers": [{"name": "Acme"}], "devices": [{"device_id": 1, "type": "x"}]}', "registry.json")
    found = problems(path)
    assert [p.path for p in found] == ["devices[0].device_id"]
    assert found[0].line is None


def test_a_document_that_no_record_can_hold_is_a_problem(write: Any) -> None:
    found = problems(write("parsers:\n  - {name: a, kind: python, source: " + "x" * 950_000 + "}\n"))
    assert "larger than" in found[0].message


def test_what_is_nested_too_deep_is_a_problem(write: Any) -> None:
    found = problems(write("parsers:\n  - {name: a, kind: table, source: " + "[" * 80 + "]" * 80 + "}\n"))
    assert "nested deeper" in found[0].message


@pytest.mark.parametrize(
    ("kind", "typed"),
    [
        ("datatype", documents.DatatypeDoc),
        ("parser", documents.ParserDoc),
        ("type", documents.DeviceTypeDoc),
        ("rule", documents.RuleDoc),
        ("recipient", documents.RecipientDoc),
        ("device", documents.DeviceDoc),
    ],
)
def test_the_file_says_what_the_documents_hold(kind: str, typed: type) -> None:
    fields = set(MODELS[kind].model_fields) | {"rev"} | ({"hash"} if kind == "parser" else set())
    assert fields - ({"file"} if kind == "parser" else set()) == set(get_type_hints(typed))


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\x00\x85\u2028\u2029\ufeff"), max_size=20)
    | st.sampled_from(["On", "no", "1e3", "0x1F", "012", "2024-01-01", "a\nb\n", " a \n b", "~", "null", "'", '"', "- x", "a: b", "#", "\n"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcxyz.-_ ", min_size=1, max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(source=_json.filter(lambda v: v is not None))
def test_what_is_dumped_reads_back_the_same(tmp_path_factory: pytest.TempPathFactory, source: Any) -> None:
    document = {"name": "p", "version": 3, "kind": "table", "status": "active", "source": source}
    document["hash"] = source_hash("table", source)
    out = io.StringIO()
    dump({"parser": [document]}, out)
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(out.getvalue(), encoding="utf-8", newline="")
    file = read(path)
    assert file.problems == []
    assert file.documents["parser"] == [document]


def test_the_outages_of_a_device_and_of_its_rules_are_instants(write: Any) -> None:
    outage = "[{from: 2024-05-01T12:00:00Z, to: 2024-05-01T14:00:00+01:00}]"
    text = GOOD.replace("rules: {hot: null}", f"outages: {outage}, rules: {{hot: {{outages: {outage}}}}}")
    file = read(write(text))
    assert file.problems == []
    (device,) = file.documents["device"]
    expected = [{"from": 1_714_564_800_000_000, "to": 1_714_568_400_000_000}]
    assert device["outages"] == device["rules"]["hot"]["outages"] == expected
