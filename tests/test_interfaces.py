"""Contracts: what a part lacks is found when a config is built, and named with its place and its purpose."""

import re
from typing import Annotated, Protocol

import pytest
from mmcv.runner import Hook
from torch import nn

from mmdet3d import interfaces
from mmdet3d.core.hooks.builder import build_hook
from mmdet3d.datasets.builder import build_dataset
from mmdet3d.datasets.pipelines.compose import Compose
from mmdet3d.interfaces import TrainingState, members, offers
from mmdet3d.models import build_model
from mmdet3d.models.attention import OA_SpatialCrossAttention, OA_TemporalAttention
from mmdet3d.models.backbones import ResNet
from mmdet3d.models.heads import OccFlowHead, OccHead
from mmdet3d.models.temporal import SparseFusion
from mmdet3d.registry import ConfigError, build

CONTRACTS = [kind for kind in vars(interfaces).values()
             if isinstance(kind, type) and getattr(kind, "_is_protocol", False) and kind is not Protocol]


class Brush(Protocol):
    width: Annotated[int, "width in pixels"]

    def paint(self, canvas, /, *, colour):
        """Change the canvas.

        Args:
            canvas: What is painted on.
        """


def painter(**members):
    """A class with these members."""
    return type("Painter", (), members)


@pytest.mark.parametrize("members, words", [
    ({"paint": lambda self, canvas, colour: None},
     "Painter has no width: width in pixels (Brush of mmdet3d.interfaces)"),
    ({"width": 3}, "Painter has no paint(): change the canvas (Brush of"),
    ({"width": 3, "paint": lambda self, canvas: None},
     "Painter.paint takes (canvas), but is called with (canvas, colour): change the canvas (Brush of"),
    ({"width": 3, "paint": lambda self, canvas, size, *, colour: None},
     "Painter.paint takes (canvas, size, colour), but is called with (canvas, colour)"),
])
def test_what_is_missing_is_named(members, words):
    with pytest.raises(ConfigError, match=f"^{re.escape('wall.brush: ' + words)}.*$") as caught:
        build({"type": painter(**members)}, "wall.brush", Brush)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("paint", [
    lambda self, anything, colour=None: None, lambda self, *args, **options: None,
    lambda self, canvas, size=3, *, colour, more=None: None])
def test_other_names_and_further_options_are_fine(paint):
    assert build({"type": painter(width=None, paint=paint)}, "brush", Brush).width is None


def test_every_module_has_a_forward_that_does_nothing():
    class Forward(Protocol):
        def forward(self, x, /):
            """Result."""

    with pytest.raises(ConfigError, match=r"head: Module has no forward\(\): result"):
        build({"type": nn.Module}, "head", Forward)


def test_a_contract_for_some_is_checked_where_it_is_begun():
    class Any(Protocol):
        pass

    class Hungry(painter(state_key="a")):
        pass

    assert build({"type": painter()}, "x", Any, TrainingState) and not offers(painter()(), TrainingState)
    with pytest.raises(ConfigError, match=r"x: Hungry has no training_state\(\): state after so many"):
        build({"type": Hungry}, "x", Any, TrainingState)
    with pytest.raises(TypeError, match="Hungry has no training_state .TrainingState of"):
        offers(Hungry(), TrainingState)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts_say_what_each_member_is_for(contract):
    asked = members(contract)
    assert asked and contract.__doc__ and all(purpose.strip() for _, purpose, _ in asked)
    # "forward" and the like are asked for by the arguments that the project passes, never by their names alone
    assert all(call is None or all(p.kind in (p.POSITIONAL_ONLY, p.KEYWORD_ONLY) for p in call.parameters.values())
               for _, _, call in asked)


LAYER = ("backward_projection", "transformer", "encoder", "transformerlayers")
PARTS = [
    (("forward_projection", "img_backbone"), ResNet, "forward", r"model\.forward_projection\.img_backbone"),
    ((*LAYER, "attn_cfgs", 0), OA_TemporalAttention, "forward",
     r"model\.backward_projection \(stage 0\)\.transformer\.encoder\.transformerlayers\[0\]\.attn_cfgs\[0\]"),
    ((*LAYER, "attn_cfgs", 1), OA_SpatialCrossAttention, "consistency", r".*\.attn_cfgs\[1\]"),
    (("temporal_fusion",), SparseFusion, "prepare", r"model\.temporal_fusion \(stage 0\)"),
    (("occupancy_head",), OccHead, "forward", r"model\.occupancy_head"),
    (("flow_head",), OccFlowHead, "foreground", r"model\.flow_head"),
]


@pytest.mark.parametrize("path, kind, method, place", PARTS, ids=[part[1].__name__ for part in PARTS])
def test_every_part_of_a_model_is_checked(tiny_config, path, kind, method, place):
    """With one argument less than it is called with."""
    part = tiny_config
    for key in path:
        part = part[key]
    part["type"] = type("Own", (kind,), {method: lambda self: None})
    with pytest.raises(ConfigError, match=rf"^{place}: Own\.{method} takes \(\), but is called with \(\w+.*\): .*$"):
        build_model(tiny_config)


@pytest.fixture
def tiny_config():
    import torch
    from mmcv import Config
    from test_registry import TINY

    with torch.device("meta"):
        yield Config.fromfile(str(TINY)).model


def test_auxiliary_heads_are_checked(tiny_config):
    tiny_config.auxiliary_heads = [{"type": nn.Identity}]
    with pytest.raises(ConfigError, match=r"model\.auxiliary_heads\[0\]: Identity has no loss\(\): losses by name"):
        build_model(tiny_config)


def test_detectors_are_checked():
    with pytest.raises(ConfigError, match=r"model: Identity has no train_step\(\): loss to minimise"):
        build_model({"type": nn.Identity})


def test_pipeline_steps_are_checked():
    with pytest.raises(ConfigError, match=r"pipeline\[1\]: Painter has no __call__\(\): dict of the sample"):
        Compose([dict, {"type": painter()}])
    step = painter(__call__=lambda self, results: results, remember_samples=lambda self: None)
    with pytest.raises(ConfigError, match=r"pipeline\[0\]: Painter.remember_samples takes \(\), but is called with"):
        Compose([{"type": step}])


def test_data_sets_are_checked():
    with pytest.raises(ConfigError, match=r"data.train: Painter has no flag: sequence of every sample"):
        build_dataset({"type": painter(__len__=lambda self: 1, __getitem__=lambda self, i: i)}, place="data.train")


def test_hooks_are_checked():
    from mmdet3d.core.hooks.builder import HOOKS

    def refused(name, base, **members):
        HOOKS.module_dict[name] = type(name, (base,), members)
        try:
            with pytest.raises(ConfigError) as caught:
                build_hook({"type": name}, "custom_hooks[0]")
        finally:
            del HOOKS.module_dict[name]
        return str(caught.value)

    assert refused("Own", object) == "custom_hooks[0]: Own does not inherit from mmcv.runner.Hook"
    assert refused("Own", Hook, after_train_iter=lambda self: None).startswith(
        "custom_hooks[0]: Own.after_train_iter takes (), but is called with (runner): act after each iteration (")
    assert refused("Own", Hook, state_key="own").startswith("custom_hooks[0]: Own has no training_state(): state after")
