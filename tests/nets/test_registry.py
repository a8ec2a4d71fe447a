"""One more file in nets/ is one more family: it is built, counted, drawn, trained, sampled and reported like the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import multistage_diffusion.nets
from multistage_diffusion.cli import main
from multistage_diffusion.config.network import FAMILIES, NetworkConfig
from multistage_diffusion.nets import build_network
from multistage_diffusion.nets.cost import feature_elements, network_cost
from multistage_diffusion.performance.execution import Execution, execute
from multistage_diffusion.performance.offload import call_memory
from multistage_diffusion.reporting.network_boxes import Box, network_boxes

TOY = '''"""A family of plain convolutions."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from multistage_diffusion.config.network import FAMILIES, NetworkConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.errors import require
from multistage_diffusion.nets.network import Block


@FAMILIES.add("toy")
@dataclass(frozen=True, kw_only=True)
class ToyConfig(NetworkConfig):
    """Settings of a toy.

    Attributes:
        depth: blocks of the encoder and of each decoder.
    """

    depth: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.depth <= 8, f"network.depth={self.depth} must be from 1 to 8")

    def encoder(self, stage: int, width: int) -> nn.Module:
        return ToyEncoder(self, width)

    def decoder(self, stage: int, encoder_width: int) -> nn.Module:
        width = self.decoder_widths[stage]
        return nn.Sequential(
            nn.Conv2d(encoder_width, width, 1), *blocks(self, width), nn.Conv2d(width, self.channels, 3, padding=1)
        )


class ToyBlock(Block):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.conv, self.dropout = nn.Conv2d(width, width, 3, padding=1), nn.Dropout(dropout)

    def compute(self, x: Tensor) -> Tensor:
        return x + self.dropout(F.silu(self.conv(x)))


def blocks(config: ToyConfig, width: int) -> list[nn.Module]:
    return [ToyBlock(width, config.dropout) for _ in range(config.depth)]


class ToyEncoder(nn.Module):
    def __init__(self, config: ToyConfig, width: int) -> None:
        super().__init__()
        self.image, self.noise = nn.Conv2d(config.channels, width, 3, padding=1), nn.Linear(1, width)
        self.blocks = nn.Sequential(*blocks(config, width))

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        return self.blocks(self.image(x) + self.noise(noise[:, None])[:, :, None, None])
'''
SET = ["network.family=toy", "network.encoder_width=8", "network.decoder_widths=[12,8,4]", "network.depth=3"]
SHORT = [
    "training.steps=4",
    "training.batch=9",
    "training.log_every=1",
    "training.held_out_rows=4",
    "network.dropout=0.2",
]


@pytest.fixture(autouse=True)
def toy(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the file into the folder of families, which is read at the first lookup."""
    FAMILIES.names()  # imports all others, which add themselves once only
    folder = tmp_path_factory.mktemp("nets")
    (folder / "toy.py").write_text(TOY)
    monkeypatch.setattr(multistage_diffusion.nets, "__path__", [*multistage_diffusion.nets.__path__, str(folder)])
    monkeypatch.setattr(FAMILIES, "_known", dict(FAMILIES._known))
    monkeypatch.setattr(FAMILIES, "_complete", False)
    yield
    sys.modules.pop("multistage_diffusion.nets.toy", None)


def config() -> NetworkConfig:
    return NetworkConfig.of("toy", channels=1, encoder_width=8, decoder_widths=(12, 8, 4), depth=3)


def train(out: Path, *changes: str) -> int:
    return main(["train", "--preset", "digits", "--out", str(out), "--device", "cpu", "--set", *SET, *SHORT, *changes])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    folder = tmp_path_factory.mktemp("run") / "toy"

    def made() -> Path:
        if not folder.exists():
            assert train(folder) == 0
        return folder

    return made


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]


def test_its_arithmetic_is_counted_as_by_hand_and_by_torch() -> None:
    cost, pixels = network_cost(config(), 6, 5), 30
    encoder = (9 * 8 + 3 * 9 * 8 * 8) * pixels + 8  # with the noise's linear layer
    assert (cost.shared_multiply_adds, cost.shared_true_flops) == (encoder, 2 * encoder)
    network = build_network(config()).eval()
    for stage, width in enumerate((12, 8, 4)):
        decoder = (8 * width + 3 * 9 * width * width + 9 * width) * pixels
        found = cost.stages[stage]
        assert (found.multiply_adds, found.true_flops) == (encoder + decoder, 2 * (encoder + decoder))
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            network(torch.zeros(1, 1, 6, 5), torch.zeros(1), [int(k == stage) for k in range(3)])
        assert flops.get_total_flops() == found.true_flops
    assert cost.total_parameters == sum(p.numel() for p in network.parameters())


def test_its_memory_is_estimated_from_a_run_without_weights() -> None:
    # the encoder's result, and the widest decoder's block: its input twice and its output four times
    assert feature_elements(config(), 6, 5) == 30 * (8 + 2 * 12 + 4 * 12)
    assert call_memory(config(), (1, 6, 5)) == 4 * 30 * (8 + 6 * 12)


def test_its_blocks_are_drawn_in_one_box_for_each_size() -> None:
    found = network_boxes(config(), 6, 5)
    box = {"size": (6, 5), "attention": False, "blocks": 3}
    assert found.encoders == [[Box(channels=8, **box)]]
    assert found.decoders == [[Box(channels=width, **box)] for width in (12, 8, 4)]
    assert not found.skips


def test_it_is_trained_and_described_and_sampled_and_reported(
    trained: Callable[[], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained()
    assert json.loads((run / "config.json").read_text())["network"] == {
        "family": "toy",
        "channels": 1,
        "encoder_width": 8,
        "decoder_widths": [12, 8, 4],
        "dropout": 0.2,
        "separate": False,
        "num_classes": 0,
        "augment_dim": 0,
        "depth": 3,
    }
    capsys.readouterr()
    assert main(["describe", str(run), "--out", str(tmp_path / "toy.svg")]) == 0
    assert ": toy, images 1 x 8 x 8" in capsys.readouterr().out
    drawing = (tmp_path / "toy.svg").read_text()
    assert "toy for images of 1 × 8 × 8" in drawing
    assert "blocks: 3 in each encoder box, 3 in each decoder box" in drawing
    assert "skip" not in drawing
    assert main(["sample", str(run), "--count", "2", "--calls", "3", "--out", str(tmp_path / "s.png")]) == 0
    assert main(["report", str(run), "--count", "2"]) == 0
    assert "toy" in (run / "report.html").read_text()


def test_its_blocks_are_computed_again_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    block, calls = sys.modules[FAMILIES["toy"].__module__].ToyBlock, []
    compute = block.compute
    monkeypatch.setattr(block, "compute", lambda self, x: (calls.append(self), compute(self, x))[1])
    network = build_network(config())
    execute(network, Execution(recompute=True))
    network(torch.zeros(2, 1, 6, 5), torch.zeros(2), [1, 0, 1]).sum().backward()
    assert len(calls) == 2 * 3 * 3  # of the encoder and two decoders, twice
    assert len(set(calls)) == 3 * 3


def test_recomputing_its_blocks_changes_no_loss(trained: Callable[[], Path], tmp_path: Path) -> None:
    assert train(tmp_path / "run", "execution.recompute=true") == 0
    assert losses(tmp_path / "run") == losses(trained())


def test_a_network_without_blocks_is_not_silently_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = sys.modules[FAMILIES["toy"].__module__]
    monkeypatch.setattr(module, "blocks", lambda config, width: [torch.nn.Identity()])
    assert train(tmp_path / "run", "execution.recompute=true") == 2
    assert "execution.recompute=True: this family of networks has no blocks" in capsys.readouterr().err
    assert [len(plan) for plan in network_boxes(config(), 6, 5).decoders] == [1, 1, 1]  # drawn as a whole


def test_it_has_no_published_layout(
    trained: Callable[[], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trained()), "--out", str(tmp_path / "x.pth")]) == 2
    assert "no published layout exists for family 'toy'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("network.depth=0", "network.depth=0 must be from 1 to 8"),
        ("network.depth=two", "network.depth='two' must be a whole number"),
        ("network.dpeth=2", "network.dpeth: unknown key; did you mean 'depth'?"),
        (
            "network.norm_groups=16",
            "network.norm_groups: unknown key of family 'toy'; it is a setting of ddpmpp, ncsnpp",
        ),
    ],
)
def test_wrong_settings_are_refused_by_their_keys(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", change) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_its_settings_are_no_one_else_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--preset", "digits", "--out", str(tmp_path / "run"), "--set", "network.depth=2"]
    assert main(["train", *out]) == 2
    assert "network.depth: unknown key of family 'ddpmpp'; it is a setting of toy" in capsys.readouterr().err
