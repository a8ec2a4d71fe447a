"""Registries: one more file in the folder adds an implementation; nothing else changes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from multistage_diffusion.errors import UserError
from multistage_diffusion.registry import Registry


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an importable package `solvers_here` with a registry and one solver."""
    folder = tmp_path / "solvers_here"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from multistage_diffusion.registry import Registry\nSOLVERS = Registry('sampling.solver', __name__)\n"
    )
    (folder / "heun.py").write_text("from . import SOLVERS\n@SOLVERS.add('heun')\ndef heun(): return 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "solvers_here"]:
        del sys.modules[name]


def registry() -> Registry[object]:
    import solvers_here

    return solvers_here.SOLVERS


def test_a_file_in_the_folder_adds_one(folder: Path) -> None:
    (folder / "euler.py").write_text("from . import SOLVERS\n@SOLVERS.add('euler')\ndef euler(): return 1\n")
    assert registry().names() == ("euler", "heun")
    assert registry()["euler"]() == 1
    assert "heun" in registry()
    assert list(registry()) == ["euler", "heun"]


def test_the_order_of_names_does_not_depend_on_what_was_imported_first(folder: Path) -> None:
    (folder / "euler.py").write_text("from . import SOLVERS\n@SOLVERS.add('euler')\ndef euler(): return 1\n")
    importlib.import_module("solvers_here.heun")
    assert registry().names() == ("euler", "heun")
    with pytest.raises(UserError, match="must be one of euler, heun"):
        registry()["rk4"]


def test_nothing_is_imported_before_the_first_lookup(folder: Path) -> None:
    solvers = registry()
    assert "solvers_here.heun" not in sys.modules
    assert solvers["heun"]() == 2
    assert "solvers_here.heun" in sys.modules


def test_files_with_an_underscore_are_no_implementations(folder: Path) -> None:
    (folder / "_broken.py").write_text("raise RuntimeError\n")
    assert registry().names() == ("heun",)


def test_an_unknown_name_lists_the_known_ones(folder: Path) -> None:
    with pytest.raises(UserError, match=r"sampling.solver='rk4' must be one of heun"):
        registry()["rk4"]


def test_a_script_may_add_one(folder: Path) -> None:
    solvers = registry()
    solvers.add("own")(len)
    assert solvers["own"] is len
    assert "heun" in solvers  # the folder's own are there, too


def test_a_name_cannot_be_taken_twice(folder: Path) -> None:
    (folder / "other.py").write_text("from . import SOLVERS\n@SOLVERS.add('heun')\ndef heun(): return 3\n")
    with pytest.raises(ValueError, match="'heun' is registered twice"):
        registry().names()
