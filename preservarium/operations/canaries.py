"""Starting canaries: what is to be shown to a share of the devices, checked before anybody sees it."""

import asyncio
from pathlib import Path
from typing import Any

from preservarium.domain.canary import CanaryDoc, LimitsDoc
from preservarium.domain.decoders.kinds import compile_any
from preservarium.errors import Reject
from preservarium.registry.file import read
from preservarium.stores import canaries, registry
from preservarium.stores.canaries import CanaryError


async def start_parser(
    connection: Any, named: str, percent: int, limits: LimitsDoc, *, actor: str, reason: str, at_us: int
) -> CanaryDoc:
    """Start a canary of a parser's version that the registry has, as a draft.

    Args:
        connection: of asyncpg.
        named: name@version.
        percent: of the devices that the parser reads.
        limits: when it is rolled back, or goes on.
        actor: who.
        reason: why.
        at_us: when, µs since the epoch, UTC.

    Raises:
        CanaryError: there is no such version, it is in force, or it cannot be compiled.
    """
    name, _, version = named.rpartition("@")
    if not name or not (version.isascii() and version.isdigit() and len(version) < 10):
        message = f"{named!r} is not NAME@VERSION of a parser"
        raise CanaryError(message)
    parsers = (await registry.load(connection, ["parser"]))["parser"]
    found = parsers.get(f"parser/{name}@{int(version)}")
    if found is None:
        message = f"the registry has no {name}@{int(version)}: apply it with `status: draft` first"
        raise CanaryError(message)
    if found.document["status"] == "active":
        message = f"{named} is in force already"
        raise CanaryError(message)
    if not any(p.document["name"] == name and p.document["status"] == "active" for p in parsers.values()):
        message = f"no version of {name} is in force: there is nothing to run beside it"
        raise CanaryError(message)
    candidate = {**found.document, "status": "active", "rev": found.rev}
    try:
        compile_any(candidate, {})
    except Reject as e:
        message = f"{named} cannot be used: {e}"
        raise CanaryError(message) from None
    return await canaries.start(
        connection, "parser", name, candidate, percent, limits, actor=actor, reason=reason, at_us=at_us
    )


async def start_datatype(
    connection: Any, path: Path, percent: int, limits: LimitsDoc, *, actor: str, reason: str, at_us: int
) -> CanaryDoc:
    """Start a canary of a datatype's new bounds.

    Args:
        connection: of asyncpg.
        path: a registry file that changes this one datatype, and nothing else.
        percent: of the devices.
        limits: when it is rolled back, or goes on.
        actor: who.
        reason: why.
        at_us: when, µs since the epoch, UTC.

    Raises:
        RegistryFileError: the file is wrong.
        CanaryError: it changes nothing, or something else.
    """
    file = await asyncio.to_thread(read, path)
    file.raise_for_errors()
    plan = await registry.plan(connection, file)
    if len(plan.changes) != 1 or plan.changes[0].kind != "datatype" or plan.changes[0].action != "change":
        said = ", ".join(f"{c.action} {c.stream}" for c in plan.changes[:5]) or "nothing"
        message = f"{path}: a canary changes one datatype; this file would {said}"
        raise CanaryError(message)
    change = plan.changes[0]
    assert change.before is not None
    assert change.after is not None
    for field in ("kind", "unit"):
        if change.before.get(field) != change.after.get(field):
            message = f"{change.name}: its {field} is of all devices alike, and cannot be tried on a share"
            raise CanaryError(message)
    candidate = {**change.after, "rev": 0}
    return await canaries.start(
        connection, "datatype", change.name, candidate, percent, limits, actor=actor, reason=reason, at_us=at_us
    )
