"""What a freshly built and initialised model contains: the framework's recursion stops at plain containers."""

import pytest
import torch
from tiny_model import build
from torch import nn


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = build()
    model.init_weights()
    return model


def test_last_batch_norm_of_every_image_block_is_zero(model):
    backbone = model.forward_projection.img_backbone
    blocks = [block for name in backbone.res_layers for block in getattr(backbone, name)]
    assert all(not block.norm2.weight.any() for block in blocks)
    assert all(torch.equal(block.norm1.weight, torch.ones_like(block.norm1.weight)) for block in blocks)


def test_basic_blocks_outside_the_backbone_keep_their_batch_norms(model):
    transform, stage = model.forward_projection.img_view_transformer, model.backward_projection_list[0]
    blocks = [transform.depth_net.depth_conv[0], stage.transformer.encoder.occ_predictor.bev_conv,
              stage.transformer.encoder.layers[1].convs[0]]
    assert all(torch.equal(block.norm2.weight, torch.ones_like(block.norm2.weight)) for block in blocks)


def test_sampling_offsets_start_with_their_pattern(model):
    for stage in model.backward_projection_list:
        for layer in stage.transformer.encoder.layers:
            temporal, spatial = layer.attentions
            for attention in (temporal, spatial.deformable_attention):
                assert not attention.sampling_offsets.weight.any()
                assert not attention.attention_weights.weight.any()
                assert not attention.attention_weights.bias.any()
                bias = attention.sampling_offsets.bias.view(8, -1, attention.num_points, 2)
                torch.testing.assert_close(bias[1, 0, 1], torch.tensor([2.0, 2.0]))  # second head, second point
            assert not spatial.output_proj.bias.any()


def test_positional_embeddings_are_standard_normal(model):
    weights = torch.cat([e.weight.flatten() for stage in model.backward_projection_list
                         for e in (stage.positional_encoding.row_embed, stage.positional_encoding.col_embed)])
    assert weights.std().item() == pytest.approx(1, abs=0.1)


def test_unused_camera_embeddings_are_finite(model):
    assert all(torch.isfinite(stage.transformer.cams_embeds).all() for stage in model.backward_projection_list)


def test_neck_biases_are_zero_and_the_channel_adjustment_keeps_pytorch_defaults(model):
    projection = model.forward_projection
    assert all(not module.bias.any() for module in projection.img_neck.modules() if isinstance(module, nn.Conv2d))
    assert projection.adjust_channel_conv.bias.any()
