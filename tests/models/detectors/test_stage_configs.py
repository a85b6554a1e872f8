"""The stage configs that are derived from the finest one."""

import copy

import pytest
import tiny_model as tiny
import torch

from mmdet3d.models import build_model
from mmdet3d.models.detectors.stage_configs import stage_configs
from mmdet3d.registry import ConfigError
from mmdet3d.structures import VoxelGrid


@pytest.fixture
def finest():
    return tiny.published("stcocc-r50-16f-openocc-12e").backward_projection


def test_derived_values_of_the_published_model(finest):
    before = copy.deepcopy(finest.to_dict())
    stages = stage_configs(finest, 3, [2, 3, 4])  # coarsest first
    assert finest.to_dict() == before
    for s, (stage, layers) in enumerate(zip(stages, [4, 3, 2], strict=True)):
        encoder = stage["transformer"]["encoder"]
        size, height = 100 // 2**s, 8 // 2**s
        assert (stage["bev_h"], stage["bev_w"], stage["bev_z"]) == (size, size, height)
        assert VoxelGrid.from_config(encoder["grid_config"]).size_xyz == (size, size, height)
        assert [encoder["grid_config"][axis] for axis in "xyz"] == [
            [-40, 40, 0.8 * 2**s], [-40, 40, 0.8 * 2**s], [-1, 5.4, 0.8 * 2**s]]
        assert encoder["grid_config"]["depth"] == [1.0, 45.0, 0.5]
        temporal, spatial = encoder["transformerlayers"]["attn_cfgs"]
        assert temporal["num_points"] == spatial["deformable_attention"]["num_points"] == height
        encoding = stage["positional_encoding"]
        assert (encoding["row_num_embed"], encoding["col_num_embed"], encoding["num_feats"]) == (size, size, 48)
        assert encoder["num_layers"] == layers
        assert encoder.get("first_stage", False) is (s == 2)


def test_optional_sizes_are_halved_only_where_given(finest):
    finest["transformer"]["encoder"]["transformerlayers"]["attn_cfgs"][1]["deformable_attention"]["num_Z_anchors"] = 8
    del finest["bev_z"]
    coarse = stage_configs(finest, 2, [1, 1])[1]
    temporal, spatial = coarse["transformer"]["encoder"]["transformerlayers"]["attn_cfgs"]
    assert spatial["deformable_attention"]["num_Z_anchors"] == 4 and "num_Z_anchors" not in temporal
    assert "bev_z" not in coarse


def test_the_number_of_anchors_may_be_given_to_both_attentions():
    model = tiny.config()
    temporal, spatial = model.backward_projection.transformer.encoder.transformerlayers.attn_cfgs
    temporal["num_Z_anchors"] = spatial.deformable_attention["num_Z_anchors"] = tiny.Z
    with torch.device("meta"):
        assert len(build_model(model).backward_projection_list) == 2


def test_one_stage_is_the_first(finest):
    only, = stage_configs(finest, 1, [5])
    assert only["transformer"]["encoder"]["num_layers"] == 5 and only["transformer"]["encoder"]["first_stage"]
    assert only["bev_h"] == 100


def test_stages_share_nothing(finest):
    stages = stage_configs(finest, 3, [2, 2, 2])
    stages[0]["transformer"]["encoder"]["grid_config"]["x"][0] = 0
    assert stages[1]["transformer"]["encoder"]["grid_config"]["x"][0] == -40


def test_refusals(finest):
    with pytest.raises(ConfigError, match=r"backward_num_layer=\[2, 2\] must have num_stage=3 entries, coarsest first"):
        stage_configs(finest, 3, [2, 2])
    with pytest.raises(ConfigError, match="bev_h=25 cannot be halved for the next coarser stage"):
        stage_configs(finest, 4, [2, 2, 2, 2])
    finest["transformer"]["encoder"]["grid_config"] = {"x": [0, 3, 1.0], "y": [0, 4, 1.0], "z": [0, 2, 1.0]}
    with pytest.raises(ValueError, match=r"cannot coarsen \(3, 4, 2\) \(X, Y, Z\) voxels by 2"):
        stage_configs(finest, 2, [2, 2])
    del finest["transformer"]["encoder"]["transformerlayers"]["attn_cfgs"][1]["deformable_attention"]
    with pytest.raises(ConfigError, match=r"attn_cfgs\[1\]: the key 'deformable_attention' is missing"):
        stage_configs(finest, 2, [2, 2])
