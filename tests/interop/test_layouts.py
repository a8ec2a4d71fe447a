"""The three published layouts, read into one value and written from it."""

from __future__ import annotations

import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import (
    FAMILIES,
    Persistent,
    Weights,
    averaged,
    fake_modules,
    golden,
    one_stage,
    write_edm,
    write_ldm,
    write_score_sde,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from multistage_diffusion.interop.layouts import SUFFIXES, published_bytes, read_published
from multistage_diffusion.interop.names import is_buffer
from multistage_diffusion.interop.parts import Published


def learnt(weights: Weights) -> Weights:
    return {key: value for key, value in weights.items() if not is_buffer(key)}


def same(a: Weights | None, b: Weights | None) -> bool:
    assert a is not None
    assert b is not None
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def weights_of(name: str, stages: str) -> Weights:
    weights = golden(name)[1]
    return one_stage(name, weights, stage=1) if stages == "one" else weights


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_published(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


# --- score_sde


@pytest.mark.parametrize("stages", ["one", "three"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("old", [False, True])
def test_a_score_sde_file_is_read(stages: str, prefix: str, old: bool, tmp_path: Path) -> None:
    weights = weights_of("ncsnpp", stages)
    read = read_published(
        write_score_sde(tmp_path / "checkpoint_26.pth", weights, averaged(weights), prefix=prefix, old=old)
    )
    assert read.family == "ncsnpp"
    assert same(read.model, learnt(weights))
    assert same(read.ema, learnt(averaged(weights)))


def test_the_listed_average_follows_the_order_of_the_model(tmp_path: Path) -> None:
    weights = dict(reversed(golden("ncsnpp")[1].items()))
    read = read_published(write_score_sde(tmp_path / "x.pth", weights, averaged(weights)))
    assert same(read.ema, learnt(averaged(weights)))


@pytest.mark.slow
def test_a_listed_average_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    weights = golden("ncsnpp")[1]
    path = write_score_sde(tmp_path / "x.pth", weights, averaged(weights))
    content = torch.load(path, weights_only=True)
    shadow = content["ema"]["shadow_params"]
    content["ema"]["shadow_params"] = shadow[:-1]
    torch.save(content, path)
    assert refusal(path) == f"ema.shadow_params: {len(shadow) - 1} tensors for the model's {len(shadow)}"
    content["ema"]["shadow_params"] = [shadow[1], shadow[0], *shadow[2:]]
    torch.save(content, path)
    assert refusal(path).startswith("ema.shadow_params: the tensor in the place of de_modules.0.0.Conv_0.bias is")
    content["ema"] = {"decay": 0.9999}
    torch.save(content, path)
    assert refusal(path).startswith("ema.shadow_params: no tensors")


@pytest.mark.slow
def test_an_exported_ncsnpp_can_be_loaded_and_resumed_by_score_sde(tmp_path: Path) -> None:
    weights = learnt(golden("ncsnpp")[1])
    published = Published(family="ncsnpp", model=weights, ema=averaged(weights), step=7)
    (tmp_path / "x.pth").write_bytes(published_bytes(published))
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    assert content["step"] == 7
    assert {key.removeprefix("module.") for key in content["model"]} == set(golden("ncsnpp")[1])
    # its buffer is exp(linspace(log 50, log 0.01, 1000)), in the golden file to half precision
    assert torch.allclose(content["model"]["module.sigmas"].float(), golden("ncsnpp")[1]["sigmas"], rtol=1e-3)
    parameters = [nn.Parameter(torch.zeros_like(value)) for value in weights.values()]
    torch.optim.Adam(parameters).load_state_dict(content["optimizer"])
    for parameter, name, value in zip(parameters, weights, content["ema"]["shadow_params"], strict=True):
        assert parameter.shape == value.shape
        assert torch.equal(value, averaged(weights)[name])


# --- EDM


@pytest.mark.parametrize("stages", ["one", "three"])
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_an_edm_pickle_is_read_without_its_source(stages: str, protocol: int, tmp_path: Path) -> None:
    weights = weights_of("edm", stages)
    path = write_edm(tmp_path / "edm.pkl", weights, protocol=protocol, kwargs={"sigma_data": 0.25})
    assert b"the source in a pickle was run" in path.read_bytes()
    read = read_published(path)
    assert read.family == "ddpmpp"
    assert read.model is None
    assert same(read.ema, learnt(weights))
    assert read.arguments["sigma_data"] == 0.25
    assert read.arguments["channel_mult"] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kwargs": {"encoder_type": "residual"}}, "encoder_type='residual' is not DDPM++'s 'standard'"),
        ({"kwargs": {"embedding_type": "fourier"}}, "embedding_type='fourier'"),
        ({"kwargs": {"resample_filter": (1, 3, 3, 1)}}, "resample_filter=[1, 3, 3, 1]"),
        ({"kwargs": {"resample_filter": torch.ones(4)}}, "resample_filter=a Tensor"),
        ({"kind": "VPPrecond"}, "holds a 'VPPrecond'"),
        ({"kind": "MyPrecond"}, "holds a 'MyPrecond'; of EDM's networks only those preconditioned as EDMPrecond"),
        ({"network": "DhariwalUNet"}, "holds a DhariwalUNet (ADM); of EDM's networks only DDPM++ is read"),
        ({"kwargs": {"model_type": "DhariwalUNet"}}, "holds a DhariwalUNet (ADM)"),
        ({"ema": None}, "has no averaged network under 'ema', but 'ema', 'loss_fn'"),
    ],
)
def test_another_network_of_edm_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in refusal(write_edm(tmp_path / "edm.pkl", golden("edm")[1], **changes))


def test_the_intervals_of_an_edm_pickle_are_its_edges(tmp_path: Path) -> None:
    weights, path = golden("edm")[1], tmp_path / "edm.pkl"
    assert read_published(write_edm(path, weights)).arguments["sigma_edges"] == [2.5103, 7.6577]
    own = [[[0, 0.5]], [(0.5, 3)], ((3, 80.0),)]
    assert read_published(write_edm(path, weights, intervals=own)).arguments["sigma_edges"] == [0.5, 3.0]
    # what the network reads is its attribute
    assert read_published(write_edm(path, weights, kwargs={"stage_interval": own})).arguments["sigma_edges"] != [
        0.5,
        3.0,
    ]
    given = write_edm(path, weights, intervals=None, kwargs={"stage_interval": own})
    assert read_published(given).arguments["sigma_edges"] == [0.5, 3.0]
    assert "sigma_edges" not in read_published(write_edm(path, weights, intervals=None)).arguments
    assert "sigma_edges" not in read_published(write_edm(path, one_stage("edm", weights))).arguments


@pytest.mark.parametrize(
    ("intervals", "words"),
    [
        ([[[0, 1], [5, 9]], [[1, 5]], [[9, 80]]], "stage_interval: stage 1 is a union of 2 intervals"),
        ([[[0, 1]], [[2, 5]], [[5, 80]]], "stage_interval: stage 1 ends at 1 but stage 2 begins at 2"),
        ([[[5, 80]], [[1, 5]], [[0, 1]]], "stage_interval: stage 1 ends at 80 but stage 2 begins at 1"),
        ([0, 1, 2], "stage_interval=[0, 1, 2] is no list of [[low, high]]"),
        ([[[1, 0]]], "is no list of [[low, high]]"),
        ([[["0", 1]]], "is no list of [[low, high]]"),
        (7, "stage_interval=7 is no list"),
        ([], "stage_interval=[] is no list"),
    ],
)
def test_intervals_that_are_no_stages_are_refused(intervals: Any, words: str, tmp_path: Path) -> None:
    text = refusal(write_edm(tmp_path / "edm.pkl", golden("edm")[1], intervals=intervals))
    assert words in text


def test_the_arguments_of_the_multi_stage_network_tell_the_edges_of_safetensors(tmp_path: Path) -> None:
    weights = learnt(golden("edm")[1])
    arguments = {"stage_interval": [[[0.0, 0.5]], [[0.5, 3.0]], [[3.0, float("inf")]]]}
    published = Published(family="ddpmpp", model=weights, ema=averaged(weights), arguments=arguments)
    (path := tmp_path / "x.safetensors").write_bytes(published_bytes(published))
    assert read_published(path).arguments["sigma_edges"] == [0.5, 3.0]


def test_edm_s_training_state_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "training-state-002500.pt"
    with fake_modules():
        net = Persistent("EDMPrecond")
        net.add_module("model", nn.Linear(2, 2))
        torch.save({"net": net, "optimizer_state": {"state": {}, "param_groups": []}}, path)
    assert refusal(path).startswith(
        "refused: it is EDM's training state, which stores the network as source code; import the network-snapshot-*.pkl"
    )


def test_score_sde_s_ve_networks_are_refused_by_name(tmp_path: Path) -> None:
    weights = one_stage("ncsnpp", golden("ncsnpp")[1])
    moved = {re.sub(r"(?<=all_modules\.)\d+", lambda m: str(int(m[0]) + 1), name): v for name, v in weights.items()}
    path = write_score_sde(tmp_path / "x.pth", {**moved, "all_modules.0.W": torch.zeros(8)}, None)
    content = torch.load(path, weights_only=True)
    content["ema"] = {"shadow_params": list(moved.values())}  # without the frequencies, which are not trained
    torch.save(content, path)
    assert refusal(path).startswith("embeds the noise by random Fourier features (all_modules.0.W), as score_sde's VE")


def test_arguments_of_the_network_inside_count_too(tmp_path: Path) -> None:
    with fake_modules():
        net, inner = Persistent("EDMPrecond"), Persistent("SongUNet", encoder_type="residual", dropout=0.2)
        net.add_module("model", inner)
        inner.add_module("map_layer0", nn.Linear(2, 2))
        net.sigma_data = 0.25
        (path := tmp_path / "edm.pkl").write_bytes(pickle.dumps({"ema": net}))
        assert refusal(path).startswith("encoder_type='residual'")
        inner._init_kwargs["encoder_type"] = "standard"
        path.write_bytes(pickle.dumps({"ema": net}))
    arguments = read_published(path).arguments
    assert (arguments["dropout"], arguments["sigma_data"]) == (0.2, 0.25)


@pytest.mark.parametrize("groups", [16, 32])
def test_the_groups_of_an_edm_network_are_in_its_pickle(groups: int, tmp_path: Path) -> None:
    names = ("model.map_layer0.weight", "model.enc.8x8_block0.norm0.weight", "model.enc.8x8_block0.norm1.weight")
    weights = {name: torch.ones(size) for name, size in zip(names, ((1, 1), 256, 32), strict=True)}
    path = write_edm(tmp_path / "edm.pkl", weights, groups=groups)
    assert read_published(path).norm_groups == groups
    path = write_edm(path, {**weights, names[1]: torch.ones(48)}, groups=groups)
    assert read_published(path).norm_groups == 16  # as many as a quarter of the channels, whatever the most
    path = write_edm(path, {**weights, "model.x.norm0.weight": torch.ones(256)}, groups=groups, odd="model.x.norm0")
    assert refusal(path) == f"model.x.norm0 normalises 256 channels in 8 groups, others in up to {groups}"


def test_the_groups_of_score_sde_s_own_networks_are_32_and_ours_are_written(tmp_path: Path) -> None:
    weights = golden("ncsnpp")[1]
    assert read_published(write_score_sde(tmp_path / "x.pth", weights, None)).norm_groups == 16
    alone = one_stage("ncsnpp", weights)
    assert read_published(write_score_sde(tmp_path / "x.pth", alone, None)).norm_groups == 32
    published = Published(family="ncsnpp", model=learnt(alone), ema=learnt(alone))
    (tmp_path / "x.pth").write_bytes(published_bytes(published))
    read = read_published(tmp_path / "x.pth")
    assert (read.norm_groups, read.arguments) == (16, {})


def test_a_pickle_without_an_average_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "edm.pkl").write_bytes(pickle.dumps({"dataset_kwargs": {}}))
    assert refusal(path) == "has no averaged network under 'ema', but 'dataset_kwargs'"
    path.write_bytes(pickle.dumps([1, 2]))
    assert refusal(path) == "the pickle: is a list, not a dictionary"


def test_modules_that_hold_each_other_end_the_reading(tmp_path: Path) -> None:
    with fake_modules():
        net, inner = Persistent("EDMPrecond"), nn.ModuleDict()
        inner.add_module("inner", inner)
        net.add_module("model", inner)
        (path := tmp_path / "edm.pkl").write_bytes(pickle.dumps({"ema": net}))
    assert "one found twice" in refusal(path)
    with fake_modules():
        net = Persistent("EDMPrecond")
        net._modules["model"] = torch.zeros(1)  # type: ignore[assignment]
        net._parameters["list"] = [1]  # type: ignore[assignment]
        (path := tmp_path / "edm.pkl").write_bytes(pickle.dumps({"ema": net}))
    assert refusal(path) == "ema._parameters: 'list' is a list, not a tensor"


def test_an_exported_ddpmpp_has_edm_s_names_and_arguments(tmp_path: Path) -> None:
    weights = golden("edm")[1]
    published = Published(
        family="ddpmpp",
        model=learnt(weights),
        ema=learnt(averaged(weights)),
        arguments={"sigma_data": 0.75, "channel_mult": [1, 2]},
        settings={"sigma_edges": [1.5]},
    )
    (path := tmp_path / "x.safetensors").write_bytes(published_bytes(published))
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        # EDM's constructor takes no other arguments than its own
        assert json.loads(file.metadata()["arguments"]) == published.arguments
        assert json.loads(file.metadata()["msdiff"]) == {"sigma_edges": [1.5], "norm_groups": 16}
        # every parameter and buffer that EDM's module has, and nothing else
        assert keys == {f"{part}.{name}" for part in ("net", "ema") for name in weights}
        for name in keys:
            if name.endswith("resample_filter"):
                assert torch.equal(file.get_tensor(name), weights[name.partition(".")[2]])


def test_other_safetensors_are_named(tmp_path: Path) -> None:
    save_file({"unet.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert refusal(tmp_path / "x.safetensors").startswith("unet.weight: is neither net.NAME nor ema.NAME")
    save_file({"net.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert "its first tensor, weight, is of unknown code" in refusal(tmp_path / "x.safetensors")
    save_file({"net.model.map_layer0.bias": torch.zeros(2)}, tmp_path / "x.safetensors", {"arguments": "{"})
    assert refusal(tmp_path / "x.safetensors") == "its metadata are not those of msdiff export"


# --- latent diffusion


@pytest.mark.parametrize("stages", ["one", "three"])
def test_a_latent_diffusion_file_is_read(stages: str, tmp_path: Path) -> None:
    weights = weights_of("ldm", stages)
    state = {"first_stage_model.quant_conv.weight": torch.ones(3, 3, 1, 1), "scale_factor": torch.tensor(0.5)}
    read = read_published(write_ldm(tmp_path / "model.ckpt", weights, averaged(weights), state=state))
    assert read.family == "ldm"
    assert same(read.model, weights)
    assert same(read.ema, averaged(weights))
    assert set(read.codec) == {"quant_conv.weight"}
    assert set(read.buffers) == {"betas", "alphas_cumprod", "logvar", "scale_factor"}
    assert "pytorch_lightning" not in sys.modules


def test_a_state_dict_without_a_u_net_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {"input_blocks.0.0.weight": torch.zeros(2)}}, path := tmp_path / "model.ckpt")
    assert refusal(path) == "state_dict holds no U-Net (model.diffusion_model.*), but 'input_blocks.0.0.weight'"


def test_a_latent_diffusion_average_that_does_not_fit_is_named(tmp_path: Path) -> None:
    weights = golden("ldm")[1]
    average = averaged(weights)
    del average["outs.2.2.bias"]
    path = write_ldm(tmp_path / "model.ckpt", weights, average)
    assert refusal(path) == "model_ema: no average of outs.2.2.bias (0 too many, 1 missing)"
    path = write_ldm(tmp_path / "model.ckpt", weights, averaged(weights) | {"label_emb.weight": torch.zeros(1)})
    words = "model_ema: diffusion_modellabel_embweight averages no weight of the U-Net (1 too many, 0 missing)"
    assert refusal(path) == words


# --- all


@pytest.mark.parametrize("stages", ["one", "three"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_is_read_again_bit_for_bit(name: str, stages: str, tmp_path: Path) -> None:
    weights = learnt(weights_of(name, stages))
    published = Published(
        family=FAMILIES[name],  # type: ignore[arg-type]
        model=weights,
        ema=averaged(weights),
        codec={"quant_conv.weight": torch.ones(3)} if name == "ldm" else {},
        buffers={"betas": torch.rand(10)} if name == "ldm" else {},
        arguments={"sigma_edges": [0.1, 2.5], "dropout": 0.1},
    )
    path = tmp_path / f"x{SUFFIXES[published.family]}"
    path.write_bytes(published_bytes(published))
    read = read_published(path)
    for part in ("model", "ema", "codec", "buffers"):
        assert same(getattr(read, part), getattr(published, part))
    assert list(read.model or ()) == list(weights)
    assert (read.family, read.arguments) == (published.family, published.arguments)


def test_a_missing_average_is_none(tmp_path: Path) -> None:
    assert read_published(write_score_sde(tmp_path / "x.pth", golden("ncsnpp")[1], None)).ema is None
    assert read_published(write_ldm(tmp_path / "x.ckpt", golden("ldm")[1], None)).ema is None


@pytest.mark.parametrize(
    ("write", "name", "words"),
    [
        (
            write_score_sde,
            "ldm",
            "that of score_sde's NCSN++ (.pth), but its first tensor, de_modules.0.0.0.emb_layers.1.bias, is that of latent",
        ),
        (write_score_sde, "edm", "is that of EDM's DDPM++ (.pkl)"),
        (
            write_ldm,
            "ncsnpp",
            "this layout is that of latent diffusion's U-Net (.ckpt), but its first tensor, de_modules.0.0.Conv_0.bias",
        ),
        (write_ldm, "edm", "is that of EDM's DDPM++ (.pkl)"),
    ],
)
def test_a_network_of_another_family_is_named(write: Any, name: str, words: str, tmp_path: Path) -> None:
    assert words in refusal(write(tmp_path / "x.pth", golden(name)[1], None))


def test_an_edm_pickle_of_another_family_is_named(tmp_path: Path) -> None:
    text = refusal(write_edm(tmp_path / "x.pkl", learnt(golden("ncsnpp")[1])))
    assert text.endswith("is that of score_sde's NCSN++ (.pth)")


def test_a_torch_file_of_another_layout_is_named(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "x.pth")
    assert refusal(tmp_path / "x.pth").startswith("has neither 'model' (score_sde) nor 'state_dict'")
    torch.save({"model": {"en_modules.0.weight": "x"}}, tmp_path / "x.pth")
    assert refusal(tmp_path / "x.pth") == "model: 'en_modules.0.weight' is a str, not a tensor"
    torch.save(torch.zeros(2), tmp_path / "x.pth")
    assert refusal(tmp_path / "x.pth") == "the file: is a Tensor, not a dictionary"


@pytest.mark.parametrize(
    "value",
    [torch.zeros(1).expand(10**6, 10**6), torch.zeros(3).to_sparse(), torch.zeros(3, device="meta")],
    ids=["expanded", "sparse", "meta"],
)
def test_tensors_that_do_not_hold_their_numbers_are_refused(value: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"model": {"en_modules.0.weight": value}}, tmp_path / "x.pth")
    assert "does not hold all of its" in refusal(tmp_path / "x.pth")
