"""Migration files: read, ordered, and checked against the rules of migrations/README.md."""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from preservarium.settings import Settings
from preservarium.stores.migrate.statements import MigrationError, Statement, split, substitute

#: Top-level folder of the checkout: the application is run from it and no wheel carries the files.
MIGRATIONS: Final = Path(__file__).resolve().parents[3] / "migrations"

Store = Literal["postgres", "clickhouse"]
Layout = Literal["timescaledb", "plain"]

_FILE_NAME: Final = re.compile(
    r"(?P<version>\d{4}[a-z]?)_(?:(?P<phase>pre|post)_)?(?P<what>[a-z0-9]+(?:_[a-z0-9]+)*)\.sql"
)
_HEADER: Final = re.compile(r"--\s*(requires:\s*(?P<requires>\S+)|(?P<flag>no-transaction|blocking))\s*$")


@dataclass(frozen=True, slots=True)
class Migration:
    """A migration file."""

    store: Store
    version: str  #: four digits and an optional letter; sorts in the order of application
    file: str  #: name without folder
    phase: Literal["", "pre", "post"]  #: before or after the new code runs
    text: str
    checksum: str  #: SHA-256 of the text with LF line ends, hexadecimal
    requires: Layout | None  #: None: needed in every layout
    transactional: bool
    blocking: bool  #: takes strong locks on tables that may be large

    def statements(self, settings: Settings) -> list[Statement]:
        """The statements with settings put in.

        Raises:
            MigrationError: a placeholder names no setting, or a secret, or its value has unsafe characters.
        """
        found = split(self.text, backslash_escapes=self.store == "clickhouse")
        return [replace(s, sql=substitute(s.sql, settings, f"{self.file}: statement {s.number}")) for s in found]


def parse_file(store: Store, path: Path) -> Migration:
    """Read one migration file.

    Raises:
        MigrationError: its name or a header line is not what migrations/README.md says.
    """
    name = _FILE_NAME.fullmatch(path.name)
    if name is None:
        message = f"{path.name}: a migration is named NNNN[a]_[pre_|post_]what.sql, lower case"
        raise MigrationError(message)
    text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
    requires: Layout | None = None
    flags: set[str] = set()
    for line in text.splitlines():
        if line.strip() and not line.startswith("--"):
            break
        header = _HEADER.fullmatch(line.strip())
        if header is None:
            continue
        if header["flag"]:
            flags.add(header["flag"])
        elif header["requires"] == "timescaledb":
            requires = "timescaledb"
        elif header["requires"] == "plain":
            requires = "plain"
        else:
            message = f"{path.name}: `requires: {header['requires']}` is neither timescaledb nor plain"
            raise MigrationError(message)
    phase: Literal["", "pre", "post"] = "pre" if name["phase"] == "pre" else "post" if name["phase"] == "post" else ""
    return Migration(
        store=store,
        version=name["version"],
        file=path.name,
        phase=phase,
        text=text,
        checksum=hashlib.sha256(text.encode()).hexdigest(),
        requires=requires,
        transactional="no-transaction" not in flags,
        blocking="blocking" in flags,
    )


def load_files(store: Store, directory: Path = MIGRATIONS) -> list[Migration]:
    """The migrations of one database in the order of application.

    Raises:
        MigrationError: a file is misnamed, or two have the same version.
    """
    found = [parse_file(store, path) for path in sorted((directory / store).glob("*")) if path.name != "README.md"]
    by_version: dict[str, Migration] = {}
    for migration in found:
        other = by_version.setdefault(migration.version, migration)
        if other is not migration:
            message = f"{migration.file}: version {migration.version} is taken by {other.file}"
            raise MigrationError(message)
    return sorted(found, key=lambda m: m.version)


_IDEMPOTENT: Final = re.compile(
    r"(?is)^(create\s+or\s+replace\b|.*\bif\s+(not\s+)?exists\b|insert\s+into\b.*\bon\s+conflict\b|grant\b|comment\s+on\b"
    r"|alter\s+table\s+.*\b(modify|reset|materialize)\s+(ttl|setting|comment|column)\b|alter\s+.*\bset\s*\(|select\b|call\b|do\b|analyze\b)"
)


def lint(migration: Migration, settings: Settings) -> list[str]:
    """What is wrong with a file by the rules of migrations/README.md; empty where nothing is."""
    faults: list[str] = []
    try:
        statements = migration.statements(settings)
    except MigrationError as e:
        return [str(e)]
    if not statements:
        faults.append("has no statement")
    if migration.store == "clickhouse" and migration.requires:
        faults.append("`requires` is for PostgreSQL")
    repeatable = migration.store == "clickhouse" or not migration.transactional
    for s in statements:
        where = f"statement {s.number} (line {s.line})"
        first = s.sql.split(None, 1)[0].lower()
        if first in {"begin", "commit", "rollback", "start"}:
            faults.append(f"{where}: the runner opens and closes the transaction")
        if re.search(r"(?i)\bconcurrently\b", s.sql) and migration.transactional:
            faults.append(f"{where}: CONCURRENTLY needs `-- no-transaction`")
        if migration.store == "clickhouse" and re.search(r"(?i)replicated_deduplication_window", _raw(migration, s)):
            faults.append(f"{where}: a cluster has other names for it: {{{{clickhouse.dedup_window}}}}")
        if repeatable and not _IDEMPOTENT.match(s.sql):
            faults.append(f"{where}: a step without transaction may run twice: IF [NOT] EXISTS or OR REPLACE")
    return faults


def _raw(migration: Migration, statement: Statement) -> str:
    """A statement as it stands in its file, without settings."""
    return split(migration.text, backslash_escapes=migration.store == "clickhouse")[statement.number - 1].sql
