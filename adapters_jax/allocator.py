"""Memory of the host: what becomes of what a step has given back, and how much was taken at most.

A step on a CPU takes memory for its temporaries anew each time. From 128 kB on (glibc's first
threshold, which grows to 32 MB at most) it comes as fresh pages, which the kernel fills with zeros
one after another, and goes back at once: of a step over 32 short questions by MiniLM an eighth. In
larger blocks than a heap of a thread holds, which is 64 MB, it always does; pages of 2 MB help
there, which only the environment can ask for (`GLIBC_TUNABLES` in launch/environment.sh).
Measured by `python -m experiments.bench --only=epoch`.
"""

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

# Numbers of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_HEAP = 64 * 2**20  # bytes that a thread's heap may have
_NEVER = 2**31 - 1
# By these a user has chosen already.
_NAMES = ('MALLOC_TRIM_THRESHOLD_', 'MALLOC_MMAP_THRESHOLD_')
_TUNABLES = ('glibc.malloc.trim_threshold', 'glibc.malloc.mmap_threshold')


def keep_freed() -> bool:
    """Let this process keep what it frees for what it takes next; return whether it will.

    Nothing changes where the environment says otherwise, or where the C library is not glibc, or
    one before 2.35, which refuses to keep blocks of more than 32 MB.
    """
    tunables = os.environ.get('GLIBC_TUNABLES', '')
    chosen = any(name in os.environ for name in _NAMES)
    if chosen or any(name in tunables for name in _TUNABLES):
        return False
    with contextlib.suppress(OSError, AttributeError):  # no C library to be had, or another one
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - whether there is one
        settings = (_MMAP_THRESHOLD, _HEAP), (_TRIM_THRESHOLD, _NEVER)
        return all(library.mallopt(name, value) == 1 for name, value in settings)
    return False


def peak_bytes() -> int:
    """Return the most bytes of memory that this process ever held."""
    status = Path('/proc/self/status')
    lines = status.read_text('utf-8').splitlines() if status.exists() else []
    # Of getrusage's number a process begins with that of the one that started it, under Linux.
    for line in lines:
        if line.startswith('VmHWM:'):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
