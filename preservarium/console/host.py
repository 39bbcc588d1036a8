"""What every view of the console needs of the app."""

from typing import Protocol

from preservarium.clock import Clock
from preservarium.settings import LiveSettings


class Host(Protocol):
    """The app, as far as all views look at it."""

    @property
    def live(self) -> LiveSettings:
        """The settings in force."""
        ...

    @property
    def clock(self) -> Clock:
        """The worker's clock."""
        ...
