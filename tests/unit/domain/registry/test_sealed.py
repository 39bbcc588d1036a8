"""Secrets of devices: sealed alike each time, opened for their device alone, never shown."""

import pytest

from preservarium.domain.readings.normalize import variables_of
from preservarium.domain.registry.sealed import NO_KEYS, PREFIX, Keyring
from preservarium.errors import ReasonCode, Reject
from preservarium.registry.apply import seal_secrets
from preservarium.registry.file import read

KEYS = Keyring("a secret of sixteen characters or more")
KEY = "231d39c1d7cc1ab1aee224cd096db932"


def test_a_secret_is_sealed_alike_each_time_and_opens_by_any_spelling_of_its_device():
    sealed = KEYS.seal("70B3D57ED005B89A", "key", KEY)
    assert sealed.startswith(PREFIX)
    assert KEY not in sealed
    assert sealed == KEYS.seal("70b3d57ed005b89a", "key", KEY) == KEYS.seal("70b3d57ed005b89a", "key", sealed)
    assert KEYS.opened("70b3d57ed005b89a", {"key": sealed}) == {"key": KEY}
    assert sealed != KEYS.seal("70b3d57ed005b89b", "key", KEY)


@pytest.mark.parametrize(
    ("keys", "device", "name", "change"),
    [
        (KEYS, "other", "key", lambda s: s),
        (KEYS, "dev", "bindkey", lambda s: s),
        (Keyring("another secret of some length"), "dev", "key", lambda s: s),
        (KEYS, "dev", "key", lambda s: s[:-6] + "AAAAA="),
        (KEYS, "dev", "key", lambda s: s[:12]),
        (KEYS, "dev", "key", lambda s: PREFIX + "é"),
        (KEYS, "dev", "key", lambda s: KEY),
        (NO_KEYS, "dev", "key", lambda s: s),
    ],
)
def test_what_cannot_be_opened_is_no_parser_and_is_not_repeated(keys, device, name, change):
    sealed = change(KEYS.seal("dev", "key", KEY))
    with pytest.raises(Reject) as e:
        keys.opened(device, {name: sealed})
    assert e.value.code is ReasonCode.NO_PARSER
    assert sealed not in str(e.value)


def test_without_a_key_nothing_can_be_sealed():
    with pytest.raises(ValueError, match="SECRETS_KEY"):
        NO_KEYS.seal("dev", "key", KEY)
    assert not NO_KEYS.usable
    assert KEYS.usable


def test_secrets_are_variables_of_parsers_that_are_no_scripts():
    device = {"device_id": "dev", "variables": {"a": 1}, "secrets": {"key": KEYS.seal("dev", "key", KEY)}}
    assert variables_of(device, {}, {"kind": "wmbus"}, KEYS) == {"a": 1, "key": KEY}
    assert variables_of(device, {}, {"kind": "javascript"}, KEYS) == {"a": 1}
    assert variables_of(device, {}) == {"a": 1}


def test_apply_seals_before_anything_goes_anywhere_and_says_what_it_cannot(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "manufacturers: [{name: m}]\nparsers: [{name: p, kind: wmbus}]\ndevice_types: [{name: t, manufacturer: m, parser: p}]\n"
        f"devices:\n  - {{device_id: dev, type: t, secrets: {{key: {KEY}}}}}\n  - {{device_id: other, type: t}}\n"
    )
    file = read(path)
    assert file.problems == []
    seal_secrets(file, KEYS)
    assert file.problems == []
    assert [d.get("secrets") for d in file.documents["device"]] == [{"key": KEYS.seal("dev", "key", KEY)}, None]
    seal_secrets(file, KEYS)  # what was exported is applied again
    assert file.problems == []
    for keys, why in ((NO_KEYS, "SECRETS_KEY is not set"), (Keyring("another secret of some length"), "another key")):
        seal_secrets(file, keys)
        assert why in str(file.problems[-1])
        assert KEY not in str(file.problems[-1])
    assert file.problems[-1].path == "devices[0].secrets.key"
