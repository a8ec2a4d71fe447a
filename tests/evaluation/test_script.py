from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import pytest
import torch

from multistage_diffusion.evaluation import FeatureExtractor, extract, get_features
from multistage_diffusion.evaluation.extraction import EXTRACT_BATCH


class Means(torch.nn.Module):
    """Mean and largest value of an image, or an answer that is wrong in one way."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.fault == "raises" or images.dtype != torch.uint8:
            raise RuntimeError("of no use")
        x = images.float().flatten(1)
        out = torch.stack([x.mean(dim=1), x.amax(dim=1)], dim=1)
        if self.fault == "rows":
            return out[1:]
        if self.fault == "integers":
            return out.long()
        if self.fault == "nan":
            return out / 0.0 * 0.0
        return out


def scripted(path: Path, fault: str = "") -> FeatureExtractor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(Means(fault)).save(str(path))
    return get_features(str(path))


def test_a_torchscript_file_is_a_feature_function(tmp_path: Path) -> None:
    extractor = scripted(tmp_path / "means.pt")
    images = torch.randint(0, 256, (EXTRACT_BATCH + 1, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(extract(extractor, images), Means()(images))
    digest = hashlib.sha256((tmp_path / "means.pt").read_bytes()).hexdigest()[:12]
    assert extractor.name == f"torchscript means.pt ({digest})"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raises", r"failed on uint8 images \(2, 1, 4, 4\): .*of no use"),
        ("rows", r"returned \(1, 2\) for 2 images; it must return \(2, D\)"),
        ("integers", "returned torch.int64"),
        ("nan", "or values that are not finite"),
    ],
)
def test_a_torchscript_file_that_answers_wrongly_is_refused(tmp_path: Path, fault: str, message: str) -> None:
    extractor = scripted(tmp_path / "faulty.pt", fault)
    with pytest.raises(ValueError, match=f"torchscript faulty.pt .*{message}") as caught:
        extractor(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_torchscript_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"features='.*none.pt': No such file"):
        get_features(str(tmp_path / "none.pt"))
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(ValueError, match=r"text.pt': not a TorchScript file"):
        get_features(str(tmp_path / "text.pt"))
