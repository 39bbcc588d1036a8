"""Which system this process is of: what the environment and `.env` say, and where they name no servers, the `up` that runs.

One system or the other, never a mixture: a registry in one PostgreSQL and a Kafka of another system would tell each
other's workers nonsense. So the running system counts only where every address that is given here is its own.
"""

import os
from pathlib import Path
from typing import Final

from preservarium import settings as ground
from preservarium.embedded.running import NAMED_BY, Running, addresses, find, named
from preservarium.embedded.service import free_port
from preservarium.errors import PreservariumError
from preservarium.settings import PREFIX, Settings


class SystemNotReady(PreservariumError):
    """The system in the data directory cannot be used now."""


def shown(directory: Path) -> str:
    """A directory for people: as short as it can be said from here."""
    try:
        return str(directory.relative_to(Path.cwd()))
    except ValueError:
        return str(directory)


def running(settings: Settings) -> Running | None:
    """The `up` that runs in the settings' data directory and is the system that they mean."""
    found = find(Path(settings.data_dir).absolute())
    if found is None:
        return None
    here = named(settings)
    if found.state != "running":
        return None if here else found
    ours = addresses(settings)
    # MQTT is not everywhere a part of the system, and a broker of one's own does not make it another.
    same = all(ours.get(service) == found.addresses.get(service) for service in here - {"mqtt"})
    return found if same else None


def join(given: Settings) -> str:
    """Take from a running system what the settings do not say; what is to be told of it, "" where nothing was taken.

    As `up` does for its own workers, what is taken goes into this process's environment: so it holds for a reload, too.

    Args:
        given: the settings so far. To be loaded anew afterwards.

    Raises:
        SettingsError: a setting is missing that only the running system's environment has.
        SystemNotReady: the system is starting or stopping.
    """
    found = running(given)
    if found is None:
        return ""
    where = shown(found.directory)
    if found.state != "running":
        message = f"the system in {where} is {found.state}: try again in a moment"
        raise SystemNotReady(message)
    here = named(given)
    if missing := sorted((found.secretive & NAMED_BY.keys()) - here - {"mqtt"}):
        message = (
            f"the system that runs in {where} uses a {missing[0]} of its own settings ({found.addresses[missing[0]]}), "
            f"with a secret: set {PREFIX}{missing[0].upper()}__… here, too"
        )
        raise ground.SettingsError(message)
    taken = {v: value for v, value in found.variables.items() if not _given(given, v)}
    if not taken.keys() - os.environ.keys():
        return ""
    os.environ.update(taken)
    return f"using the system that runs in {where}"


def join_as_worker() -> str:
    """The same for a worker that is started by hand: it is one more of that system, beside those of `up`.

    It has a console port of its own, where none is given, and no connector to the MQTT broker, because a broker takes one of
    a name: the second one would drive out the first, again and again.

    Raises:
        SettingsError: a setting is wrong, or missing.
        SystemNotReady: the system is starting or stopping.
    """
    given = ground.load()
    said = join(given)
    if not said:
        return ""
    if "enabled" not in given.mqtt.model_fields_set:
        os.environ[f"{PREFIX}MQTT__ENABLED"] = "false"
    if "port" in given.web.model_fields_set:
        return said
    port = free_port()
    os.environ[f"{PREFIX}WEB__PORT"] = str(port)
    return f"{said}; this worker's console is at port {port}, where --web-port names no other"


def _given(settings: Settings, variable: str) -> bool:
    """Whether the settings say what this variable would, or something that it is a part of."""
    section, _, name = variable.removeprefix(PREFIX).lower().rpartition("__")
    if not section:
        return name in settings.model_fields_set
    given = getattr(settings, section).model_fields_set
    if section in NAMED_BY and section in named(settings):
        return True  # it has its address from elsewhere, and all that belongs to it
    decisive = name in NAMED_BY.get(section, ()) or name in _OF_POSTGRES
    return not decisive and name.removesuffix("_file") in given


#: What reaches the embedded PostgreSQL, as a whole: half of it would be half of another server.
_OF_POSTGRES: Final = frozenset({"port", "database", "user", "password_file"})
