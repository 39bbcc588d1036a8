"""docs/ALARM_RULES.md: what it shows is what the registry takes."""

import re
from pathlib import Path
from typing import Any

import pytest

from preservarium.domain.alarms.rule import KINDS
from preservarium.domain.alarms.rules import compile_rules
from preservarium.domain.registry.checks import check_meaning, check_references
from preservarium.domain.registry.documents import identity
from preservarium.registry.file import read

ROOT = Path(__file__).parents[4]
TEXT = (ROOT / "docs" / "ALARM_RULES.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
SAMPLE = read(ROOT / "examples" / "registry.yaml")
DATATYPES = {d["name"]: d for d in SAMPLE.documents["datatype"]}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("name: ")[-1].split()[0].strip(",{}"))
def test_each_example_is_taken_by_the_registry_and_compiles(block: str, tmp_path: Path) -> None:
    path = tmp_path / "registry.yaml"
    path.write_text(block, encoding="utf-8")
    file = read(path)
    rules: dict[str, Any] = {d["name"]: {**d, "rev": 1} for d in file.documents.get("rule", ())}
    known = {
        "datatype": DATATYPES,
        "type": ["cold-store"],
        "rule": [*rules, "too-warm", "door-open"],
    }
    check_references(file, known)
    check_meaning(file, DATATYPES, rules, {"cold-store": {"name": "cold-store"}})
    assert file.problems == []
    device: Any = {"device_id": "d", "rev": 1, "type": "t", "enabled": True, "rules": {name: {} for name in rules}}
    compiled = compile_rules(device, None, rules.get, DATATYPES.get)
    assert compiled.problems == ()
    assert set(compiled.by_name) == set(rules)
    assert rules or file.documents["device"]


def test_every_kind_is_shown() -> None:
    shown = set(re.findall(r"kind: (\w+)", "".join(BLOCKS)))
    assert shown | {"low"} == set(KINDS)


def test_the_rules_of_the_sample_compile_on_every_device() -> None:
    by = {
        kind: {identity(kind, d): {"rev": 1, "version": 1, **d} for d in docs}
        for kind, docs in SAMPLE.documents.items()
    }
    found: set[str] = set()
    for device in by["device"].values():
        compiled = compile_rules(device, by["type"][device["type"]], by["rule"].get, by["datatype"].get)
        assert compiled.problems == ()
        found |= {rule.kind for rule in compiled.by_name.values()}
    assert found >= {"high", "low", "rate", "expression", "no_data"}
