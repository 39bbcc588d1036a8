"""Registry files to begin with: small, with comments, one for each way that a first device comes (start/)."""

from pathlib import Path
from typing import Final

from preservarium.errors import PreservariumError

_FOLDER: Final = Path(__file__).with_name("start")
#: Ways in that there is a file for; the first is the default.
STARTS: Final = ("plain", "ttn", "chirpstack", "zigbee2mqtt")


class StartError(PreservariumError):
    """The file cannot be written."""


def start_text(name: str) -> str:
    """The file for one of `STARTS`."""
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def write_start(name: str, path: Path) -> bool:
    """Write it, unless it stands there already.

    Args:
        name: one of `STARTS`.
        path: of the new file.

    Returns:
        Whether it was written; False where the file says just that.

    Raises:
        StartError: another file stands there, or it cannot be written.
    """
    text = start_text(name)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        try:
            if path.read_text(encoding="utf-8") == text:
                return False
        except (OSError, UnicodeDecodeError):
            pass
        message = f"{path} is there already, and is another file"
        raise StartError(message) from None
    except OSError as e:
        message = f"{path} cannot be written: {e.strerror or e}"
        raise StartError(message) from None
    return True
