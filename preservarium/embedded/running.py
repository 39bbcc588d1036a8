"""The note that `preservarium up` leaves in its data directory, so that commands in another shell find its servers.

It names the process, how far it is, the addresses, and the settings in force without their secrets: a password is named by
the file that it stands in. Only its owner may read it. It goes with the process; where that was killed, pid and start
time say so.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import SecretStr

from preservarium.embedded.guard import started_at
from preservarium.settings import Settings, fields

#: In the data directory.
FILE: Final = "running.json"

#: Service -> the settings that say where it is: whoever gives one of them has a service of their own.
NAMED_BY: Final[Mapping[str, frozenset[str]]] = {
    "kafka": frozenset({"bootstrap_servers"}),
    "postgres": frozenset({"url", "host"}),
    "clickhouse": frozenset({"url"}),
    "mqtt": frozenset({"url"}),
}
#: Of this process alone.
_OWN: Final = frozenset({"data_dir", "log_level", "log_format"})

State = Literal["starting", "running", "stopping"]


def named(settings: Settings) -> frozenset[str]:
    """The services whose address the settings give."""
    return frozenset(s for s, names in NAMED_BY.items() if getattr(settings, s).model_fields_set & names)


def addresses(settings: Settings) -> dict[str, str]:
    """Where the settings say that each service is, without user and password."""
    postgres = urlsplit(settings.postgres.dsn)
    host, port, *_ = settings.clickhouse.parts
    mqtt = urlsplit(settings.mqtt.url.get_secret_value())
    found = {
        "kafka": settings.kafka.bootstrap_servers,
        "postgres": f"{postgres.hostname or settings.postgres.host}:{postgres.port or 5432}{postgres.path}",
        "clickhouse": f"{host}:{port}" if settings.clickhouse.enabled else "",
        "mqtt": f"{mqtt.hostname}:{mqtt.port or (8883 if mqtt.scheme == 'mqtts' else 1883)}" if settings.mqtt.enabled else "",
    }  # fmt: skip
    return {service: address for service, address in found.items() if address}


def shareable(settings: Settings) -> dict[str, str]:
    """The settings that are not the default, as variables, without secrets and without what is this process's own."""
    found: dict[str, str] = {}
    for each in fields():
        holder = getattr(settings, each.section) if each.section else settings
        value = getattr(holder, each.name)
        if _secret(value) or value == type(holder).model_fields[each.name].default or each.name in _OWN:
            continue
        text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        found[each.variable] = text.lower() if isinstance(value, bool) else text
    return found


def secretive(settings: Settings) -> frozenset[str]:
    """The services of the settings' own that are reached with a secret."""
    return frozenset(
        service
        for service in named(settings)
        if any(_secret(getattr(getattr(settings, service), n)) for n in getattr(settings, service).model_fields_set)
    )


def _secret(value: object) -> bool:
    """Whether a setting's value is one: an address without a password in it is none."""
    if not isinstance(value, SecretStr):
        return False
    text = value.get_secret_value()
    return bool(text) and ("://" not in text or urlsplit(text).password is not None or "password" in text)


@dataclass(frozen=True, slots=True)
class Running:
    """What the note says."""

    directory: Path  #: the data directory
    pid: int
    started_at: str | None  #: of the process, as `guard.started_at` has it
    state: State
    web: str = ""  #: address of the console
    addresses: Mapping[str, str] = field(default_factory=dict)  #: service -> address, without secrets
    #: PRESERVARIUM_ variables of whoever wants to use it
    variables: Mapping[str, str] = field(default_factory=dict)
    #: services that are reached with a secret which is not in the variables
    secretive: frozenset[str] = frozenset()

    @classmethod
    def ours(cls, directory: Path, web: str) -> Self:
        """The note of this process, at its start."""
        return cls(directory, os.getpid(), started_at(os.getpid()), "starting", web)

    def serving(self, settings: Settings, embedded: Mapping[str, Mapping[str, str]]) -> "Running":
        """The note of a system that can be used.

        Args:
            settings: in force.
            embedded: service -> variables that reach it, of those that were started here.
        """
        variables = shareable(settings)
        for reach in embedded.values():
            variables |= reach
        return replace(
            self,
            state="running",
            addresses=addresses(settings),
            variables=variables,
            secretive=secretive(settings) - embedded.keys(),
        )

    def write(self) -> None:
        """Put it into the directory, at once and as a whole."""
        new = self.directory / f"{FILE}.{os.getpid()}"
        new.unlink(missing_ok=True)
        text = json.dumps(
            asdict(self) | {"directory": str(self.directory), "secretive": sorted(self.secretive)}, indent=2
        )
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as f:
            f.write(text + "\n")
        new.replace(self.directory / FILE)

    def remove(self) -> None:
        """Take it away, where it is still ours."""
        if (there := find(self.directory)) is None or there.pid == self.pid:
            (self.directory / FILE).unlink(missing_ok=True)


def find(directory: Path) -> Running | None:
    """What runs in a data directory; None where nothing does, also where a note was left behind."""
    try:
        document = json.loads((directory / FILE).read_text(encoding="utf-8"))
        found = Running(
            directory=directory,
            pid=int(document["pid"]),
            started_at=document["started_at"],
            state=document["state"],
            web=document["web"],
            addresses=dict(document["addresses"]),
            variables=dict(document["variables"]),
            secretive=frozenset(document["secretive"]),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    # A pid is given again to another process, a pid with its start time is not.
    return found if found.started_at is not None and started_at(found.pid) == found.started_at else None
