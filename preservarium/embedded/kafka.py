"""Apache Kafka on one machine: KRaft, one node, the real broker from Maven Central.

What wins, in this order: a broker given by URL (then nothing is started), `KAFKA_HOME`, the jars that the pinned
`kafka-pom.xml` names (Maven resolves and verifies them once per user), and where Java or Maven is missing librdkafka's
in-memory broker, which forgets everything when it stops. docs/decisions/0001-kafka-version.md says why this version.
"""

import fcntl
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final

from preservarium.embedded.service import Interrupted, Service, ServiceError, ServiceUnavailable, port_answers, run_tool

POM: Final = Path(__file__).with_name("kafka-pom.xml")
JAVA_MIN: Final = 17  #: Kafka 4 brokers are compiled for it
#: One node and a handful of clients: the heap that a broker needs for that, an eighth of the default.
HEAP: Final = ("-Xms128m", "-Xmx512m")
MAVEN_S: Final = 600.0  #: 45 MB of jars over a slow line

PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={directory}/data
# Topics are made by `preservarium migrate` with the declared settings, never by a typo.
auto.create.topics.enable=false
num.partitions=12
default.replication.factor=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
# A group of one or two workers gains nothing from waiting for more members.
group.initial.rebalance.delay.ms=0
# After a kill -9 the controller waits until the lost broker's session has ended before it lets the new one in: the
# default of 9 s is most of such a start. Shorter than this, a busy machine would lose its broker for no reason.
broker.session.timeout.ms=4000
broker.heartbeat.interval.ms=1000
num.network.threads=2
num.io.threads=4
# Some 400 partitions are read at a start and flushed at a stop, each of which waits for the disk: at the same time.
num.recovery.threads.per.data.dir=4
background.threads=4
log.cleaner.threads=1
log.cleaner.dedupe.buffer.size=16777216
# Every partition preallocates its index files at this size.
log.index.size.max.bytes=1048576
"""

LOG4J = """\
status = error
appender.file.type = RollingFile
appender.file.name = file
appender.file.fileName = {directory}/server.log
appender.file.filePattern = {directory}/server.log.%i
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = [%d] %p %m (%c)%n
appender.file.policies.type = Policies
appender.file.policies.size.type = SizeBasedTriggeringPolicy
appender.file.policies.size.size = 10MB
appender.file.strategy.type = DefaultRolloverStrategy
appender.file.strategy.max = 2
# What a start has come to is said at this level, and a start that says nothing is given up (embedded/service.py).
rootLogger.level = info
rootLogger.appenderRef.file.ref = file
"""


@cache
def java_version(java: str) -> int | None:
    """The major version of this Java, or None where it does not run."""
    try:
        said = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=False).stderr
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r'version "(\d+)(?:\.(\d+))?', said)
    return None if found is None else int(found[2] if found[1] == "1" and found[2] else found[1])


def find_java() -> str:
    """A Java that Kafka runs on.

    Raises:
        ServiceUnavailable: none is installed, or it is too old.
    """
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    version = java_version(java) if java else None
    if java is None or version is None:
        message = f"Java {JAVA_MIN} or newer is not installed (Debian: apt install openjdk-17-jre-headless)"
        raise ServiceUnavailable(message)
    if version < JAVA_MIN:
        message = f"Kafka needs Java {JAVA_MIN} or newer; {java} is {version}"
        raise ServiceUnavailable(message)
    return java


def pinned_version() -> str:
    """The Kafka version that the pom names."""
    found = re.search(r"<kafka\.version>([^<]+)</kafka\.version>", POM.read_text(encoding="utf-8"))
    assert found is not None, "kafka-pom.xml names the version"
    return found[1]


def cache_directory(version: str) -> Path:
    """Where the jars of this version are kept for this user."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "preservarium" / f"kafka-{version}"


def resolve_jars(version: str | None = None, *, interrupted: threading.Event | None = None) -> Path:
    """The directory with the broker's jars; fetched by Maven on first use, checksums verified.

    Raises:
        ServiceUnavailable: there is no `KAFKA_HOME`, no cached jars and no Maven.
        ServiceError: Maven failed.
    """
    if home := os.environ.get("KAFKA_HOME"):
        libs = Path(home) / "libs"
        if not any(libs.glob("kafka_*.jar")):
            message = f"KAFKA_HOME={home} has no libs/kafka_*.jar"
            raise ServiceError(message)
        return libs
    version = version or pinned_version()
    return fetch_jars(
        POM,
        cache_directory(version),
        f"Kafka {version}",
        f"-Dkafka.version={version}",
        advice="; or set KAFKA_HOME",
        interrupted=interrupted,
    )


def fetch_jars(
    pom: Path, target: Path, what: str, *options: str, advice: str = "", interrupted: threading.Event | None = None
) -> Path:
    """The directory in `target` with the jars that a pom names; fetched by Maven on first use, checksums verified.

    Raises:
        ServiceUnavailable: there are no cached jars and no Maven.
        Interrupted: `interrupted` was set meanwhile.
        ServiceError: Maven failed.
    """
    if (target / "complete").exists():
        return target / "lib"
    maven = shutil.which("mvn")
    if maven is None:
        message = f"Maven is not installed, and it fetches the jars of {what} (Debian: apt install maven){advice}"
        raise ServiceUnavailable(message)
    target.mkdir(parents=True, exist_ok=True)
    with (target / "lock").open("w") as lock:
        _hold(lock.fileno(), what, interrupted)
        # Another first start may have fetched them meanwhile; its broker runs on them by now.
        if not (target / "complete").exists():
            _fetch(maven, pom, target, what, options, interrupted)
    return target / "lib"


def _hold(lock: int, what: str, interrupted: threading.Event | None) -> None:
    """Wait for a lock of the file system; it is given back when its file is closed, or its process has died."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if interrupted is not None and interrupted.is_set():
                raise Interrupted(what) from None
            time.sleep(0.1)
        else:
            return


def _fetch(
    maven: str, pom: Path, target: Path, what: str, options: Sequence[str], interrupted: threading.Event | None
) -> None:
    for left in ("lib", "fetch"):
        shutil.rmtree(target / left, ignore_errors=True)
    own = target / "fetch"
    own.mkdir()
    shutil.copy(pom, own / "pom.xml")
    try:
        done = run_tool(
            f"Maven, for {what}",
            [
                maven,
                "-q",
                "-B",
                "--strict-checksums",
                *options,
                "dependency:copy-dependencies",
                "-DincludeScope=runtime",
                "-DoutputDirectory=lib",
            ],
            # Without a terminal of its own Maven neither asks nor colours.
            cwd=own,
            timeout_s=MAVEN_S,
            interrupted=interrupted,
        )
        if done.returncode != 0 or not any((own / "lib").glob("*.jar")):
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
            message = f"Maven could not fetch {what}:\n{tail}"
            raise ServiceError(message)
        (own / "lib").rename(target / "lib")
        (target / "complete").touch()
    finally:
        shutil.rmtree(own, ignore_errors=True)


def speaks_kafka(host: str, port: int, timeout_s: float = 2.0) -> bool:
    """Whether a broker answers an ApiVersions request: an open port alone does not say that it serves."""
    client = b"preservarium"
    # ApiVersions v0: length, key 18, version 0, correlation id, client id.
    body = struct.pack(">hhih", 18, 0, 1, len(client)) + client
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as s:
            s.sendall(struct.pack(">i", len(body)) + body)
            head = s.recv(8)
    except OSError:
        return False
    return len(head) == 8 and head[4:] == struct.pack(">i", 1)


class Kafka(Service):
    """The real broker.

    Attributes:
        durable: records survive a stop.
        partitions: the partition count that `kafka.partitions` must have here; None: any.
        java_options: further options of the JVM.
    """

    name = "kafka"
    durable = True
    partitions: int | None = None
    #: Further options of the storage tool, at the first start: what must be there before a client connects.
    format_options: Sequence[str] = ()
    start_s = 60.0
    stop_s = 20.0

    def __init__(self, directory: str | Path, *, version: str | None = None, java_options: Sequence[str] = ()) -> None:
        super().__init__(directory)
        self.version = version
        self.java_options = tuple(java_options)
        self.port = 0
        self._java = ""
        self._jars = Path()

    @property
    def bootstrap_servers(self) -> str:
        """host:port, as `kafka.bootstrap_servers` takes it."""
        return f"127.0.0.1:{self.port}"

    def prepare(self) -> None:
        """Fetch the jars, write the properties, format the storage once."""
        self._java = find_java()
        self._jars = resolve_jars(self.version, interrupted=self._interrupted)
        self.port = self.remembered_port()
        (self.directory / "server.properties").write_text(self.properties(), encoding="utf-8")
        (self.directory / "log4j2.properties").write_text(LOG4J.format(directory=self.directory), encoding="utf-8")
        if (self.directory / "data" / "meta.properties").exists():
            return
        cluster = urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
        done = run_tool(
            "Kafka's storage tool",
            [
                *self._jvm("kafka.tools.StorageTool"),
                "format",
                # A cluster id that starts with "-" would be read as an option.
                f"--cluster-id={cluster}",
                "--config=server.properties",
                "--ignore-formatted",
                *self.format_options,
            ],
            timeout_s=self.start_max_s,
            interrupted=self._interrupted,
            cwd=self.directory,
        )
        if done.returncode != 0:
            message = f"Kafka's storage could not be formatted: {(done.stdout + done.stderr).strip()[-500:]}"
            raise ServiceError(message)

    def properties(self) -> str:
        """Text of server.properties. Of a name that stands twice the last one counts, so a subclass may append."""
        return PROPERTIES.format(
            port=self.port, controller_port=self.remembered_port("controller_port"), directory=self.directory
        )

    def command(self) -> Sequence[str]:
        """The broker."""
        return [*self._jvm("kafka.Kafka"), "server.properties"]

    def healthy(self) -> bool:
        """Whether the broker answers a request of Kafka's protocol."""
        return speaks_kafka("127.0.0.1", self.port)

    def _jvm(self, main: str) -> list[str]:
        return [
            self._java,
            *HEAP,
            # The serial collector has no threads of its own: on two cores it costs less than G1.
            "-XX:+UseSerialGC",
            "-XX:-UsePerfData",
            "-Djava.awt.headless=true",
            f"-Dlog4j2.configurationFile=file:{self.directory}/log4j2.properties",
            *self.java_options,
            "-cp",
            f"{self._jars}/*",
            main,
        ]


class MockKafka(Service):
    """librdkafka's in-memory broker: for machines without Java or Maven.

    It speaks enough of the protocol for producers, consumers and groups. It lacks CreateTopics: a topic comes into
    being with the first metadata request that names it, with four partitions. Everything is gone when it stops.
    """

    name = "kafka-mock"
    durable = False
    #: librdkafka's default, which no setting changes.
    partitions: int | None = 4
    start_s = 20.0
    stop_s = 5.0

    @property
    def bootstrap_servers(self) -> str:
        """host:port, as `kafka.bootstrap_servers` takes it."""
        return self._address_file.read_text(encoding="utf-8").strip() if self._address_file.exists() else ""

    @property
    def _address_file(self) -> Path:
        return self.directory / "bootstrap"

    def prepare(self) -> None:
        """Forget the address of an earlier run."""
        try:
            import confluent_kafka  # noqa: F401
        except ImportError as e:
            message = "confluent-kafka is not installed (pip install 'preservarium[embedded]')"
            raise ServiceUnavailable(message) from e
        self._address_file.unlink(missing_ok=True)

    def command(self) -> Sequence[str]:
        """A child that holds the broker in memory and writes its address down."""
        return [sys.executable, "-m", "preservarium.embedded.mock_kafka", str(self._address_file)]

    def environment(self) -> Mapping[str, str]:
        """With this package importable."""
        return self.python_environment()

    def healthy(self) -> bool:
        """Whether the broker's port is open."""
        _, _, port = self.bootstrap_servers.rpartition(":")
        return port.isdigit() and port_answers(int(port))


def kafka_for(directory: str | Path, *, interrupted: threading.Event | None = None) -> tuple[Kafka | MockKafka, str]:
    """The best broker this machine can run, not yet started, and a notice for people ("" where there is nothing to say).

    Raises:
        Interrupted: `interrupted` was set while Maven fetched the jars.
        ServiceError: the jars could not be fetched although Java and Maven are there.
    """
    try:
        find_java()
        resolve_jars(interrupted=interrupted)
    except ServiceUnavailable as e:
        notice = (
            f"{e}. Running librdkafka's in-memory broker instead: it has {MockKafka.partitions} partitions a topic,"
            " and NOTHING in Kafka survives the stop."
        )
        return MockKafka(Path(directory) / "kafka-mock"), notice
    return Kafka(Path(directory) / "kafka"), ""
