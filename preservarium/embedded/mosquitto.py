"""The Mosquitto MQTT broker, where it is installed on the machine: for tests and trials of the MQTT connector."""

import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from preservarium.embedded.service import Service, ServiceUnavailable

#: Debian puts it where only root's PATH looks.
PLACES: Final = ("/usr/sbin", "/usr/local/sbin", "/usr/bin", "/usr/local/bin", "/opt/homebrew/sbin")

CONFIG: Final = """\
listener {port} 127.0.0.1
allow_anonymous true
persistence true
persistence_location {directory}/
persistence_file mosquitto.db
# Sessions and queued messages survive a kill, too, up to the last second.
autosave_interval 1
max_queued_messages 0
max_inflight_messages 1000
log_dest stderr
log_type error
log_type warning
log_type notice
connection_messages false
"""

CONNECT: Final = bytes.fromhex("100f00044d5154540402000500036d6f6e")  # MQTT 3.1.1, clean session, keep-alive 5 s, "mon"


class Mosquitto(Service):
    """A broker that lets everyone in, on loopback."""

    name = "mosquitto"
    start_s = 10.0
    stop_s = 5.0

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        self.port = 0
        self._program = ""

    @property
    def url(self) -> str:
        """mqtt://host:port, as `mqtt.url` takes it."""
        return f"mqtt://127.0.0.1:{self.port}"

    def prepare(self) -> None:
        """Find the program and write its configuration."""
        path = os.pathsep.join((os.environ.get("PATH", ""), *PLACES))
        program = shutil.which("mosquitto", path=path)
        if program is None:
            message = "Mosquitto is not installed (Debian: apt install mosquitto)"
            raise ServiceUnavailable(message)
        self._program = program
        self.port = self.remembered_port()
        text = self.configuration()
        if os.geteuid() == 0:
            # It would change to a user of its own that may not write here.
            text += "user root\n"
        (self.directory / "mosquitto.conf").write_text(text, encoding="utf-8")

    def configuration(self) -> str:
        """Text of mosquitto.conf; a subclass may append a listener."""
        return CONFIG.format(port=self.port, directory=self.directory)

    def command(self) -> Sequence[str]:
        """The broker in the foreground."""
        return [self._program, "-c", str(self.directory / "mosquitto.conf")]

    def healthy(self) -> bool:
        """Whether the broker accepts a session."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as s:
                s.sendall(CONNECT)
                answer = s.recv(4)
        except OSError:
            return False
        return len(answer) == 4 and answer[0] == 0x20 and answer[3] == 0
