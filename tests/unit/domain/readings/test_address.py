"""Addresses: what is the same one in another spelling."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.readings.address import SEPARATORS, canonical_address, spellings
from preservarium.domain.registry.changes import device_keys

EUI = "70b3d57ed0aa0001"
MAC = "a4c1380badf0"


@pytest.mark.parametrize(
    ("given_as", "canonical"),
    [
        *[(text, EUI) for text in (EUI, "70B3D57ED0AA0001", "70B3d57eD0aa0001", "70-B3-D5-7E-D0-AA-00-01", "70:b3:d5:7e:d0:aa:00:01", "70.B3.D5.7E.D0.AA.00.01", "70 b3 d5 7e d0 aa 00 01", "70b3.d57e.d0aa.0001", "70B3-D57E-D0AA-0001")],
        *[(text, MAC) for text in (MAC, "A4C1380BADF0", "A4:C1:38:0B:AD:F0", "a4-c1-38-0b-ad-f0", "a4c1.380b.adf0", "A4 C1 38 0B AD F0")],
        # What is neither is the text that it is.
        *[(text, text) for text in ("Sensor-1", "SENSOR-1", "eui-70B3D57ED0AA0001", "70B3D57ED0AA00", "70B3D57ED0AA000102", "70-B3:D5-7E-D0-AA-00-01", "70B3-D57ED0AA0001", "70-B3D5-7ED0-AA00-01", "G0B3D57ED0AA0001", "a4:c1:38:0b:ad", "",
            "a4::c1:38:0b:ad:f0", " 70B3D57ED0AA0001", "A4C1380BADF0\n", "urn:dev:mac:A4C1380BADF0", "７0B3D57ED0AA0001", "ABCDEF", "00123")],
    ],
)  # fmt: skip
def test_the_canonical_form(given_as, canonical):
    assert canonical_address(given_as) == canonical
    assert canonical_address(canonical) == canonical


@given(st.binary(min_size=8, max_size=8) | st.binary(min_size=6, max_size=6))
def test_every_usual_spelling_of_the_same_bytes_has_one_form(data):
    for separator in ("", *SEPARATORS):
        text = data.hex(separator) if separator else data.hex()
        assert canonical_address(text) == canonical_address(text.upper()) == data.hex()
    found = [*spellings(data.hex(":").upper())]
    assert found[0] == data.hex(":").upper()
    assert len(found) == len(set(found))
    assert {data.hex(), data.hex().upper(), data.hex("-"), data.hex(":").upper(), data.hex(".", 2)} <= set(found)
    assert {canonical_address(one) for one in found} == {data.hex()}


def test_what_has_one_spelling_only():
    assert [*spellings("Sensor-1")] == ["Sensor-1"]
    assert device_keys("Sensor-1") == ("Sensor-1",)
    assert device_keys(EUI) == (EUI,)
    assert device_keys("70-B3-D5-7E-D0-AA-00-01") == ("70-B3-D5-7E-D0-AA-00-01", EUI)
