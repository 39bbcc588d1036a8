"""The files of a back-up: records of Kafka, and the manifest that says what belongs to it.

    manifest.json                          written last: a directory without it is no back-up
    postgres.dump                          pg_dump's custom format
    kafka/<topic>/<partition>.gz           records with their offsets
    changelogs/<table>/<partition>.gz      the newest value of each key
    clickhouse/<table>/<partition>.gz      rows in ClickHouse's format Native

A file of records is gzip over length-prefixed msgpack. Every file's size and SHA-256 stand in the manifest.
"""

import gzip
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Self

import msgspec

from preservarium.errors import PreservariumError

VERSION: Final = 1
MANIFEST: Final = "manifest.json"
POSTGRES: Final = "postgres.dump"
#: Between time and size: a back-up reads faster than this compresses anyway.
GZIP_LEVEL: Final = 1
#: Records that are read from a file in one go.
RECORDS_AT_ONCE: Final = 1_000
_LENGTH_BYTES: Final = 4


class BackupError(PreservariumError):
    """The back-up cannot be made, or is not one that can be restored."""


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """One record."""

    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()


class Span(msgspec.Struct, frozen=True):
    """Of a topic's partition, what was copied."""

    begin: int  #: offset from which on everything was copied
    end: int  #: offset after the last record
    records: int


class Position(msgspec.Struct, frozen=True):
    """Where a consumer group stands in a partition."""

    offset: int
    metadata: str = ""


class FileSum(msgspec.Struct, frozen=True):
    """What a file must be."""

    bytes: int
    sha256: str


class Manifest(msgspec.Struct):
    """What a back-up holds. Topics and groups are named without this system's prefix and group."""

    release: str
    #: RFC 3339, when the positions were taken: what came before is in the back-up
    taken_at: str
    #: topic -> partition
    topics: dict[str, dict[int, Span]] = {}
    #: table -> partition -> values
    changelogs: dict[str, dict[int, int]] = {}
    #: suffix of the group ("" for the shared one) -> topic -> partition
    groups: dict[str, dict[str, dict[int, Position]]] = {}
    #: sink -> topic -> partition -> next offset, as PostgreSQL's snapshot has it
    sinks: dict[str, dict[str, dict[int, int]]] = {}
    timescaledb: bool = False
    #: databases that were left out, because their own tools copy them
    without: list[str] = []
    #: table -> ids of its partitions
    clickhouse: dict[str, list[str]] = {}
    #: step -> seconds that it took
    seconds: dict[str, float] = {}
    files: dict[str, FileSum] = {}
    version: int = VERSION

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files.values())


class EntryWriter:
    """Appends records to a file, from any thread but one at a time; a context manager."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records = 0
        self._file = gzip.open(path, "wb", compresslevel=GZIP_LEVEL)  # noqa: SIM115  # closed by __exit__
        self._encode = msgspec.msgpack.Encoder().encode

    def add(self, entries: Iterable[Entry]) -> None:
        """Append."""
        for entry in entries:
            encoded = self._encode(entry)
            self._file.write(len(encoded).to_bytes(_LENGTH_BYTES, "big") + encoded)
            self.records += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_entries(path: Path) -> Iterator[list[Entry]]:
    """The records of a file, in its order, some at a time.

    Raises:
        BackupError: the file ends in the middle, or holds something else.
    """
    decode = msgspec.msgpack.Decoder(Entry).decode
    some: list[Entry] = []
    try:
        with gzip.open(path, "rb") as file:
            while head := file.read(_LENGTH_BYTES):
                size = int.from_bytes(head, "big")
                body = file.read(size)
                if len(head) != _LENGTH_BYTES or len(body) != size:
                    message = f"{path} ends in the middle of a record"
                    raise BackupError(message)
                some.append(decode(body))
                if len(some) == RECORDS_AT_ONCE:
                    yield some
                    some = []
    except (OSError, EOFError, msgspec.MsgspecError) as e:
        message = f"{path} is damaged: {e}"
        raise BackupError(message) from e
    if some:
        yield some


def topic_file(directory: Path, topic: str, partition: int) -> Path:
    """Where the records of a topic's partition are."""
    return directory / "kafka" / topic / f"{partition}.gz"


def changelog_file(directory: Path, table: str, partition: int) -> Path:
    """Where the values of a state table's partition are."""
    return directory / "changelogs" / table / f"{partition}.gz"


def clickhouse_file(directory: Path, table: str, partition: str) -> Path:
    """Where the rows of a partition of ClickHouse's are."""
    return directory / "clickhouse" / table / f"{partition}.gz"


def seal(directory: Path, manifest: Manifest) -> None:
    """Note every file, then write the manifest: from then on the directory is a back-up."""
    manifest.files = {
        str(path.relative_to(directory)): file_sum(path) for path in sorted(directory.rglob("*")) if path.is_file()
    }
    half = directory / f"{MANIFEST}.new"
    half.write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    half.rename(directory / MANIFEST)


def unseal(directory: Path) -> Manifest:
    """The manifest, once every file is what it says.

    Raises:
        BackupError: there is none, it is of another version, or a file is missing or another one.
    """
    path = directory / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        message = f"{directory} is no back-up, or one that was not finished: it has no {MANIFEST}"
        raise BackupError(message) from None
    except (OSError, msgspec.MsgspecError) as e:
        message = f"{path} cannot be read: {e}"
        raise BackupError(message) from e
    if manifest.version != VERSION:
        message = f"{directory} is a back-up of version {manifest.version}; this release reads version {VERSION}"
        raise BackupError(message)
    for name, expected in manifest.files.items():
        try:
            found = file_sum(directory / name)
        except OSError as e:
            message = f"{directory / name} cannot be read: {e.strerror}"
            raise BackupError(message) from e
        if found != expected:
            message = f"{directory / name} is not the file that the manifest names: it was damaged or exchanged"
            raise BackupError(message)
    return manifest


def file_sum(path: Path) -> FileSum:
    """Size and digest of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileSum(path.stat().st_size, digest)
