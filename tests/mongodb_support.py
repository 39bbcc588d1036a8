"""A server that speaks MongoDB's protocol, with change streams: mongo-java-server. It is not MongoDB's own server.

tests/mongodb/ReplicaSet.java says what is added to it. Jars come from Maven Central once per user; a JDK compiles the one class.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from preservarium.embedded.kafka import cache_directory, fetch_jars, find_java
from preservarium.embedded.service import Service, ServiceError, ServiceUnavailable, port_answers

FOLDER: Final = Path(__file__).with_name("mongodb")
COMPILE_S: Final = 60.0


class MongoStandIn(Service):
    """One process, one file; what it has acknowledged survives `kill` and `start`."""

    name = "mongodb"
    start_s = 30.0
    stop_s = 10.0

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        self.port = 0
        self._java = ""
        self._jars = Path()

    @property
    def url(self) -> str:
        """Of the server; append the database's name."""
        return f"mongodb://127.0.0.1:{self.port}/"

    def prepare(self) -> None:
        """Fetch, compile, and take a port."""
        self._java = find_java()
        compiler = shutil.which("javac", path=str(Path(self._java).parent)) or shutil.which("javac")
        if compiler is None:
            message = "no JDK that compiles the stand-in for MongoDB (Debian: apt install openjdk-17-jdk-headless)"
            raise ServiceUnavailable(message)
        self._jars = fetch_jars(
            FOLDER / "pom.xml", cache_directory("").with_name("test-mongodb-1.47.0"), "mongo-java-server"
        )
        self.port = self.remembered_port()
        classes = self.directory / "classes"
        if classes.exists():
            return
        done = subprocess.run(
            [compiler, "-d", str(classes), "-cp", f"{self._jars}/*", str(FOLDER / "ReplicaSet.java")],
            capture_output=True, text=True, timeout=COMPILE_S, check=False,
        )  # fmt: skip
        if done.returncode:
            raise ServiceError(done.stderr)

    def command(self) -> Sequence[str]:
        """The server."""
        return [
            self._java, "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
            # A question that waits for news holds its thread.
            "-Dio.netty.eventLoopThreads=16",
            "-cp", f"{self.directory}/classes:{self._jars}/*", "ReplicaSet", str(self.directory / "data.mv"), str(self.port),
        ]  # fmt: skip

    def healthy(self) -> bool:
        """Whether its port is open."""
        return port_answers(self.port)
