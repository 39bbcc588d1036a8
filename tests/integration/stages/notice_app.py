"""The app itself, for tests/integration/stages/test_notices.py: PRESERVARIUM_AGENTS__ENABLED says which of its agents run."""

from preservarium import app

__all__ = ["app"]
