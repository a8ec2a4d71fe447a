"""model_index.json: what diffusers' own pipelines write is understood, and what cannot be a run is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from foreign_pipelines import unet, with_part

from multistage_diffusion import cli
from multistage_diffusion.errors import UserError
from multistage_diffusion.interop.diffusers_folder import read_folder
from multistage_diffusion.interop.pipeline_index import read_index

diffusers = pytest.importorskip("diffusers")

KL = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


def vq() -> Any:
    return diffusers.VQModel(latent_channels=3, block_out_channels=(8,), norm_num_groups=4)


def dit() -> Any:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
    return diffusers.DiTTransformer2DModel(**sizes, in_channels=4, num_embeds_ada_norm=3)


def pipelines() -> dict[str, Any]:
    kl = diffusers.AutoencoderKL(**KL, latent_channels=4)
    return {
        "DDPMPipeline": diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()),
        "DDIMPipeline": diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler()),
        "PNDMPipeline": diffusers.PNDMPipeline(unet(), diffusers.PNDMScheduler()),
        "LDMPipeline": diffusers.LDMPipeline(vq(), unet(), diffusers.DDIMScheduler(clip_sample=False)),
        "DiTPipeline": diffusers.DiTPipeline(dit(), kl, diffusers.DDIMScheduler(), id2label={"0": "cat, dog"}),
    }


def changed(folder: Path, **changes: Any) -> Path:
    """Change a folder's model_index.json; None takes a key out."""
    file = folder / "model_index.json"
    said = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))
    return folder


@pytest.fixture
def ddpm(tmp_path: Path) -> Path:
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize("kind", pipelines())
def test_pipelines_that_diffusers_writes_are_understood(kind: str, tmp_path: Path) -> None:
    pipe = pipelines()[kind]
    pipe.save_pretrained(tmp_path)
    found = read_index(tmp_path)
    assert found is not None
    assert found.pipeline == kind
    parts = {part.name: part for part in (found.network, found.scheduler, found.codec) if part is not None}
    assert {name: part.kind for name, part in parts.items()} == {
        name: type(value).__name__ for name, value in pipe.components.items()
    }
    assert all(part.folder == tmp_path / name for name, part in parts.items())


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path)
    assert read_index(tmp_path) is None


def test_components_are_found_by_their_names(ddpm: Path) -> None:
    for name in ("unet", "scheduler"):
        (ddpm / name).rename(ddpm / f"my_{name}")
    parts = {"my_unet": ["diffusers", "UNet2DModel"], "my_scheduler": ["diffusers", "DDPMScheduler"]}
    changed(ddpm, unet=None, scheduler=None, extra=[None, None], **parts)
    with_part(ddpm, "first_stage", vq())
    found = read_folder(ddpm)
    assert (found.network["_class_name"], found.scheduler["_class_name"]) == ("UNet2DModel", "DDPMScheduler")
    assert found.codec == ddpm / "first_stage"


def test_movq_is_an_autoencoder(ddpm: Path) -> None:
    assert read_folder(with_part(ddpm, "movq", vq())).codec == ddpm / "movq"


def test_old_pipelines_have_all_files_in_one_folder(ddpm: Path) -> None:
    """google/ddpm-cifar10-32 is such a folder; diffusers reads it so, too."""
    for part in ("unet", "scheduler"):
        for file in (ddpm / part).iterdir():
            file.rename(ddpm / file.name)
        (ddpm / part).rmdir()
    assert diffusers.DDPMPipeline.from_pretrained(ddpm).unet.config.sample_size == 8
    found = read_folder(ddpm)
    assert (found.network["sample_size"], found.scheduler["_class_name"]) == (8, "DDPMScheduler")


OTHERS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("KarrasVePipeline", {"scheduler": ["diffusers", "KarrasVeScheduler"]}, ["noise of KarrasVeScheduler"]),
    ("ScoreSdeVePipeline", {"scheduler": ["diffusers", "ScoreSdeVeScheduler"]}, ["noise of ScoreSdeVeScheduler"]),
    ("ConsistencyModelPipeline", {}, ["maps noise to an image at once"]),
    ("LDMSuperResolutionPipeline", {"vqvae": ["diffusers", "VQModel"]}, ["is told of a small image"]),
    ("MultistagePipeline", {"_class_name": ["pipeline_1", "MultistagePipeline"]}, ["--init-from RUN"]),
    (
        "StableDiffusionPipeline",
        {
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "unet": ["diffusers", "UNet2DConditionModel"],
        },
        ["text_encoder (CLIPTextModel), tokenizer (CLIPTokenizer)", "told of classes at most"],
    ),
    (
        "MyPipeline",
        {"told": ["transformers", "SiglipVisionTransformer"]},
        ["told (SiglipVisionTransformer)"],
    ),
    ("WanPipeline", {"unet_2": ["diffusers", "UNet2DModel"]}, ["more than one network (unet, unet_2)"]),
    ("MyPipeline", {"second": ["diffusers", "DDIMScheduler"]}, ["more than one scheduler (scheduler, second)"]),
]


@pytest.mark.parametrize(("kind", "changes", "said"), OTHERS, ids=[f"{kind} {list(c)[:1]}" for kind, c, _ in OTHERS])
def test_what_cannot_be_a_run_is_refused_by_name(
    kind: str, changes: dict[str, Any], said: list[str], ddpm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(ddpm, **{"_class_name": kind, **changes})
    assert cli.main(["import", str(ddpm), "--out", str(ddpm.parent / "run")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for words in (f"{ddpm / 'model_index.json'}: {kind} ", "DDPMPipeline, DDIMPipeline", *said):
        assert words in err
    assert not (ddpm.parent / "run").exists()


def test_names_of_refused_pipelines_are_those_of_diffusers() -> None:
    names = {kind for kind, _, _ in OTHERS if not kind.startswith("M")}
    listed = Path(diffusers.__file__).read_text()  # also those that need other packages
    assert {kind for kind in names if f'"{kind}"' not in listed} == set()


def test_where_index_and_files_contradict_one_another_it_is_said(ddpm: Path) -> None:
    index = (ddpm / "model_index.json").read_text()
    changed(ddpm, vae=["diffusers", "AutoencoderKL"])
    with pytest.raises(UserError, match=r"names vae \(AutoencoderKL\), but there is no folder vae"):
        read_folder(ddpm)
    (ddpm / "model_index.json").write_text(index)
    vq().save_pretrained(ddpm / "vqvae")
    with pytest.raises(
        UserError, match=r'names no autoencoder, .* folder vqvae; .* add "vqvae": \["diffusers", "VQModel"\]'
    ):
        read_folder(ddpm)
    changed(ddpm, vqvae=["diffusers", "AutoencoderKL"])
    with pytest.raises(UserError, match=r"_class_name='VQModel', but model_index\.json says vqvae is 'AutoencoderKL'"):
        read_folder(ddpm)
    changed(ddpm, vqvae=["diffusers", "VQModel"], unet=["diffusers", "UNet2DConditionModel"])
    with pytest.raises(UserError, match=r"'UNet2DModel', but model_index\.json says unet is 'UNet2DConditionModel'"):
        read_folder(ddpm)
    changed(ddpm, unet=None)
    with pytest.raises(UserError, match="names no network"):
        read_folder(ddpm)
    changed(ddpm, unet=["diffusers", "UNet2DModel"])
    (ddpm / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match=r"scheduler_config.json: is missing, but .* names scheduler \(DDPMScheduler\)"):
        read_folder(ddpm)


def test_the_class_of_the_scheduler_is_that_of_the_index_as_in_diffusers(ddpm: Path) -> None:
    diffusers.DDIMScheduler().save_pretrained(ddpm / "scheduler")
    assert type(diffusers.DDPMPipeline.from_pretrained(ddpm).scheduler).__name__ == "DDPMScheduler"
    with pytest.warns(UserWarning, match="_class_name='DDIMScheduler', but .* says 'DDPMScheduler'"):
        assert read_folder(ddpm).scheduler["_class_name"] == "DDPMScheduler"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no mapping"),
        ("{", "model_index.json"),
        ('{"../unet": ["diffusers", "UNet2DModel"]}', "'../unet': .* is no component"),
        ('{"unet": ["diffusers", 3]}', "'unet': .* is no component"),
        ('{"_class_name": ["own", "Mine"], "id2label": {}, "n": 3}', "names no network"),
    ],
)
def test_a_damaged_index_is_refused(text: str, message: str, ddpm: Path) -> None:
    (ddpm / "model_index.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_folder(ddpm)
    assert "\n" not in str(caught.value)
