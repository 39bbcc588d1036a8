"""In a worker of the soak: a clock that can be set wrong, as an operator or NTP would, by a file that says by how many seconds.

Python imports this by its name before anything else where the folder is on its path. Durations (time.monotonic) stay true.
"""

import os
import time

_file = os.environ.get("SOAK_CLOCK_FILE", "")
_real_ns = time.time_ns
_monotonic = time.monotonic
_offset_ns = 0
_looked_s = 0.0


def _time_ns() -> int:
    global _looked_s, _offset_ns
    now_s = _monotonic()
    if now_s - _looked_s > 0.1:
        _looked_s = now_s
        try:
            with open(_file) as file:
                _offset_ns = int(float(file.read() or 0) * 1e9)
        except (OSError, ValueError):
            pass
    return _real_ns() + _offset_ns


if _file:
    time.time_ns = _time_ns
    time.time = lambda: _time_ns() / 1e9
