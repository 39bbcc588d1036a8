"""Files of a back-up come back as they were written, and what was changed since is refused."""

import gzip
from pathlib import Path

import pytest

from preservarium import topics
from preservarium.operations.backup import files
from preservarium.operations.backup.files import BackupError, Entry, EntryWriter, Manifest, Position, Span
from preservarium.operations.backup.kafka import Reader, starts
from preservarium.operations.backup.restore import unexpired

ENTRIES = [
    Entry(7, 1_700_000_000_000, b"dev", b'{"a": 1}', (("rev", b"3"), ("none", None))),
    Entry(9, -1, None, b""),
    Entry(10, 0, b"\0\xff", None),
]


def backup(directory: Path) -> Manifest:
    with EntryWriter(files.topic_file(directory, "iot_raw_data", 3)) as file:
        file.add(ENTRIES[:2])
        file.add(ENTRIES[2:])
        assert file.records == 3
    manifest = Manifest("1.0", "2026-01-01T00:00:00+00:00")
    manifest.topics = {"iot_raw_data": {3: Span(7, 11, 3)}}
    manifest.groups = {
        "": {"iot_raw_data": {3: Position(7)}},
        "sync": {"iot_validated_data": {0: Position(5, "planned:9|[]")}},
    }
    manifest.sinks = {"sink": {"iot_validated_data": {0: 4}}}
    files.seal(directory, manifest)
    return manifest


def test_records_and_manifest_come_back_as_they_were(tmp_path: Path) -> None:
    written = backup(tmp_path)
    assert files.unseal(tmp_path) == written
    assert set(written.files) == {"kafka/iot_raw_data/3.gz"}
    assert [e for some in files.read_entries(files.topic_file(tmp_path, "iot_raw_data", 3)) for e in some] == ENTRIES


@pytest.mark.parametrize("count", [0, 1, files.RECORDS_AT_ONCE, files.RECORDS_AT_ONCE + 1])
def test_any_number_of_records_is_read(tmp_path: Path, count: int) -> None:
    entries = [Entry(n, n, b"k", b"%d" % n) for n in range(count)]
    path = tmp_path / "0.gz"
    with EntryWriter(path) as file:
        file.add(entries)
    assert [e for some in files.read_entries(path) for e in some] == entries


def test_a_directory_without_manifest_is_no_backup(tmp_path: Path) -> None:
    backup(tmp_path)
    (tmp_path / files.MANIFEST).unlink()
    with pytest.raises(BackupError, match="was not finished"):
        files.unseal(tmp_path)


@pytest.mark.parametrize("harm", ["changed", "cut", "gone"])
def test_a_file_that_is_another_one_is_refused(tmp_path: Path, harm: str) -> None:
    backup(tmp_path)
    path = files.topic_file(tmp_path, "iot_raw_data", 3)
    held = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    else:
        held[len(held) // 2] ^= 1
        path.write_bytes(held if harm == "changed" else held[:-1])
    with pytest.raises(BackupError, match=str(path)):
        files.unseal(tmp_path)


def test_a_backup_of_another_version_is_refused(tmp_path: Path) -> None:
    manifest = backup(tmp_path)
    manifest.version = files.VERSION + 1
    files.seal(tmp_path, manifest)
    with pytest.raises(BackupError, match=f"version {files.VERSION + 1}"):
        files.unseal(tmp_path)


@pytest.mark.parametrize("body", [b"\0\0", b"\0\0\0\x09abc", b"\0\0\0\x01\xc1", b"\0\0\0\x01\x01"])
def test_a_file_of_records_that_holds_something_else_is_refused(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "0.gz"
    path.write_bytes(gzip.compress(body))
    with pytest.raises(BackupError, match=str(path)):
        list(files.read_entries(path))


READERS = [
    Reader("validated", ""),
    Reader("validated", "sync"),
    Reader("validated", "sink", "sink"),
    Reader("raw", ""),
]


@pytest.mark.parametrize(
    ("topic", "shared", "sync", "sink", "begin", "expected"),
    [
        ("validated", 30, 20, 10, 0, 10),  # the database's word counts for its sink, whatever Kafka's commit says
        ("validated", 30, 20, 25, 0, 20),
        ("validated", None, 20, 25, 5, 5),  # a stage that has not committed has everything before it
        ("validated", 30, None, 25, 5, 5),
        ("validated", 30, 20, None, 5, 5),
        ("validated", 30, 20, 10, 15, 15),  # retention was faster
        ("raw", 30, 20, 10, 0, 30),
        ("errors", 30, 20, 10, 3, 3),  # which no stage reads
    ],
)
def test_a_topic_is_needed_from_its_slowest_reader_on(
    topic: str, shared: int | None, sync: int | None, sink: int | None, begin: int, expected: int
) -> None:
    groups = {
        suffix: {} if at is None else {name: {0: Position(at)} for name in ("validated", "raw", "errors")}
        for suffix, at in (("", shared), ("sync", sync))
    }
    sinks = {} if sink is None else {"sink": {"validated": {0: sink}}}
    assert starts(topic, READERS, {0: begin}, groups, sinks) == {0: expected}


def test_what_retention_would_take_before_it_is_read_is_written_as_of_now() -> None:
    now_ms = 1_800_000_000_000
    assert topics.RAW.retention_ms is not None
    fresh = Entry(1, now_ms - topics.RAW.retention_ms // 4, b"k", b"v", (("attempt", b"2"),))
    old = Entry(2, now_ms - topics.RAW.retention_ms * 3, b"k", b"v", (("attempt", b"2"),))
    undated = Entry(3, -1, b"k", b"v")
    received = ("received", b"%d" % old.timestamp_ms)
    assert unexpired([fresh, old, undated], topics.RAW, now_ms) == [
        fresh, Entry(2, -1, b"k", b"v", (("attempt", b"2"), received)), undated,
    ]  # fmt: skip
    # Restored a second time, it was received when it was.
    again = Entry(2, old.timestamp_ms + 5, b"k", b"v", (received,))
    assert unexpired([again], topics.RAW, now_ms) == [Entry(2, -1, b"k", b"v", (received,))]
    assert unexpired([old], topics.ALERTS, now_ms) == [old], "kept for a fortnight"
    ancient = Entry(2, 1, b"k", b"v")
    assert unexpired([ancient], topics.ALERTS, now_ms) == [Entry(2, -1, b"k", b"v")]
    assert unexpired([ancient], topics.ALARM_STANDING, now_ms) == [ancient], "kept for ever"
