"""examples/commands: a registry that workers can use, and a codec that takes back what it made."""

from pathlib import Path
from typing import Any

from preservarium.domain.commands.downlinks import Payload, encoded, encoder_arguments
from preservarium.domain.commands.profile import compile_profile
from preservarium.domain.registry.checks import check_meaning, check_references
from preservarium.domain.registry.documents import identity
from preservarium.registry.file import read
from preservarium.sandbox.javascript import JavaScript

FOLDER = Path(__file__).parents[4] / "examples" / "commands"


def test_the_example_registry_is_right_and_its_devices_can_be_sent_to():
    file = read(FOLDER / "registry.yaml")
    names = {kind: [identity(kind, d) for d in documents] for kind, documents in file.documents.items()}
    check_references(file, names)
    by_name = {kind: dict(zip(names[kind], documents, strict=True)) for kind, documents in file.documents.items()}
    check_meaning(file, by_name["datatype"], by_name["rule"], by_name["type"])
    assert [str(p) for p in file.problems] == []
    for device in by_name["device"].values():
        kind: Any = by_name["type"][device["type"]]
        profile = compile_profile({"rev": 1, **device}, kind, "devices/{device}/down")  # type: ignore[typeddict-item]
        assert profile.problem == ""
        assert profile.sleeps is (device["type"] == "relay_chirpstack")


def test_the_codec_takes_back_what_it_made():
    codec = JavaScript((FOLDER / "relay.js").read_text(), 1.0)
    for fan, light in ((0, 0), (1, 0), (0, 1), (1, 1)):
        arguments = encoder_arguments("javascript", "relay-1", {"fields": {"fan": fan, "light": light}}, {})
        payload = encoded(codec.call("encodeDownlink", arguments, 1_000), {})
        assert payload == Payload(bytes([fan | light << 1]), 10)
        said = codec.call("decodeUplink", f'{{"bytes": {list(payload.data)}, "fPort": 10}}', 1_000)
        assert said == f'{{"data":{{"fan":{fan},"light":{light}}}}}'


def test_wrong_sections_are_found_where_they_stand(tmp_path):
    path = tmp_path / "registry.yaml"
    path.write_text(
        (FOLDER / "registry.yaml").read_text().replace("tries: 3", "tries: 99").replace("on: cleared", "on: later")
        .replace("file: relay.js", f"file: {FOLDER / 'relay.js'}")
    )  # fmt: skip
    texts = [str(p) for p in read(path).problems]
    assert any("tries: 99" in text and "device_types[0].downlink" in text for text in texts)
    assert any("1.on" in text and "rules[0].commands" in text for text in texts)
