"""Model tests run on one thread, because their tensors are tiny."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def tests_of_models(one_thread):
    """Every module here."""
