"""Forward passes of a whole (tiny) model in evaluation: contract, memory, determinism, refusals."""

import copy

import numpy as np
import pytest
import tiny_model as tiny
import torch
from torch.nn import functional as F

from mmdet3d.models import build_model
from mmdet3d.models.attention.backward_projection import ego_shift
from mmdet3d.models.detectors.prediction import result_dict
from mmdet3d.utils.checkpoint import load_checkpoint, save_checkpoint

B, X, Y, Z, K = tiny.BATCH, tiny.X, tiny.Y, tiny.Z, tiny.CLASSES


@pytest.fixture(scope="module")
def shared_model():
    return tiny.build()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def model(shared_model):
    shared_model.eval()
    shared_model.reset_memory()
    return shared_model


def run(model, step=0, memory=None, seed=0, **options):
    torch.manual_seed(seed)  # of the flow head's noise
    return model.run(*tiny.frame(step, **options), memory)[0]


def simple_test(model, step):
    inputs, metas = tiny.frame(step)
    return model.simple_test(None, metas, img_inputs=inputs)


def assert_same(a, b):
    """Of two predictions."""
    for name in ("semantic_logits", "flow", "volume"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for many, others in ((a.stage_logits, b.stage_logits), (a.memory.histories, b.memory.histories)):
        assert all(torch.equal(x, y) for x, y in zip(many, others, strict=True))


def test_shapes_of_a_prediction(model):
    prediction = run(model)
    assert prediction.semantic_logits.shape == (B, 2 * X, 2 * Y, 2 * Z, K)
    assert prediction.flow.shape == (B, 2 * X, 2 * Y, 2 * Z, 2)
    assert [tuple(x.shape) for x in prediction.stage_logits] == [(B, X, Y, Z, K), (B, X // 2, Y // 2, Z // 2, K)]
    assert prediction.volume.shape == (B, 16, Z, Y, X)
    memory = prediction.memory
    assert [tuple(h.shape) for h in memory.histories] == [(B, X * Y * Z, 64), (B, X * Y * Z // 8, 32)]
    assert memory.sizes == ((Z, Y, X), (Z // 2, Y // 2, X // 2)) and memory.channels == 16
    assert memory.sequence_ids.tolist() == [3, 5] and memory.ego_translation[0].tolist() == [300, 120, 1]
    assert torch.equal(memory.newest_volume(0), prediction.volume)
    assert model.memory is None  # run hands the memory out and keeps none


def test_the_test_loops_contract(model):
    (inputs, metas), torch_seed = tiny.frame(0), torch.manual_seed(4)
    results = model(return_loss=False, points=[None], img_metas=[metas], img_inputs=[inputs], rescale=True)
    assert isinstance(results, list) and len(results) == 1
    result, = results
    assert set(result) == {"occ_results", "flow_results", "index"} and result["index"] == [0, 1]
    occupancy, flow = result["occ_results"], result["flow_results"]
    assert isinstance(occupancy, np.ndarray) and occupancy.dtype == np.uint8 and flow.dtype == np.float16
    assert occupancy.shape == (B, 2 * X, 2 * Y, 2 * Z) and flow.shape == (*occupancy.shape, 2)
    prediction = run(model, seed=torch_seed.initial_seed())
    np.testing.assert_array_equal(occupancy, prediction.semantic_logits.argmax(-1))
    moving = np.isin(occupancy, range(8))
    assert 0 < moving.mean() < 1 and not flow[~moving].any()
    np.testing.assert_array_equal(flow[moving], prediction.flow.half().numpy()[moving])


def test_the_unchanged_tiny_config_runs():
    torch.manual_seed(0)
    model = build_model(tiny.published("stcocc-tiny-synthetic"))
    model.eval()
    inputs, metas = tiny.frame(0, batch=1, cams=6)
    result, = model.simple_test(None, metas, img_inputs=[inputs])
    assert result["occ_results"].shape == (1, 40, 40, 8) and result["flow_results"].shape == (1, 40, 40, 8, 2)


def test_without_a_flow_head_the_flow_is_zero():
    model = tiny.build(flow_head=None)
    result, = simple_test(model, 0)
    assert result["flow_results"].shape == (B, 2 * X, 2 * Y, 2 * Z, 2) and not result["flow_results"].any()
    assert not any(key.startswith("flow_head") for key in model.state_dict())


def test_without_temporal_fusion_there_is_no_memory():
    model = tiny.build(temporal_fusion=None)
    for step in range(2):
        result, = simple_test(model, step)
        assert result["occ_results"].shape == (B, 2 * X, 2 * Y, 2 * Z) and model.memory is None
    assert not any(key.startswith("temporal_fusion") for key in model.state_dict())


def test_two_augmentations_are_refused(model):
    inputs, metas = tiny.frame(0)
    with pytest.raises(ValueError, match="exactly one test-time augmentation .*got 1 img_metas, 2 img_inputs and"):
        model(return_loss=False, img_metas=[metas], img_inputs=[inputs, inputs])
    with pytest.raises(ValueError, match="got 2 img_metas"):
        model.forward_test([metas, metas], [inputs])
    with pytest.raises(ValueError, match="got 1 img_metas, 1 img_inputs and 2 points"):
        model(return_loss=False, points=[None, None], img_metas=[metas], img_inputs=[inputs])


def test_the_entry_point_below_the_test_loop(model):
    inputs, metas = tiny.frame(0)
    results = []
    for wrapped in (inputs, [inputs]):
        torch.manual_seed(0)
        model.reset_memory()
        results += model.simple_test(None, metas, img=None, img_inputs=wrapped, rescale=True, gt_depth=None)
    np.testing.assert_array_equal(results[0]["occ_results"], results[1]["occ_results"])
    np.testing.assert_array_equal(results[0]["flow_results"], results[1]["flow_results"])
    with pytest.raises(ValueError, match="simple_test needs img_inputs, the six input tensors"):
        model.simple_test(None, metas)


def test_results_do_not_need_gradients_to_be_off(model):
    inputs, metas = tiny.frame(0)
    with torch.enable_grad():
        prediction, _ = model.run(inputs, metas)
        assert prediction.flow.requires_grad
        semantics, flow = model.decode(prediction)
    assert not semantics.requires_grad and not flow.requires_grad
    assert isinstance(result_dict(semantics, flow, [0, 1])["flow_results"], np.ndarray)


@pytest.mark.parametrize("change, words", [
    (lambda inputs, metas: (inputs, metas[:1]),
     "one dict of img_metas per sample, got img_inputs of 2 samples and 1 img_metas"),
    (lambda inputs, metas: (inputs[:5], metas), "expected six img_inputs .*got 5 img_inputs"),
    (lambda inputs, metas: ([], metas), "expected six img_inputs .*got 0 img_inputs"),
    (lambda inputs, metas: ([inputs[0][..., :160], *inputs[1:]], metas),
     r"input_size \(H, W\) = \(64, 176\), got \(2, 6, 3, 64, 160\)"),
    (lambda inputs, metas: ([*inputs[:5], inputs[5][:1]], metas), r"\(bda\) must be \(2, 4, 4\), got \(1, 4, 4\)"),
    (lambda inputs, metas: (inputs, [metas[0], metas[1] | {"lidar2img": torch.eye(4).repeat(6, 1, 1)}]),
     r"img_metas\[1\]: lidar2img must have the shape \(2, 4, 4\), got \(6, 4, 4\)")])
def test_inputs_that_do_not_fit_are_refused(model, change, words):
    with pytest.raises(ValueError, match=words):
        model.run(*change(*tiny.frame(0)))


# ---- the cascade ----------------------------------------------------------------------------------------------------


def test_what_the_stages_hand_to_each_other(model):
    seen = {"projection": [], "fusion": []}
    parts = {"projection": model.backward_projection_list, "fusion": model.temporal_fusion_list}
    hooks = [module.register_forward_hook(lambda _, args, output, s=s, kind=kind: seen[kind].append((s, args, output)))
             for kind, modules in parts.items() for s, module in enumerate(modules)]
    torch.manual_seed(0)
    inputs, metas = tiny.frame(0)
    prediction, features = model.run(inputs, metas)
    for hook in hooks:
        hook.remove()
    assert [s for s, *_ in seen["projection"]] == [s for s, *_ in seen["fusion"]] == [1, 0]
    coarse = logits = None
    for (s, given, (bev, stage)), (_, fused_args, (fused, _)) in zip(seen["projection"], seen["fusion"], strict=True):
        volume = features.volumes[s]
        if coarse is not None:
            volume = volume + F.interpolate(coarse, scale_factor=2, mode="trilinear", align_corners=False)
        torch.testing.assert_close(given[0], volume.mean(2))
        assert given[3] is None if logits is None else torch.equal(given[3], logits)
        occupied = (1 - stage.softmax(-1)[..., -1]).permute(0, 3, 2, 1)
        torch.testing.assert_close(fused_args[0], volume + bev.unsqueeze(2) * occupied.unsqueeze(1))
        torch.testing.assert_close(fused_args[2], occupied)
        assert torch.equal(fused_args[1], stage) and torch.equal(prediction.stage_logits[s], stage)
        coarse, logits = fused, stage
    assert torch.equal(prediction.volume, coarse)
    torch.testing.assert_close(prediction.semantic_logits, model.occupancy_head(coarse, logits))


def test_displacement_since_the_frame_before(model):
    seen = []
    memory = run(model).memory
    for step, previous, options in ((0, None, {}), (3, memory, {"starts": [False, True]})):
        inputs, metas = tiny.frame(step, **options)
        seen.append(model.plan(model.camera_inputs(inputs), model.frame_meta(metas), previous).stages.shift)
    assert not seen[0].any() and seen[0].dtype == torch.float32
    moved = torch.tensor([[2.4, 0, 0], [0, 0, 0]], dtype=torch.float64)
    yaw = torch.tensor([0.0, 0.1], dtype=torch.float64)
    torch.testing.assert_close(seen[1], ego_shift(moved, yaw, (48.0, 32.0)))
    assert seen[1][0].any()


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_passing_the_memory_on_equals_the_models_own_state(model):
    memory = None
    for step in range(3):
        inputs, metas = tiny.frame(step, starts=[step == 0, step in (0, 2)])
        torch.manual_seed(step)
        result, = model.simple_test(None, metas, img_inputs=inputs)
        kept = model.memory
        torch.manual_seed(step)
        prediction, _ = model.run(inputs, metas, memory)
        (semantics, flow), memory = model.decode(prediction), prediction.memory
        assert model.memory is kept
        np.testing.assert_array_equal(result["occ_results"], semantics)
        np.testing.assert_array_equal(result["flow_results"], flow)
        assert all(torch.equal(a, b) for a, b in zip(memory.histories, kept.histories, strict=True))


def test_run_leaves_the_models_memory_alone(model):
    simple_test(model, 0)
    memory = model.memory
    before = memory.clone()
    model.run(*tiny.frame(1), memory)
    model.run(*tiny.frame(0))
    assert model.memory is memory
    for name in ("bda", "sequence_ids", "ego_translation"):
        assert torch.equal(getattr(memory, name), getattr(before, name))
    assert all(torch.equal(a, b) for a, b in zip(memory.histories, before.histories, strict=True))


def test_the_memory_matters_and_resetting_forgets_it(model):
    first = run(model).memory
    assert not torch.allclose(run(model, 1, first).semantic_logits, run(model, 1).semantic_logits)
    simple_test(model, 0)
    model.reset_memory()
    assert model.memory is None


def test_a_restored_memory_continues_as_if_nothing_had_happened(model, tmp_path):
    memory = run(model).memory
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    restored = type(memory).from_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    assert_same(run(model, 1, restored), run(model, 1, memory))


def test_metas_stay_as_they_are_and_serve_twice(model):
    inputs, metas = tiny.frame(0)
    before = copy.deepcopy(metas)
    predictions = []
    for _ in range(2):
        torch.manual_seed(0)
        predictions.append(model.run(inputs, metas)[0])
    assert_same(*predictions)
    for mine, theirs in zip(metas, before, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            np.testing.assert_array_equal(np.asarray(mine[key]), np.asarray(theirs[key]))


def test_another_batch_size_is_refused_until_reset(model):
    simple_test(model, 0)
    inputs, metas = tiny.frame(1, batch=1)
    with pytest.raises(ValueError, match=r"memory holds 2 batch slots, but the batch has 1 samples.*reset_memory\(\)"):
        model.simple_test(None, metas, img_inputs=inputs)
    model.reset_memory()
    model.simple_test(None, metas, img_inputs=inputs)


def test_a_sequence_that_the_memory_does_not_follow_is_refused(model):
    memory = run(model).memory
    with pytest.raises(ValueError, match=r"batch slot 1 continues sequence 6 .*but the memory follows sequence 5"):
        run(model, 1, memory, sequences=(3, 6))
    assert run(model, 1, memory, starts=[False, True], sequences=(3, 6)).memory.sequence_ids.tolist() == [3, 6]


def test_a_sequence_may_be_entered_in_the_middle(model):
    assert run(model, 4).memory.sequence_ids.tolist() == [3, 5]


# ---- determinism, options, checkpoints ------------------------------------------------------------------------------


def test_evaluation_is_deterministic_but_for_the_flow_heads_noise(model):
    first, second = run(model, seed=1), run(model, seed=2)
    assert torch.equal(first.semantic_logits, second.semantic_logits) and torch.equal(first.volume, second.volume)
    assert not torch.equal(first.flow, second.flow)
    assert_same(run(model, seed=1), first)
    plain = tiny.build()
    plain.flow_head.gumbel_in_eval = False
    assert_same(run(plain, seed=1), run(plain, seed=2))


@pytest.mark.parametrize("options, training, evaluation", [
    ({"train_top_k": [90, 9], "val_top_k": [50, 5]}, [9, 90], [9, 90]),
    ({"train_top_k": [90, 9], "val_top_k": [50, 5], "train_top_k_in_eval": False}, [9, 90], [5, 50]),
    ({"train_top_k": [90, 9], "val_top_k": None, "train_top_k_in_eval": False}, [9, 90], [9, 90]),
    ({"train_top_k": None, "val_top_k": [50, 5]}, [5, 50], [5, 50])])
def test_foreground_voxels_in_training_and_evaluation(options, training, evaluation):
    model, seen = tiny.build(**options), []
    for fusion in model.temporal_fusion_list:
        fusion.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["top_k"]), with_kwargs=True)
    run(model)
    assert seen == evaluation
    seen.clear()
    model.train()
    run(model)
    assert seen == training


def test_a_checkpoint_restores_the_model(model, tmp_path):
    save_checkpoint({"state_dict": model.state_dict(), "meta": {"epoch": 1}}, tmp_path / "model.pth")
    torch.manual_seed(9)
    other = build_model(tiny.config())
    other.eval()
    assert not torch.equal(run(other).semantic_logits, run(model).semantic_logits)
    load_checkpoint(other, tmp_path / "model.pth", strict=True)
    assert_same(run(other), run(model))


def test_cascade_runs_on_precomputed_features(model):
    inputs, metas = tiny.frame(0)
    prediction = run(model)
    given = model.camera_inputs(inputs)
    features = model.forward_projection(given.images, model.forward_projection.geometry(given))
    torch.manual_seed(0)
    plan = model.plan_stages(model.frame_meta(metas), given.bda, None)
    assert_same(model.cascade(features, plan, None), prediction)
