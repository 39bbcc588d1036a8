"""Published payloads and packs: copied facts always, the shared files where they are present."""

import math
import os
from pathlib import Path

import cbor2
import orjson
import pytest

from preservarium.domain.decoders import examples, senml
from preservarium.domain.decoders.kinds import compile_parser
from preservarium.registry.yaml_tree import plain_file

ROOT = Path(__file__).parents[4]
CASES = ROOT / "tests" / "cases"
VECTORS = Path(os.environ.get("PRESERVARIUM_VECTORS", ROOT.parent / "shared" / "vectors"))
#: RFC 8428 gives the time of its resolved examples: those that count from now.
NOW_S = 1_498_780_179
NOW_OF = {7: 1_499_109_309}
LABELS = {v: k for k, v in senml._LABELS.items()}


def lines(path):
    if not path.is_file():
        pytest.skip(f"{path} is not there: set PRESERVARIUM_VECTORS to the folder of test vectors")
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def decentlab_faults(vectors):
    decoders = {}
    faults = []
    for vector in vectors:
        device = vector["device"]
        if device not in decoders:
            decoders[device] = compile_parser(plain_file(ROOT / f"examples/decentlab/{device[3:].lower()}.yaml"))
        fields = decoders[device].decode(examples.raw_message(bytes.fromhex(vector["hex"])))
        found = {f.name: f.value for f in fields}
        units = {f.name: f.unit for f in fields if f.name in vector["units"]}
        # One decoder of theirs prints the unit "None" for none.
        wanted = {name: None if unit == "None" else unit for name, unit in vector["units"].items()}
        same = found.keys() == vector["values"].keys() and all(
            math.isclose(found[name], value, rel_tol=1e-9, abs_tol=0.0) for name, value in vector["values"].items()
        )
        if not same or units != wanted or len(fields) != len(found):
            faults.append((device, vector["hex"], found, vector["values"]))
    return faults


@pytest.mark.parametrize(
    "path", [CASES / "decentlab" / "payloads.jsonl", VECTORS / "decentlab.jsonl"], ids=["copied", "shared"]
)
def test_all_decentlab_payloads_give_the_published_values(path):
    vectors = lines(path)
    assert len(vectors) == 134
    assert len({v["device"] for v in vectors}) == 68
    assert decentlab_faults(vectors) == []


def test_copied_facts_are_the_shared_ones():
    assert lines(VECTORS / "decentlab.jsonl") == lines(CASES / "decentlab" / "payloads.jsonl")
    assert lines(VECTORS / "senml.jsonl") == lines(CASES / "senml" / "rfc8428.jsonl")


@pytest.mark.parametrize("path", [CASES / "senml" / "rfc8428.jsonl", VECTORS / "senml.jsonl"], ids=["copied", "shared"])
def test_all_senml_packs_resolve_as_published(path):
    packs = lines(path)
    assert len(packs) == 13
    for case in packs:
        resolved = senml.resolve(case["pack"], NOW_OF.get(case["example"], NOW_S))
        if case["resolved"] is None:
            # The RFC prints no resolved form of the last one: two values of 0.5, then two of 0 a tenth of a second later.
            assert [(r["n"], round(r["t"], 3), r["v"]) for r in resolved] == [
                ("2001:db8::3", 1320078429.0, 0.5),
                ("2001:db8::4", 1320078429.0, 0.5),
                ("2001:db8::3", 1320078429.1, 0),
                ("2001:db8::4", 1320078429.1, 0),
            ]
            continue
        # The published form of the seventh leaves its data value out.
        assert [r for r in resolved if "vd" not in r] == case["resolved"], case["example"]
        assert sum("vd" in r for r in resolved) == sum("vd" in r for r in case["pack"])


def test_the_same_packs_in_cbor_resolve_the_same():
    for case in lines(CASES / "senml" / "rfc8428.jsonl"):
        coded = cbor2.dumps([{LABELS.get(k, k): v for k, v in record.items()} for record in case["pack"]])
        assert senml.resolve(senml._records(coded), NOW_S) == senml.resolve(case["pack"], NOW_S)
