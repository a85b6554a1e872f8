"""Occlusion-aware cross attention: which queries meet which camera, and with what result."""

import math

import pytest
import torch
from literal_attention import cross_attention, depth_weight

from mmdet3d.models.attention import OA_MSDeformableAttention3D, OA_SpatialCrossAttention
from mmdet3d.models.attention.camera_anchors import CameraAnchors
from mmdet3d.ops import depth_consistency

CAMS, BATCH, QUERIES, POINTS, CHANNELS, HEADS, BINS, SIZE = 3, 2, 11, 4, 6, 2, 5, (2, 7)
RANGE = (1.0, 6.0, 1.0)


def make(shared=True, **options):
    torch.manual_seed(4)
    inner = {"type": "OA_MSDeformableAttention3D", "embed_dims": CHANNELS, "num_heads": HEADS, "num_points": POINTS,
             **options}
    module = OA_SpatialCrossAttention(inner, CHANNELS, CAMS, dbound=RANGE, dropout=0.0, shared_occlusion_buffer=shared)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(5)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    valid = uniform(CAMS, BATCH, QUERIES, POINTS) < 0.3
    valid[:, :, 4] = False  # seen by no camera
    anchors = CameraAnchors(uniform(CAMS, BATCH, QUERIES, POINTS, 2) * 1.2 - 0.1,
                            uniform(CAMS, BATCH, QUERIES, POINTS) * 8 - 1, valid)
    return {"query": uniform(BATCH, QUERIES, CHANNELS) - 0.5, "query_pos": uniform(BATCH, QUERIES, CHANNELS) - 0.5,
            "tokens": uniform(CAMS, BATCH, SIZE[0] * SIZE[1], CHANNELS) - 0.5, "anchors": anchors,
            "visibility": uniform(BATCH, QUERIES, POINTS),
            "depth": (uniform(BATCH, CAMS, BINS, *SIZE) * 4).softmax(2)}


def attend(module, query, query_pos, tokens, anchors, visibility, depth):
    consistency = module.consistency(anchors, depth)
    return module(query, query_pos, tokens, SIZE, anchors, consistency, visibility)


@pytest.mark.parametrize("shared", [True, False])
def test_equals_the_literal_loop_over_cameras(case, shared):
    module = make(shared)
    mask = case["anchors"].valid & (case["visibility"] > 0.5)
    lists = [[row.any(-1).sum().item() for row in camera] for camera in mask]
    assert len({length for camera in lists for length in camera}) > 2  # lists of different lengths
    with torch.no_grad():
        output = attend(module, **case)
        torch.testing.assert_close(output, cross_attention(module, mask=mask, shared=shared, **case))
        assert not torch.allclose(output, attend(make(not shared), **case))
        unseen = ~mask.any(-1).any(0)
        assert unseen[:, 4].all()
        torch.testing.assert_close(output[unseen], (case["query"] + module.output_proj.bias)[unseen])


def test_nothing_in_any_camera_leaves_the_query_and_the_bias(case):
    nowhere = case["anchors"]._replace(valid=torch.zeros_like(case["anchors"].valid))
    module = make()
    with torch.no_grad():
        output = attend(module, **{**case, "anchors": nowhere})
    torch.testing.assert_close(output, case["query"] + module.output_proj.bias)


def test_all_anchors_in_a_camera_count_when_none_is_visible(case):
    module = make()
    case["visibility"] = case["visibility"] * 0.5
    assert torch.equal(module.visible_anchors(case["anchors"].valid, case["visibility"]), case["anchors"].valid)
    with torch.no_grad():
        expected = cross_attention(module, mask=case["anchors"].valid, **case)
        torch.testing.assert_close(attend(module, **case), expected)
    # One visible anchor anywhere in the batch, and only that one counts.
    n, b, q, z = case["anchors"].valid.nonzero()[7].tolist()
    case["visibility"][b, q, z] = 0.9
    mask = module.visible_anchors(case["anchors"].valid, case["visibility"])
    assert mask[n, b, q, z] and mask.sum() == case["anchors"].valid[:, b, q, z].sum()


def test_the_threshold_of_evaluation_is_strict():
    visibility = torch.tensor([0.5, 0.5000001, 0.4999999]).view(1, 3, 1)
    mask = make().visible_anchors(torch.ones(2, 1, 3, 1, dtype=torch.bool), visibility)
    assert mask[..., 0].tolist() == [[[False, True, False]]] * 2


def test_the_threshold_of_training_is_a_truncated_normal_that_cameras_share():
    torch.manual_seed(0)
    module = make().train()
    levels = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
    visibility = levels.expand(1, 20000, 6).contiguous()
    valid = torch.ones(3, 1, 20000, 6, dtype=torch.bool)
    mask = module.visible_anchors(valid, visibility)
    assert torch.equal(mask[0], mask[1]) and torch.equal(mask[0], mask[2])

    def below(x):  # of the standard normal
        return 0.5 * (1 + math.erf(x / math.sqrt(2)))

    for k, level in enumerate(levels.tolist()):
        expected = (below(level - 0.5) - below(-0.5)) / (below(0.5) - below(-0.5))
        assert mask[0, 0, :, k].float().mean().item() == pytest.approx(expected, abs=0.015)
    again = module.visible_anchors(valid, visibility)
    assert not torch.equal(mask, again)


@pytest.mark.parametrize("options", [
    {}, {"squared_sigma": False}, {"distance_to_neighbours": False}, {"softmax_depth": False}, {"sigma": 0.7},
    {"sigma": 3.0, "squared_sigma": False, "distance_to_neighbours": False, "softmax_depth": False}])
def test_depth_consistency_equals_its_formula(options):
    module = OA_MSDeformableAttention3D(CHANNELS, num_heads=HEADS, num_points=POINTS, **options)
    generator = torch.Generator().manual_seed(6)
    position = torch.rand(2, 1, 5, POINTS, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    position[0, 0, 0, 0] = -3.0  # off the map: a zero distribution, whose first bin counts
    anchor = torch.rand(2, 1, 5, POINTS, generator=generator, dtype=torch.float64) * 7
    depth = (torch.rand(1, 2, BINS, *SIZE, generator=generator, dtype=torch.float64) * 5).softmax(2)
    weight = depth_consistency(position, anchor, anchor > -1, depth, module.depth_fit(RANGE))
    rules = {"sigma": options.get("sigma", 2.0), "squared": options.get("squared_sigma", True),
             "neighbours": options.get("distance_to_neighbours", True), "softmax": options.get("softmax_depth", True)}
    for m in range(2):
        for q in range(5):
            for z in range(POINTS):
                expected = depth_weight(position[m, 0, q, z], anchor[m, 0, q, z], depth[0, m], RANGE, **rules)
                torch.testing.assert_close(weight[m, 0, q, z], expected)


@pytest.mark.parametrize("anchor, options, mu_and_factor", [
    (3.0, {}, (0.5, 2.0)), (3.5, {}, (0.0, 2.0)), (4.25, {}, (0.75, 2.0)),
    (3.0, {"distance_to_neighbours": False}, (0.0, 2.0)), (4.25, {"distance_to_neighbours": False}, (1.25, 2.0)),
    (3.0, {"squared_sigma": False}, (0.5, 0.125))])
def test_depth_consistency_of_a_certain_depth(anchor, options, mu_and_factor):
    """The depth is 3 m for sure, with bins of 0.5 m."""
    mu, factor = mu_and_factor
    depth = torch.zeros(1, 1, 88, 2, 3)
    depth[:, :, 4] = 1
    rule = OA_MSDeformableAttention3D(8, num_points=1, **options).depth_fit((1.0, 45.0, 0.5))
    weight = depth_consistency(torch.full((1, 1, 1, 1, 2), 0.5), torch.full((1, 1, 1, 1), anchor),
                               torch.ones(1, 1, 1, 1, dtype=torch.bool), depth, rule)
    assert weight.item() == pytest.approx(math.exp(-factor * mu**2))


def test_no_gradient_into_depth_positions_or_visibility_weights(case):
    module = make()
    for name in ("query", "query_pos", "tokens", "depth"):
        case[name].requires_grad_()
    attend(module, **case).square().sum().backward()
    assert case["depth"].grad is None
    for tensor in (case["query"], case["query_pos"], case["tokens"], *module.parameters()):
        assert tensor.grad.abs().sum() > 0


def test_initial_values_and_published_shapes():
    inner = {"type": "OA_MSDeformableAttention3D", "embed_dims": 96, "num_points": 2}
    module = OA_SpatialCrossAttention(inner, 96)
    attention = module.deformable_attention
    bias = attention.sampling_offsets.bias.view(8, 2, 2)
    torch.testing.assert_close(bias[0], torch.tensor([[1.0, 0], [2, 0]]))
    torch.testing.assert_close(bias[1], torch.tensor([[1.0, 1], [2, 2]]))
    torch.testing.assert_close(bias[6], torch.tensor([[0.0, -1], [0, -2]]), atol=1e-6, rtol=0)
    for tensor in (attention.sampling_offsets.weight, attention.attention_weights.weight,
                   attention.attention_weights.bias, attention.value_proj.bias, module.output_proj.bias):
        assert not tensor.any()
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == {
        "deformable_attention.sampling_offsets.weight": (32, 97), "deformable_attention.sampling_offsets.bias": (32,),
        "deformable_attention.attention_weights.weight": (16, 96), "deformable_attention.attention_weights.bias": (16,),
        "deformable_attention.value_proj.weight": (96, 96), "deformable_attention.value_proj.bias": (96,),
        "output_proj.weight": (96, 96), "output_proj.bias": (96,)}


def test_unsupported_options_are_refused(case):
    with pytest.raises(ValueError, match="layer_scale is not supported"):
        OA_SpatialCrossAttention({"type": "OA_MSDeformableAttention3D", "embed_dims": 8}, 8, layer_scale=0.1)
    case["tokens"] = case["tokens"][1:]
    with pytest.raises(ValueError, match="expected the tokens of num_cams=3 cameras, got 2"):
        attend(make(), **case)
    with pytest.raises(ValueError, match="num_heads.*num_levels"):
        OA_MSDeformableAttention3D(96, num_levels=4)
