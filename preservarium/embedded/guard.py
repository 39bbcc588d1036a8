"""Run as a script: stands between an owner and one service process, and ends the service when the owner is gone.

The owner holds the other end of our standard input. Its end, however the owner dies (clean exit, exception, kill -9),
is end-of-file here, and the service is stopped in its own clean way. A parent-death signal alone would not do: Linux
sends it when the THREAD that started the child ends, and services are started from threads.

Only the standard library, started with `-I -S`: 20 ms and 9 MB, and no dependency can break a shutdown.
"""

import ctypes
import fcntl
import json
import os
import select
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

EXIT_BUSY = 75  #: another owner's guard holds this data directory (EX_TEMPFAIL)
PR_SET_PDEATHSIG = 1
POLL_S = 0.05


def started_at(pid: int) -> str | None:
    """A text that, with the pid, identifies one process for as long as the machine runs; None: no such process."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            # The command's name may hold spaces and parentheses; the fields after the last ")" are plain.
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def tell(text: str) -> None:
    """One line for the owner."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        pass


def lock(path: str, wait_s: float) -> int:
    """Hold the data directory for as long as we live; the kernel lets go of it however we die."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # An owner that was just killed leaves a guard that is still stopping its service: worth a wait.
            if time.monotonic() > deadline:
                tell("busy")
                sys.exit(EXIT_BUSY)
            if select.select([sys.stdin], [], [], POLL_S)[0]:
                sys.exit(0)  # our own owner is gone meanwhile
        else:
            return handle


def stop_leftover(pid_file: Path, stop_signal: int, stop_s: float) -> None:
    """End a service whose guard was killed with it running: we hold the lock, so nobody owns it any more."""
    try:
        known = json.loads(pid_file.read_text())
        pid, identity = int(known["pid"]), known["started_at"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if identity is None or started_at(pid) != identity:
        return
    for number, patience_s in ((stop_signal, stop_s), (signal.SIGKILL, 10.0)):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if started_at(pid) != identity:
                return
            time.sleep(POLL_S)


def spawn(spec: dict[str, Any]) -> "subprocess.Popen[bytes]":
    """Start the service in a session of its own: a Ctrl-C on the owner's terminal is the owner's to handle.

    Our environment is the service's; we use none of it ourselves (`-I`).
    """
    stop_signal = int(spec["stop_signal"])
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    guard_pid = os.getpid()

    def in_child() -> None:
        # Here the signal is sound: this process has one thread, and it lives until the service has ended.
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, stop_signal, 0, 0, 0)
            if os.getppid() != guard_pid:
                os._exit(1)

    with open(spec["log"], "ab") as log:
        return subprocess.Popen(
            spec["command"],
            cwd=spec.get("cwd"),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=in_child,
        )


def stop(child: "subprocess.Popen[bytes]", stop_signal: int, stop_s: float) -> None:
    """Stop the service cleanly, and hard where it does not obey."""
    for number, patience_s in ((stop_signal, stop_s), (signal.SIGKILL, 10.0)):
        if child.poll() is not None:
            break
        if number == signal.SIGKILL:
            os.killpg(child.pid, number)
        else:
            child.send_signal(number)
        try:
            child.wait(patience_s)
        except subprocess.TimeoutExpired:
            tell(f"did not stop within {patience_s:g} s")


def main() -> NoReturn:
    """Lock, clear left-overs, start, wait for the owner's end or the service's, stop."""
    spec = json.loads(sys.argv[1])
    stop_signal, stop_s = int(spec["stop_signal"]), float(spec["stop_s"])
    held = lock(spec["lock_file"], float(spec["busy_wait_s"]))
    pid_file = Path(spec["pid_file"])
    stop_leftover(pid_file, stop_signal, stop_s)

    waker, wakened = os.pipe()
    os.set_blocking(waker, False)
    os.set_blocking(wakened, False)
    signal.set_wakeup_fd(wakened, warn_on_full_buffer=False)
    asked = False

    def ask(_number: int, _frame: object) -> None:
        nonlocal asked
        asked = True

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, ask)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)

    try:
        child = spawn(spec)
    except OSError as e:
        tell(f"failed {e}")
        sys.exit(1)
    pid_file.write_text(json.dumps({"pid": child.pid, "started_at": started_at(child.pid), "guard": os.getpid()}))
    tell(f"started {child.pid}")

    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        selector.register(waker, selectors.EVENT_READ)
        while child.poll() is None and not asked:
            for key, _ in selector.select():
                if not os.read(key.fd, 4096) and key.fd == sys.stdin.fileno():
                    asked = True
    stop(child, stop_signal, stop_s)
    pid_file.unlink(missing_ok=True)
    os.close(held)
    sys.exit(0 if asked else child.returncode if 0 <= child.returncode < 256 else 128 - child.returncode)


if __name__ == "__main__":
    main()
