"""How far a database is: its files beside what was applied, and the running of their statements."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from preservarium.settings import Settings
from preservarium.stores.migrate.files import Layout, Migration, Store
from preservarium.stores.migrate.statements import MigrationError, Statement
from preservarium.waiting import one_line

Status = Literal["not_started", "in_progress", "completed", "not_needed"]


@dataclass(frozen=True, slots=True)
class FileState:
    """A migration file and what the database knows of it."""

    version: str
    file: str
    status: Status
    requires: str | None = None
    blocking: bool = False
    statements: int = 0
    applied_at: datetime | None = None
    duration_ms: int | None = None


@dataclass(slots=True)
class Report:
    """What a run found and did in one database."""

    store: Store
    layout: Layout | None = None  #: PostgreSQL: how measurements are laid out
    layout_remembered: bool = False  #: False: what a first migration would choose
    files: list[FileState] = field(default_factory=list)
    applied: list[str] = field(default_factory=list)  #: files applied by this run
    newer: list[str] = field(default_factory=list)  #: versions that the database has and this checkout does not

    @property
    def pending(self) -> list[FileState]:
        """Files that are still to be applied."""
        return [f for f in self.files if f.status in {"not_started", "in_progress"}]


@dataclass(frozen=True, slots=True)
class Applied:
    """What a database has recorded of a version."""

    checksum: str
    status: str
    applied_at: datetime | None
    duration_ms: int | None


def compare(
    store: Store, files: Sequence[Migration], applied: dict[str, Applied], layout: Layout | None, settings: Settings
) -> Report:
    """The state of every file.

    Raises:
        MigrationError: an applied file was edited, or a file is missing or new below one that was applied.
    """
    report = Report(store, layout)
    newest = max((v for v, a in applied.items() if a.status == "completed"), default="")
    known = {m.version for m in files}
    for version in sorted(applied.keys() - known):
        if files and version < files[-1].version:
            message = f"{store}: version {version} was applied and its file is missing"
            raise MigrationError(message)
        report.newer.append(version)
    for m in files:
        done = applied.get(m.version)
        status: Status = "not_started"
        if done is not None:
            # One that failed halfway may be mended and is run again from its start.
            if done.status == "completed" and done.checksum != m.checksum:
                message = f"{m.file}: was edited after it was applied; undo the edit and write a new migration"
                raise MigrationError(message)
            status = "completed" if done.status == "completed" else "in_progress"
        elif m.requires and layout and m.requires != layout:
            status = "not_needed"
        elif m.version < newest:
            message = f"{m.file}: newer versions (up to {newest}) were applied; give it a higher number"
            raise MigrationError(message)
        report.files.append(
            FileState(
                m.version,
                m.file,
                status,
                m.requires,
                m.blocking,
                len(m.statements(settings)),
                done.applied_at if done else None,
                done.duration_ms if done else None,
            )
        )
    return report


async def run(execute: Callable[[str], Awaitable[Any]], m: Migration, statements: Sequence[Statement]) -> None:
    """Run statements, one after the other.

    Raises:
        MigrationError: names file, statement and the database's error.
    """
    for s in statements:
        try:
            await execute(s.sql)
        except Exception as e:
            hint = getattr(e, "hint", None)
            message = f"{m.store}/{m.file}: statement {s.number} (line {s.line}): {one_line(e)}" + (
                f" (hint: {hint})" if hint else ""
            )
            raise MigrationError(message) from e
