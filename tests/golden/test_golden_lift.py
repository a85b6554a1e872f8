"""The lift of the golden inputs against its literal steps: every voxel, and what the model makes of them."""

import numpy as np
import pytest
import torch
from golden_cases import build, eval_tensors, load_module
from literal_lift import literal_cells, literal_points
from test_golden_eval import TOLERANCE

from mmdet3d.models.detectors.frame_plan import map_tensors
from mmdet3d.models.view_transforms.geometry import CameraFrame, split_frames
from mmdet3d.models.view_transforms.lift_splat import PoolTargets
from mmdet3d.utils.beside import Beside

BATCH, FLIPS = 2, ((1, -1), (-1, -1))
COMPARED = ("coarse_voxel_0", "coarse_voxel_1", "coarse_voxel_2", "semantic_logits")


@pytest.fixture(scope="module")
def model():
    return build("openocc").eval()


def expected_cells(model, inputs):
    """Voxels of the earlier and the key frame, from matrices on the CPU."""
    projection = model.forward_projection
    transform = projection.img_view_transformer
    _, cameras = split_frames(tuple(inputs), projection.num_cams, projection.num_frames)
    points = literal_points(CameraFrame.stack([cameras[1], cameras[0]]), inputs[5].repeat(2, 1, 1),
                            transform.input_size, transform.feature_size, transform.depths.cpu())
    return literal_cells(points, transform.grid)


def golden_inputs(shared):
    """The inputs of both golden sets without their pictures; and of the first with augmentations, as in training."""
    fill = load_module(shared / "golden/fill.py")
    generator = load_module(shared / "spec/golden/golden_inputs.py")
    for with_gt, batch in ((False, 1), (True, BATCH)):
        for frame in fill.make_sequence(seed=0, frames=2, batch=batch, flip=with_gt, with_gt=with_gt):
            yield frame["img_inputs"]
    for step, (starts, sequences, flips) in enumerate(generator.STEPS):
        yield generator.make_batch(step, BATCH, starts, sequences, flips, images=False)[0]


@pytest.mark.slow
def test_every_voxel_of_the_golden_inputs(shared, device, model):
    model.to(device)
    transform = model.forward_projection.img_view_transformer
    size = transform.input_size
    for inputs in golden_inputs(shared):
        images = torch.zeros(()).expand(*inputs[0].shape[:3], *size)
        lifts = model.forward_projection.geometry((images, *inputs[1:]))
        cells = transform.pool_targets(map_tensors(lambda tensor: tensor.to(device), lifts)).cells
        assert torch.equal(cells.cpu(), expected_cells(model, (images, *inputs[1:])))


@pytest.mark.slow
def test_the_model_sees_the_voxels_of_the_literal_steps(shared, device, model, record_property):
    generator = load_module(shared / "spec/golden/golden_inputs.py")
    generator.fill_model(model)
    model.to(device)
    inputs, metas = generator.make_batch(1, BATCH, (True, True), (3, 4), FLIPS)
    plan, images = model.plan(inputs, metas, None).to(device), inputs[0].to(device)
    cells = expected_cells(model, inputs).to(device)
    tensors = []
    with torch.no_grad():
        for targets in (None, Beside(lambda: PoolTargets(cells))):
            features = model.forward_projection(images, plan.lifts, plan.reuse, targets=targets)
            torch.manual_seed(0)
            tensors.append(eval_tensors(model.cascade(features, plan, None), features))
    errors = {}
    for name in COMPARED:
        mine, expected = (tensor[name].cpu().double().numpy() for tensor in tensors)
        errors[name] = float(np.quantile(np.abs(mine - expected), 0.999) / expected.std())
    record_property("errors", errors)
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}
