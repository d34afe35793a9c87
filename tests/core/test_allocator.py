"""malloc keeps its pages: seen in a fresh process, by the page faults of blocks that are allocated again and again."""

import ctypes
import json
import os
import subprocess
import sys

import pytest

from norm_matters.core import allocator

glibc_only = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's malloc")

# 40 MiB: above the largest threshold that glibc reaches by itself.
FAULTS = """
import ctypes, json, resource, sys
from norm_matters.core.allocator import keep_pages

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size = 40 * 2**20

def use():
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    ctypes.memset(block, 1, size)
    libc.free(block)

kept = keep_pages() if sys.argv[1] == "keep" else None
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def fresh_process(mode: str, **environment: str):
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", FAULTS, mode]
    done = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


@glibc_only
def test_freed_blocks_are_used_again_without_new_pages() -> None:
    kept, faults = fresh_process("keep")
    _, faults_before = fresh_process("default")
    assert kept.startswith("glibc keeps freed blocks of up to ")
    # Pages may be larger than 4 KiB on another machine, so only the ratio says something.
    assert faults_before > 40
    assert faults < faults_before / 20


@glibc_only
@pytest.mark.parametrize(
    "environment", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}]
)
def test_settings_in_the_environment_are_left_alone(environment: dict[str, str]) -> None:
    kept, _ = fresh_process("keep", **environment)
    assert kept is None


@glibc_only
def test_tunables_of_other_parts_of_glibc_do_not_count() -> None:
    kept, _ = fresh_process("keep", GLIBC_TUNABLES="glibc.rtld.optional_static_tls=512")
    assert kept is not None


@pytest.fixture
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("MALLOC_", "GLIBC_TUNABLES")):
            monkeypatch.delenv(name)


class AnotherLibrary:
    """A C library that is not glibc: calling anything in it is an error."""

    def mallopt(self, *_: int) -> int:
        raise AssertionError("mallopt of another C library was called")


@pytest.mark.usefixtures("_no_settings")
def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: AnotherLibrary())
    assert allocator.keep_pages() is None


@glibc_only
@pytest.mark.usefixtures("_no_settings")
def test_a_preloaded_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = ctypes.CDLL(None)
    real = allocator._file_of
    assert real(libc, "malloc") == real(libc, "gnu_get_libc_version")

    def preloaded(libc: ctypes.CDLL, function: str) -> bytes | None:
        return b"/usr/lib/libjemalloc.so.2" if function == "malloc" else real(libc, function)

    monkeypatch.setattr(allocator, "_file_of", preloaded)
    assert allocator.keep_pages() is None


@glibc_only
@pytest.mark.usefixtures("_no_settings")
def test_an_old_glibc_that_refuses_large_thresholds_gets_its_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class OldGlibc:
        def mallopt(self, parameter: int, value: int) -> int:
            calls.append((parameter, value))
            return int(value <= 2**25)

    monkeypatch.setattr(allocator, "_glibc_with_its_own_malloc", OldGlibc)
    assert "32 MiB" in (allocator.keep_pages() or "")
    assert calls[-2:] == [(-3, 2**25), (-1, -1)]
