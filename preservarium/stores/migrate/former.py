"""The database of the service that this replaces: recognised, put out of the way of our names, and its readers brought over.

Its table `iot_measurements` becomes `iot_measurements_old`; ours of that name is a view with the same columns first. What may read and write the
old one may read and write the view, and views on the old one are made again on it. The rows stay where they are: `preservarium adopt` carries
them over (preservarium/stores/adoption.py). What has to be remembered meanwhile stands in `schema_facts`.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import structlog

from preservarium.stores.migrate.statements import MigrationError
from preservarium.waiting import one_line

log = structlog.get_logger(__name__)

TABLE: Final = "iot_measurements"
OLD_TABLE: Final = "iot_measurements_old"
#: Views of the old service's manual that have their like in ours, under the same name.
OURS: Final = ("recent_activity", "compression_stats", "measurement_chunks", "storage_jobs", "latest_measurements")
COLUMNS: Final = (
    "timestamp", "device_id", "connector_mode", "component_type", "pin_position", "value", "unit", "topic",
)  # fmt: skip
#: Name of the fact.
FACT: Final = "former service"


@dataclass(slots=True)
class View:
    """A view that read the old table."""

    name: str  #: quoted where it must be
    owner: str
    definition: str
    grants: list[str] = field(default_factory=list)  #: statements, `{name}` for the view's
    made_again: bool = True  #: False: one of ours has its name


@dataclass(slots=True)
class Former:
    """What was found of the old service."""

    table: str = OLD_TABLE
    hypertable: bool = False
    chunk_interval: str | None = (
        None  #: PostgreSQL's text of an interval, as are the next two; None: TimescaleDB's was not used
    )
    compress_after: str | None = None
    drop_after: str | None = None
    paused_jobs: list[int] = field(
        default_factory=list
    )  #: policies of the old table, which would drop what is not carried over yet
    grants: list[str] = field(default_factory=list)
    views: list[View] = field(default_factory=list)  #: in the order in which they can be made
    #: what reads the old table on, and must be made anew by hand: materialized views, continuous aggregates, and what stands on them
    left: list[str] = field(default_factory=list)
    restored: bool = False  #: grants and views are on our view


async def known(connection: Any) -> Former | None:
    """What was found of an old service by an earlier migration."""
    if not await connection.fetchval("SELECT to_regclass('schema_facts') IS NOT NULL"):
        return None
    text = await connection.fetchval("SELECT value FROM schema_facts WHERE name = $1", FACT)
    if text is None:
        return None
    found = json.loads(text)
    return Former(**{**found, "views": [View(**view) for view in found["views"]]})


async def recognised(connection: Any) -> bool:
    """Whether the old service's table stands where ours will be: a table, with its columns."""
    rows = await connection.fetch(
        "SELECT a.attname::text FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
        " WHERE c.oid = to_regclass($1) AND c.relkind IN ('r', 'p') AND c.relnamespace = current_schema()::regnamespace",
        TABLE,
    )
    return set(COLUMNS) <= {row[0] for row in rows}


async def put_aside(connection: Any) -> Former:
    """Rename the old table, remember who reads it, and stop its policies. One transaction.

    Raises:
        MigrationError: a name is taken, or something depends on it that cannot be brought over.
    """
    async with connection.transaction():
        await connection.execute("SET LOCAL lock_timeout = '60s'")
        if await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", OLD_TABLE):
            message = (
                f"{TABLE} is the old service's table, and {OLD_TABLE}, which it would become, exists: rename that one"
            )
            raise MigrationError(message)
        try:
            found = Former(grants=await _grants(connection, TABLE))
            await _read_policies(connection, found)
            await _read_views(connection, found)
            for view in reversed(found.views):
                await connection.execute(f"DROP VIEW {view.name}")
            await connection.execute(f"ALTER TABLE {TABLE} RENAME TO {OLD_TABLE}")
        except MigrationError:
            raise
        except Exception as e:
            message = f"the old service's table {TABLE} cannot be put aside: {one_line(e)}"
            raise MigrationError(message) from e
        await remember(connection, found)
    log.info("the old service's table was put aside", table=OLD_TABLE, action="run `preservarium adopt run`")
    return found


async def restore(connection: Any, found: Former) -> None:
    """Let in whoever was let in before, and make the views again. One transaction; `found` says so afterwards.

    Raises:
        MigrationError: a view cannot be made.
    """
    async with connection.transaction():
        for statement in found.grants:
            await connection.execute(statement.format(name=TABLE))
        for view in found.views:
            if not view.made_again:
                continue
            try:
                await connection.execute(f"CREATE VIEW {view.name} AS {view.definition}")
                await connection.execute(f"ALTER VIEW {view.name} OWNER TO {view.owner}")
                for statement in view.grants:
                    await connection.execute(statement.format(name=view.name))
            except Exception as e:
                message = (
                    f"the view {view.name}, which read the old service's table, cannot be made again: {one_line(e)}"
                )
                raise MigrationError(message) from e
        found.restored = True
        await remember(connection, found)


async def remember(connection: Any, found: Former) -> None:
    """Write what was found into `schema_facts`."""
    await connection.execute(
        "INSERT INTO schema_facts (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = excluded.value, set_at = now()",
        FACT,
        json.dumps(asdict(found)),
    )


async def _grants(connection: Any, name: str) -> list[str]:
    """Statements that let others do with `{name}` what they may do with this relation. Its owner may all, of the view, too."""
    rows = await connection.fetch(
        "SELECT DISTINCT x.privilege_type, x.is_grantable, CASE WHEN x.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(r.rolname) END"
        " FROM pg_class c CROSS JOIN LATERAL aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) AS x"
        " LEFT JOIN pg_roles r ON r.oid = x.grantee"
        " WHERE c.oid = $1::text::regclass AND x.privilege_type IN ('SELECT', 'INSERT') AND (x.grantee = 0 OR r.rolname <> current_user)"
        " ORDER BY 3, 1",
        name,
    )
    return [
        f"GRANT {right} ON {{name}} TO {who.replace('{', '{{').replace('}', '}}')}{' WITH GRANT OPTION' if again else ''}"
        for right, again, who in rows
    ]


async def _read_policies(connection: Any, found: Former) -> None:
    if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb')"):
        return
    row = await connection.fetchrow(
        "SELECT d.time_interval::text FROM timescaledb_information.dimensions d"
        " WHERE d.hypertable_schema = current_schema() AND d.hypertable_name = $1 AND d.dimension_number = 1",
        TABLE,
    )
    if row is None:
        return
    found.hypertable, found.chunk_interval = True, row[0]
    jobs = await connection.fetch(
        "SELECT job_id, proc_name::text, config ->> 'compress_after', config ->> 'drop_after' FROM timescaledb_information.jobs"
        " WHERE hypertable_schema = current_schema() AND hypertable_name = $1",
        TABLE,
    )
    for job_id, kind, compress_after, drop_after in jobs:
        if kind == "policy_compression":
            found.compress_after = compress_after
        elif kind == "policy_retention":
            found.drop_after = drop_after
        else:
            continue
        found.paused_jobs.append(job_id)
        await connection.execute("SELECT alter_job($1, scheduled => false)", job_id)


_READERS: Final = """
WITH RECURSIVE readers AS (
  SELECT to_regclass($1)::oid AS relation, 0 AS depth
  UNION
  SELECT w.ev_class, r.depth + 1 FROM readers r
  JOIN pg_depend d ON d.refobjid = r.relation AND d.refclassid = 'pg_class'::regclass AND d.classid = 'pg_rewrite'::regclass
  JOIN pg_rewrite w ON w.oid = d.objid
  WHERE w.ev_class <> r.relation AND r.depth < 100)
SELECT c.oid, c.oid::regclass::text AS name, c.relkind::text AS kind, quote_ident(pg_get_userbyid(c.relowner)) AS owner,
       pg_get_viewdef(c.oid) AS definition, c.relname::text AS plain, n.nspname = current_schema() AS here, max(r.depth) AS depth
FROM readers r JOIN pg_class c ON c.oid = r.relation JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE r.depth > 0 GROUP BY c.oid, n.nspname ORDER BY max(r.depth), c.oid"""
#: Views that other things stand on than plain views: those cannot be dropped and made again.
_HELD: Final = """
SELECT DISTINCT d.refobjid FROM pg_depend d JOIN pg_rewrite w ON w.oid = d.objid AND d.classid = 'pg_rewrite'::regclass
WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY ($1::oid[]) AND w.ev_class = ANY ($2::oid[]) AND w.ev_class <> d.refobjid"""


async def _read_views(connection: Any, found: Former) -> None:
    rows = await connection.fetch(_READERS, TABLE)
    aggregates: set[str] = set()
    if found.hypertable:
        named = await connection.fetch(
            "SELECT format('%I.%I', view_schema, view_name)::regclass::text, materialization_hypertable_schema FROM timescaledb_information.continuous_aggregates"
        )
        aggregates = {row[0] for row in named}
    stay = {
        r["oid"]
        for r in rows
        if r["kind"] != "v" or r["name"] in aggregates or r["name"].startswith("_timescaledb_internal.")
    }
    for _ in rows:
        held = {r[0] for r in await connection.fetch(_HELD, [r["oid"] for r in rows], list(stay))}
        if held <= stay:
            break
        stay |= held
    for r in rows:
        if r["oid"] in stay:
            if not r["name"].startswith("_timescaledb_internal."):
                found.left.append(r["name"])
            continue
        ours = r["here"] and r["plain"] in OURS
        found.views.append(
            View(r["name"], r["owner"], r["definition"], await _grants(connection, r["name"]), made_again=not ours)
        )
    taken = await connection.fetch(
        "SELECT c.relname::text FROM pg_class c WHERE c.relnamespace = current_schema()::regnamespace AND c.relname = ANY ($1::text[])"
        " AND c.relkind = 'v' AND NOT c.oid = ANY ($2::oid[])",
        list(OURS),
        [r["oid"] for r in rows],
    )
    # A view of that name which reads something else: it keeps its definition, not its name.
    for (name,) in taken:
        await connection.execute(f"ALTER VIEW {name} RENAME TO {name}_old")
        found.left.append(f"{name}_old")
