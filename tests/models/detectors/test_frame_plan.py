"""The host's part of a frame, its one transfer, and the device's part, which reads nothing back."""

import dataclasses

import numpy as np
import pytest
import tiny_model as tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet3d.models.detectors.frame_plan import map_tensors

REFUSED = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique", "aten._unique2",
           "aten.is_nonzero", "aten.equal", "aten.lift_fresh")  # the last: numbers of the host made a tensor


class Observer(TorchDispatchMode):
    """Refuses operators that a GPU would have to be waited for, or whose shapes depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not name.startswith(REFUSED), name
        if name.startswith("aten._to_copy"):
            assert (kwargs or {}).get("device") in (None, args[0].device), name
        if name.startswith(("aten.index.Tensor", "aten.index_put")):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), f"{name} by a mask"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model():
    return tiny.build()


def plan_of(model, frame, memory=None):
    """The plan of (img_inputs, img_metas)."""
    inputs, metas = frame
    return model.plan(model.camera_inputs(inputs), model.frame_meta(metas), memory)


def leaves(plan):
    tensors = []
    map_tensors(lambda tensor: tensors.append(tensor) or tensor, (plan.lifts, plan.stages))
    return tensors


def test_the_device_part_reads_nothing_back(model):
    memory = None
    with torch.no_grad():
        for step in range(2):
            inputs, metas = tiny.frame(step)
            for b, meta in enumerate(metas):
                meta.update(noise_seed=7 * step + b, image_keys=(step, step - 1, step - 2))
            plan = plan_of(model, (inputs, metas), memory)
            with Observer():
                prediction, _ = model.compute(model.camera_inputs(inputs).images, plan, memory)
                model.decode(prediction)
            memory = prediction.memory


def test_run_is_the_plan_and_its_computation(model):
    inputs, metas = tiny.frame(0)
    with torch.no_grad():
        torch.manual_seed(0)
        expected, _ = model.run(inputs, metas)
        torch.manual_seed(0)
        found, _ = model.compute(model.camera_inputs(inputs).images, plan_of(model, (inputs, metas)), None)
    assert torch.equal(found.semantic_logits, expected.semantic_logits) and torch.equal(found.flow, expected.flow)


def test_all_tensors_lie_in_one_buffer(model):
    inputs, metas = tiny.frame(0)
    plan = plan_of(model, (inputs, metas))
    start, end = plan.buffer.data_ptr(), plan.buffer.data_ptr() + len(plan.buffer)
    places = sorted((t.data_ptr(), t.numel() * t.element_size()) for t in leaves(plan))
    assert places[0][0] >= start and places[-1][0] + places[-1][1] <= end
    assert all(a + size <= b for (a, size), (b, _) in zip(places, places[1:], strict=False))
    assert all(place % 4 == 0 for place, _ in places)
    moved = plan.to("meta")
    assert {t.device.type for t in leaves(moved)} == {"meta"} and moved.bda.device.type == "cpu"
    assert [(t.shape, t.dtype) for t in leaves(moved)] == [(t.shape, t.dtype) for t in leaves(plan)]
    assert plan.to("cpu") is plan


def test_a_plan_can_be_loaded_into_the_place_of_another(model):
    first, second = (plan_of(model, tiny.frame(step)) for step in range(2))
    expected = [t.clone() for t in leaves(second)]
    places = [t.data_ptr() for t in leaves(first)]
    loaded = first.load(second)
    assert [t.data_ptr() for t in leaves(loaded)] == places and loaded.meta is second.meta
    assert all(torch.equal(a, b) for a, b in zip(leaves(loaded), expected, strict=True))
    other = plan_of(model, tiny.frame(0, batch=1))
    with pytest.raises(ValueError, match=r"the plan holds \d+ bytes and cannot take one of \d+"):
        first.load(other)


def test_signatures_tell_frames_apart_that_run_differently(model):
    plans = [plan_of(model, tiny.frame(1, starts=list(starts))) for starts in ((False, False), (False, True))]
    assert plans[0].signature != plans[1].signature
    assert plans[0].signature == plan_of(model, tiny.frame(2, starts=[False, False])).signature
    assert len({plan.signature for plan in plans}) == 2


def test_matrices_on_the_host_stay_where_they_are(model):
    inputs, _ = tiny.frame(0)
    given = model.camera_inputs(inputs)
    named = (given.ego_from_sensor, given.global_from_ego, given.intrinsics, given.post_aug, given.bda)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(named, inputs[1:], strict=True))


def test_values_of_the_stages(model):
    with torch.no_grad():
        memory = model.run(*tiny.frame(0))[0].memory
    inputs, metas = tiny.frame(1, starts=[True, False])
    stages = plan_of(model, (inputs, metas), memory).stages
    assert stages.start_mask.tolist() == [True, False]
    # The second slot is mirrored along x at step 1 alone; its flip is new, whether or not it starts.
    assert stages.previous_flips.tolist() == [[False, False], [True, False]]
    assert not stages.shift[0].any() and stages.shift[1].any()
    assert torch.equal(stages.bda, inputs[5])
    assert len(stages.index_matrices) == 2 and all(m.shape == (2, 4, 4) for m in stages.index_matrices)
    expected = metas[0]["lidar2img"] @ np.asarray(metas[0]["ego2lidar"])
    torch.testing.assert_close(stages.image_from_augmented[0], torch.as_tensor(expected))
    # 0.8 m ahead in voxels of 4 m, mirrored: x' = (-(4 x - 24) + 0.8 + 24) / 4
    row = stages.index_matrices[0][1, 0]
    torch.testing.assert_close(row, torch.tensor([-1.0, 0, 0, (48 + 0.8) / 4]))


def test_without_memory_the_frame_is_compared_with_itself(model):
    stages = plan_of(model, tiny.frame(1)).stages
    assert not stages.previous_flips.any() and not stages.shift.any()


@pytest.mark.cuda
def test_matrices_on_a_gpu_serve_and_the_frame_waits_for_nothing():
    model = tiny.build().cuda()
    inputs, metas = tiny.frame(0)
    host = plan_of(model, (inputs, metas))
    assert torch.equal(plan_of(model, ([t.cuda() for t in inputs], metas)).buffer, host.buffer)
    images = model.camera_inputs(inputs).images.cuda()
    plan = dataclasses.replace(host, buffer=host.buffer.pin_memory()).to("cuda")
    with torch.no_grad():
        model.compute(images, plan, None)  # cuDNN and others set up
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            prediction, _ = model.compute(images, plan, None)
            model.decode(prediction)
        finally:
            torch.cuda.set_sync_debug_mode("default")
