from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from multistage_diffusion.performance.devices import keep_memory

FAULTS = """
import resource, sys, threading, torch
from multistage_diffusion.performance.devices import keep_memory
kept = sys.argv[1] == "kept"
if kept:
    keep_memory(torch.device("cpu"))
torch.set_num_threads(1)
# freed at once, as a network's maps are; in a thread, some fill just more than one of its heaps
sizes = [(10_000_000, 1)] if sys.argv[2] == "here" else [(2_000_000, 12), (10_000_000, 1), (2_500_000, 5)]
def work(size, count, times):
    for _ in range(times):
        [torch.ones(size) for _ in range(count)]
def counted():
    faults = 0
    for size, count in sizes:
        work(size, count, 20 if kept else 1)  # until memory has found its place
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        work(size, count, 5)
        faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(faults)
if sys.argv[2] == "here":
    counted()
else:
    thread = threading.Thread(target=counted)
    thread.start()
    thread.join()
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a matter of glibc")
@pytest.mark.parametrize("where", ["here", "in a thread"])
def test_freed_memory_is_used_again_without_asking_for_it(where: str) -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how, where], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("kept") < 0.01 * faults("as it is")


def test_other_systems_and_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_: pytest.fail("the C library was asked"))
    keep_memory(torch.device("cuda"))
    monkeypatch.setattr(sys, "platform", "darwin")
    keep_memory(torch.device("cpu"))
