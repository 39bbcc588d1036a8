import json

import pytest
from click.testing import CliRunner

from preservarium.cli.decode import commands

COMMANDS = {c.name: c for c in commands}


def run(*args, stdin=None):
    command = COMMANDS[args[0]]
    return CliRunner().invoke(command, [str(a) for a in args[1:]], input=stdin)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(
        "name: t\nkind: table\nsource:\n  parameters: {k: 2}\n  fields:\n    - {name: a, type: u8, expr: x * k, unit: °C}\n"
        "    - repeat: end\n      fields: [{name: b, type: u8}]\n"
        "examples:\n  - {hex: '010203', expect: {a: {value: 2, unit: °C}, b: [2, 3]}}\n"
    )
    return path


def test_a_payload_is_printed_as_data(table):
    result = run("decode", "--codec", table, "--hex", "01 05 06")
    assert (result.exit_code, json.loads(result.output)) == (
        0,
        {"data": {"a": 2, "b": [5, 6]}, "warnings": [], "errors": []},
    )
    assert json.loads(run("decode", "-c", table, "--hex", "01", "--var", "k=10").output)["data"] == {"a": 10}


def test_readings_are_printed_on_request(table):
    result = json.loads(run("decode", "-c", table, "--hex", "01", "--readings").output)
    assert result["readings"] == [{"component_type": "a", "pin_position": "-1", "value": 2, "unit": "°C"}]


def test_a_refused_payload_is_an_error_with_exit_code_1(table):
    result = run("decode", "-c", table, "--hex", "")
    assert result.exit_code == 1
    assert json.loads(result.output)["errors"][0].startswith("decode_failed: the payload is too short")


def test_a_format_without_a_file(tmp_path):
    payload = tmp_path / "p.json"
    payload.write_text('[{"n":"x","u":"Cel","v":1}]')
    assert json.loads(run("decode", "--format", "senml", "--json", payload).output)["data"] == {"x": 1}
    assert json.loads(run("decode", "--format", "csv", "--text", "-", stdin="a\n1\n").output)["data"] == {"a": "1"}


def test_a_bare_source_is_told_by_what_is_in_it(tmp_path):
    table = tmp_path / "a.yaml"
    table.write_text("fields: [{name: a, type: u8}]\n")
    mapping = tmp_path / "b.json"
    mapping.write_text('{"fields": [{"path": "x.y"}]}')
    assert json.loads(run("decode", "-c", table, "--hex", "07").output)["data"] == {"a": 7}
    assert json.loads(run("decode", "-c", mapping, "--json", "-", stdin='{"x": {"y": 8}}').output)["data"] == {"x.y": 8}


@pytest.mark.parametrize(
    "args",
    [
        ("decode", "-c", "nowhere.yaml", "--hex", "00"), ("decode", "--hex", "00"), ("decode", "--format", "senml"), ("decode", "--format", "senml", "--hex", "0"),
        ("decode", "--format", "senml", "--hex", "00", "--time", "soon"), ("decode", "--format", "senml", "--hex", "00", "--var", "x"), ("decoders", "test", "nothing-of-that-name"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_exit_code_2(args):
    result = run(*args)
    assert result.exit_code == 2
    assert result.output.count("\n") <= 5


def test_a_batch_goes_on_after_a_bad_line(table, tmp_path):
    lines = tmp_path / "batch.ndjson"
    lines.write_text(
        f'{{"codec": "{table}", "hex": "01"}}\nnonsense\n{{"codec": "{table}", "hex": ""}}\n\n{{"codec": "{table}", "port": 1, "hex": "02"}}\n'
    )
    result = run("decode", "--batch", lines)
    found = [json.loads(line) for line in result.output.splitlines()]
    assert result.exit_code == 1
    assert [f["data"] for f in found] == [{"a": 2}, {}, {}, {"a": 4}]
    assert [bool(f["errors"]) for f in found] == [False, True, True, False]


def test_examples_are_run_and_differences_shown(table, tmp_path):
    result = run("decoders", "test", tmp_path)
    assert (result.exit_code, result.output) == (0, "1 parsers, 1 examples, 0 do not hold\n")
    table.write_text(table.read_text().replace("value: 2", "value: 3").replace("b: [2, 3]", "b: 2, c: 1"))
    result = run("decoders", "test", table)
    assert result.exit_code == 1
    assert "a: expected 3, decoded 2" in result.output
    assert "b: expected 1, decoded 2" in result.output
    assert "c: expected 1, decoded 0" in result.output
    report = json.loads(run("decoders", "test", table, "--json").output)
    assert report["failed"] == 1
    assert report["parsers"][0]["parser"] == "t@1"


def test_the_sample_registry_has_examples_for_every_parser():
    from pathlib import Path

    from preservarium.domain.decoders import examples
    from preservarium.registry.file import read

    documents = read(Path(__file__).parents[3] / "examples" / "registry.yaml")
    assert documents.errors == []
    for parser in documents.documents["parser"]:
        outcomes = examples.run({"version": 1, **parser})
        assert outcomes, parser["name"]
        assert [line for o in outcomes for line in o.differences] == [], parser["name"]
