from __future__ import annotations

from pathlib import Path

import pytest

from multistage_diffusion.evaluation.features import features_help, get_features


def test_unknown_features_list_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"features='incepton' is unknown; choose one of .*inception.*, pixels.*TorchScript"
    ):
        get_features("incepton")
    with pytest.raises(
        ValueError, match=r"features='pixels' takes no file of weights; w\.pth is for inception or vgg16; leave"
    ):
        get_features("pixels", Path("w.pth"))


def test_the_help_names_every_extractor_with_its_extra() -> None:
    assert "pixels" in features_help()
    assert "inception (extra: eval)" in features_help()
    assert "TorchScript file, which is code" in features_help()
