"""Parts of a training: optimizer, seeds, folders."""

import random

import numpy as np
import pytest
import torch
from mmcv import Config

from mmdet3d.apis.train import build_training_optimizer, dump_config, set_random_seed, work_dir_of
from mmdet3d.registry import ConfigError

ADAM = {"type": "AdamW", "lr": 1e-4, "weight_decay": 1e-2}


def model(device="cpu", dtype=torch.float32):
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(device, dtype)


def test_published_optimizer_has_one_group_of_all_parameters():
    network = model()
    optimizer = build_training_optimizer(network, ADAM)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW and group["params"] == list(network.parameters())
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (1e-4, 1e-2, (0.9, 0.999), 1e-8)
    assert not group["fused"] and ADAM == {"type": "AdamW", "lr": 1e-4, "weight_decay": 1e-2}


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, options, fused", [
    (torch.float32, {}, True), (torch.float32, {"fused": False}, False), (torch.float32, {"foreach": True}, None),
    (torch.float16, {}, None)])
def test_fused_where_nothing_speaks_against_it(dtype, options, fused):
    optimizer = build_training_optimizer(model("cuda", dtype), {**ADAM, **options})
    assert optimizer.param_groups[0]["fused"] is fused


@pytest.mark.cuda
def test_the_fused_step_is_that_of_the_plain_one():
    results = []
    for options in ({}, {"foreach": False, "fused": False}):
        torch.manual_seed(0)
        # No norm, before which a bias has a gradient of nothing but rounding, as large to Adam as any other.
        network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).cuda()
        optimizer = build_training_optimizer(network, {**ADAM, "lr": 1e-2, **options})
        for step in range(5):
            optimizer.zero_grad()
            inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(step)).cuda()
            (network(inputs) - inputs[:, :2]).square().mean().backward()
            optimizer.step()
        results.append([parameter.detach().cpu() for parameter in network.parameters()])
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_groups_by_name_remain_possible():
    cfg = {**ADAM, "paramwise_cfg": {"norm_decay_mult": 0.0}}
    groups = build_training_optimizer(model(), cfg).param_groups
    assert [group["weight_decay"] for group in groups] == [1e-2, 1e-2, 0.0, 0.0]


@pytest.mark.parametrize("cfg", [{"lr": 1e-4}, {**ADAM, "type": "AdamX"}, {**ADAM, "lrr": 1}, {**ADAM, "lr": -1.0}])
def test_wrong_optimizers(cfg):
    with pytest.raises(ConfigError, match="^optimizer: "):
        build_training_optimizer(model(), cfg)


def draws():
    return random.random(), np.random.mtrand._rand.rand(), float(torch.rand(()))


def test_seeds():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        first, second, third = ((set_random_seed(seed), draws())[1] for seed in (3, 3, 4))
        assert first == second and not set(first) & set(third)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def test_deterministic_algorithms(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    states = torch.get_rng_state(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        set_random_seed(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = states[1:]
        torch.set_rng_state(states[0])


def test_work_dirs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.py").write_text("work_dir = None\nvalue = 1\n")
    cfg = Config.fromfile("some.py")
    assert work_dir_of(cfg) == tmp_path / "work_dirs/some"
    cfg.work_dir = "elsewhere"
    assert work_dir_of(cfg) == tmp_path / "elsewhere" and work_dir_of(cfg, "given") == tmp_path / "given"
    assert Config.fromfile(str(dump_config(cfg, tmp_path / "new"))).work_dir == "elsewhere"
