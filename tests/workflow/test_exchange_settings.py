"""Exports of transformers remember what shapes do not show of their run: heads, depth, classes, latents, sampler."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from multistage_diffusion import cli
from multistage_diffusion.config import CodecConfig, SamplingConfig
from multistage_diffusion.config.serialization import to_dict
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.errors import UserError
from multistage_diffusion.files import write_json
from multistage_diffusion.training.run import Run
from multistage_diffusion.workflow.export import export_published
from multistage_diffusion.workflow.import_run import import_published
from multistage_diffusion.workflow.imported import save_first_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
SUFFIX = {"dit": ".pt", "uvit": ".pth", "uvit_classes": ".pth"}
SAMPLER = SamplingConfig(
    solver="dpm++",
    method="multistep",
    order=2,
    calls=13,
    spacing="edm",
    sigma_min=0.02,
    rho=5.0,
    guidance=2.5,
    guidance_interval=(0.25, 2.0),
    denoise_last="always",
)


def published(folder: Path, name: str) -> tuple[Path, int]:
    """Write the weights of the original code as it does; return the file and the channels of a head."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        keys = [key for key in file.keys() if key.startswith("weights.")]  # noqa: SIM118
        weights = {key.removeprefix("weights."): file.get_tensor(key) for key in keys}
        settings = json.loads(file.metadata()["config"])
    torch.save(weights, folder / "published.pt")
    width = settings.get("hidden_size") or settings["embed_dim"]
    return folder / "published.pt", int(width // settings["num_heads"])


def resampled(run: Run, sampling: SamplingConfig) -> None:
    """Give a run another sampler, as the command line does when training goes on."""
    write_json(run.config_file, to_dict(dataclasses.replace(run.config(), sampling=sampling)))


def on_latents(run: Run, path: Path, codec: CodecConfig, shape: tuple[int, int, int]) -> Run:
    """Return a run with the same weights on the latents of another autoencoder, or on pixels."""
    config = run.config()
    config = dataclasses.replace(config, codec=codec, data=dataclasses.replace(config.data, shape=shape))
    model, ema = (dict(run.denoiser("best", part).network.state_dict()) for part in ("model", "ema"))
    return Run.create(path, config, fill=lambda new: save_first_checkpoint(new, config, model=model, ema=ema))


def output(run: Run) -> Tensor:
    network, generator = run.denoiser().network, torch.Generator().manual_seed(0)
    x = torch.randn(3, *run.config().input_shape, generator=generator)
    labels = torch.tensor([0, 2, -1]) if run.config().network.num_classes else None
    with torch.no_grad():
        return network(x, torch.tensor([5.0, 100.0, 900.0]), [3], Conditioning(labels=labels))


def loaded(state: dict[str, Tensor]) -> nn.Module:
    """Load a state dict strictly into modules with parameters of these names, as the original code does."""
    root = nn.Module()
    for name, value in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(torch.zeros_like(value)))
    root.load_state_dict(state, strict=True)
    return root


@pytest.mark.parametrize("name", SUFFIX)
def test_an_imported_run_remembers_its_settings_through_export(name: str, tmp_path: Path) -> None:
    file, heads = published(tmp_path, name)
    depth = 2 if name == "dit" else None
    run = import_published(file, tmp_path / "run", head_channels=heads, encoder_depth=depth)
    codec = run.config().codec
    if codec.used:  # an autoencoder that divides sides by 4
        shape = (3, 4 * codec.shape[1], 4 * codec.shape[2])
        run = on_latents(run, tmp_path / "other", dataclasses.replace(codec, scale=0.75, shift=0.125), shape)
    resampled(run, SAMPLER)
    config = run.config()
    out = tmp_path / f"exported{SUFFIX[name]}"
    assert cli.main(["export", str(run.path), "--out", str(out)]) == 0
    again = import_published(out, tmp_path / "again")
    found = again.config()
    assert found.sampling == SAMPLER
    assert (found.network, found.codec, found.data.shape) == (config.network, config.codec, config.data.shape)
    assert torch.equal(output(again), output(run))
    content = torch.load(out, weights_only=True)
    loaded(content["ema"] if name == "dit" else content)
    twice = import_published(export_published(again, tmp_path / f"twice{SUFFIX[name]}"), tmp_path / "third")
    assert twice.config().sampling == SAMPLER


def test_options_at_import_overrule_what_a_file_remembers(tmp_path: Path) -> None:
    file, heads = published(tmp_path, "dit")
    run = import_published(file, tmp_path / "run", head_channels=heads, encoder_depth=2)
    out = export_published(run, tmp_path / "exported.pt")
    again = import_published(out, tmp_path / "again", encoder_depth=1, head_channels=heads // 2)
    assert (again.config().network.encoder_depth, again.config().network.head_channels) == (1, heads // 2)


def test_classes_of_a_round_number_of_rows_need_not_be_told_again(tmp_path: Path) -> None:
    file, heads = published(tmp_path, "uvit_classes")
    weights = torch.load(file)
    weights["label_emb.weight"] = torch.randn(10, weights["label_emb.weight"].shape[1])
    torch.save(weights, file)
    run = import_published(file, tmp_path / "run", head_channels=heads, classes=9)
    again = import_published(export_published(run, tmp_path / "exported.pth"), tmp_path / "again")
    assert again.config().network == run.config().network
    assert again.config().network.num_classes == 9


def test_four_channels_of_pixels_do_not_become_latents(tmp_path: Path) -> None:
    file, heads = published(tmp_path, "uvit_classes")
    run = import_published(file, tmp_path / "run", head_channels=heads)
    assert run.config().codec.used
    run = on_latents(run, tmp_path / "pixels", CodecConfig(), run.config().input_shape)
    found = import_published(export_published(run, tmp_path / "exported.pth"), tmp_path / "again").config()
    assert (found.codec.used, found.data.shape) == (False, run.config().input_shape)


def test_inputs_of_another_size_than_the_positions_are_not_exported_but_padded_ones_are(tmp_path: Path) -> None:
    file, heads = published(tmp_path, "uvit_classes")
    run = import_published(file, tmp_path / "run", head_channels=heads)
    codec = run.config().codec
    other, padded = (
        on_latents(run, tmp_path / name, dataclasses.replace(codec, shape=(4, side, 8)), (3, 8 * side, 64))
        for name, side in (("other", 10), ("padded", 7))
    )
    with pytest.raises(UserError, match=r"network.size=\[8, 8\]: the inputs of this run are \[10, 8\]"):
        export_published(other, tmp_path / "other.pth")
    assert not (tmp_path / "other.pth").exists()
    again = import_published(export_published(padded, tmp_path / "padded.pth"), tmp_path / "again").config()
    assert (again.input_shape, again.data.shape, again.network) == ((4, 7, 8), (3, 56, 64), run.config().network)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_channels": "8"}, "arguments: head_channels='8' must be a positive whole number"),
        ({"encoder_depth": True}, "arguments: encoder_depth=True must be a positive whole number"),
        ({"head_channels": 16, "scale_factor": -1.0}, r"arguments: scale_factor=-1.0 must be a positive number"),
        (
            {"head_channels": 16, "scale_factor": 1.0, "shift_factor": "a"},
            "arguments: shift_factor='a' must be a finite",
        ),
        (
            {"head_channels": 16, "data_shape": [3, 0, 8]},
            r"arguments: data_shape=\[3, 0, 8\] must be \[channels, height",
        ),
        ({"head_channels": 16, "classes": 5}, "arguments: classes=5, but the class table is of 6"),
        ({"head_channels": 16, "data_shape": [3, 8, 8]}, r"data_shape=\[3, 8, 8\], but the network has 4 channels"),
        (
            {"head_channels": 16, "input_shape": [4, 10, 8]},
            r"input_shape=\[4, 10, 8\], but the network is for \[4, 8, 8\]",
        ),
        ({"head_channels": 16, "noise": "edm"}, "arguments: noise='edm' must be one of ddpm, sit"),
        ({"head_channels": 16, "data_shape": "a"}, r"arguments: data_shape='a' must be \[channels, height"),
    ],
    ids=str,
)
def test_damaged_settings_of_a_file_are_named(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    file, _ = published(tmp_path, "dit")
    torch.save({"model": torch.load(file), "ema": torch.load(file), "arguments": arguments}, file)
    with pytest.raises(UserError, match=message):
        import_published(file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_sampler_that_is_not_known_is_left_out(tmp_path: Path) -> None:
    file, _ = published(tmp_path, "dit")
    arguments = {"head_channels": 16, "scale_factor": 1.0, "sampling": {"solver": "of-a-later-release"}}
    torch.save({"model": torch.load(file), "ema": torch.load(file), "arguments": arguments}, file)
    with pytest.warns(UserWarning, match=r"the sampling settings of the file are left out: .*of-a-later-release"):
        run = import_published(file, tmp_path / "run")
    assert run.config().sampling == SamplingConfig(calls=20)
