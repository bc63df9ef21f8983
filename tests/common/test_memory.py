"""Freed memory is used again instead of being requested from the system."""

import platform
import subprocess
import sys

import pytest

# Faults are counted in a process of its own: the setting belongs to the whole process.
CHILD = """
import ctypes, resource, sys
from medmoe_hf.common.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 * 2**20)
    libc.memset(block, 1, 64 * 2**20)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


print(*(faults() for _ in range(3)))
"""


def page_faults(mode):
    process = subprocess.run([sys.executable, "-c", CHILD, mode], capture_output=True, text=True, check=True)
    return [int(number) for number in process.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_freed_block_is_used_again():
    returned, kept = page_faults("returned"), page_faults("kept")
    # 64 MiB are at least 32 pages, of 2 MiB where they are huge.
    assert min(returned) >= 32
    assert kept[0] >= 32
    assert max(kept[1:]) < 16
