"""What the allocator's settings are for: the next large tensor takes memory that is already there."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from lit_posttrain.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def touch():
    tensors = [torch.empty(3 * 2**20).fill_(1.0) for _ in range(16)]  # 12 MiB, 3,072 pages each
    del tensors
for _ in range(3):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    kept = faults("keep")
    assert kept < 200
    assert faults("default") > 5 * kept  # what this is against; huge pages may make it few, but not this few


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_posttrain import allocator

    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert not allocator.keep_freed_memory()
