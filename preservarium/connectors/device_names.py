"""Which device a point with tags is of: line protocol and Telegraf's metrics name hosts and tags, and no device. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

_PLACE: Final = re.compile(r"\{([^{}]+)\}")
#: What stands for the measurement in a template.
MEASUREMENT: Final = "measurement"
#: Entries of a rule: each costs a look at every point.
ENTRIES_MAX: Final = 20


@dataclass(frozen=True, slots=True)
class Rule:
    """`device,host` or `{site}-{host},{measurement}`: the first entry whose tags are all there names the device."""

    text: str
    entries: tuple[tuple[str, tuple[str, ...]], ...]  #: (template, its tags)

    def device(self, measurement: str, tags: Mapping[str, str]) -> str | None:
        """What the point is of; None where no entry says."""
        for template, names in self.entries:
            if all(name == MEASUREMENT or tags.get(name) for name in names):
                if template == f"{{{names[0]}}}" and names[0] in tags:
                    return tags[names[0]]
                return _PLACE.sub(lambda found: tags.get(found[1]) or measurement, template)
        return None


@lru_cache(maxsize=16)
def rule_of(text: str) -> Rule:
    """The rule that a setting says.

    Raises:
        ValueError: it is none.
    """
    entries = []
    for part in text.split(","):
        entry = part.strip()
        if not entry:
            continue
        template = entry if "{" in entry or "}" in entry else f"{{{entry}}}"
        names = tuple(_PLACE.findall(template))
        if not names or set(_PLACE.sub("", template)) & set("{}"):
            message = f"{entry!r} is neither a tag nor a template such as {{site}}-{{host}}"
            raise ValueError(message)
        entries.append((template, names))
    if not 0 < len(entries) <= ENTRIES_MAX:
        message = f"1 to {ENTRIES_MAX} tags or templates, separated by commas"
        raise ValueError(message)
    return Rule(text, tuple(entries))
