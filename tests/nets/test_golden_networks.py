"""The published networks on random weights: every case, every stage, to 1e-5."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.interop.names import convert_published, edm_names, ldm_names, ncsnpp_names
from multistage_diffusion.nets import MultiDecoderNetwork, build_network

GOLDEN = Path(__file__).parents[1] / "golden"


class Golden:
    """One file: its configuration, weights in fp32, cases, and our network with the weights loaded."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"{name}_multistage.safetensors", "pt") as file:
            self.meta = json.loads(file.metadata()["config"])
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
        self.weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
        self.cases: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("case"):
                case, field = key.split(".")
                self.cases.setdefault(case, {})[field] = value
        meta = self.meta
        attention = meta.get("attention_downsample_factors") or [
            meta["image_size"] // r for r in meta["attention_resolutions"]
        ]
        own = (
            {"head_channels": meta["head_channels"], "decoder_attention": tuple(meta["decoder_has_attention"])}
            if name == "ldm"
            else {}
        )
        self.config = NetworkConfig.of(
            family={"ncsnpp": "ncsnpp", "edm": "ddpmpp", "ldm": "ldm"}[name],  # type: ignore[arg-type]
            channels=meta["channels"],
            encoder_width=meta["encoder_width"],
            decoder_widths=tuple(meta["decoder_widths"]),
            channel_mult=tuple(meta["channel_mult"]),
            blocks_per_level=meta["blocks_per_level"],
            attention_factors=tuple(attention),
            augment_dim=meta.get("augment_dim", 0),
            **own,
        )
        self.names = {
            "ncsnpp": lambda: ncsnpp_names(self.config),
            "edm": lambda: edm_names(self.config, resolution=meta["image_size"]),
            "ldm": lambda: ldm_names(self.config),
        }[name]()
        self.network: MultiDecoderNetwork = build_network(self.config).eval()
        self.network.load_state_dict(convert_published(self.weights, self.names))


@pytest.fixture(scope="module")
def ncsnpp() -> Golden:
    return Golden("ncsnpp")


@pytest.fixture(scope="module")
def edm() -> Golden:
    return Golden("edm")


@pytest.fixture(scope="module")
def ldm() -> Golden:
    return Golden("ldm")


def stage_of(value: float, uppers: list[float | None]) -> int:
    """The published stages: (lower, upper]; the golden cases lie well inside."""
    return next(k for k, upper in enumerate(uppers) if upper is None or value <= upper)


def one_stage(stage: int, rows: int) -> list[int]:
    return [rows if k == stage else 0 for k in range(3)]


def assert_close(result: Tensor, reference: Tensor) -> None:
    assert float((result - reference).abs().max() / reference.abs().max()) <= 1e-5


@pytest.mark.parametrize("name", ["ncsnpp", "edm", "ldm"])
def test_mapping_covers_every_published_weight(name: str, request: pytest.FixtureRequest) -> None:
    golden = request.getfixturevalue(name)
    buffers = {k for k in golden.weights if k == "sigmas" or k.endswith("resample_filter")}
    assert set(golden.names) == set(golden.weights) - buffers
    assert sum(p.numel() for p in golden.network.parameters()) == golden.meta["params"]


@torch.no_grad()
def test_ncsnpp_equals_published_output(ncsnpp: Golden) -> None:
    uppers = [high for _, high in ncsnpp.meta["intervals_t"]]
    seen = set()
    for case in ncsnpp.cases.values():
        stage = stage_of(float(case["t"][0]), uppers)
        seen.add(stage)
        eps = ncsnpp.network(case["x"], case["time_cond"], one_stage(stage, len(case["x"])))
        assert_close(eps, case["eps"])
    assert seen == {0, 1, 2}


@torch.no_grad()
def test_ddpmpp_equals_published_denoiser(edm: Golden) -> None:
    uppers = [high for _, high in edm.meta["intervals_sigma"]]
    data = edm.meta["sigma_data"]
    seen = set()
    for case in edm.cases.values():
        x, sigma = case["x"], case["sigma"]
        stage = stage_of(float(sigma[0]), uppers)
        seen.add(stage)
        # Karras et al. 2022, Table 1: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).
        s = sigma.view(-1, 1, 1, 1)
        c_skip = data**2 / (s**2 + data**2)
        c_out = s * data / (s**2 + data**2).sqrt()
        c_in = 1 / (s**2 + data**2).sqrt()
        c_noise = sigma.log() / 4
        cond = Conditioning(augment=case["augment_labels"])
        raw = edm.network(c_in * x, c_noise, one_stage(stage, len(x)), cond)
        assert_close(c_skip * x + c_out * raw, case["denoised"])
        assert_close(raw, (case["denoised"] - c_skip * x) / c_out)  # the network's own share, not hidden by c_skip x
    assert seen == {0, 1, 2}


@torch.no_grad()
def test_ldm_equals_published_output(ldm: Golden) -> None:
    uppers = ldm.meta["stage_timestep_upper_bounds"]  # exclusive
    seen = set()
    for case in ldm.cases.values():
        step = int(case["timestep"][0])
        stage = next(k for k, upper in enumerate(uppers) if step < upper)
        seen.add(stage)
        eps = ldm.network(case["x"], case["timestep"], one_stage(stage, len(case["x"])))
        assert_close(eps, case["eps"])
    assert seen == {0, 1, 2}
