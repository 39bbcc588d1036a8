"""What no longer watches: an alarm whose device or rule is gone, or whose rule watches another series now.

Such an alarm ends: nothing that happens to the process can end it any more. The transition `withdrawn` says why.
"""

from enum import StrEnum


class Gone(StrEnum):
    """Why an alarm has nothing that watches it; the text is for people, the name in lower case is the code."""

    DEVICE_REMOVED = "the device is not registered any more"
    DEVICE_DISABLED = "the device is switched off"
    RULE_REMOVED = "no such rule watches the device any more"
    RULE_DISABLED = "the rule is switched off"
    RULE_UNUSABLE = "the rule cannot be used as it is now"
    RULE_MOVED = "the rule watches another series of the device now"

    @property
    def code(self) -> str:
        """As lines have it."""
        return self.name.lower()
