"""Back-up and restore of the whole system: what is the truth, in which order it is copied, what is made anew.

docs/decisions/0009-backup.md says why. `create` copies beside running workers, `restore` fills empty servers; `files` is what lies
in between, `kafka` reads topics and groups, `databases` runs the databases' own tools.

May import what operations may.
"""
