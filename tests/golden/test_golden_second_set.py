"""A second, independent set of golden values: the image branch, and the voxel path with flips and a restart (B = 2)."""

import numpy as np
import pytest
import torch
from golden_cases import build, load_module

from mmdet3d.models.detectors.frame_plan import map_tensors
from mmdet3d.models.view_transforms import ForwardFeatures
from mmdet3d.structures import CameraInputs
from mmdet3d.utils.fold_batch_norm import fold_batch_norm

BATCH = 2
FLOW_SEED = 5


def compare(golden, key, tensor, generator):
    """Sum of magnitudes within 1e-4 relative, and 99.9 % of the samples within 1e-3 of the spread."""
    sums, sample = generator.summary(tensor.cpu())
    wanted = golden[f"{key}/sample"]
    assert sums[1] == pytest.approx(golden[f"{key}/sums"][1], rel=1e-4), key
    error = np.abs(sample - wanted) / max(wanted.std(), 1e-12)
    assert np.quantile(error, 0.999) < 1e-3, key
    return float(np.quantile(error, 0.999))


@pytest.fixture
def generator(shared):
    return load_module(shared / "spec/golden/golden_inputs.py")


@pytest.fixture
def unfolded(generator):
    model = build("openocc")
    generator.fill_model(model)
    return model.eval()


@pytest.fixture
def model(unfolded, device):
    return unfolded.to(device)


@pytest.mark.slow
@pytest.mark.parametrize("folded", [False, True])
def test_image_branch(shared, device, generator, unfolded, folded, record_property):
    model = (fold_batch_norm(unfolded, inplace=True) if folded else unfolded).to(device)
    golden = np.load(shared / "spec/golden/golden_image.npz")
    inputs, _ = generator.make_batch(1, 1, (False,), (3,), ((1, -1),))
    seen = {"adj": {}, "key": {}}
    projection = model.forward_projection
    depth_net = projection.img_view_transformer.depth_net
    matched = iter(("key", "adj"))

    def keep_depth_net(module, args, output):  # both frames in one pass, the earlier one first
        for name, neck, logits, context in zip(("adj", "key"), *(x.chunk(2) for x in (args[0], *output)), strict=True):
            seen[name].update(neck=neck, depthnet=torch.cat([logits, context], 1), depth=logits.softmax(1))

    def keep_volumes(module, args, output):
        for name, volume in zip(("adj", "key"), args[0].chunk(2, dim=1), strict=True):
            seen[name]["bev"] = volume

    hooks = [depth_net.cost_volumn_net.register_forward_hook(
                 lambda module, args, output: seen[next(matched)].update(cost_volume=args[0])),
             depth_net.register_forward_hook(keep_depth_net),
             projection.img_bev_encoder_backbone.register_forward_hook(keep_volumes)]
    with torch.no_grad():
        given = CameraInputs.from_img_inputs(inputs, projection.num_cams, projection.num_frames)
        lifts = map_tensors(lambda tensor: tensor.to(device), projection.geometry(given))
        features = projection(given.images.to(device), lifts)
    for hook in hooks:
        hook.remove()
    tensors = {f"{frame}/{name}": value for frame, values in seen.items() for name, value in values.items()}
    tensors.update({f"vol{s}": volume for s, volume in enumerate(features.volumes)},
                   context96=features.context, depth_key=features.depth)
    assert {f"{name}/sums" for name in tensors} == {name for name in golden.files if name.endswith("sums")}
    record_property("errors", {name: compare(golden, name, value, generator) for name, value in tensors.items()})


@pytest.mark.slow
def test_voxel_path_and_losses(shared, device, generator, model, monkeypatch, record_property):
    golden = np.load(shared / "spec/golden/golden_voxel_openocc.npz")
    draw_gumbel_on_the_cpu(monkeypatch)
    model.flow_head.register_forward_pre_hook(lambda *_: torch.manual_seed(FLOW_SEED) and None)
    memory, errors = None, {}
    for step, (starts, sequences, flips) in enumerate(generator.STEPS):
        inputs, metas = generator.make_batch(step, BATCH, starts, sequences, flips, images=False)
        volumes, context, depth = generator.voxel_inputs(step, BATCH)
        features = ForwardFeatures([v.to(device) for v in volumes], depth.to(device), context.to(device))
        with torch.no_grad():
            plan = model.plan_stages(model.frame_meta(metas), inputs[5], memory, features.depth.device).to(device)
            prediction = model.cascade(features, plan, memory)
        memory = prediction.memory
        tensors = {"logits": prediction.semantic_logits, "flow": prediction.flow, "voxel_feats": prediction.volume}
        tensors |= {f"history{s}": memory.history_volume(s) for s in range(3)}
        tensors |= {f"pred_1_{2 ** (s + 1)}": logits for s, logits in enumerate(prediction.stage_logits)}
        for name, value in tensors.items():
            errors[f"step{step}/{name}"] = compare(golden, f"step{step}/{name}", value, generator)
        foreground = model.flow_head.foreground(prediction.semantic_logits.argmax(-1)).sum().item()
        assert foreground == pytest.approx(float(golden[f"step{step}/fg_count"]), rel=1e-4)
    record_property("errors", errors)
    targets = {key: value.to(device) for key, value in generator.targets(step, BATCH, 17).items()}
    losses = model.losses(prediction, features.depth, targets["depth"], targets["1"], targets["flow"],
                          **{f"voxel_semantics_1_{n}": targets[n] for n in "248"})
    wanted = {key.split("/")[1]: float(golden[key]) for key in golden.files if key.startswith("loss/")}
    assert losses.keys() == wanted.keys()
    for name, value in wanted.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4), name


def draw_gumbel_on_the_cpu(monkeypatch):
    """The golden flow used noise of the CPU generator; draw it there whatever the device."""

    def gumbel_softmax(logits, tau=1, hard=False, eps=1e-10, dim=-1):
        noise = -torch.empty(logits.shape, dtype=logits.dtype).exponential_().log()
        return ((logits + noise.to(logits.device)) / tau).softmax(dim)

    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", gumbel_softmax)
