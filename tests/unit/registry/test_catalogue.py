"""The catalogue without Kafka: what records make of it."""

from typing import Any

import orjson
import pytest

from preservarium.errors import Retry
from preservarium.registry.catalogue import Catalogue


def _doc(name: str, rev: int, **more: Any) -> bytes:
    return orjson.dumps({"name": name, "rev": rev, **more})


def test_documents_are_found_by_kind_and_name() -> None:
    catalogue = Catalogue()
    for kind in ("datatype", "parser", "type", "rule", "recipient"):
        assert catalogue.apply(f"{kind}/x".encode(), _doc("x", 1, of=kind))
    assert [
        d and d.get("of")  # type: ignore[attr-defined]
        for d in (
            catalogue.datatype("x"),
            catalogue.parser("x"),
            catalogue.type("x"),
            catalogue.rule("x"),
            catalogue.recipient("x"),
        )
    ] == ["datatype", "parser", "type", "rule", "recipient"]
    assert catalogue.datatype("y") is None
    assert catalogue.documents()["rule"] == {"x": {"name": "x", "rev": 1, "of": "rule"}}


def test_rev_grows_with_every_change_and_only_then() -> None:
    catalogue = Catalogue()
    revs = [catalogue.rev]
    for value in (_doc("x", 1), _doc("x", 1), _doc("x", 2), None):
        catalogue.apply(b"rule/x", value, rev=3)
        revs.append(catalogue.rev)
    assert revs == [0, 1, 1, 2, 3]


def test_records_that_come_again_change_nothing() -> None:
    catalogue = Catalogue()
    catalogue.apply(b"parser/p", _doc("p", 2, version=2))
    assert not catalogue.apply(b"parser/p", _doc("p", 1, version=1))
    assert catalogue.apply(b"parser/p", None, rev=3)
    assert not catalogue.apply(b"parser/p", _doc("p", 2, version=2))
    assert catalogue.parser("p") is None
    assert catalogue.apply(b"parser/p", _doc("p", 4, version=3))


def test_a_tombstone_without_revision_removes() -> None:
    catalogue = Catalogue()
    catalogue.apply(b"type/t", _doc("t", 9))
    assert catalogue.apply(b"type/t", None)
    assert catalogue.type("t") is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"", _doc("x", 1)),
        (b"rule", _doc("x", 1)),
        (b"rule/", _doc("", 1)),
        (b"nonsense/x", _doc("x", 1)),
        (b"\xff\xfe/x", _doc("x", 1)),
        (b"rule/x", b"{"),
        (b"rule/x", b"[]"),
        (b"rule/x", b"null"),
        (b"rule/x", b'{"name":"x"}'),
        (b"rule/x", b'{"name":"x","rev":"1"}'),
        (b"rule/x", _doc("y", 1)),
    ],
)
def test_foreign_records_are_skipped(key: bytes, value: bytes) -> None:
    catalogue = Catalogue()
    assert not catalogue.apply(key, value)
    assert catalogue.rev == 0


def test_listeners_hear_of_changes() -> None:
    catalogue = Catalogue()
    heard: list[tuple[str, str]] = []
    catalogue.on_change(lambda kind, name: heard.append((kind, name)))
    catalogue.apply(b"rule/x", _doc("x", 1))
    catalogue.apply(b"rule/x", _doc("x", 1))
    catalogue.apply(b"rule/x", None, rev=2)
    assert heard == [("rule", "x"), ("rule", "x")]


async def test_a_catalogue_that_was_not_read_asks_to_try_again() -> None:
    with pytest.raises(Retry, match="has not been read yet"):
        await Catalogue().ready(timeout_s=0.01)
