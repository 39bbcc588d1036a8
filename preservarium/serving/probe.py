"""`python -m preservarium.serving.probe [PATH] [PORT]`: whether a port of ours here answers 200; for containers' health checks.

Exit code 0 where it does, 1 where it does not, with what it said. It needs no program that slim images lack, and imports nothing of ours.
"""

import os
import sys
import urllib.error
import urllib.request
from typing import Final

#: Within the time-outs of those who ask (5 s).
ANSWER_S: Final = 4.0


def main(arguments: list[str]) -> int:
    """Ask once; the exit code."""
    path = arguments[0] if arguments else "/health"
    port = arguments[1] if len(arguments) > 1 else os.environ.get("PRESERVARIUM_WEB__PORT", "6066")
    # Not through a proxy that the environment names: it is this container.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}{path}", timeout=ANSWER_S) as response:
            return 0 if response.status == 200 else 1
    except urllib.error.HTTPError as e:
        with e:
            print(e.read(2_000).decode(errors="replace"))
    except OSError as e:
        print(e)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
