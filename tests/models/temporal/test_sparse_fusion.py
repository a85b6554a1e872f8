"""Sparse temporal fusion against its literal steps, over sequences with restarts and flips."""

import math

import pytest
import torch
from literal_fusion import LiteralFusion

from mmdet3d.models.temporal import SparseFusion
from mmdet3d.ops.history_warp import history_warp
from mmdet3d.structures import TemporalMemory, VoxelGrid

GRID = VoxelGrid((-4, -3, -1), (4, 3, 3), (2, 2, 2))
SIZE, CHANNELS, SLOTS, CLASSES, TOP_K, BATCH = (2, 3, 4), 5, 4, 6, 7, 2  # SIZE is (Z, Y, X)
VOXELS = 24
# starts, sequence numbers and flips (x, y) of the two batch slots, step after step
STEPS = [((True, True), (0, 5), ((1, 1), (-1, 1))), ((False, False), (0, 5), ((1, -1), (-1, -1))),
         ((True, False), (3, 5), ((-1, 1), (1, 1))), ((False, True), (3, 4), ((1, 1), (1, -1)))]


def make(**options):
    torch.manual_seed(1)
    return SparseFusion(TOP_K, SLOTS, CHANNELS, CLASSES, occ_embedims=3, **options)


def step_inputs(step):
    generator = torch.Generator().manual_seed(step)
    _, _, flips = STEPS[step % len(STEPS)]
    bda = torch.stack([torch.diag(torch.tensor([x, y, 1.0, 1.0])) for x, y in flips])
    poses = torch.eye(4).repeat(BATCH, 1, 1)
    for b in range(BATCH):
        yaw = 0.2 * (b + 1) * step
        poses[b, :2, :2] = torch.tensor([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]])
        poses[b, :3, 3] = torch.tensor([1.3, -0.4, 0.1]) * (1 + b)
    return {"volume": torch.randn(BATCH, CHANNELS, *SIZE, generator=generator),
            "logits": torch.randn(BATCH, *SIZE[::-1], CLASSES, generator=generator),
            "occupied": torch.rand(BATCH, *SIZE, generator=generator), "bda": bda, "previous_ego_from_ego": poses}


def fuse(module, volume, logits, occupied, bda, previous_ego_from_ego, history, starts, previous_bda, out=None,
         **options):
    """The module on the index matrix of the poses."""
    matrix, = module.index_matrices([GRID], starts, bda, previous_bda, previous_ego_from_ego)
    return module(volume, logits, occupied, module.prepare(history, GRID, starts, matrix, out), GRID, **options)


def as_volumes(history):
    """[B, V, T * C] -> [B, T * C, Z, Y, X]."""
    return TemporalMemory((history,), (SIZE,), CHANNELS, None, None, None).history_volume(0)


def run(module, steps, starts_of=lambda step: STEPS[step % len(STEPS)][0]):
    """(inputs, output, history) of each step; the volumes require grad."""
    history = previous_bda = None
    for step in range(steps):
        inputs = step_inputs(step)
        inputs["volume"].requires_grad_()
        output, history = fuse(module, **inputs, history=history, starts=starts_of(step), previous_bda=previous_bda)
        previous_bda = inputs["bda"]
        yield inputs, output, history


def test_equals_the_literal_steps_with_restarts_and_flips():
    module = make()
    literal = LiteralFusion(module, GRID)
    weight = torch.randn(BATCH, CHANNELS, *SIZE)
    for step, (inputs, output, history) in enumerate(run(module, len(STEPS))):
        starts, ids, _ = STEPS[step]
        volume = inputs["volume"].detach().clone().requires_grad_()
        expected = literal(volume, inputs["logits"], inputs["occupied"], ids, starts, inputs["bda"],
                           inputs["previous_ego_from_ego"])
        torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-4)
        assert history.shape == (BATCH, VOXELS, SLOTS * CHANNELS) and not history.requires_grad
        torch.testing.assert_close(as_volumes(history), literal.history, atol=2e-5, rtol=1e-4)
        mine, = torch.autograd.grad((output * weight).sum(), inputs["volume"])
        theirs, = torch.autograd.grad((expected * weight).sum(), volume)
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_a_first_frame_that_starts_nothing_has_a_constant_history():
    """Without a memory the history is the current volume; its gradient counts only where a sequence starts."""
    starts = (False, True)
    module = make()
    (inputs, output, _), = run(module, 1, lambda _: starts)
    literal = LiteralFusion(module, GRID)
    volume = inputs["volume"].detach().clone().requires_grad_()
    expected = literal(volume, inputs["logits"], inputs["occupied"], (0, 1), starts, inputs["bda"],
                       inputs["previous_ego_from_ego"])
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-4)
    mine, = torch.autograd.grad(output.square().sum(), inputs["volume"])
    theirs, = torch.autograd.grad(expected.square().sum(), volume)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_gradient_through_the_history_only_where_a_sequence_starts():
    """The gradient of one voxel's output reaches other voxels of the current volume only through a fresh history."""
    module = make()
    for step, (inputs, output, _) in enumerate(run(module, 4)):
        for b in range(BATCH):
            grad, = torch.autograd.grad(output[b, :, 1, 1, 2].sum(), inputs["volume"], retain_graph=True)
            others = grad[b].clone()
            others[:, 1, 1, 2] = 0
            assert others.any() == STEPS[step][0][b]
            assert grad[b, :, 1, 1, 2].any() and not grad[1 - b].any()


def test_what_the_new_history_holds():
    *_, (_, _, before), (inputs, output, history) = run(make(), 2)
    newest = as_volumes(history)[:, :CHANNELS]
    assert torch.equal(newest, output.detach())
    still = {**step_inputs(2), "previous_ego_from_ego": torch.eye(4).repeat(BATCH, 1, 1), "bda": inputs["bda"]}
    _, after = fuse(make(), **still, history=history, starts=(False, False), previous_bda=inputs["bda"])
    torch.testing.assert_close(after[..., CHANNELS:], history[..., :-CHANNELS])
    assert not torch.allclose(before, history)


def test_foreground_sees_all_slots_and_background_the_newest_half():
    module = make()
    *_, (_, _, history) = run(module, 1)
    inputs = step_inputs(1)
    inputs["previous_ego_from_ego"] = torch.eye(4).repeat(BATCH, 1, 1)
    same = {"starts": (False, False), "previous_bda": inputs["bda"]}
    outputs = []
    for first_changed in (SLOTS, 2):
        changed = history.clone()
        changed[..., first_changed * CHANNELS:] += 1
        outputs.append(fuse(module, **inputs, history=changed, **same)[0].flatten(2).transpose(1, 2))
    differs = (outputs[0] != outputs[1]).any(-1)  # [B, V]
    for b in range(BATCH):
        foreground = inputs["occupied"][b].flatten().topk(TOP_K).indices
        assert differs[b].sum() == TOP_K and differs[b, foreground].all()


def test_another_number_of_foreground_voxels_can_be_asked_for():
    inputs, module = step_inputs(0), make()
    same = {"history": None, "starts": (True, True), "previous_bda": None}
    wide = SparseFusion(12, SLOTS, CHANNELS, CLASSES, occ_embedims=3)
    wide.load_state_dict(module.state_dict())
    expected, _ = fuse(wide, **inputs, **same)
    output, _ = fuse(module, **inputs, **same, top_k=12)
    assert torch.equal(output, expected) and not torch.equal(output, fuse(module, **inputs, **same)[0])


@pytest.mark.parametrize("options", [{"top_k": 25}, {}])
def test_more_foreground_than_voxels_is_refused(options):
    module = make()
    module.top_k = 7 if options else 25
    with pytest.raises(ValueError, match="top_k=25 exceeds the 24 voxels of the stage"):
        fuse(module, **step_inputs(0), history=None, starts=(True, True), previous_bda=None, **options)


@pytest.mark.parametrize("occupied", [0.5, 0.0, 1.0])
def test_ties_follow_two_separate_selections(occupied):
    module, inputs = make(), step_inputs(0)
    inputs["occupied"] = torch.full_like(inputs["occupied"], occupied)
    output, _ = fuse(module, **inputs, history=None, starts=(True, True), previous_bda=None)
    expected = LiteralFusion(module, GRID)(inputs["volume"], inputs["logits"], inputs["occupied"], (0, 1), (True, True),
                                           inputs["bda"], inputs["previous_ego_from_ego"])
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-4)


def test_a_batch_is_its_samples():
    module = make()
    together = list(run(module, len(STEPS)))
    for b in range(BATCH):
        history = previous_bda = None
        for step, (_, output, batch_history) in enumerate(together):
            inputs = {name: value[b : b + 1] for name, value in step_inputs(step).items()}
            alone, history = fuse(module, **inputs, history=history, starts=STEPS[step][0][b : b + 1],
                                  previous_bda=previous_bda)
            previous_bda = inputs["bda"]
            torch.testing.assert_close(alone[0], output[b], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(history[0], batch_history[b], atol=1e-5, rtol=1e-5)


def test_the_input_volume_and_history_stay_as_they_are():
    module, inputs = make(), step_inputs(1)
    *_, (_, _, history) = run(module, 1)
    volume, past = inputs["volume"].clone(), history.clone()
    fuse(module, **inputs, history=history, starts=(True, False), previous_bda=inputs["bda"])
    assert torch.equal(inputs["volume"], volume) and torch.equal(history, past)


def test_the_centre_convention_moves_the_history_by_half_a_voxel_less():
    inputs = step_inputs(0)
    inputs["bda"] = torch.diag(torch.tensor([-1.0, 1, 1, 1])).repeat(BATCH, 1, 1)
    inputs["previous_ego_from_ego"] = torch.eye(4).repeat(BATCH, 1, 1)
    history = torch.randn(BATCH, VOXELS, SLOTS * CHANNELS)
    same = {"history": history, "starts": (False, False),
            "previous_bda": torch.eye(4).repeat(BATCH, 1, 1)}
    _, centre = fuse(make(corner_origin=False), **inputs, **same)
    kept = as_volumes(history)[:, :-CHANNELS]
    torch.testing.assert_close(as_volumes(centre)[:, CHANNELS:], kept.flip(-1), atol=1e-5, rtol=1e-5)
    _, corner = fuse(make(), **inputs, **same)
    moved = as_volumes(corner)[:, CHANNELS:]
    assert not moved[..., 0].any()
    torch.testing.assert_close(moved[..., 1:], kept[..., 1:].flip(-1), atol=1e-5, rtol=1e-5)


def test_published_shapes():
    state = SparseFusion(12000, history_num=16, num_classes=17).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items() if "weight" in key} == {
        "occ_embedding.0.weight": (32, 17), "occ_embedding.2.weight": (32, 32),
        "history_fusion_linear.0.weight": (96, 1664), "history_fusion_linear.2.weight": (96, 96),
        "history_fusion_bg_linear.0.weight": (96, 896), "history_fusion_bg_linear.2.weight": (96, 96)}
    assert len(state) == 12


def test_gradients_of_the_weights_with_restarts():
    """The history is one buffer, whose newest slot is written after the others were read for the gradients."""
    module = make()
    literal = LiteralFusion(module, GRID)
    mine, theirs = 0, 0
    for step, (inputs, output, _) in enumerate(run(module, len(STEPS))):
        starts, ids, _ = STEPS[step]
        expected = literal(inputs["volume"], inputs["logits"], inputs["occupied"], ids, starts, inputs["bda"],
                           inputs["previous_ego_from_ego"])
        mine, theirs = mine + output.square().sum(), theirs + expected.square().sum()
    gradients = [torch.autograd.grad(loss, list(module.parameters())) for loss in (mine, theirs)]
    for got, wanted in zip(*gradients, strict=True):
        assert wanted.any()
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def one_step(module, device="cpu", history=None, starts=(False, True), **options):
    inputs = {name: value.to(device) for name, value in step_inputs(1).items()}
    return fuse(module, **inputs, history=history, starts=starts, previous_bda=inputs["bda"], **options)


@pytest.mark.cuda
@pytest.mark.parametrize("starts", [(False, False), (False, True), (True, True)])
def test_cuda_equals_cpu(starts):
    module, history = make(), torch.randn(BATCH, VOXELS, SLOTS * CHANNELS)
    expected = one_step(module, history=history, starts=starts)
    gradients = torch.autograd.grad(expected[0].square().sum(), list(module.parameters()))
    module.cuda()
    results = one_step(module, "cuda", history.cuda(), starts)
    for got, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(got.cpu(), wanted, atol=2e-5, rtol=1e-4)
    for got, wanted in zip(torch.autograd.grad(results[0].square().sum(), list(module.parameters())), gradients,
                           strict=True):
        torch.testing.assert_close(got.cpu(), wanted, atol=1e-3, rtol=1e-4)


def test_the_caller_can_bring_the_memory_of_the_new_history(device):
    module, history = make().to(device), torch.randn(BATCH, VOXELS, SLOTS * CHANNELS, device=device)
    buffer = torch.full_like(history, 7)
    with torch.no_grad():
        expected, expected_history = one_step(module, device, history)
        output, new = one_step(module, device, history, out=buffer)
        assert new.data_ptr() == buffer.data_ptr()
        assert torch.equal(output, expected) and torch.equal(new, expected_history)
        with pytest.raises(ValueError, match="the tensor for the new history must be contiguous"):
            one_step(module, device, history, out=buffer.mT)
        with pytest.raises(ValueError, match="out must not share memory with history"):
            one_step(module, device, history, out=history)
    with pytest.raises(ValueError, match="must not require a gradient"):
        one_step(module, device, history, out=buffer.clone().requires_grad_())


@torch.no_grad()
@pytest.mark.parametrize("starts", [(False, False), (False, True), (True, True)])
def test_what_is_prepared_is_the_history_of_sequences_that_go_on(starts):
    """Slots but the first are those of the operator; where a sequence starts they are left for the features."""
    module, inputs = make(), step_inputs(1)
    history, out = (torch.randn(BATCH, VOXELS, SLOTS * CHANNELS) for _ in range(2))
    matrix, = module.index_matrices([GRID], starts, inputs["bda"], None, inputs["previous_ego_from_ego"])
    past = module.prepare(history, GRID, starts, matrix, out)
    assert past.new.data_ptr() == out.data_ptr() and past.goes_on is not any(starts)
    expected, _ = history_warp(history.unflatten(2, (SLOTS, CHANNELS)), matrix, SIZE)
    assert torch.equal(past.new[:, :, 1:], expected[:, :, 1:]) is not any(starts)
    new = module(inputs["volume"], inputs["logits"], inputs["occupied"], past, GRID)[1]
    assert new.data_ptr() == out.data_ptr()
    goes_on = [not start for start in starts]
    assert torch.equal(new.unflatten(2, (SLOTS, CHANNELS))[goes_on][:, :, 1:], expected[goes_on][:, :, 1:])


def test_gradients_are_the_same_with_memory_of_the_caller(device):
    module, history = make().to(device), torch.randn(BATCH, VOXELS, SLOTS * CHANNELS, device=device)
    gradients = []
    for buffer in (None, torch.full_like(history, 7)):
        module.zero_grad()
        output, new = one_step(module, device, history, out=buffer)
        assert not new.requires_grad
        output.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    for mine, expected in zip(*gradients, strict=True):
        assert expected.any() and torch.equal(mine, expected)


def test_memory_formats(device):
    """A channels-last volume is not copied, and the result is one."""
    module = make().to(device)
    inputs = {name: value.to(device) for name, value in step_inputs(1).items()}
    expected, _ = one_step(module, device)
    inputs["volume"] = inputs["volume"].contiguous(memory_format=torch.channels_last_3d)
    output, _ = fuse(module, **inputs, history=None, starts=(False, True), previous_bda=inputs["bda"])
    assert torch.equal(output, expected) and output.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_history_is_kept_in_the_precision_of_the_step(device, dtype):
    module, history = make().to(device), torch.randn(BATCH, VOXELS, SLOTS * CHANNELS, device=device).to(dtype)
    expected, expected_history = one_step(module, device, history.float())
    output, new = one_step(module, device, history)  # comes out of a step under autocast, goes on without
    assert new.dtype == output.dtype == torch.float32
    assert torch.equal(output, expected) and torch.equal(new, expected_history)
    with torch.autocast(device, dtype=dtype):
        half, new = one_step(module, device, history)
        also, same = one_step(module, device, history.float())
    assert new.dtype == dtype and half.dtype == torch.float32
    assert torch.equal(also, half) and torch.equal(same, new)
    torch.testing.assert_close(half, expected, atol=5e-2, rtol=5e-2)
    torch.testing.assert_close(new.float(), expected_history, atol=3e-2, rtol=3e-2)


def test_autocast(device):
    module, history = make().to(device), torch.randn(BATCH, VOXELS, SLOTS * CHANNELS, device=device)
    expected, expected_history = one_step(module, device, history)
    with torch.autocast(device, dtype=torch.bfloat16):
        output, new = one_step(module, device, history)
    assert output.dtype == torch.float32 and new.dtype == torch.bfloat16 and not torch.equal(output, expected)
    torch.testing.assert_close(output, expected, atol=5e-2, rtol=5e-2)
    torch.testing.assert_close(new.float(), expected_history, atol=3e-2, rtol=3e-2)
    output.square().sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in module.parameters())


def test_no_copy_of_the_history_is_kept_for_the_gradients():
    module = SparseFusion(3, 16, 8, CLASSES, occ_embedims=3)
    inputs, history, kept = step_inputs(1), torch.randn(BATCH, VOXELS, 16 * 8), {}
    inputs["volume"] = torch.randn(BATCH, 8, *SIZE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
        _, new = fuse(module, **inputs, history=history, starts=(False, False), previous_bda=inputs["bda"])
    own = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept.values()}
    own.pop(new.untyped_storage().data_ptr())
    assert sum(own.values()) < new.untyped_storage().nbytes()
