"""Parts of somebody's own in a whole model: they share no code with the project's, and fulfil its contracts."""

import copy

import pytest
import tiny_model as tiny
import torch
from test_stcocc_training import LOSSES, train
from torch import nn
from torch.nn import functional as F

from mmdet3d.core.cuda_graphs.engine import EAGER_CALLS
from mmdet3d.core.cuda_graphs.frames import FrameRunner
from mmdet3d.core.cuda_graphs.steps import StepGraph
from mmdet3d.models import build_model
from mmdet3d.registry import ConfigError
from mmdet3d.utils.fold_batch_norm import fold_batch_norm


class MeanAttention(nn.Module):
    """Temporal attention without points."""

    def __init__(self, embed_dims):
        super().__init__()
        self.mix = nn.Linear(2 * embed_dims, embed_dims)

    def forward(self, query, query_pos, values, reference_points, visibility, bev_size, cells):
        return query + self.mix(torch.cat([query + query_pos, values[::2]], -1))


class PooledAttention(nn.Module):
    """Spatial attention that looks at no depth and at the cameras as a whole."""

    def __init__(self, embed_dims):
        super().__init__()
        self.project = nn.Linear(embed_dims, embed_dims)

    def consistency(self, anchors, depth):
        return None

    def forward(self, query, query_pos, tokens, image_size, anchors, consistency, visibility):
        assert consistency is None and tokens.shape[2] == image_size[0] * image_size[1]
        return query + self.project(tokens.mean((0, 2)))[:, None] * visibility.mean(-1, keepdim=True)


class NeighbourHead(nn.Module):
    """Occupancy head whose convolution and batch norm are attributes side by side."""

    def __init__(self, num_classes, channels):
        super().__init__()
        self.num_classes = num_classes
        self.conv, self.bn = nn.Conv3d(channels, num_classes, 1), nn.BatchNorm3d(num_classes)

    def forward(self, volume, coarse_logits):
        logits = self.bn(self.conv(volume)) + coarse_logits.permute(0, 4, 3, 2, 1)
        return F.interpolate(logits, scale_factor=2).permute(0, 4, 3, 2, 1)


class StillHead(nn.Module):
    """Flow head with a velocity per class."""

    def __init__(self, num_classes):
        super().__init__()
        self.velocity = nn.Linear(num_classes, 2)

    def features(self, volume):
        return volume.mean()

    def forward(self, volume, semantic_logits, noise_seeds, features):
        return self.velocity(semantic_logits.softmax(-1)) + 0 * features.get()

    def foreground(self, semantics):
        return semantics < 8


class LastFrameFusion(nn.Module):
    """Temporal fusion that remembers one volume, where it was."""

    def __init__(self, history_num, top_k, channels):
        super().__init__()
        self.history_num, self.channels = history_num, channels
        self.mix = nn.Linear(2 * channels, channels)

    def index_matrices(self, grids, starts, bda, previous_bda, previous_ego_from_ego):
        return torch.eye(4).expand(len(grids), len(bda), 4, 4)

    def prepare(self, history, grid, starts, index_matrix, out):
        return history, starts

    def forward(self, volume, logits, occupied, past, grid, *, top_k):
        history, starts = past
        rows = volume.flatten(2).transpose(1, 2)
        past = rows.detach() if history is None else history[..., : self.channels]
        past = torch.where(torch.tensor(starts)[:, None, None], rows.detach(), past)
        fused = rows + self.mix(torch.cat([rows, past], -1))
        return fused.transpose(1, 2).unflatten(2, grid.size_zyx), fused.detach().repeat(1, 1, self.history_num)


class VoxelShare(nn.Module):
    """Auxiliary head: how much of the volume is not free."""

    def __init__(self, channels, name="loss_share"):
        super().__init__()
        self.classify, self.name = nn.Linear(channels, 1), name

    def loss(self, prediction, targets):
        share = self.classify(prediction.volume.mean((2, 3, 4))).sigmoid()[:, 0]
        truth = (targets["voxel_semantics"] != 16).float().mean((1, 2, 3))
        return {self.name: F.mse_loss(share, truth), "share": share.mean().detach()}


def own_attentions():
    model = tiny.config()
    attentions = model.backward_projection.transformer.encoder.transformerlayers.attn_cfgs
    attentions[0] = {"type": MeanAttention, "embed_dims": 16}
    attentions[1] = {"type": PooledAttention, "embed_dims": 16}
    model.occupancy_head = {"type": NeighbourHead, "num_classes": 17, "channels": 16}
    model.flow_head = {"type": StillHead, "num_classes": 17}
    model.temporal_fusion = {"type": LastFrameFusion, "channels": 16}
    model.auxiliary_heads = [{"type": VoxelShare, "channels": 16}]
    return model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(own_attentions())


def test_a_model_of_own_parts_learns(model):
    reached, outputs = train(copy.deepcopy(model).train())
    names = [f"{part}.{kind}" for part in (
        "backward_projection_list.0.transformer.encoder.layers.0.attentions.0.mix",
        "backward_projection_list.1.transformer.encoder.layers.1.attentions.1.project", "occupancy_head.conv",
        "flow_head.velocity", "temporal_fusion_list.0.mix", "auxiliary_heads.0.classify")
        for kind in ("weight", "bias")]
    assert set(names) - {"occupancy_head.conv.bias"} <= reached  # which the batch norm takes away again
    log = outputs[0]["log_vars"]
    assert list(log) == [*LOSSES, "loss_share", "share", "loss"]
    assert log["loss"] == pytest.approx(sum(log[name] for name in [*LOSSES, "loss_share"]), rel=1e-5)


def test_it_predicts_alike_with_and_without_folding(model, caplog):
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        model.occupancy_head.bn.running_mean.normal_()
        model.occupancy_head.bn.running_var.uniform_(0.5, 2)
    folded, memories = fold_batch_norm(model), [None, None]
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "not folded, because the convolution before them is not known: occupancy_head.bn"]
    for step in range(2):
        with torch.no_grad():
            predictions = [one.run(*tiny.frame(step), memory)[0]
                           for one, memory in zip((model, folded), memories, strict=True)]
        memories = [prediction.memory for prediction in predictions]
        torch.testing.assert_close(predictions[1].semantic_logits, predictions[0].semantic_logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(predictions[1].flow, predictions[0].flow, rtol=1e-3, atol=1e-3)


def test_two_auxiliary_heads_cannot_share_a_name():
    model = tiny.config(auxiliary_heads=[{"type": VoxelShare, "channels": 16},
                                         {"type": VoxelShare, "channels": 16, "name": "loss_depth"}])
    with pytest.raises(ValueError, match=r"model.auxiliary_heads\[1\]: VoxelShare gives \['loss_depth', 'share'\]"):
        build_model(model).train_step(tiny.training_batch())


# ---- backbones of mmdet ---------------------------------------------------------------------------------------------

SWIN = {"type": "SwinTransformer", "embed_dims": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4],
        "out_indices": (0, 2, 3), "drop_path_rate": 0.0}


def with_backbone(backbone, channels):
    model = tiny.config()
    projection = model.forward_projection
    projection.img_backbone, projection.img_neck.in_channels = backbone, channels
    return model


class Plain(nn.Module):
    """The project's backbone, without its way to stop after the first output."""

    def __init__(self, **options):
        super().__init__()
        from mmdet3d.models.backbones import ResNet

        self.net = ResNet(**options)

    def forward(self, images):
        return self.net(images)


def test_a_backbone_without_stereo_stages_gives_the_same():
    config = tiny.config()
    options = {key: value for key, value in config.forward_projection.img_backbone.items() if key != "type"}
    torch.manual_seed(0)
    model = build_model(config)
    torch.manual_seed(0)
    plain = build_model(with_backbone({"type": Plain, **options}, [64, 128]))
    for one in (model, plain):
        one.eval()
    memory = None
    for step in range(2):  # with gradients frame after frame, without all together, and with features of before
        inputs = tiny.frame(step)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                expected, found = (one.run(*inputs, memory)[0] for one in (model, plain))
            torch.testing.assert_close(found.semantic_logits, expected.semantic_logits)
        memory = expected.memory


def test_a_backbone_of_mmdet_learns():
    torch.manual_seed(0)
    model = build_model(with_backbone(SWIN, [64, 128])).train()
    model.init_weights()
    model.train_step(tiny.training_batch())["loss"].backward()
    backbone = model.forward_projection.img_backbone
    without = {name for name, parameter in backbone.named_parameters() if parameter.grad is None}
    assert without == {"norm0.weight", "norm0.bias"}  # of the first output, through which no gradient flows
    assert backbone.patch_embed.projection.weight.grad.any() and backbone.norm3.weight.grad.any()


@pytest.mark.parametrize("change, channels, words", [
    ({"out_indices": (1, 2, 3)}, [64, 128],
     r"img_backbone: the first output of SwinTransformer, the stereo feature, must have stride 4, \(h, w\) = \(16, 44\)"
     r" here, but has \(8, 22\); see its out_indices"),
    ({"out_indices": (0,)}, [64, 128],
     r"img_backbone: SwinTransformer must give a tuple of feature maps .*, but gives \[\(2, 16, 16, 44\)\]"),
    ({}, [64, 256],
     r"img_neck.in_channels is \[64, 256\], but the outputs of SwinTransformer after the first have the channels "
     r"\[64, 128\]"),
    ({"out_indices": (0, 1, 2)}, [32, 64],
     r"img_neck: the first output of CustomFPN must have the view transform's in_channels and \(h, w\), \(32, 4, 11\), "
     r"but has \(32, 8, 22\)"),
], ids=["stride", "one output", "channels", "neck"])
def test_outputs_that_do_not_fit_are_named(change, channels, words):
    model = build_model(with_backbone({**SWIN, **change}, channels)).eval()
    with pytest.raises(ConfigError, match=rf"^model\.forward_projection\.{words}$") as caught, torch.no_grad():
        model.run(*tiny.frame(batch=1))
    assert "\n" not in str(caught.value)


# ---- in CUDA graphs -------------------------------------------------------------------------------------------------


def test_frames_of_a_backbone_of_mmdet_are_recorded(device):
    torch.manual_seed(0)
    model = build_model(with_backbone(SWIN, [64, 128])).eval().to(device)
    runner, memories = FrameRunner(model), [None, None]
    for step in range(EAGER_CALLS + 4):
        (images, *matrices), metas = tiny.frame(step, batch=1)
        metas[0]["noise_seed"] = step
        inputs = [images.to(device), *matrices]
        with torch.inference_mode():
            prediction, _ = model.run(inputs, metas, memories[0])
            expected = *model.decode(prediction), prediction.memory
            found = runner(inputs, metas, memories[1])
        assert (found[0] == expected[0]).float().mean() > 0.999
        torch.testing.assert_close(found[2].histories[0], expected[2].histories[0], rtol=1e-3, atol=1e-3)
        memories = [expected[2].clone(), found[2]]
    assert bool(runner.engine.captures) == (device == "cuda")


def test_losses_of_an_auxiliary_head_are_recorded(device):
    torch.manual_seed(0)
    model = build_model(tiny.config(auxiliary_heads=[{"type": VoxelShare, "channels": 16}])).train().to(device)
    other = copy.deepcopy(model)
    step = StepGraph(model, graphs=device == "cuda")
    for number in range(EAGER_CALLS + 4):
        batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value
                 for name, value in tiny.training_batch(number).items()}
        batch["img_inputs"] = [batch["img_inputs"][0].to(device), *batch["img_inputs"][1:]]
        losses = []
        for train_step, trained in ((step.step, model), (other.train_step, other)):
            torch.manual_seed(7)
            outputs = train_step(batch)
            if trained is other:
                trained.zero_grad(set_to_none=True)
                outputs["loss"].backward()
            losses.append(outputs["log_vars"])
        assert losses[0]["loss_share"] > 0 and losses[0] == pytest.approx(losses[1], rel=1e-4)
        torch.testing.assert_close(model.auxiliary_heads[0].classify.weight.grad,
                                   other.auxiliary_heads[0].classify.weight.grad, rtol=1e-3, atol=1e-5)
    assert bool(step.engine.captures) == (device == "cuda")
