"""What the settings name of a source: its tables or collections, and which of their columns hold which field."""

from collections.abc import Callable, Sequence

from preservarium.errors import PreservariumError
from preservarium.extract.source import Table
from preservarium.settings import Settings


class SourceError(PreservariumError):
    """The source cannot be read as the settings say: a missing table, column, right or feature."""


def mapping(text: str) -> dict[str, str]:
    """`field=column, …` as a mapping.

    Raises:
        SourceError: it is not of that form.
    """
    found: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, separator, column = (p.strip() for p in part.partition("="))
        if not separator or not name or not column:
            message = f"{part!r} is not of the form field=column"
            raise SourceError(message)
        found[name] = column
    return found


class NamedTables:
    """What every source takes from the settings (`extract`).

    Args:
        settings: asked each time.
    """

    def __init__(self, settings: Callable[[], Settings]) -> None:
        self._settings = settings

    @property
    def tables(self) -> Sequence[Table]:
        """What the settings name."""
        s = self._settings().extract
        return [t for t, name in (("employees", s.employees_table), ("tasks", s.tasks_table)) if name]  # type: ignore[misc]

    def _name(self, table: Table) -> str:
        s = self._settings().extract
        return s.tasks_table if table == "tasks" else s.employees_table

    def _mapped(self, table: Table) -> dict[str, str]:
        """Field -> column, where it has another name.

        Raises:
            SourceError: the setting cannot be read.
        """
        s = self._settings().extract
        return mapping(s.tasks_columns if table == "tasks" else s.employees_columns)
