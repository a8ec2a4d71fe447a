"""Shared by the tests of training and sampling: what makes tiny runs, as fixtures."""

from __future__ import annotations

import pytest
from tiny import tiny_config, tiny_data


@pytest.fixture(name="tiny_config", scope="session")
def tiny_config_fixture():
    return tiny_config


@pytest.fixture(name="tiny_data", scope="session")
def tiny_data_fixture():
    return tiny_data
