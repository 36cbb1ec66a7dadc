"""The C allocator's settings: by default glibc gives every large tensor back to the kernel and faults it in again."""

import ctypes
import platform

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for the next tensor: no mapping a tensor of its own, no trimming of the heap.

    Page faults of fresh memory cost a fifth of a decoding or training step on a CPU. Freed memory then stays with the
    process; what it uses at its peak grows by fragmentation only.

    Returns:
        False where the C library is not glibc, or the settings were refused. An allocator that is preloaded over glibc
        may accept them and do as it always does (tcmalloc).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(_M_MMAP_MAX, 0) == 1, mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT) == 1])
