"""The encoder of a stage: occupancy predictor, recurrence of logits, value queue and the order within a layer."""

import pytest
import small_stage as stage
import torch

from mmdet3d.models.attention.encoder_layer import BEVFormerEncoderLayer
from mmdet3d.models.attention.occupancy_predictor import OccupancyPredictor, occupied_probability, query_visibility
from mmdet3d.registry import ConfigError, build

X, Y, Z, CLASSES, BATCH, QUERIES = stage.X, stage.Y, stage.Z, stage.CLASSES, stage.BATCH, stage.QUERIES


def test_predictor_channels_are_z_times_classes_plus_class():
    torch.manual_seed(0)
    predictor = OccupancyPredictor(5, 3, num_heights=4, num_classes=7).eval()
    bev = torch.randn(2, 5, 3, 6)  # [B, C, Y, X]
    with torch.no_grad():
        logits, features = predictor(bev), predictor.bev_conv(bev)
        assert logits.shape == (2, 6, 3, 4, 7)
        for b in range(2):
            for x in range(6):
                for y in range(3):
                    hidden = predictor.predicter[0](features[b, :, y, x])
                    column = predictor.predicter[2](torch.log1p(hidden.exp()))
                    for z in range(4):
                        torch.testing.assert_close(logits[b, x, y, z], column[z * 7 : z * 7 + 7])
    assert predictor.predicter[0].weight.shape == (6, 5) and predictor.predicter[2].weight.shape == (28, 6)


def test_visibility_of_queries():
    logits = torch.randn(2, 5, 3, 4, 6, requires_grad=True)  # [B, X, Y, Z, K]
    visibility = query_visibility(logits)
    assert visibility.shape == (2, 15, 4) and not visibility.requires_grad
    assert occupied_probability(logits).requires_grad
    for x in range(5):
        for y in range(3):
            free = logits[:, x, y].softmax(-1)[..., 5]
            torch.testing.assert_close(visibility[:, y * 5 + x], 1 - free.detach())


class Trace:
    """What the layers and the predictor were given and gave during one forward pass of a stage."""

    def __init__(self, module, **arguments):
        encoder = module.transformer.encoder
        self.layers, self.predictions, self.encoder_inputs = [], [], {}
        hooks = [layer.register_forward_hook(lambda _, args, output: self.layers.append((*args, output)))
                 for layer in encoder.layers]
        hooks.append(encoder.occ_predictor.register_forward_hook(
            lambda _, args, output: self.predictions.append((args[0], output))))
        hooks.append(encoder.register_forward_pre_hook(
            lambda _, args, kwargs: self.encoder_inputs.update(kwargs), with_kwargs=True))
        self.bev, self.logits = stage.call(module, **arguments)
        for hook in hooks:
            hook.remove()


def trace(encoder=(), coarse=True, previous=True):
    with torch.no_grad():
        return Trace(stage.make(encoder), **stage.inputs(coarse=coarse, previous=previous))


def test_shapes_and_that_logits_are_predicted_before_the_last_attention():
    seen = trace()
    assert seen.bev.shape == (BATCH, stage.CHANNELS, Y, X) and seen.logits.shape == (BATCH, X, Y, Z, CLASSES)
    first_query, last_query = seen.layers[0][0], seen.layers[1][0]
    for (bev, _), query in zip(seen.predictions, (first_query, last_query), strict=True):
        torch.testing.assert_close(bev.flatten(2).transpose(1, 2), query)
    torch.testing.assert_close(seen.layers[0][-1], last_query)
    torch.testing.assert_close(seen.bev.flatten(2).transpose(1, 2), seen.layers[1][-1])


@pytest.mark.parametrize("coarse", [True, False])
def test_recurrence_of_the_logits(coarse):
    seen = trace(coarse=coarse)
    first, second = (output for _, output in seen.predictions)
    if coarse:
        first = first + 0.5 * seen.encoder_inputs["coarse_logits"]
    torch.testing.assert_close(seen.logits, second + 0.5 * first)
    torch.testing.assert_close(seen.layers[0][1], query_visibility(first))
    torch.testing.assert_close(seen.layers[1][1], query_visibility(seen.logits))


def test_logits_are_not_detached_between_layers():
    arguments = stage.inputs()
    arguments["coarse_logits"].requires_grad_()
    _, logits = stage.call(stage.make(), **arguments)
    grad, = torch.autograd.grad(logits.sum(), arguments["coarse_logits"])
    # Two layers, a factor of a half each; up-sampling spreads each coarse voxel over eight fine ones.
    assert grad.sum().item() == pytest.approx(0.25 * logits.numel(), rel=1e-5)


def cell_centres():
    return torch.tensor([[(q % X + 0.5) / X, (q // X + 0.5) / Y] for q in range(QUERIES)])


def test_value_queue_with_a_history():
    seen = trace()
    previous, entry = (seen.encoder_inputs[name] for name in ("previous", "query"))
    shift = stage.inputs()["shift"]
    assert shift[0].any() and not shift[1].any()
    for _, _, values, references, _, _ in seen.layers:
        for b in range(BATCH):
            assert torch.equal(values[2 * b], previous[b]) and torch.equal(values[2 * b + 1], entry[b])
            torch.testing.assert_close(references[2 * b], cell_centres() + shift[b])
            torch.testing.assert_close(references[2 * b + 1], cell_centres())


def test_value_queue_without_a_history():
    seen = trace(previous=False)
    for query, _, values, references, _, _ in seen.layers:
        for b in range(BATCH):
            for row in (2 * b, 2 * b + 1):
                assert torch.equal(values[row], query[b])
                torch.testing.assert_close(references[row], cell_centres())


def test_refreshed_value_queue():
    seen = trace({"refresh_value_queue": True})
    for query, _, values, _, _, _ in seen.layers:
        assert torch.equal(values[0::2], seen.encoder_inputs["previous"]) and torch.equal(values[1::2], query)
    plain = trace()
    assert torch.equal(plain.layers[0][-1], seen.layers[0][-1]) and not torch.allclose(plain.bev, seen.bev)


@pytest.mark.parametrize("first_stage, entries", [(False, 2), (True, 1)])
def test_trainable_recurrence_adds_one_entry_and_changes_nothing_at_first(first_stage, entries):
    constant = stage.make({"first_stage": first_stage})
    trained = stage.make({"first_stage": first_stage, "trainable_recurrence": True})
    name = "transformer.encoder.recurrence_weights"
    assert set(trained.state_dict()) - set(constant.state_dict()) == {name}
    assert trained.state_dict()[name].tolist() == [0.5] * entries
    arguments = stage.inputs(coarse=not first_stage)
    with torch.no_grad():
        for mine, theirs in zip(stage.call(trained, **arguments), stage.call(constant, **arguments), strict=True):
            assert torch.equal(mine, theirs)
    stage.call(trained, **arguments)[1].sum().backward()
    assert trained.transformer.encoder.recurrence_weights.grad.abs().min() > 0


@pytest.mark.parametrize("first_stage", [False, True])
def test_each_layer_has_its_own_trained_weight(first_stage):
    module = stage.make({"first_stage": first_stage, "trainable_recurrence": True})
    weights = module.transformer.encoder.recurrence_weights
    with torch.no_grad():
        weights.copy_(torch.tensor([0.25, -2.0][-len(weights):]))
        seen = Trace(module, **stage.inputs(coarse=not first_stage))
        first, second = (output for _, output in seen.predictions)
        if not first_stage:
            first = first + 0.25 * seen.encoder_inputs["coarse_logits"]
        torch.testing.assert_close(seen.logits, second - 2 * first)


def test_a_layer_is_attention_norm_attention_norm_convolution():
    seen = trace()
    layer = stage.make().transformer.encoder.layers[0]
    query, visibility, values, references, context, output = seen.layers[0]
    temporal, spatial = layer.attentions
    with torch.no_grad():
        x = layer.norms[0](temporal(query, context.query_pos, values, references, visibility, (Y, X),
                                    torch.tensor([float(X), float(Y)])))
        x = layer.norms[1](spatial(x, context.query_pos, context.tokens, stage.FEATURE, context.anchors,
                                   context.consistency, visibility))
        bev = torch.stack([x[:, y * X : (y + 1) * X].transpose(1, 2) for y in range(Y)], 2)  # [B, C, Y, X]
        torch.testing.assert_close(output, layer.convs[0](bev).flatten(2).transpose(1, 2))
        torch.testing.assert_close(context.consistency, spatial.consistency(context.anchors, stage.inputs()["depth"]))
    assert context.bev_size == (Y, X) and context.tokens.shape == (stage.CAMS, BATCH, 6, stage.CHANNELS)


def test_tokens_are_rows_of_the_feature_map():
    seen, context = trace(), stage.inputs()["context"]
    tokens = seen.encoder_inputs["tokens"]
    for v in range(2):
        for u in range(3):
            assert torch.equal(tokens[:, :, v * 3 + u], context[:, :, :, v, u].transpose(0, 1))


def test_camera_embeddings_count_only_when_asked_for():
    plain, embedded = stage.make(), stage.make()
    embedded.transformer.use_cams_embeds = True
    with torch.no_grad():
        tokens = Trace(embedded, **stage.inputs()).encoder_inputs["tokens"]
        torch.testing.assert_close(tokens, Trace(plain, **stage.inputs()).encoder_inputs["tokens"]
                                   + plain.transformer.cams_embeds[:, None, None])
    stage.call(plain.train(), **stage.inputs())[0].sum().backward()
    assert torch.equal(plain.transformer.cams_embeds.grad, torch.zeros(stage.CAMS, stage.CHANNELS))
    assert build(stage.config()["transformer"]).cams_embeds.isfinite().all()


def test_constants_are_not_saved():
    names = list(stage.make().state_dict())
    assert not [name for name in names if "anchors" in name or "reference_points" in name or "recurrence" in name]


@pytest.mark.parametrize("change, words", [
    ({"use_temporal": False}, "use_temporal=False is not supported"),
    ({"grid_config": {**stage.GRID, "x": [-6, 6, 5.0]}}, "holds no whole number of voxels")])
def test_unsupported_encoders_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        stage.make(change)


def test_unsupported_layers_are_refused():
    cfgs = stage.config()["transformer"]["encoder"]["transformerlayers"]["attn_cfgs"]
    with pytest.raises(ValueError, match="operation_order must be .*got"):
        BEVFormerEncoderLayer(cfgs, operation_order=("self_attn", "norm", "ffn", "norm"))
    with pytest.raises(ValueError, match="attn_cfgs must hold the temporal and the cross attention, got 1 entries"):
        BEVFormerEncoderLayer(cfgs[:1])
