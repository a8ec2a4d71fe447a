"""Published networks and scores, with random weights: those of the published ones are not on every machine."""

from __future__ import annotations

import sys
import urllib.error
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation import extract, fidelity, frechet_distance, get_features, precision_recall
from multistage_diffusion.evaluation.fidelity import DINOv2, Inception
from multistage_diffusion.evaluation.kernel_distance import kernel_distance

pytest.importorskip("torch_fidelity")
FID = {"prc_neighborhood": 3, "prc_batch_size": 10000, "save_cpu_ram": False, "verbose": False}


def smooth_images(count: int, seed: int, channels: int = 1, size: int = 16) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=g) * torch.rand(count, 1, 1, 1, generator=g)
    return (F.interpolate(coarse, (size, size), mode="bilinear") * 255).to(torch.uint8)


@pytest.fixture(scope="module", name="weights")
def fixture_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the state of a randomly initialised Inception whose features vary."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):  # activations that neither die nor explode
            torch.nn.init.kaiming_normal_(layer.weight)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def agree(fake: torch.Tensor, real: torch.Tensor) -> None:
    """Compare our numbers with torch-fidelity's on the same features, in float64: its float32 distances are rounded."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    fake, real = fake.double(), real.double()
    statistics = [fid_features_to_statistics(x) for x in (fake, real)]
    theirs = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert frechet_distance(fake, real) == pytest.approx(theirs, rel=1e-6)
    prc = prc_features_to_metric(fake, real, **FID)
    precision, recall = precision_recall(real, fake)
    assert (precision, recall) == pytest.approx((prc["precision"], prc["recall"]), abs=1e-3)


def test_ours_agree_on_the_small_classifier_s_features() -> None:
    extractor = get_features("fashion-classifier")
    agree(extract(extractor, smooth_images(400, 0)), extract(extractor, smooth_images(500, 1) // 2))


@pytest.mark.slow
def test_ours_agree_on_inception_s_features(weights: Path) -> None:
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    # an early layer: more images than dimensions, where torch-fidelity's eigenvalues are exact, too, and quick
    stem = FEATURE_EXTRACTORS_REGISTRY["inception-v3-compat"](
        "inception-v3-compat", ["64"], feature_extractor_weights_path=str(weights), verbose=False
    )
    fake, real = (torch.cat([stem(x)[0] for x in smooth_images(80, seed, 3).split(16)]) for seed in (0, 1))
    assert float(fake.var(dim=0).sum()) > 0.01
    agree(fake, real)


@pytest.mark.slow
def test_inception_is_torch_fidelity_s_own(weights: Path) -> None:
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    grey = smooth_images(2, 0)
    own = FEATURE_EXTRACTORS_REGISTRY["inception-v3-compat"](
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights), verbose=False
    )
    features, logits = own(grey.repeat(1, 3, 1, 1))
    extractor = Inception(weights)
    assert torch.equal(extractor(grey), features)
    torch.testing.assert_close(extractor.logits(features), logits)
    assert extractor.name.startswith("inception-v3-compat 2048 (torch-fidelity 0.")
    assert "weights " in extractor.name
    assert "299x299" in extractor.preprocessing


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"nonsense", "not a file of weights alone"),
        (Bomb(), "not a file of weights alone"),
        ([1, 2], "does not hold a state_dict"),
        ({"a": torch.zeros(1)}, "not the weights of inception-v3-compat"),
    ],
)
def test_no_other_file_is_taken_for_weights(content, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("weights.pth")
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(ValueError, match=f"weights.pth: .*{message}") as caught:
        get_features("inception", file)
    assert "\n" not in str(caught.value)
    assert not Path("exploded").exists()


def test_a_flipped_bit_of_weights_is_found(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"a": torch.full((2,), 3.0)}, file)
    content = bytearray(file.read_bytes())
    content[content.index(torch.full((2,), 3.0).numpy().tobytes()) + 1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth: is truncated or damaged \(entry .*Bad CRC-32"):
        get_features("inception", file)


def test_without_a_network_the_mend_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(
        ValueError, match=r"features='inception': .* cannot be downloaded \(no network\).*--inception-weights"
    ):
        get_features("inception")
    assert list(tmp_path.rglob("*.pth")) == []


def test_weights_are_downloaded_once(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = []

    def download(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        urls.append((url, hash_prefix))
        Path(path).write_bytes(weights.read_bytes())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(Inception, "_load", lambda *_: torch.nn.Identity())
    assert Inception().name == Inception().name
    assert urls == [(Inception.url, "6726825d")]


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for call in (lambda: get_features("inception"), lambda: kernel_distance(torch.zeros(5, 2), torch.zeros(5, 2))):
        with pytest.raises(ValueError, match=r"pip install 'multistage-diffusion\[eval\]'"):
            call()
    assert "torch-fidelity" in fidelity.why_unavailable()


def test_dinov2_loads_itself() -> None:
    with pytest.raises(ValueError, match="features='dinov2' takes no file of weights"):
        get_features("dinov2", Path("weights.pth"))


def test_weights_that_cannot_be_fetched_name_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity import registry

    def offline(*_: object, **__: object) -> None:
        raise RuntimeError("It looks like there is no internet connection")

    monkeypatch.setitem(registry.FEATURE_EXTRACTORS_REGISTRY, "dinov2-vit-l-14", offline)
    with pytest.raises(
        UserError,
        match=r"^features='dinov2': its weights cannot be downloaded \(It looks .*connect to the network once",
    ):
        DINOv2()
