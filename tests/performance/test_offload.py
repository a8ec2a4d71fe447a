from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multistage_diffusion import memory, preset
from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.nets import build_network
from multistage_diffusion.performance import offload
from multistage_diffusion.performance.offload import MOST, OneStageAtATime, call_memory, free_memory, images_at_once

CPU = torch.device("cpu")
NETWORKS = {
    "digits": (preset("digits").network, (1, 8, 8)),
    "ncsnpp": (preset("cifar10-dpm").network, (3, 32, 32)),
    "ddpmpp": (preset("cifar10-edm").network, (3, 32, 32)),
    "ldm": (preset("celebahq-ldm").network, (3, 64, 64)),
}


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors alive that were made inside, whatever the device."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.users: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (storage(leaf) not in known or storage(leaf) in self.users):
                self.count(leaf)
        return out

    def count(self, tensor: Tensor) -> None:
        key, size = storage(tensor), tensor.untyped_storage().nbytes()
        if key not in self.users:
            self.now += size
            self.peak = max(self.peak, self.now)
        self.users[key] = self.users.get(key, 0) + 1
        weakref.finalize(tensor, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
            self.now -= size


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak(network: NetworkConfig, shape: tuple[int, int, int]) -> int:
    """The bytes that a call really holds at most, of any stage."""
    stages, found = len(network.decoder_widths), 0
    with torch.device("meta"), torch.no_grad():
        built = build_network(network).eval()
        for stage in range(stages):
            with Live() as live:
                built(torch.empty(1, *shape), torch.empty(1), [int(k == stage) for k in range(stages)])
            found = max(found, live.peak)
    return found


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "ncsnpp")) for n in NETWORKS])
@pytest.mark.parametrize("separate", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_memory_of_a_call_is_no_less_and_not_much_more_than_it_takes(name: str, separate: bool) -> None:
    network, shape = NETWORKS[name]
    network = dataclasses.replace(network, separate=separate)
    real = peak(dataclasses.replace(network, attention_factors=()), shape)  # whose matrices no device writes out
    assert real < call_memory(network, shape) < 2 * real


def test_as_many_images_at_once_as_fit_in_batches_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    network, shape = NETWORKS["ncsnpp"]
    each = call_memory(network, shape) + offload.NOISE * 3 * 32 * 32
    monkeypatch.setattr(offload, "free_memory", lambda _: int(100 * each / offload.SHARE) + 1)
    assert images_at_once(network, shape, 1000, CPU) == 100
    assert images_at_once(network, shape, 101, CPU) == 51
    assert images_at_once(network, shape, 7, CPU) == 7
    assert images_at_once(network, shape, 0, CPU) == 1
    assert 50 <= images_at_once(network, shape, 1000, CPU, rows=2) <= 55  # noise does not double
    monkeypatch.setattr(offload, "free_memory", lambda _: 10**15)
    assert images_at_once(network, shape, 10**6, CPU) == MOST["cpu"]
    monkeypatch.setattr(offload, "free_memory", lambda _: 1)
    assert images_at_once(network, shape, 10, CPU) == 1


def test_free_memory_is_some_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**20 < free_memory(CPU) < whole
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "none")
    assert free_memory(CPU) == whole // 2


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    config = NetworkConfig.of(
        family="ddpmpp",
        channels=1,
        encoder_width=8,
        decoder_widths=(12, 8, 4),
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_factors=(),
        dropout=0.0,
    )
    built = build_network(config).eval().requires_grad_(False)
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.3)
    return built


def test_one_stage_at_a_time_computes_the_same(network: nn.Module) -> None:
    plain = copy.deepcopy(network)
    residents = OneStageAtATime(network, CPU)
    x, noise = torch.randn(2, 1, 8, 8), torch.rand(2)
    for stage in (2, 2, 1, 0, 2):
        counts = [2 * int(k == stage) for k in range(3)]
        assert torch.equal(network(x, noise, counts), plain(x, noise, counts))
        assert residents.stage == stage


@pytest.mark.parametrize("separate", [False, True])
def test_only_one_stage_is_on_the_device(network: nn.Module, separate: bool) -> None:
    if separate:
        network = build_network(dataclasses.replace(network.config, separate=True))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    home = {tensor.data_ptr() for tensor in network.state_dict().values()}
    residents = OneStageAtATime(network, CPU)

    def there() -> set[str]:
        """The parts whose tensors are copies on the device."""
        found = {name: {t.data_ptr() in home for t in p.state_dict().values()} for name, p in network.parts().items()}
        assert all(len(at_home) == 1 for at_home in found.values())
        return {name for name, at_home in found.items() if at_home == {False}}

    assert there() == set()
    for stage in (2, 1, 2, 0):
        residents.bring(stage)
        encoder = {f"encoder.{stage + 1}"} if separate else set()
        assert there() == encoder | {f"decoder.{stage + 1}"}
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, before[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_holds_one_decoder(network: nn.Module) -> None:
    residents = OneStageAtATime(network, torch.device("cuda"))
    for stage in (2, 0):
        counts = [2 * int(k == stage) for k in range(3)]
        network(torch.randn(2, 1, 8, 8, device="cuda"), torch.rand(2, device="cuda"), counts)
        assert residents.stage == stage
        devices = [{p.device.type for p in decoder.parameters()} for decoder in network.decoders]
        assert devices == [{"cuda"} if k == stage else {"cpu"} for k in range(3)]


STEP = """
import torch
from multistage_diffusion import override, preset
from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.performance.offload import training_memory
from multistage_diffusion.shares import row_counts, stage_shares

def now(kind):
    return 1024 * int(open("/proc/self/status").read().split(kind + ":")[1].split()[0])

config = override(preset("images-32-cpu"), {"data.source": "x"})
counts = row_counts(config.training, stage_shares(config.training, config.stages, config.diffusion.prior))
denoiser = build_denoiser(config).train()

def step(counts):
    sigma = torch.cat([torch.full((n,), v) for n, v in zip(counts, (0.1, 0.4, 1.0), strict=True)])
    denoiser(torch.randn(sum(counts), 3, 32, 32), sigma).square().mean().backward()

step([1, 1, 1])  # code that a first step loads and compiles is not the step's memory
denoiser.zero_grad(set_to_none=True)
before, own = now("VmRSS"), sum(4 * p.numel() for p in denoiser.parameters())
step(counts)
print(training_memory(config, sum(counts)) - 3 * own, now("VmHWM") - before + own)  # moments and EMA are not there
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_the_memory_of_a_training_step_is_predicted_by_counting() -> None:
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True)
    predicted, measured = map(float, done.stdout.split())
    assert measured > 300 * 2**20
    assert 0.8 < predicted / measured < 1.3
