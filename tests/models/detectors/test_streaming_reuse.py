"""Features of the frame before serve again, and nothing changes."""

import pytest
import tiny_model as tiny
import torch

from mmdet3d.models.view_transforms.feature_reuse import CACHED

CAMS, FRAMES = tiny.CAMS, 3


@pytest.fixture(scope="module")
def model():
    return tiny.build()


def sample(records, starts, batch=1, keys=True):
    """A batch whose three frames show the pictures, and have the poses, of the numbered records."""
    inputs, metas = tiny.frame(records[0], starts=[starts] * batch, batch=batch)
    images = torch.stack([torch.randn(batch, CAMS, 3, *tiny.IMAGE, generator=torch.Generator().manual_seed(r))
                          for r in records], 2)
    inputs[0] = images.flatten(1, 2)
    world = inputs[2].unflatten(1, (FRAMES, CAMS))
    for f, record in enumerate(records):
        world[:, f, :, 0, 3] = 300 + 0.8 * record
    inputs[5] = torch.eye(4).repeat(batch, 1, 1)
    if keys:
        for b, meta in enumerate(metas):
            meta["image_keys"] = tuple((b, record) for record in records)
    return inputs, metas


# Two scenes as the data side delivers them: frames that a scene does not have are replaced by the current one.
SCENES = [((0, 0, 0), True), ((1, 0, 1), False), ((2, 1, 0), False), ((3, 2, 1), False),
          ((7, 7, 7), True), ((8, 7, 8), False), ((9, 8, 7), False)]


def plan_of(model, frame, memory=None):
    """The plan of (img_inputs, img_metas)."""
    inputs, metas = frame
    return model.plan(model.camera_inputs(inputs), model.frame_meta(metas), memory)


def run(model, keys, batch=1):
    """Predictions of the scenes, and what the first stage of the backbone was given at each frame."""
    memory, predictions, seen = None, [], []
    hook = model.forward_projection.img_backbone.conv1.register_forward_pre_hook(
        lambda _, args: seen[-1].append(len(args[0])))
    torch.manual_seed(0)
    with torch.no_grad():
        for records, starts in SCENES:
            seen.append([])
            prediction, _ = model.run(*sample(records, starts, batch, keys), memory)
            memory = prediction.memory
            predictions.append(prediction)
    hook.remove()
    return predictions, seen


@pytest.mark.parametrize("batch", [1, 2])
def test_results_are_the_same_with_and_without_reuse(model, batch):
    (plain, everything), (reused, rest) = run(model, False, batch), run(model, True, batch)
    images = batch * CAMS
    assert everything == [[images] * 3] * len(SCENES) and rest == [[images]] * len(SCENES)
    for mine, theirs in zip(reused, plain, strict=True):
        for name in ("semantic_logits", "flow", "volume"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        assert all(torch.equal(a, b) for a, b in zip(mine.memory.histories, theirs.memory.histories, strict=True))
        assert theirs.memory.features is None and len(mine.memory.features.stereo) == images


def test_what_the_plans_decide(model):
    memory, decisions = None, []
    with torch.no_grad():
        for records, starts in SCENES[:4]:
            inputs, metas = sample(records, starts)
            decisions.append(plan_of(model, (inputs, metas), memory).reuse[:2])
            memory = model.run(inputs, metas, memory)[0].memory
    assert decisions == [((0, 0, 0), (0, 0)), ((0, CACHED, 0), (0, 1)), ((0, CACHED, 2), (0, CACHED)),
                         ((0, CACHED, 2), (0, CACHED))]


def test_other_cameras_of_the_older_pair_are_matched_again(model):
    with torch.no_grad():
        memory = model.run(*sample((1, 0, -1), False))[0].memory
        inputs, metas = sample((2, 1, 0), False)
        inputs[3] = inputs[3].clone()
        inputs[3][:, :, 0, 0] = 95.0  # another focal length
        assert plan_of(model, (inputs, metas), memory).reuse.pairs == (0, 1)


def test_the_memory_takes_the_features_along(model):
    with torch.no_grad():
        memory = model.run(*sample((1, 0, -1), False, batch=2))[0].memory
        moved = memory.to("meta").features
        assert moved.stereo.device.type == moved.neck.device.type == moved.matching.device.type == "meta"
        copy = memory.clone().features
        assert torch.equal(copy.neck, memory.features.neck) and copy.neck.data_ptr() != memory.features.neck.data_ptr()
        assert "features" not in memory.state_dict()
        assert type(memory).from_state_dict(memory.state_dict()).features is None
        first = memory.narrow(1)
        inputs, metas = sample((2, 1, 0), False)
        assert plan_of(model, (inputs, metas), first).reuse.frames == (0, CACHED, 2)
        torch.manual_seed(0)
        reused, _ = model.run(inputs, metas, first)
        torch.manual_seed(0)
        plain, _ = model.run(*sample((2, 1, 0), False, keys=False), first)
    torch.testing.assert_close(reused.semantic_logits, plain.semantic_logits)


@torch.no_grad()
def second_sample(model, batch):
    """Images, plan and memory of a sample whose earlier pictures are known, and its prediction."""
    memory = model.run(*sample((1, 0, -1), False, batch))[0].memory
    inputs, metas = sample((2, 1, 0), False, batch)
    plan = plan_of(model, (inputs, metas), memory)
    torch.manual_seed(0)
    images = model.camera_inputs(inputs).images
    return images, plan, memory, model.compute(images, plan, memory)[0]


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_the_newest_pictures_can_go_first(model, batch):
    network = model.forward_projection
    images, plan, memory, expected = second_sample(model, batch)
    assert network.newest_alone(plan.reuse)
    assert not network.newest_alone(plan_of(model, sample((2, 1, 0), False, batch)).reuse)
    newest = network.frame_features(images[:, :, 0].flatten(0, 1))
    torch.manual_seed(0)
    found, _ = model.compute(torch.full_like(images, torch.nan), plan, memory, newest=newest)
    assert torch.equal(found.semantic_logits, expected.semantic_logits) and torch.equal(found.flow, expected.flow)
    assert torch.equal(found.memory.features.stereo, expected.memory.features.stereo)


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_what_needs_no_pictures_can_go_first(model, batch):
    images, plan, memory, expected = second_sample(model, batch)
    stages = model.precompute(plan, memory)
    assert all(stage.get().past.goes_on for stage in stages)
    features = model.forward_projection(images, plan.lifts, plan.reuse, memory.features)
    torch.manual_seed(0)
    found = model.cascade(features, plan, memory, stages)
    assert torch.equal(found.semantic_logits, expected.semantic_logits) and torch.equal(found.flow, expected.flow)
    for mine, theirs in zip(found.memory.histories, expected.memory.histories, strict=True):
        assert torch.equal(mine, theirs)


def test_training_and_gradients_do_without(model):
    inputs, metas = sample((1, 0, -1), False)
    prediction, _ = model.run(inputs, metas)
    assert prediction.memory.features is None
    model.train()
    with torch.no_grad():
        assert model.run(*sample((1, 0, -1), False, batch=2))[0].memory.features is None
    model.eval()
