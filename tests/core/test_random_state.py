"""Random generators are put back to the bit."""

import random

import numpy as np
import pytest
import torch

from mmdet3d.core.random_state import capture_random_state, preserved_random_state, restore_random_state


def draw(device):
    return (random.random(), random.gauss(0, 1), np.random.normal(), np.random.randint(1000),  # noqa: NPY002
            torch.rand(3).tolist(), torch.rand(3, device=device).tolist())


def test_draws_repeat(device, tmp_path):
    random.gauss(0, 1), np.random.normal()  # noqa: NPY002 - each keeps a second number for later
    state = capture_random_state(device)
    first = draw(device)
    torch.save(state, tmp_path / "state.pth")
    draw(device)
    restore_random_state(torch.load(tmp_path / "state.pth", weights_only=True), device)
    assert draw(device) == first


def test_preserved(device):
    restore = capture_random_state(device)
    expected = draw(device)
    restore_random_state(restore, device)
    with pytest.raises(KeyError), preserved_random_state(device):
        draw(device)
        raise KeyError
    assert draw(device) == expected


@pytest.mark.parametrize("change", [{"python": None}, {"torch": torch.zeros(3)}, {"numpy": {}}])
def test_refusals(change):
    with pytest.raises(ValueError, match="random generators do not fit"):
        restore_random_state({**capture_random_state(), **change})
