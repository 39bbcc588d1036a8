"""Codecs as the field publishes them: bundles, the commands that run them, the proof before they are used."""

import json

import pytest
import structlog
from click.testing import CliRunner

from preservarium import metrics
from preservarium.cli.decode import commands
from preservarium.domain.registry.checks import RegistryFileError
from preservarium.registry import codecs
from preservarium.registry.file import read
from preservarium.registry.proving import check_active, check_scripts
from preservarium.settings import Settings

pytest.importorskip("quickjs")
pytest.importorskip("RestrictedPython")

COMMANDS = {c.name: c for c in commands}
CODEC = """\
function decodeUplink(input) {
  if (input.fPort === 9) return {errors: ["unknown FPort"]};
  if (input.bytes.length === 0) throw new Error("empty");
  return {data: {valve: input.bytes[0] ? "On" : "Off", temperature: {value: input.bytes[1] / 10, unit: "°C"}}, warnings: []};
}
"""
TTN = """\
uplinkDecoder:
  fileName: valve.js
  examples:
    - description: open
      input: {fPort: 1, bytes: [0x01, 215]}
      output:
        data:
          valve: On
          temperature: {value: 21.5, unit: "\\xB0C"}
    - description: refused
      input: {fPort: 9, bytes: []}
      output: {errors: [unknown FPort]}
downlinkEncoder:
  fileName: valve.js
"""


def run(*args, stdin=None):
    return CliRunner().invoke(COMMANDS[args[0]], [str(a) for a in args[1:]], input=stdin)


@pytest.fixture(autouse=True)
def logs_elsewhere():
    """As the `preservarium` group does: standard output is for results."""
    before = structlog.get_config()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.configure(**before)


@pytest.fixture
def vendor(tmp_path):
    (tmp_path / "valve.js").write_text(CODEC)
    (tmp_path / "valve-codec.yaml").write_text(TTN)
    (tmp_path / "old.js").write_text("function Decoder(bytes, port) { return {n: bytes[0], port: port}; }")
    (tmp_path / "p.py").write_text("def decode(payload, context):\n    return [{'name': 'n', 'value': payload[0]}]\n")
    return tmp_path


@pytest.mark.parametrize("name", ["valve.js", "valve-codec.yaml"])
def test_a_bundle_is_loaded_from_either_of_its_files(vendor, name):
    bundle = codecs.load(vendor / name)
    assert (bundle.kind, bundle.path.name, bundle.source) == ("javascript", "valve.js", CODEC)
    assert bundle.examples[0] == {
        "hex": "01d7", "port": 1, "description": "open",
        "output": {"data": {"valve": "On", "temperature": {"value": 21.5, "unit": "°C"}}},
    }  # fmt: skip
    assert len(bundle.examples) == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("test_decode_valve.json", [{"name": "open", "input": {"fPort": 1, "bytes": [1, 0]}, "expected": {"data": {"a": 1}}}]),
        ("examples.json", [{"type": "uplink", "description": "open", "bytes": "0100", "fPort": 1, "data": {"a": 1}},
                           {"type": "downlink-encode", "input": {"data": {}}, "output": {}}]),
        ("valve.json", {"examples": [{"description": "open", "input": {"fPort": 1, "bytes": "01 00"}, "output": {"data": {"a": 1}}}]}),
    ],
)  # fmt: skip
def test_examples_beside_a_script_are_found(tmp_path, name, content):
    (tmp_path / "valve.js").write_text(CODEC)
    (tmp_path / name).write_text(json.dumps(content))
    assert codecs.load(tmp_path / "valve.js").examples == [
        {"hex": "0100", "port": 1, "output": {"data": {"a": 1}}, "description": "open"}
    ]


def test_a_bundle_that_leads_elsewhere_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    for name in ("../up.js", "missing.js", "notes.txt"):
        path.write_text(f"uplinkDecoder: {{fileName: {name}}}")
        with pytest.raises(RegistryFileError):
            codecs.load(path)


def test_decode_prints_what_the_script_returned(vendor):
    result = run("decode", "--codec", vendor / "valve.js", "--format", "ttn", "--port", "1", "--hex", "00c8")
    assert result.exit_code == 0
    printed = result.stdout
    assert json.loads(printed) == {"data": {"valve": "Off", "temperature": {"value": 20, "unit": "°C"}}, "warnings": []}
    refused = run("decode", "--codec", vendor / "valve-codec.yaml", "--port", "9", "--hex", "00")
    assert (refused.exit_code, json.loads(refused.stdout)) == (1, {"errors": ["unknown FPort"]})
    thrown = run("decode", "--codec", vendor / "valve.js", "--hex", "")
    assert thrown.exit_code == 1
    assert json.loads(thrown.stdout)["errors"] == ["script_fault: valve@1, line 3: Error: empty"]
    assert json.loads(run("decode", "-c", vendor / "old.js", "-p", "5", "--hex", "07").stdout) == {
        "data": {"n": 7, "port": 5}
    }
    assert json.loads(run("decode", "-c", vendor / "p.py", "--hex", "07").stdout) == [{"name": "n", "value": 7}]
    assert run("decode", "-c", vendor / "p.py", "--format", "ttn", "--hex", "07").exit_code == 2


def test_readings_of_a_script(vendor):
    result = json.loads(run("decode", "-c", vendor / "valve.js", "--hex", "01d7", "--readings").stdout)
    assert result["data"]["valve"] == "On"
    assert result["readings"] == [
        {"component_type": "valve", "pin_position": "-1", "value_text": "On", "unit": ""},
        {"component_type": "temperature", "pin_position": "-1", "value": 21.5, "unit": "°C"},
    ]


def test_a_batch_keeps_the_order_of_its_lines(vendor):
    table = vendor / "t.yaml"
    table.write_text("fields: [{name: a, type: u8}]\n")
    lines = []
    for n in range(600):
        lines.append({"codec": str(vendor / "old.js"), "port": 1, "hex": f"{n % 256:02x}"})
        lines.append({"codec": str(table), "hex": f"{n % 256:02x}"})
    lines.append({"codec": str(vendor / "none.js"), "hex": "00"})
    lines.append({"codec": str(vendor / "valve.js"), "port": 9, "hex": "00"})
    result = run("decode", "--batch", "-", stdin="\n".join(json.dumps(line) for line in lines))
    printed = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert result.exit_code == 1
    assert len(printed) == len(lines)
    for n in range(600):
        assert printed[2 * n] == {"data": {"n": n % 256, "port": 1}}
        assert printed[2 * n + 1]["data"] == {"a": n % 256}
    assert "No such file" in printed[-2]["errors"][0]
    assert printed[-1] == {"errors": ["unknown FPort"]}


def test_decoders_test_runs_bundles_in_the_sandbox(vendor):
    result = run("decoders", "test", vendor, "--json")
    report = json.loads(result.stdout[result.stdout.index("{") :])
    assert (result.exit_code, report["examples"], report["failed"]) == (0, 2, 0)
    (vendor / "valve-codec.yaml").write_text(TTN.replace("valve: On", "valve: Off"))
    result = run("decoders", "test", vendor / "valve.js")
    assert result.exit_code == 1
    assert "data.valve: expected 'Off', returned 'On'" in result.stdout


REGISTRY = "parsers:\n  - {name: valve, kind: javascript, file: FILE, status: STATUS}\n"


@pytest.mark.parametrize("name", ["valve.js", "valve-codec.yaml"])
async def test_a_registry_file_names_a_bundle_and_its_examples_are_proven(vendor, name):
    path = vendor / "registry.yaml"
    path.write_text(REGISTRY.replace("FILE", name).replace("STATUS", "active"))
    file = read(path)
    await check_scripts(file, Settings())
    (parser,) = file.documents["parser"]
    assert (file.problems, parser["source"], len(parser["examples"])) == ([], CODEC, 2)


@pytest.mark.parametrize(("status", "errors"), [("active", 1), ("draft", 0)])
async def test_a_version_whose_examples_fail_cannot_become_active(vendor, status, errors):
    (vendor / "valve-codec.yaml").write_text(TTN.replace("valve: On", "valve: Off"))
    path = vendor / "registry.yaml"
    path.write_text(REGISTRY.replace("FILE", "valve.js").replace("STATUS", status))
    file = read(path)
    await check_scripts(file, Settings())
    assert len(file.errors) == errors
    (problem,) = file.problems
    assert problem.path == "parsers[0].examples[0]"
    assert problem.message == "data.valve: expected 'Off', returned 'On'"


async def test_a_worker_says_at_start_which_active_parsers_fail():
    def parser(name, status, output):
        return {
            "name": name, "version": 2, "kind": "javascript", "status": status, "source": CODEC, "hash": "",
            "examples": [{"hex": "01", "port": 9, "output": output}],
        }  # fmt: skip

    wrong, right = {"errors": ["other"]}, {"errors": ["unknown FPort"], "warnings": []}
    table = {"name": "t", "version": 1, "kind": "table", "status": "active", "source": {"fields": 5}, "examples": [{"hex": "00", "expect": {}}]}  # fmt: skip
    docs = [parser("good", "active", right), parser("bad", "active", wrong), parser("off", "retired", wrong), table]
    with structlog.testing.capture_logs() as logs:
        assert await check_active(docs, Settings()) == 2
    assert [e["parser"] for e in logs if e["event"] == "parser_example_fails"] == ["bad@2", "t@1"]
    assert metrics.PARSER_EXAMPLES_FAILING._value.get() == 2


def test_a_result_that_json_cannot_carry_on_is_a_refusal(vendor):
    odd = vendor / "odd.js"
    odd.write_text("function decodeUplink(i) { return {data: {t: '\\ud800'}, errors: []}; }")
    plain = run("decode", "-c", odd, "--hex", "00")
    assert plain.exit_code == 1
    assert "\\ud800" in plain.stdout
    shown = json.loads(run("decode", "-c", odd, "--hex", "00", "--readings").stdout)
    assert shown["readings"] == []
    assert shown["errors"]
    batch = run("decode", "--batch", "-", stdin=json.dumps({"codec": str(odd), "hex": "00"}))
    assert (batch.exit_code, batch.stdout.count("\n")) == (1, 1)
