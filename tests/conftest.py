"""Shared by the tests: what makes tiny runs, and a folder of real images, as fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest
from crops import make_crops
from tiny import tiny_config, tiny_data


@pytest.fixture(name="tiny_config", scope="session")
def tiny_config_fixture():
    return tiny_config


@pytest.fixture(name="tiny_data", scope="session")
def tiny_data_fixture():
    return tiny_data


@pytest.fixture(scope="session")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pieces of two photographs, 48 to 96 pixels a side, JPEG and PNG, in a folder for each photograph."""
    pytest.importorskip("sklearn")
    return make_crops(tmp_path_factory.mktemp("real") / "crops")
