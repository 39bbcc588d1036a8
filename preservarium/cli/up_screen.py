"""What `preservarium up` shows: lines that stay, one line that changes, and the addresses."""

from time import monotonic
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from preservarium.embedded.running import Running
    from preservarium.embedded.supervise import Standing
    from preservarium.operations.accounting_live import Count

#: Elsewhere than on a terminal the changing line comes this often.
PLAIN_LINE_S: Final = 5.0
#: Names of the stores as people write them.
STORES: Final = {"postgres": "PostgreSQL", "clickhouse": "ClickHouse"}


class Screen:
    """Lines for people, and one line that changes: on a terminal in its place, elsewhere now and then."""

    def __init__(self, *, to_stderr: bool) -> None:
        from rich.console import Console

        self._console = Console(stderr=to_stderr, highlight=False)
        self._live: Any = None
        self._shown_s = 0.0

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False, soft_wrap=True)

    def change(self, line: str) -> None:
        """The line that changes."""
        if self._console.is_terminal:
            from rich.live import Live
            from rich.text import Text

            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=4)
                self._live.start()
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
        elif monotonic() - self._shown_s >= PLAIN_LINE_S:
            self._shown_s = monotonic()
            self.say(line)

    def close(self) -> None:
        """Leave the changing line as it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def progress_line(seconds: float, count: "Count", workers: "Standing") -> str:
    """How a run goes, in the words and with the numbers of the accounting at its end."""
    stored = "".join(f"  {STORES.get(s, s)} {n:,}" for s, n in sorted(count.stored.items(), reverse=True))
    lag = f"{workers.lag:,}" if workers.alive else "–"
    return (
        f"{seconds:5.0f} s  messages {count.messages:,}  standardized {count.standardized:,}  validated {count.validated:,}"
        f"{stored}  errors {count.errors:,}  lag {lag}  worker {workers.rss_bytes / 2**20:.0f} MiB"
    )


def address_lines(note: "Running", where: str, mail: str, program: str) -> list[str]:
    """Every door of a system that runs, one a line.

    Args:
        note: what it says of itself.
        where: its data directory, for people.
        mail: the directory where mail lies; "" where a mail server has it.
        program: how the command line is called here.
    """
    at = note.addresses
    doors = [("Console", note.web), ("Readings", f"POST {note.web}/ingest"), ("Kafka", at["kafka"])]
    doors.append(("PostgreSQL", f"{at['postgres']}   ({program} db postgres)"))
    if "clickhouse" in at:
        doors.append(("ClickHouse", f"{at['clickhouse']}   ({program} db clickhouse)"))
    if "mqtt" in at:
        doors.append(("MQTT", f"mqtt://{at['mqtt']}   (devices/<address>/up)"))
    if mail:
        doors.append(("Mail", f"{mail}   (notices, a file each)"))
    width = max(len(name) for name, _ in doors) + 1
    return [
        *(f"{name + ':':<{width}} {door}" for name, door in doors),
        "",
        f"Commands in another shell use this system by themselves, by the note in {where}: {program} doctor",
    ]
