"""Where a machine's workers keep their tables, and deleting them: what `faust -A preservarium reset` does.

Faust's own would look in `data_dir` itself. Workers share it, each in a directory of its own, and those of `preservarium up`
have theirs in its `state`.
"""

import fcntl
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click
import faust

#: Beneath `data_dir`, before `worker-N`.
PLACES: Final = (".", "state", "volatile/state")


def slots(data_dir: Path) -> Iterator[Path]:
    """The directories of this machine's workers, in a data directory."""
    for place in PLACES:
        yield from sorted((data_dir / place).glob("worker-[0-9]*"))


def reset(data_dir: Path, table: str) -> list[str]:
    """Delete the local databases of a table, of every worker that does not run; what was done, a line each."""
    said: list[str] = []
    for slot in slots(data_dir):
        found = sorted(path for path in slot.glob(f"v*/tables/{table}-[0-9]*.db") if path.is_dir())
        if not found:
            continue
        with (slot / "lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                said.append(f"{slot}: a worker runs there, nothing was deleted: stop it first")
                continue
            for path in found:
                shutil.rmtree(path)
        said.append(f"{slot}: {len(found)} databases deleted; the worker restores them from Kafka")
    return said or [f"no database of {table} is in {data_dir.absolute()}, nothing was deleted"]


class Table(faust.Table):  # type: ignore[misc]  # faust has no types
    """Faust's table, whose local state is found where our workers keep it."""

    #: What Faust's base class says of starting and stopping goes with the rest of Faust's log.
    logger = logging.getLogger("faust.tables")

    def reset_state(self) -> None:
        """Delete the local databases, and say which; called by `faust reset` alone."""
        app: Any = self.app
        if app._datadir_given:
            super().reset_state()  # --datadir names one directory, and that one is meant
            return
        for line in reset(Path(app.live().data_dir), str(self.name)):
            click.echo(f"  {line}")
