"""Files of the archive: every byte comes back, damage is told, and nobody sees half a file."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preservarium.domain.archive import Segment
from preservarium.settings import Archive
from preservarium.stores.archive_files import ArchivedRecord, ArchiveError, Files, Reader, Writer, verify

pytest.importorskip("pyarrow", reason="missing: PyArrow (extra `archive`)")

records_of = st.lists(
    st.tuples(
        st.integers(1, 5),
        st.integers(-1, 2**62),
        st.none() | st.binary(max_size=40),
        st.none() | st.binary(max_size=200),
        st.lists(st.tuples(st.text(max_size=10).filter(lambda t: t < "\ud800" or t > "\udfff"), st.none() | st.binary(max_size=20)), max_size=3),
    ),
    min_size=1,
    max_size=40,
)  # fmt: skip


def made(folder: Path, records: list[Any], *, partition: int = 0, first: int | None = None, group: int = 7) -> Segment:
    """A file of these records in an archive, cut into small row groups."""
    local = folder / "local"
    writer = Writer(local, {"topic": "t", "epoch": 0, "partition": partition, "first": records[0].offset})
    for n, record in enumerate(records):
        writer.add(record)
        if n % group == group - 1:
            writer.flush()
    next_ = records[-1].offset + 1
    sha256, size = writer.close(next_)
    segment = Segment(
        "t", 0, partition, records[0].offset if first is None else first, next_, "2025-12-01", writer.records, writer.value_bytes, size,
        sha256, max(0, writer.min_time_ms or 0), max(0, writer.max_time_ms or 0),
    )  # fmt: skip
    Files(Archive(url=str(folder / "archive"))).put(local, segment.path)
    return segment


def plain(count: int, first: int = 0) -> list[Any]:
    return [
        SimpleNamespace(offset=first + n, timestamp=1_000 * n, key=b"d%d" % (n % 3), value=b'{"n": %d}' % n, headers=())
        for n in range(count)
    ]


@given(drawn=records_of)
@settings(max_examples=40)
def test_every_record_comes_back_byte_for_byte(tmp_path_factory: pytest.TempPathFactory, drawn: list[Any]) -> None:
    folder, at, records = tmp_path_factory.mktemp("files"), 0, []
    for step, time_ms, key, value, headers in drawn:
        at += step
        records.append(SimpleNamespace(offset=at, timestamp=time_ms, key=key, value=value, headers=tuple(headers)))
    segment = made(folder, records)
    files = Files(Archive(url=str(folder / "archive")))
    reader = Reader(files, segment.path)
    try:
        found = [record for some in reader.records(0, 2**62) for record in some]
        assert found == [ArchivedRecord(r.offset, r.timestamp, r.key, r.value, r.headers) for r in records]
        some = {r.offset for r in records[::2]} | {0}
        assert reader.at(some) == {r.offset: r for r in found if r.offset in some}
        begin, end = records[len(records) // 3].offset, records[-1].offset
        assert [r for group in reader.records(begin, end) for r in group] == [
            r for r in found if begin <= r.offset < end
        ]
        assert reader.since(10**6) == next((r.offset for r in records if r.timestamp >= 10**6), None)
    finally:
        reader.close()
    assert verify(files, segment) == ""


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Files, Segment, Path]:
    segment = made(tmp_path, plain(50))
    return Files(Archive(url=str(tmp_path / "archive"))), segment, tmp_path / "archive" / segment.path


def test_a_changed_byte_is_found(archive: tuple[Files, Segment, Path]) -> None:
    files, segment, path = archive
    assert verify(files, segment) == ""
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    assert "SHA-256" in verify(files, segment)
    assert verify(files, segment, quick=True) == ""


def test_a_file_that_is_cut_or_gone_is_found(archive: tuple[Files, Segment, Path]) -> None:
    files, segment, path = archive
    path.write_bytes(path.read_bytes()[:-10])
    assert "bytes, and should have" in verify(files, segment, quick=True)
    with pytest.raises(ArchiveError, match="is no file of the archive, or is damaged"):
        Reader(files, segment.path)
    path.unlink()
    assert verify(files, segment) == "the file is not there"
    with pytest.raises(ArchiveError, match="cannot be read"):
        Reader(files, segment.path)


def test_content_that_is_not_what_the_index_says_is_found(archive: tuple[Files, Segment, Path]) -> None:
    files, segment, path = archive
    assert "has 50 records, and should have 49" in verify(files, replace(segment, records=49))
    short = replace(segment, next=40)
    path.rename(path.with_name(short.path.rpartition("/")[2]))
    assert "offset 40 stands behind 39 in a file of 0 to 40" in verify(files, short)


def test_a_page_that_is_damaged_is_not_given_as_data(archive: tuple[Files, Segment, Path]) -> None:
    files, segment, path = archive
    content = path.read_bytes()
    # Every byte of the first pages in turn: never other records than those that were written, without a word.
    whole = {r.offset: r for r in plain(50)}
    for at in range(4, min(400, len(content) - 200), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            reader = Reader(files, segment.path)
        except ArchiveError:
            continue
        try:
            for some in reader.records(0, 100):
                for record in some:
                    assert (record.key, record.value) == (whole[record.offset].key, whole[record.offset].value)
        except ArchiveError:
            pass
        finally:
            reader.close()


def test_deleting_takes_empty_folders_along(archive: tuple[Files, Segment, Path]) -> None:
    files, segment, path = archive
    files.delete(segment.path)
    files.delete(segment.path)
    assert not path.exists()
    assert list(files.list()) == []
    assert list(Path(files.url).rglob("*")) == []


def test_what_a_crash_left_beside_a_file_is_cleared(archive: tuple[Files, Segment, Path]) -> None:
    files, segment, path = archive
    part = path.with_name(f"{path.name}.123-abcdef.part")
    part.write_bytes(b"half")
    assert len(list(files.list())) == 2
    files.clear(segment.path)
    assert [name for name, _ in files.list()] == [segment.path]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArchiveError, match="cannot be written"):
        Files(Archive(url=str(tmp_path / "file" / "archive"))).check()


def test_a_place_of_another_scheme_goes_through_fsspec() -> None:
    pytest.importorskip("fsspec", reason="missing: fsspec (extra `archive`)")
    files = Files(Archive(url="memory://bucket/archive"))
    files.check()
    assert list(files.list()) == []
    with pytest.raises(ArchiveError, match="cannot be used"):
        Files(Archive(url="gopher://bucket/archive")).check()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"url": "s3://Bucket_/x"}, "is no bucket"),
        ({"url": "s3://user:secret@bucket/x"}, "holds a user or password"),
        ({"url": "/srv/a", "s3_region": "eu"}, "s3_region is given, but url is not of s3://"),
        ({"url": "s3://bucket", "s3_access_key": "k"}, "belong together"),
        ({"url": "/srv/a", "topics": " , "}, "topics names none"),
        ({"url": "/srv/a", "topics": "no/topic"}, "is no topic"),
        ({"url": "s3://bucket", "s3_endpoint": "ftp://x"}, "http"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Archive(**given)
