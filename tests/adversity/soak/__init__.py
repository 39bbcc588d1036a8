"""Faults as data against the whole system, and a checker that knows what should be there afterwards.

| file | holds |
|---|---|
| `faults.py` | the kinds of faults, and the plan that a seed makes of them |
| `proxy.py` | a TCP proxy that cuts, delays, resets and swallows |
| `fleet.py` | devices that number their readings, and fall silent around the healing of a cut |
| `world.py` | Kafka, both stores, a mail server, workers, each behind proxies of its own |
| `inject.py` | carries a plan out, and measures how long it takes until all is well again |
| `expected.py` | what the stores should hold, computed from the raw topic alone; pure |
| `check.py` | what they do hold, beside it |
| `report.py` | docs/RELIABILITY.md's tables, made from the JSON of runs |
| `__main__.py` | `python -m soak`, which is `make soak` |
"""
