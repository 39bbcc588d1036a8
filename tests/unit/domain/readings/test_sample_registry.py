"""The sample registry is what a newcomer sees first: everything in it must hold together."""

from pathlib import Path

import pytest

from preservarium.domain.decoders import examples
from preservarium.domain.readings.normalize import compile_device, normalize
from preservarium.domain.readings.units import canonical
from preservarium.domain.registry.checks import check_references
from preservarium.domain.registry.documents import identity
from preservarium.registry.file import read

FILE = read(Path(__file__).parents[4] / "examples" / "registry.yaml")
BY = {kind: {identity(kind, d): {"rev": 1, "version": 1, **d} for d in docs} for kind, docs in FILE.documents.items()}


def test_the_file_is_right():
    check_references(FILE, BY)
    assert FILE.problems == []
    assert sum(t.startswith("decentlab-") for t in BY["type"]) == 68
    assert {d["type"] for d in BY["device"].values()} >= {t for t in BY["type"] if t.startswith("decentlab-")}


@pytest.mark.parametrize("name", BY["datatype"])
def test_every_unit_is_known_and_canonical(name):
    assert canonical(BY["datatype"][name]["unit"]) == (BY["datatype"][name]["unit"], True)


@pytest.mark.parametrize("device_id", BY["device"])
def test_what_a_device_sends_becomes_readings_of_known_datatypes_that_its_sensor_can_report(device_id):
    device = BY["device"][device_id]
    kind = BY["type"][device["type"]]
    parser = BY["parser"][kind["parser"]]
    compiled = compile_device(device, kind, parser, BY["datatype"].get)
    for example in parser["examples"]:
        if example.get("reject"):
            continue
        message, refused = normalize(examples.example_input(example), compiled, 0)
        assert refused == ()
        for reading in message["readings"]:
            datatype = BY["datatype"].get(reading["component_type"])
            assert datatype is not None, f"{reading['component_type']} is no datatype"
            assert "flags" not in reading
            assert reading["unit"] == datatype["unit"]
            span = datatype.get("fail_span")
            if span is not None and (span["min"] is not None or span["max"] is not None):
                assert span["min"] <= reading["value"] <= span["max"], reading
