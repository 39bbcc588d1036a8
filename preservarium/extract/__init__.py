"""Tasks and employees out of databases that have no change feed, into the topics `task_events` and `employees`.

| file | what |
|---|---|
| source.py | what a source is, and what it gives |
| named.py | the tables and columns that the settings name |
| postgres.py | PostgreSQL: a watermark on (updated_at, id), woken by LISTEN/NOTIFY |
| mongo.py | MongoDB: change streams |
| ledger.py | what was sent: positions and the version of each row, in our PostgreSQL |
| service.py | one worker at a time reads, sends and records |
| status.py | how it stands, a look at the source, and having everything sent again: for the command |

docs/EXTRACT.md says how to use it, and what it does about each of a watermark's traps.

May import streaming, stores, the domain and the ground.
"""
