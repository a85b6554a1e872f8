"""The switches of deterministic training."""

import os

import pytest
import torch

from mmdet3d.utils.determinism import set_deterministic


@pytest.fixture(autouse=True)
def switches_as_before():
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    cudnn.benchmark, cudnn.deterministic = before
    torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])


def test_switches(monkeypatch, caplog):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.backends.cudnn.benchmark = True
    set_deterministic()
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and not caplog.text


def test_a_setting_of_the_user_stays(monkeypatch, caplog):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    set_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":0:0" and "only reproducible with one of" in caplog.text
