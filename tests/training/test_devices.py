from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from multistage_diffusion.training.devices import keep_memory

FAULTS = """
import resource, sys, torch
from multistage_diffusion.training.devices import keep_memory
if sys.argv[1] == "kept":
    keep_memory(torch.device("cpu"))
def work():
    for _ in range(20):
        torch.ones(10_000_000)  # 40 MB, freed at once
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a matter of glibc")
def test_freed_memory_is_used_again_without_asking_for_it() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("kept") < 0.1 * faults("as it is")


def test_other_systems_and_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_: pytest.fail("the C library was asked"))
    keep_memory(torch.device("cuda"))
    monkeypatch.setattr(sys, "platform", "darwin")
    keep_memory(torch.device("cpu"))
