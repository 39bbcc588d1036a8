"""Files of the archive: where they lie, and what is in them. Blocking: to be called in threads.

A file is Parquet with zstd, a row a record in the order of offsets: `offset`, `kafka_time` (ms, UTC), `key`, `value`, `headers`. Topic,
partition and day are in its path. Its metadata says the range that it covers, also where no record stood at the ends of it.

PyArrow is imported when it is needed: a worker that does not archive does not pay for it (docs/decisions/0012-archive.md has the figures).
"""

import contextlib
import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import orjson

from preservarium.domain.archive import SUFFIX, Segment
from preservarium.errors import PreservariumError, reason
from preservarium.settings import Archive

#: Records of a row group: the least that is read for one record.
GROUP_RECORDS: Final = 10_000
#: Bytes of a row group's values; one record may have a megabyte.
GROUP_BYTES: Final = 16 * 1024 * 1024
#: Of a page, which is what zstd sees at once.
PAGE_BYTES: Final = 4 * 1024 * 1024
#: zstd's: 6 takes twice the time for a tenth less, 1 saves little.
LEVEL: Final = 3
#: In a file's metadata.
META: Final = b"preservarium.archive"
#: What a file of this layout says of itself.
VERSION: Final = 1
#: Read and written at once where files are copied.
BLOCK_BYTES: Final = 1 << 20
#: A store that does not answer is given up after this time, and tried again by whoever asks.
CONNECT_S: Final = 10.0
REQUEST_S: Final = 60.0
#: Behind the name of a file that is being written into a folder.
PART: Final = ".part"


class ArchiveError(PreservariumError):
    """The archive cannot be read or written; the message says which file, and why."""


def require() -> None:
    """See that what reads and writes files is installed, without importing it.

    Raises:
        ArchiveError: it is not.
    """
    if find_spec("pyarrow") is None:
        message = "the archive needs PyArrow: pip install 'preservarium[archive]'"
        raise ArchiveError(message)


@dataclass(frozen=True, slots=True)
class ArchivedRecord:
    """A record out of the archive, in the shape of Kafka's."""

    offset: int
    timestamp: int  #: ms since the epoch
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()


class Files:
    """The place where the files are: a folder, S3, or what fsspec knows. Connects when it is first asked.

    Args:
        settings: which, and how to log in.
    """

    def __init__(self, settings: Archive) -> None:
        self._settings = settings
        self._opened: tuple[Any, str] | None = None

    @property
    def url(self) -> str:
        """Where it is, for people."""
        return self._settings.url

    def _place(self) -> tuple[Any, str]:
        """The file system, and the path of the archive in it."""
        if self._opened is None:
            require()
            url = self._settings.url
            scheme, mark, rest = url.partition("://")
            try:
                if not mark or scheme == "file":
                    from pyarrow.fs import LocalFileSystem

                    path = os.path.abspath(os.path.expanduser(rest if mark else url))
                    self._opened = LocalFileSystem(), path
                elif scheme == "s3":
                    self._opened = self._s3(), rest.strip("/")
                else:
                    self._opened = _fsspec(url)
            except (OSError, ValueError, ImportError) as e:
                message = f"the archive at {url} cannot be used: {reason(e)}"
                raise ArchiveError(message) from None
        return self._opened

    def _s3(self) -> Any:
        from pyarrow.fs import S3FileSystem

        s = self._settings
        options: dict[str, Any] = {"connect_timeout": CONNECT_S, "request_timeout": REQUEST_S}
        if s.s3_endpoint:
            scheme, _, place = s.s3_endpoint.partition("://")
            options |= {"scheme": scheme, "endpoint_override": place.rstrip("/"), "region": s.s3_region or "us-east-1"}
        elif s.s3_region:
            options["region"] = s.s3_region
        if s.s3_access_key:
            options |= {"access_key": s.s3_access_key, "secret_key": s.s3_secret_key.get_secret_value()}
        return S3FileSystem(**options)

    @property
    def _is_folder(self) -> bool:
        return type(self._place()[0]).__name__ == "LocalFileSystem"

    def _full(self, path: str) -> str:
        base = self._place()[1]
        return f"{base}/{path}" if base else path

    def _error(self, e: BaseException, what: str, path: str) -> ArchiveError:
        return ArchiveError(f"{self.url}: {path or 'the archive'} {what}: {reason(e)}")

    def check(self) -> None:
        """See that it can be written to.

        Raises:
            ArchiveError: it cannot.
        """
        probe = f".probe-{os.getpid()}-{os.urandom(4).hex()}"
        fs, _ = self._place()
        try:
            if self._is_folder:
                os.makedirs(self._full(""), exist_ok=True)
            with fs.open_output_stream(self._full(probe)) as out:
                out.write(b"x")
            fs.delete_file(self._full(probe))
        except OSError as e:
            raise self._error(e, "cannot be written", "") from None

    def size(self, path: str) -> int | None:
        """Bytes of a file; None where there is none.

        Raises:
            ArchiveError: it cannot be asked.
        """
        fs, _ = self._place()
        try:
            found = fs.get_file_info(self._full(path))
        except OSError as e:
            raise self._error(e, "cannot be looked for", path) from None
        return int(found.size) if found.is_file else None

    def put(self, local: Path, path: str) -> None:
        """Write a file as a whole: nobody sees a part of it under its name, and it outlives a crash of the machine.

        Raises:
            ArchiveError: it was not written.
        """
        fs, _ = self._place()
        full = self._full(path)
        try:
            if self._is_folder:
                _into_folder(local, Path(full))
                return
            with local.open("rb") as source, fs.open_output_stream(full) as out:
                while block := source.read(BLOCK_BYTES):
                    out.write(block)
        except OSError as e:
            raise self._error(e, "was not written", path) from None
        if (there := self.size(path)) != local.stat().st_size:
            message = f"{self.url}: {path} has {there} bytes, and {local.stat().st_size} were written"
            raise ArchiveError(message)

    def open(self, path: str) -> Any:
        """A file, to be read anywhere in it and closed.

        Raises:
            ArchiveError: it is not there.
        """
        fs, _ = self._place()
        try:
            return fs.open_input_file(self._full(path))
        except OSError as e:
            raise self._error(e, "cannot be read", path) from None

    def sha256(self, path: str, to: Path | None = None) -> tuple[str, int]:
        """SHA-256 and bytes of a file, read whole; written to `to` on the way.

        Raises:
            ArchiveError: it cannot be read.
        """
        fs, _ = self._place()
        digest, total = hashlib.sha256(), 0
        try:
            with fs.open_input_stream(self._full(path)) as source:
                out = to.open("wb") if to is not None else None
                try:
                    while block := source.read(BLOCK_BYTES):
                        digest.update(block)
                        total += len(block)
                        if out is not None:
                            out.write(block)
                finally:
                    if out is not None:
                        out.close()
        except OSError as e:
            raise self._error(e, "cannot be read", path) from None
        return digest.hexdigest(), total

    def delete(self, path: str) -> None:
        """Delete a file; nothing where it is not there.

        Raises:
            ArchiveError: it is there still.
        """
        fs, _ = self._place()
        try:
            fs.delete_file(self._full(path))
        except FileNotFoundError:
            pass
        except OSError as e:
            if self.size(path) is not None:
                raise self._error(e, "was not deleted", path) from None
        if self._is_folder:
            _prune(Path(self._full(path)).parent, Path(self._place()[1]))

    def clear(self, path: str) -> None:
        """Take away what a crash in the middle of writing a file has left beside it. Stores other than folders leave nothing."""
        if self._is_folder:
            full = Path(self._full(path))
            for part in full.parent.glob(f"{full.name}.*{PART}"):
                part.unlink(missing_ok=True)

    def list(self) -> Iterator[tuple[str, int]]:
        """(path below the URL, bytes) of every file that has the suffix of ours, or is a part of one.

        Raises:
            ArchiveError: it cannot be listed.
        """
        from pyarrow.fs import FileSelector

        fs, base = self._place()
        try:
            found = fs.get_file_info(FileSelector(base, recursive=True, allow_not_found=True))
        except OSError as e:
            raise self._error(e, "cannot be listed", "") from None
        for one in found:
            if one.is_file and one.path.endswith((SUFFIX, PART)):
                yield one.path[len(base) :].lstrip("/"), int(one.size)


def _fsspec(url: str) -> tuple[Any, str]:
    """A place of another scheme."""
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    system, path = fsspec.core.url_to_fs(url)
    return PyFileSystem(FSSpecHandler(system)), path.rstrip("/")


def _into_folder(local: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that it can be moved there at once; by a name of its own, because two workers may be at it.
    part = to.with_name(f"{to.name}.{os.getpid()}-{os.urandom(4).hex()}{PART}")
    try:
        with local.open("rb") as source, part.open("wb") as out:
            while block := source.read(BLOCK_BYTES):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        part.replace(to)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(to.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _prune(folder: Path, base: Path) -> None:
    """Take away folders that are empty now."""
    while folder != base and base in folder.parents:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


# --- what is in a file

_COLUMNS: Final = ("offset", "kafka_time", "key", "value", "headers")


def _schema() -> Any:
    import pyarrow as pa

    header = pa.struct([pa.field("name", pa.string(), nullable=False), pa.field("value", pa.binary())])
    return pa.schema(
        [
            pa.field("offset", pa.int64(), nullable=False),
            pa.field("kafka_time", pa.timestamp("ms", tz="UTC"), nullable=False),
            pa.field("key", pa.binary()),
            pa.field("value", pa.binary()),
            pa.field("headers", pa.list_(header)),
        ]
    )


# Arrays are made of buffers: `pyarrow.array` looks whether it was given something of pandas, and imports that for it, which takes longer and
# more memory than all the rest.


def _numbers(values: Sequence[int], kind: Any) -> Any:
    """64-bit whole numbers, or what Arrow keeps as such."""
    import pyarrow as pa

    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(array("q", values))])


def _validity(values: Sequence[Any]) -> Any:
    """A bit for each value, set where there is one; None where all are."""
    import pyarrow as pa

    if None not in values:
        return None
    bits = bytearray((len(values) + 7) // 8)
    for n, value in enumerate(values):
        if value is not None:
            bits[n >> 3] |= 1 << (n & 7)
    return pa.py_buffer(bytes(bits))


def _ends(sizes: Iterable[int]) -> Any:
    """Where each of some follows the one before: 32 bits each, one more than there are."""
    import pyarrow as pa

    return pa.py_buffer(array("i", accumulate(sizes, initial=0)))


def _bytes(values: Sequence[bytes | None], kind: Any) -> Any:
    """Byte strings, some of which may be missing."""
    import pyarrow as pa

    there = [value or b"" for value in values]
    buffers = [_validity(values), _ends(map(len, there)), pa.py_buffer(b"".join(there))]
    return pa.Array.from_buffers(kind, len(values), buffers)


def _header_lists(values: Sequence[Sequence[tuple[str, bytes | None]] | None], kind: Any) -> Any:
    """Lists of (name, value), some of which may be missing."""
    import pyarrow as pa

    flat = [header for headers in values if headers for header in headers]
    names = _bytes([name.encode() for name, _ in flat], pa.string())
    inner = pa.StructArray.from_arrays(
        [names, _bytes([value for _, value in flat], pa.binary())], fields=list(kind.value_type)
    )
    buffers = [_validity(values), _ends(len(headers or ()) for headers in values)]
    return pa.Array.from_buffers(kind, len(values), buffers, children=[inner])


class Writer:
    """Writes one file, a row group at a time.

    Args:
        local: where to.
        about: what it says of itself, besides its end.
    """

    def __init__(self, local: Path, about: dict[str, Any]) -> None:
        self._local = local
        self._about = about
        self._writer: Any = None
        self._offsets: list[int] = []
        self._times: list[int] = []
        self._keys: list[bytes | None] = []
        self._values: list[bytes | None] = []
        self._headers: list[list[tuple[str, bytes | None]] | None] = []
        self._bytes = 0
        self.records = 0
        self.value_bytes = 0
        self.last: int | None = None  #: offset
        self.min_time_ms: int | None = None
        self.max_time_ms: int | None = None

    def add(self, record: Any) -> None:
        """Take a record of Kafka; its offset is greater than the one before."""
        key, value, headers, time_ms = record.key, record.value, record.headers, record.timestamp
        self._offsets.append(record.offset)
        self._times.append(time_ms)
        self._keys.append(key)
        self._values.append(value)
        self._headers.append(list(headers) if headers else None)
        size = (len(key) if key else 0) + (len(value) if value else 0)
        self._bytes += size
        self.value_bytes += size
        self.records += 1
        self.last = record.offset
        if self.min_time_ms is None or time_ms < self.min_time_ms:
            self.min_time_ms = time_ms
        if self.max_time_ms is None or time_ms > self.max_time_ms:
            self.max_time_ms = time_ms

    @property
    def full(self) -> bool:
        """Whether a row group is together."""
        return len(self._offsets) >= GROUP_RECORDS or self._bytes >= GROUP_BYTES

    def flush(self) -> None:
        """Write what is together as a row group."""
        if not self._offsets:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = _schema()
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._local,
                schema,
                compression="zstd",
                compression_level=LEVEL,
                use_dictionary=["key"],
                column_encoding={"offset": "DELTA_BINARY_PACKED", "kafka_time": "DELTA_BINARY_PACKED"},
                # Of values they would be a copy of two of them.
                write_statistics=["offset", "kafka_time", "key"],
                write_page_checksum=True,
                # One row group is read as a whole: pages of it need not be small.
                data_page_size=PAGE_BYTES,
            )
        arrays = [
            _numbers(self._offsets, schema.field("offset").type),
            _numbers(self._times, schema.field("kafka_time").type),
            _bytes(self._keys, pa.binary()),
            _bytes(self._values, pa.binary()),
            _header_lists(self._headers, schema.field("headers").type),
        ]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=GROUP_RECORDS)
        self._offsets, self._times, self._keys, self._values, self._headers = [], [], [], [], []
        self._bytes = 0

    def close(self, next_: int) -> tuple[str, int]:
        """End the file, which covers offsets to before `next_`; its SHA-256 and its bytes. There is a record in it."""
        self.flush()
        about = {**self._about, "version": VERSION, "next": next_, "records": self.records}
        self._writer.add_key_value_metadata({META.decode(): orjson.dumps(about, option=orjson.OPT_SORT_KEYS).decode()})
        self._writer.close()
        digest, total = hashlib.sha256(), 0
        with self._local.open("rb") as made:
            while block := made.read(BLOCK_BYTES):
                digest.update(block)
                total += len(block)
        return digest.hexdigest(), total

    def abandon(self) -> None:
        """Leave it; nothing is kept."""
        writer, self._writer = self._writer, None
        if writer is not None:
            # Why it is left is told already: a full disk, say, which the end of a file meets as well.
            with contextlib.suppress(Exception):
                writer.close()


class Reader:
    """Reads one file of the archive; to be closed.

    Args:
        files: where it is.
        path: below the URL.

    Raises:
        ArchiveError: it is not there, or is none of ours.
    """

    def __init__(self, files: Files, path: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._where = f"{files.url}: {path}"
        self._source = files.open(path)
        try:
            self._file = pq.ParquetFile(self._source, page_checksum_verification=True)
            self.about: dict[str, Any] = orjson.loads((self._file.metadata.metadata or {})[META])
        except (OSError, pa.ArrowException, KeyError, ValueError) as e:
            self._source.close()
            message = f"{self._where} is no file of the archive, or is damaged: {reason(e)}"
            raise ArchiveError(message) from None

    def close(self) -> None:
        """Close it."""
        self._source.close()

    def records(self, begin: int, end: int) -> Iterator[Sequence[ArchivedRecord]]:
        """Records from offset `begin` to before `end`, a row group at a time.

        Raises:
            ArchiveError: it is damaged.
        """
        for number in range(self._file.metadata.num_row_groups):
            low, high = self._span(number)
            if high < begin or low >= end:
                continue
            columns = [column.to_pylist() for column in self._group(number, _COLUMNS)]
            yield [record for record in _records(columns) if begin <= record.offset < end]

    def at(self, wanted: set[int]) -> dict[int, ArchivedRecord]:
        """Records by their offsets; those that are not in it are left out.

        Raises:
            ArchiveError: it is damaged.
        """
        import pyarrow as pa

        found: dict[int, ArchivedRecord] = {}
        for number in range(self._file.metadata.num_row_groups):
            low, high = self._span(number)
            mine = {offset for offset in wanted if low <= offset <= high}
            if not mine:
                continue
            columns = self._group(number, _COLUMNS)
            there = [n for n, offset in enumerate(columns[0].to_pylist()) if offset in mine]
            picked = [column.take(_numbers(there, pa.int64())).to_pylist() for column in columns]
            found.update({record.offset: record for record in _records(picked)})
        return found

    def since(self, time_ms: int) -> int | None:
        """The offset of the first record of a time or later; None where there is none.

        Raises:
            ArchiveError: it is damaged.
        """
        for number in range(self._file.metadata.num_row_groups):
            offsets, times = (column.to_pylist() for column in self._group(number, ["offset", "kafka_time"]))
            for offset, at in zip(offsets, times, strict=True):
                if at >= time_ms:
                    return int(offset)
        return None

    def offsets(self) -> Iterator[Sequence[int]]:
        """Every offset, a row group at a time.

        Raises:
            ArchiveError: it is damaged.
        """
        for number in range(self._file.metadata.num_row_groups):
            yield self._group(number, ["offset"])[0].to_pylist()

    def _span(self, number: int) -> tuple[int, int]:
        found = self._file.metadata.row_group(number).column(0).statistics
        return (found.min, found.max) if found is not None and found.has_min_max else (0, 2**63 - 1)

    def _group(self, number: int, names: Sequence[str]) -> list[Any]:
        import pyarrow as pa

        try:
            table = self._file.read_row_group(number, columns=list(names))
            # A time that Python's dates do not know is a number all the same.
            return [
                column.cast(pa.int64()) if name == "kafka_time" else column
                for name, column in zip(names, (table.column(name) for name in names), strict=True)
            ]
        except (OSError, pa.ArrowException) as e:
            message = f"{self._where} is damaged: {reason(e)}"
            raise ArchiveError(message) from None


def _records(columns: Sequence[Sequence[Any]]) -> Iterator[ArchivedRecord]:
    for offset, time_ms, key, value, headers in zip(*columns, strict=True):
        yield ArchivedRecord(offset, time_ms, key, value, _headers(headers))


def _headers(found: Sequence[Any] | None) -> tuple[tuple[str, bytes | None], ...]:
    return tuple((one["name"], one["value"]) for one in found) if found else ()


def verify(files: Files, segment: Segment, *, quick: bool = False) -> str:
    """What is wrong with a segment's file; empty where nothing is.

    Args:
        files: where it is.
        segment: what the index says of it.
        quick: only that it is there, with the bytes that it should have.
    """
    try:
        size = files.size(segment.path)
        if size is None:
            return "the file is not there"
        if size != segment.file_bytes:
            return f"the file has {size} bytes, and should have {segment.file_bytes}"
        if quick:
            return ""
        digest, _ = files.sha256(segment.path)
        if digest != segment.sha256:
            return f"the file's SHA-256 is {digest}, and should be {segment.sha256}"
        return _content(files, segment)
    except ArchiveError as e:
        return str(e)


def _content(files: Files, segment: Segment) -> str:
    reader = Reader(files, segment.path)
    try:
        count, last = 0, segment.first - 1
        for some in reader.offsets():
            for offset in some:
                if not last < offset < segment.next:
                    return f"offset {offset} stands behind {last} in a file of {segment.first} to {segment.next}"
                last = offset
            count += len(some)
        if count != segment.records:
            return f"the file has {count} records, and should have {segment.records}"
    finally:
        reader.close()
    return ""
