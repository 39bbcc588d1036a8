"""State tables: declarations only. A stage names the one that is its state, and the app lets nobody else write it.

Run from a checkout or an editable install; no wheel carries this name.
"""

from pathlib import Path

if not (Path(__file__).parent.parent / "preservarium").is_dir():
    # PyTables installs a package of the same name.
    raise ImportError(f"this is not Preservarium's package `tables`: {__file__}")  # noqa: EM102
