"""Contradictions between the parts of a config, which are refused when the model is built."""

import pytest
import tiny_model as tiny
import torch

from mmdet3d.models import build_model
from mmdet3d.registry import ConfigError

CAMERAS = r"model\.forward_projection\.num_cams is 2"
HEAD = r"model\.occupancy_head\.num_classes is 17"
ENCODER = ("backward_projection", "transformer", "encoder")
CROSS = (*ENCODER, "transformerlayers", "attn_cfgs", 1)


def change(config, path, value):
    *path, last = path
    for key in path:
        config = config[key]
    config[last] = value


CASES = [
    ((*CROSS, "dbound"), [1.0, 61.0, 2.0],
     r"dbound is \(1.0, 61.0, 2.0\), but .*grid_config.depth is \(1.0, 45.0, 2.0\)"),
    ((*ENCODER, "pc_range"), [-40, -16, -1, 40, 16, 5.4],
     r"encoder.pc_range \(stage 0\) is \(-40.0, .*, but the grid of .*transformer is \(-24.0, -16.0, -1.0, 24.0, "),
    (("backward_projection", "pc_range"), [-24, -16, -1, 24, 16, 6],
     r"model.backward_projection.pc_range \(stage 0\) is"),
    ((*ENCODER, "data_config"), {"input_size": (64, 160)},
     r"data_config.input_size is \(64, 160\), but .*transformer.input_size is \(64, 176\)"),
    (("empty_idx",), 0, r"model.empty_idx is 0, but the last class, which is free space, is 16"),
    (("foreground_idx",), [0, 17], r"model.foreground_idx holds \[17\]; accepted are the classes 0..16"),
    (("foreground_idx",), [-1], r"model.foreground_idx holds \[-1\]"),
    (("flow_head", "foreground_idx"), [3, -2], r"model.flow_head.foreground_idx holds \[-2\]"),
    ((*ENCODER, "num_cam"), 6, f"encoder.num_cam is 6, but {CAMERAS}"),
    (("backward_projection", "transformer", "num_cams"), 6, f"transformer.num_cams is 6, but {CAMERAS}"),
    ((*CROSS, "num_cams"), 6, rf"attn_cfgs\[1\].num_cams is 6, but {CAMERAS}"),
    ((*ENCODER, "predictor_num_calsses"), 18, f"predictor_num_calsses is 18, but {HEAD}"),
    (("temporal_fusion", "num_classes"), 18, f"temporal_fusion.num_classes is 18, but {HEAD}"),
    (("flow_head", "num_classes"), 18, f"flow_head.num_classes is 18, but {HEAD}"),
    ((*CROSS, "deformable_attention", "num_points"), 8,
     r"attn_cfgs\[1\].deformable_attention.num_points \(stage 0\) is 8, but the number of voxels along z is 4"),
    ((*ENCODER, "transformerlayers", "attn_cfgs", 0, "num_points"), 2, r"attn_cfgs\[0\].num_points \(stage 0\) is 2"),
    (("class_weights",), [1.0] * 18, f"length of model.class_weights is 18, but {HEAD}"),
    (("intermediate_pred_loss_weight",), [1.0, 0.5], r"loss_weight is 2, but num_stage \+ 1 is 3"),
    (("train_top_k",), [385, 15], r"385 for stage 0 in training must be 1..384"),
    (("train_top_k",), [100, 49], r"49 for stage 1 in training must be 1..48"),
    (("train_top_k",), [100, 0], r"0 for stage 1 in training must be 1..48"),
    (("forward_projection", "img_bev_encoder_backbone", "backbone_output_ids"), [0, 2],
     r"backbone_output_ids=\[0, 2\] must be ascending stages of 0..1"),
    (("forward_projection", "img_bev_encoder_backbone", "backbone_output_ids"), [1, 0], "must be ascending stages"),
    (("forward_projection", "img_bev_encoder_backbone", "backbone_output_ids"), [0], "the list of all stages is"),
    (("forward_projection", "img_view_transformer", "cv_downsample"), 8, "cv_downsample must be 4, .* got 8"),
]


@pytest.mark.parametrize("path, value, words", CASES, ids=[f"{'.'.join(map(str, case[0]))}-{i}"
                                                           for i, case in enumerate(CASES)])
def test_contradictions_name_both_places(path, value, words):
    config = tiny.config()
    change(config, path, value)
    with pytest.raises(ConfigError, match=words), torch.device("meta"):
        build_model(config)


def test_a_moving_class_that_the_flow_head_does_not_have():
    config = tiny.config()
    config.flow_head.foreground_idx = [20]
    with pytest.raises(ConfigError, match=r"model\.flow_head: OccFlowHead: IndexError .*20"):
        build_model(config)


def test_the_number_of_volumes_is_the_number_of_stages():
    config = tiny.config()
    config.forward_projection.img_bev_encoder_backbone.update(
        num_layer=[1, 1, 1], num_channels=[16, 32, 48], stride=[1, 2, 2], backbone_output_ids=[0, 1, 2])
    with pytest.raises(ConfigError, match=r"number of volumes of .* is 3, but model.num_stage is 2"), \
            torch.device("meta"):
        build_model(config)


def test_the_number_of_voxels_also_bounds_the_evaluation():
    config = tiny.config(val_top_k=[100, 49], train_top_k_in_eval=False)
    with pytest.raises(ConfigError, match=r"49 for stage 1 in evaluation must be 1..48"), torch.device("meta"):
        build_model(config)


def test_the_defaults_fit_each_other():
    config = tiny.config()
    del config["intermediate_pred_loss_weight"]
    with torch.device("meta"):
        assert build_model(config).voxel_losses.scale_weights == (1.0, 0.5, 0.25)
