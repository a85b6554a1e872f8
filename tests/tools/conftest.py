"""Fixtures of the tests of scripts."""

import shutil

import pytest
from bare_machine import Machine


@pytest.fixture
def machine(tmp_path):
    if not all(shutil.which(name) for name in ("bash", "awk", "tar")):
        pytest.skip("needs bash, awk and tar")
    return Machine(tmp_path)
