from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from multistage_diffusion.commands.options import parse_changes
from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation import get_features, trust


class Sums(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().flatten(1).sum(1, keepdim=True)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MSDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trust, "_here", set())
    torch.jit.script(Sums()).save(str(tmp_path / "sums.pt"))  # type: ignore[no-untyped-call]
    return tmp_path / "sums.pt"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand for another process."""
    monkeypatch.setattr(trust, "_here", set())


def test_a_file_of_a_configuration_runs_only_after_the_user_named_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"sums\.pt'?: is code .* --set evaluation\.features="):
        get_features(str(file), named=False)
    assert get_features(str(file)) is not None  # named in this very call
    with pytest.raises(UserError, match="is code"):
        get_features(str(file), named=False)
    parse_changes([f"evaluation.features={file}"])
    forget(monkeypatch)
    assert get_features(str(file), named=False) is not None
    file.write_bytes(file.read_bytes() + b"!")  # another file of its name
    with pytest.raises(UserError, match="is code"):
        get_features(str(file), named=False)


def test_features_that_are_no_code_need_no_consent(file: Path) -> None:
    trust.agree("pixels")
    trust.agree(str(file.with_name("none.pt")))
    assert not (file.parent / "cache").exists()
    assert get_features("pixels", named=False) is not None


def test_without_a_place_to_remember_this_process_knows(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSDIFF_CACHE", str(file / "below-a-file"))
    trust.agree(str(file))
    assert get_features(str(file), named=False) is not None
    forget(monkeypatch)
    with pytest.raises(UserError, match="is code"):
        get_features(str(file), named=False)
