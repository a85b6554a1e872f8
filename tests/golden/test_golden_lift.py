"""The lift of the golden inputs against its literal steps: every voxel, and what the model makes of them."""

import numpy as np
import pytest
import torch
from golden_cases import build, eval_tensors, load_module
from literal_lift import literal_cells, literal_points
from test_golden_eval import TOLERANCE

from mmdet3d.models.detectors.frame_plan import map_tensors
from mmdet3d.models.view_transforms.geometry import CameraFrame, camera_frames
from mmdet3d.models.view_transforms.lift_splat import PoolTargets
from mmdet3d.ops import sort_by_cell
from mmdet3d.structures import CameraInputs
from mmdet3d.utils.beside import Beside

BATCH, FLIPS = 2, ((1, -1), (-1, -1))
COMPARED = ("coarse_voxel_0", "coarse_voxel_1", "coarse_voxel_2", "semantic_logits")


@pytest.fixture(scope="module")
def model():
    return build("openocc").eval()


def expected_cells(model, inputs):
    """Voxels of the earlier and the key frame, from matrices on the CPU."""
    transform, cameras = model.forward_projection.img_view_transformer, camera_frames(inputs)
    points = literal_points(CameraFrame.stack([cameras[1], cameras[0]]), inputs.bda.repeat(2, 1, 1),
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
    projection = model.forward_projection
    for img_inputs in golden_inputs(shared):
        inputs = CameraInputs.from_img_inputs(img_inputs, projection.num_cams, projection.num_frames)
        lifts = map_tensors(lambda tensor: tensor.to(device), projection.geometry(inputs))
        cells = projection.img_view_transformer.pool_targets(lifts).get().cells
        assert torch.equal(cells.cpu(), expected_cells(model, inputs))


@pytest.mark.slow
def test_the_model_sees_the_voxels_of_the_literal_steps(shared, device, model, monkeypatch, record_property):
    generator = load_module(shared / "spec/golden/golden_inputs.py")
    generator.fill_model(model)
    model.to(device)
    img_inputs, metas = generator.make_batch(1, BATCH, (True, True), (3, 4), FLIPS)
    img_inputs[0] = img_inputs[0].to(device)
    tensors = []
    transform = model.forward_projection.img_view_transformer
    cells = expected_cells(model, model.camera_inputs(img_inputs)).to(device)
    literal = Beside(lambda: PoolTargets(cells, sort_by_cell(cells, transform.grid.size_zyx)))
    for pool_targets in (transform.pool_targets, lambda geometry: literal):
        monkeypatch.setattr(transform, "pool_targets", pool_targets)
        with torch.no_grad():
            tensors.append(eval_tensors(*model.run(img_inputs, metas)))
    errors = {}
    for name in COMPARED:
        mine, expected = (tensor[name].cpu().double().numpy() for tensor in tensors)
        errors[name] = float(np.quantile(np.abs(mine - expected), 0.999) / expected.std())
    record_property("errors", errors)
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}
