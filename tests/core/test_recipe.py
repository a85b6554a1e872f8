"""How learning rate and lengths follow the batch."""

from pathlib import Path

import pytest
from mmcv import Config

from mmdet3d.core.recipe import batch_warning, effective_batch, recipe_batch, scaled
from mmdet3d.registry import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "config/stcocc"
PUBLISHED, TINY = (str(CONFIGS / f"stcocc-{name}.py") for name in ("r50-16f-openocc-12e", "tiny-synthetic"))


def config(**options):
    cfg = Config.fromfile(PUBLISHED)
    cfg.merge_from_dict(options)
    return cfg


def test_batches():
    assert recipe_batch(config()) == 16 and effective_batch(config(), 8) == 16
    cfg = config(**{"data.samples_per_gpu": 1, "optimizer_config.cumulative_iters": 3})
    assert recipe_batch(cfg) == 16 and effective_batch(cfg, 2) == 6
    assert effective_batch(config(**{"data.train_dataloader": {"samples_per_gpu": 5}}), 2) == 10
    assert recipe_batch(Config.fromfile(TINY)) is None


@pytest.mark.parametrize("value", [0, "two", None])
def test_batch_size_is_a_number(value):
    with pytest.raises(ConfigError, match="data.samples_per_gpu: expected a positive whole number"):
        effective_batch(config(**{"data.samples_per_gpu": value}), 1)


def test_a_warning_where_the_batch_is_not_that_of_the_recipe():
    assert batch_warning(config(), 8) is None
    assert batch_warning(config(**{"optimizer_config.cumulative_iters": 4}), 2) is None
    text = batch_warning(config(), 1)
    assert "the effective batch is 2 (1 processes x 2 samples x 1 iterations per step)" in text
    assert "the recipe is made for 16" in text
    assert "stay as the config has them" in text and "cumulative_iters=8" in text
    assert "follow it" in batch_warning(config(auto_scale=True), 4)
    assert batch_warning(Config.fromfile(TINY), 5) is None


def lengths(cfg):
    return (cfg.optimizer.lr, cfg.runner.max_iters, list(cfg.lr_config.step), cfg.checkpoint_config.interval,
            cfg.custom_hooks[0].interval, cfg.lr_config.warmup_iters)


def test_nothing_changes_unless_asked():
    cfg = config()
    for world_size in (1, 8):
        assert lengths(scaled(cfg, world_size)) == (1e-4, 96060, [96060], 8005, 16010, 200)


@pytest.mark.parametrize("wish", [True, {"base_batch": 16}])
def test_fewer_gpus_see_as_many_samples(wish):
    cfg = config(auto_scale=wish)
    assert lengths(scaled(cfg, 2)) == (2.5e-5, 4 * 96060, [4 * 96060], 4 * 8005, 4 * 16010, 200)
    assert lengths(scaled(cfg, 16)) == (2e-4, 48030, [48030], 4002, 8005, 200)  # 4002.5 is rounded to even
    assert lengths(cfg)[0] == 1e-4 and cfg.runner.max_iters == 96060  # as it was


def test_with_accumulation_the_learning_rate_stays_and_lengths_are_whole_groups():
    cfg = config(auto_scale=True, **{"optimizer_config.cumulative_iters": 8, "checkpoint_config.interval": 3})
    assert lengths(scaled(cfg, 1)) == (1e-4, 8 * 96060, [8 * 96060], 24, 8 * 16010, 200)
    odd = config(auto_scale={"base_batch": 5}, **{"optimizer_config.cumulative_iters": 2})
    result = scaled(odd, 1)
    assert result.runner.max_iters == 240150 and result.optimizer.lr == pytest.approx(0.8e-4)
    assert result.checkpoint_config.interval % 2 == 0


def test_intervals_of_evaluation_follow_too():
    cfg = config(auto_scale=True, evaluation={"interval": 100, "pictures": {"interval": 7}}, **{"lr_config.step": 50})
    result = scaled(cfg, 4)
    assert result.evaluation.interval == 200 and result.evaluation.pictures.interval == 14
    assert result.lr_config.step == 100


def test_learning_rate_alone():
    cfg = config()
    assert lengths(scaled(cfg, 2, autoscale_lr=True)) == (2.5e-5, 96060, [96060], 8005, 16010, 200)
    assert lengths(scaled(cfg, 8, autoscale_lr=True))[0] == 1e-4
    with pytest.raises(ConfigError, match="auto_scale and --autoscale-lr"):
        scaled(config(auto_scale=True), 2, autoscale_lr=True)


@pytest.mark.parametrize("wish, message", [
    ({"base": 16}, r"auto_scale: unknown \['base'\]"), ({"base_batch": 0}, "auto_scale.base_batch: expected"),
    ({"base_batch": "many"}, "auto_scale.base_batch: expected"), (5, "auto_scale: expected a dict")])
def test_wrong_wishes(wish, message):
    with pytest.raises(ConfigError, match=message):
        scaled(config(auto_scale=wish), 1)


def test_a_config_without_recipe_needs_a_base():
    cfg = Config.fromfile(TINY)
    cfg.auto_scale = True
    with pytest.raises(ConfigError, match="auto_scale.base_batch: expected the batch that the schedule was made for"):
        scaled(cfg, 1)
