"""Parsers: one payload format a file (field tables: a folder), one contract (`base`), one list of kinds (`kinds`).

A kind that runs scripts has no decoder here: scripts run in killable processes outside the domain
(`preservarium/sandbox/`); `scripts` has the two pure ends of such a call.

May import the domain and `preservarium.errors`.
"""
