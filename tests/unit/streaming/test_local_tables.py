"""`faust reset` deletes what it says: the databases of workers that do not run, wherever they lie."""

import fcntl

import pytest

from preservarium.streaming import local_tables


def database(slot, name):
    path = slot / "v1" / "tables" / name
    path.mkdir(parents=True)
    (path / "CURRENT").touch()
    return path


@pytest.mark.parametrize("place", [".", "state", "volatile/state"])
def test_the_databases_of_one_table_are_deleted_and_counted(tmp_path, place):
    slot = tmp_path / place / "worker-0"
    gone = [database(slot, f"series_states-{n}.db") for n in range(3)]
    stay = [
        database(slot, "alarm_states-0.db"),
        database(slot, "series_states_more-0.db"),
        database(slot, "series_states-backups"),
    ]
    (line,) = local_tables.reset(tmp_path, "series_states")
    assert line.startswith(str(slot))
    assert "3 databases deleted" in line
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in stay)


def test_a_worker_that_runs_keeps_its_own(tmp_path):
    busy, idle = tmp_path / "worker-0", tmp_path / "worker-1"
    kept, gone = database(busy, "t-0.db"), database(idle, "t-0.db")
    with (busy / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = local_tables.reset(tmp_path, "t")
    assert "a worker runs there, nothing was deleted" in said[0]
    assert "1 databases deleted" in said[1]
    assert kept.exists()
    assert not gone.exists()


def test_where_nothing_is_it_says_so(tmp_path):
    assert local_tables.reset(tmp_path, "t") == [f"no database of t is in {tmp_path}, nothing was deleted"]


def test_what_faust_says_of_tables_stays_with_faust_s_log():
    """Hook: mode gives each class of services the logger of its module, unless it has one that no other class has."""
    assert local_tables.Table.logger.name.startswith("faust.")
