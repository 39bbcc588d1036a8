"""Logging: structlog for us, the standard library's for Faust and aiokafka, one format for both.

A log line is a constant event name with fields. Nothing is logged per record. WARNING: nothing is lost; ERROR: something
is lost or needs a human.
"""

import logging
import logging.config
import sys
import time
from typing import Any, Final

import structlog

#: These talk of every connection, service and flush at INFO.
_QUIET: Final = {
    "aiokafka": "WARNING",
    "faust": "WARNING",
    "mode": "WARNING",
    "aiohttp.access": "WARNING",
}

#: A library's message that repeats is written once in this time: an outage must not fill the disk.
REPEAT_S: Final = 60.0
#: Messages that are remembered for that; more than a broker's failure has kinds of.
REPEATS_MAX: Final = 1_000


class Repeats(logging.Filter):
    """Lets the same message of a chatty library through once in `REPEAT_S`."""

    def __init__(self, prefix: str = "aiokafka") -> None:
        super().__init__()
        self._prefix = prefix
        self._written_s: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        if not record.name.startswith(self._prefix):
            return True
        key = record.name, record.getMessage()
        now_s = time.monotonic()
        last_s = self._written_s.get(key)
        if last_s is not None and now_s - last_s < REPEAT_S:
            return False
        if len(self._written_s) >= REPEATS_MAX:
            self._written_s.clear()
        self._written_s[key] = now_s
        return True


_SHARED: Final[list[Any]] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def config(level: str, form: str) -> dict[str, Any]:
    """A `logging.config.dictConfig` dictionary.

    Args:
        level: least severe level that is logged.
        form: `console`, `json`, or `auto`: console on a terminal, JSON elsewhere.
    """
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    renderer: list[Any] = (
        # Plain tracebacks: those with local variables take a second each, and show payloads and passwords.
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "preservarium": {
                "()": structlog.stdlib.ProcessorFormatter,
                "processors": [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
                # What Faust says is made for columns: %-formatted and padded.
                "foreign_pre_chain": [*_SHARED, structlog.stdlib.ExtraAdder()],
            }
        },
        "filters": {"repeats": {"()": Repeats}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "preservarium", "filters": ["repeats"]}},
        "root": {"level": level, "handlers": ["stderr"]},
        "loggers": {name: {"level": max(level, quiet, key=_severity)} for name, quiet in _QUIET.items()},
    }


def configure(level: str = "INFO", form: str = "auto") -> None:
    """Set logging up for the process: structlog and the standard library."""
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_SHARED,
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    logging.config.dictConfig(config(level, form))


def set_level(level: str) -> None:
    """Change the level of a running process."""
    logging.getLogger().setLevel(level)
    for name, quiet in _QUIET.items():
        logging.getLogger(name).setLevel(max(level, quiet, key=_severity))


def _severity(name: str) -> int:
    return logging.getLevelNamesMapping()[name]
