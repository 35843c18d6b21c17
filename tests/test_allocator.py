"""What a process has freed it takes again without new pages, unless its user has chosen."""

import os
import platform
import subprocess
import sys

import pytest

C_LIBRARY, VERSION = platform.libc_ver()
pytestmark = pytest.mark.skipif(
    C_LIBRARY != 'glibc' or tuple(map(int, VERSION.split('.'))) < (2, 35),
    reason='the C library is not glibc 2.35 or newer, and is left as it is',
)

# Takes and gives back 48 MiB, as the program of a step does in a thread of its own, and prints how
# many pages were new once it has done so before.
_ROUNDS = """
import ctypes, resource, sys, threading
from adapters_jax import allocator
print(allocator.keep_freed() if sys.argv[1] == 'keep' else None)
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def take():
    block = library.malloc(48 * 2**20)
    ctypes.memset(block, 1, 48 * 2**20)
    library.free(block)

def rounds():
    take()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        take()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=rounds)
thread.start()
thread.join()
"""


def new_pages(keep, **environment):
    """Return what `keep_freed` said, and how many pages five rounds took."""
    own = {k: v for k, v in os.environ.items() if 'MALLOC' not in k and k != 'GLIBC_TUNABLES'}
    command = [sys.executable, '-c', _ROUNDS, 'keep' if keep else 'leave']
    done = subprocess.run(command, env=own | environment, check=True, capture_output=True)
    said, pages = done.stdout.split()
    return said.decode(), int(pages)


def test_freed_memory_is_taken_again():
    said, kept = new_pages(keep=True)
    _, left = new_pages(keep=False)
    assert said == 'True'
    # As glibc comes, every round has 12,288 pages of 4 kB, or whatever the kernel's are.
    assert 20 * kept < left


@pytest.mark.parametrize(
    'environment',
    [
        {'MALLOC_MMAP_THRESHOLD_': '1000000'},
        {'MALLOC_TRIM_THRESHOLD_': '1000000'},
        {'GLIBC_TUNABLES': 'glibc.malloc.mmap_threshold=1000000'},
    ],
)
def test_a_users_own_choice_holds(environment):
    said, _ = new_pages(keep=True, **environment)
    assert said == 'False'
