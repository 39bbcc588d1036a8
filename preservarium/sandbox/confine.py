"""What a sandbox process gives up before it runs the first script.

Three nets, each enough against the accidents of its kind: resource limits (memory, CPU, files), an unprivileged user where
we are root, and on Linux a seccomp filter that allows the system calls of computing and of the two pipes, and refuses
every other one with EPERM: no file can be opened, no socket made, no process started.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from typing import Final

#: Address space of the process: QuickJS contexts have their own, smaller limit; this one is for Python scripts.
MEMORY_BYTES_MAX: Final = 768 << 20

_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000

#: System calls of computing, memory, signals, time and the open pipes, by architecture.
_SYSCALLS: Final[dict[str, tuple[int, tuple[int, ...]]]] = {
    # read write fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn ioctl(refused below) madvise
    # mremap getpid exit uname gettimeofday getrusage times setitimer getitimer sigaltstack poll select sched_yield
    # clock_gettime clock_nanosleep nanosleep exit_group tgkill gettid futex set_robust_list rseq getrandom membarrier
    # restart_syscall close pread64? (no) sysinfo
    "x86_64": (
        0xC000003E,
        (0, 1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 23, 24, 25, 28, 35, 36, 38, 39, 60, 63, 96, 98, 99, 100, 131, 186, 202, 219,
         228, 229, 230, 231, 234, 273, 318, 324, 334),
    ),
    "aarch64": (
        0xC00000B7,
        (56 + 1, 62, 63, 64, 72, 73, 80, 93, 94, 98, 99, 101, 102, 103, 113, 114, 115, 124, 128, 131, 132, 134, 135, 139, 153,
         160, 165, 169, 172, 178, 179, 214, 215, 216, 222, 226, 233, 278, 283, 293),
    ),
}  # fmt: skip


def limit_resources() -> None:
    """Cap memory and files; write no core."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def drop_user() -> None:
    """Become nobody where we are root."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)


def filter_system_calls() -> bool:
    """Install the seccomp filter for this process; False where the platform has none.

    Raises:
        OSError: the kernel refused the filter; the process must not run scripts then.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _SYSCALLS:
        return False
    architecture, allowed = _SYSCALLS[machine]
    refuse = _ERRNO | errno.EPERM
    # struct sock_filter {u16 code; u8 jt; u8 jf; u32 k}: load the architecture, then the number, compare, return.
    program = [
        (0x20, 0, 0, 4),
        (0x15, 1, 0, architecture),
        (0x06, 0, 0, refuse),
        (0x20, 0, 0, 0),
    ]
    for i, number in enumerate(allowed):
        program.append((0x15, len(allowed) - i, 0, number))
    program += [(0x06, 0, 0, refuse), (0x06, 0, 0, _ALLOW)]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    fprog = Program(len(program), ctypes.cast(buffer, ctypes.c_void_p).value)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(fprog), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")
    return True
