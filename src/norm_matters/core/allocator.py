"""The C library's malloc: have it keep the pages of large blocks that were freed, for the next step needs them again.

Every training step allocates the same large activations. glibc takes blocks over a threshold (at most 32 MiB) from the
system one by one and returns each when it is freed, and returns the top of its heap too: the next step then waits for
the system to map and clear the same pages again, which on a CPU costs more than the arithmetic of a normalisation.
"""

import ctypes
import os
from collections.abc import Mapping

# From glibc's malloc.h: the parameters of mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

LARGEST_KEPT = 2**30
"""Bytes; blocks over this still come from the system and go back to it, so that a single one cannot pin its memory."""

_NEVER = -1  # for M_TRIM_THRESHOLD, as its manual says


def keep_pages() -> str | None:
    """Have glibc's malloc keep freed blocks of up to `LARGEST_KEPT` bytes for reuse, in the whole process from now on.

    Nothing is done where malloc is not glibc's own (musl, macOS, Windows, a preloaded jemalloc or tcmalloc), or where
    the environment sets it up already (`MALLOC_...`, `GLIBC_TUNABLES`). Results do not depend on it. The process then
    holds the memory of its largest moment until it ends. Source: mallopt(3).

    Returns:
        What was set, for the record; None where nothing was.
    """
    if _set_by_user(os.environ):
        return None
    libc = _glibc_with_its_own_malloc()
    if libc is None:
        return None
    # An old glibc refuses a threshold over 32 MiB.
    for largest in (LARGEST_KEPT, 2**25):
        if libc.mallopt(_M_MMAP_THRESHOLD, largest) and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER):
            return f"glibc keeps freed blocks of up to {largest // 2**20} MiB (mmap_threshold, trim_threshold)"
    return None


def _set_by_user(environment: Mapping[str, str]) -> bool:
    """Whether the environment holds settings of glibc's malloc."""
    return "glibc.malloc." in environment.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in environment
    )


def _glibc_with_its_own_malloc() -> ctypes.CDLL | None:
    """The C library, if it is glibc and the process takes its memory from glibc's malloc."""
    if os.name != "posix":
        return None
    libc = ctypes.CDLL(None)
    if not all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "dladdr")):
        return None
    # A preloaded allocator brings a malloc of its own, in another file.
    own, used = _file_of(libc, "gnu_get_libc_version"), _file_of(libc, "malloc")
    return libc if own is not None and own == used else None


def _file_of(libc: ctypes.CDLL, function: str) -> bytes | None:
    """The library that a function of this process is in."""
    found = _SymbolInfo()
    address = ctypes.cast(getattr(libc, function), ctypes.c_void_p)
    return found.file if libc.dladdr(address, ctypes.byref(found)) else None


class _SymbolInfo(ctypes.Structure):
    """`Dl_info` of dlfcn.h; see dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )
