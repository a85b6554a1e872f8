"""The one way from frames to predictions: start of a scene, slots, noise, folding, precision, pixels."""

import copy

import numpy as np
import pytest
import tiny_model as tiny
import torch

from mmdet3d.core.predictor import MODES, SCENE_STARTS, Predictor, forget_slots
from mmdet3d.structures import TemporalMemory
from mmdet3d.utils.command import add_predictor_options
from mmdet3d.utils.fold_batch_norm import fold_batch_norm, is_folded
from mmdet3d.utils.normalise import NORMALISED

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ((2, 3, 4), (1, 2, 2))


def memory_of(batch):
    generator = torch.Generator().manual_seed(0)
    return TemporalMemory(
        histories=tuple(torch.randn(batch, z * y * x, 6, generator=generator) for z, y, x in SIZES), sizes=SIZES,
        channels=3, bda=torch.eye(4).repeat(batch, 1, 1), sequence_ids=torch.arange(batch),
        ego_translation=torch.ones(batch, 3, dtype=torch.float64))


class Recorder:
    """Stands for the runner: remembers what memory it was given and gives another one."""

    def __init__(self):
        self.given = []

    def __call__(self, inputs, metas, memory):
        self.given.append(memory)
        result = memory_of(len(metas))
        return None, None, TemporalMemory(**{**vars(result), "histories": tuple(h + 10 for h in result.histories)})


@pytest.fixture(scope="module")
def model():
    return tiny.build()


def recorded(model, memory, starts, **options):
    """The memories that the runner was given for a batch with these starts."""
    predictor = Predictor(model, fold=False, **options)
    predictor.runner = Recorder()
    metas = [{"sample_idx": str(slot), "start_of_sequence": start} for slot, start in enumerate(starts)]
    predictor(None, metas, memory)
    return predictor.runner.given


def scene(length, number, first=0, batch=1):
    """Frames of a scene with the images that its frames share."""
    samples = []
    for step in range(length):
        inputs, metas = tiny.frame(first + step, starts=[step == 0] * batch, sequences=(number, number + 50),
                                   batch=batch)
        inputs[5] = torch.eye(4).repeat(batch, 1, 1)
        for b, meta in enumerate(metas):
            meta["image_keys"] = tuple((number, b, max(step - back, 0)) for back in range(3))
            meta["sample_idx"] = f"scene-{number}-{step}-{b}"
        samples.append((inputs, metas))
    return samples


def predict(predictor, samples):
    memory, results = None, []
    for inputs, metas in samples:
        semantics, flow, memory = predictor(inputs, metas, memory)
        results.append((semantics.clone(), flow.clone()))
    return results


def assert_equal(mine, theirs):
    for (semantics, flow), (expected, expected_flow) in zip(mine, theirs, strict=True):
        assert torch.equal(semantics, expected) and torch.equal(flow, expected_flow)


# ---- which memory a frame finds -------------------------------------------------------------------------------------


def same(given, memory):
    return all(torch.equal(a, b) for a, b in zip(given.histories, memory.histories, strict=True))


@pytest.mark.parametrize("scene_start", SCENE_STARTS)
def test_a_sequence_goes_on_with_its_memory(model, scene_start):
    given, = recorded(model, memory_of(2), [False, False], scene_start=scene_start)
    assert same(given, memory_of(2))


def test_where_all_slots_start_there_is_no_memory(model):
    assert recorded(model, memory_of(2), [True, True], scene_start="none") == [None]


def test_a_slot_that_starts_alone_has_zeros(model):
    memory = memory_of(3)
    given, = recorded(model, memory, [False, True, False], scene_start="none")
    for new, old in zip(given.histories, memory.histories, strict=True):
        assert torch.equal(new[[0, 2]], old[[0, 2]]) and not new[1].any() and old[1].any()
    assert torch.equal(forget_slots(memory, [True] * 3).histories[0], torch.zeros_like(memory.histories[0]))


def test_carried_over_it_stays(model):
    given, = recorded(model, memory_of(2), [True, True], scene_start="carried")
    assert same(given, memory_of(2))


def test_a_primed_start_finds_the_memory_of_its_own_first_run(model):
    first, second = recorded(model, memory_of(2), [True, True], scene_start="primed")
    assert first is None
    assert all(torch.equal(a, b + 10) for a, b in zip(second.histories, memory_of(2).histories, strict=True))
    first, second = recorded(model, memory_of(2), [False, True], scene_start="primed")
    assert first is None
    for new, old in zip(second.histories, memory_of(2).histories, strict=True):
        assert torch.equal(new[0], old[0]) and torch.equal(new[1], old[1] + 10)


def test_slots_disappear_from_the_end(model):
    memory = memory_of(3)
    given, = recorded(model, memory, [False, False])
    assert given.batch_size == 2 and torch.equal(given.histories[0], memory.histories[0][:2])
    with pytest.raises(ValueError, match="a batch of 4 samples follows one of 3; slots may only disappear"):
        recorded(model, memory, [False] * 4)


@pytest.mark.parametrize("scene_start", SCENE_STARTS)
def test_a_model_without_memory(scene_start):
    predictor = Predictor(tiny.build(temporal_fusion=None), scene_start=scene_start)
    samples = scene(2, 1) + scene(1, 2)
    assert_equal(predict(predictor, samples), [predictor(*sample)[:2] for sample in samples])


# ---- predictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene_start, depends", [("primed", False), ("none", False), ("carried", True)])
def test_a_scene_depends_on_the_one_before_it_only_if_that_is_carried_over(model, device, scene_start, depends):
    predictor = Predictor(model.to(device), scene_start=scene_start)
    alone, after = predict(predictor, scene(4, 2)), predict(predictor, scene(4, 1, first=9) + scene(4, 2))[4:]
    equal = [torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(alone, after, strict=True)]
    assert equal == [True] * 4 if not depends else not all(equal)


def test_the_start_of_a_scene_matters(model):
    results = [predict(Predictor(model, scene_start=scene_start), scene(3, 1)) for scene_start in ("primed", "none")]
    assert not torch.equal(results[0][0][1], results[1][0][1])


def test_a_primed_start_computes_the_image_features_once(model):
    seen = []
    predictor = Predictor(model, scene_start="primed")
    backbone = predictor.model.forward_projection.img_backbone
    first_stage = backbone.first_stage
    backbone.first_stage = lambda images: seen.append(len(images)) or first_stage(images)
    predict(predictor, scene(1, 1))
    assert seen == [tiny.CAMS]


def test_slots_that_start_at_different_times_are_primed_alone(model):
    """With a temporal attention that keeps the samples of a batch apart, each slot is as it would be alone."""
    config = tiny.config()
    config.backward_projection.transformer.encoder.transformerlayers.attn_cfgs[0].update(
        scrambled_reduction=False, interleaved_history_rows=False)
    torch.manual_seed(0)
    apart = tiny.build_model(config).eval()
    predictor = Predictor(apart, fold=False, scene_start="primed")
    pair = [tiny.frame(step, starts=[step == 0, step in (0, 2)], sequences=(1, 1 + (step >= 2)), batch=2)
            for step in range(4)]
    together = predict(predictor, pair)
    for slot, first in ((0, 0), (1, 2)):
        alone = predict(predictor, [([t[slot:slot + 1] for t in inputs], metas[slot:slot + 1])
                                    for inputs, metas in pair[first:]])
        for (semantics, flow), (expected, expected_flow) in zip(together[first:], alone, strict=True):
            assert (semantics[slot] == expected[0]).float().mean() > 0.999
            torch.testing.assert_close(flow[slot], expected_flow[0], atol=0.05, rtol=0.05)


def test_noise_depends_on_the_sample_only(model, device):
    samples = scene(2, 1)
    results = []
    for seed, noise_seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(seed)
        results.append(predict(Predictor(model.to(device), noise_seed=noise_seed), samples))
    assert_equal(results[0], results[1])
    assert torch.equal(results[0][0][0], results[2][0][0]) and not torch.equal(results[0][0][1], results[2][0][1])
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(predict(Predictor(model, noise_seed=None), samples)[1][1])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_pixels_and_floats_give_the_same_bits(model, device):
    floats, pixels = [], []
    table = torch.from_numpy(NORMALISED)
    for inputs, metas in scene(3, 1):
        images = (inputs[0] * 40 + 100).clamp(0, 255).to(torch.uint8)
        normalised = torch.stack([table[c][images[:, :, c].int()] for c in range(3)], 2)
        floats.append(([normalised, *inputs[1:]], metas))
        pixels.append(([images, *inputs[1:]], metas))
    predictor = Predictor(model.to(device))
    assert_equal(predict(predictor, pixels), predict(predictor, floats))


def test_a_seed_of_the_sample_itself_counts(model):
    (inputs, metas), = scene(1, 1)
    flows = [Predictor(model)(inputs, [{**metas[0], "noise_seed": seed}])[1] for seed in (1, 1, 2)]
    assert torch.equal(flows[0], flows[1]) and not torch.equal(flows[0], flows[2])


@pytest.mark.parametrize("key", ["sample_idx", "start_of_sequence"])
def test_what_a_sample_lacks_is_named(model, key):
    (inputs, metas), = scene(1, 1)
    with pytest.raises(ValueError, match=rf"img_metas\[0\] lacks \['{key}'\]; it has"):
        Predictor(model)(inputs, [{name: value for name, value in metas[0].items() if name != key}])


def test_more_slots_that_all_start_follow_fewer(model):
    assert recorded(model, memory_of(1), [True, True], scene_start="none") == [None]


# ---- the model ------------------------------------------------------------------------------------------------------


def test_the_model_stays_as_it_is(model):
    model.train()
    before = copy.deepcopy(model.state_dict())
    model.memory = sentinel = object()
    predict(Predictor(model), scene(2, 1))
    assert model.training and model.memory is sentinel and not is_folded(model)
    model.eval()
    model.reset_memory()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_folding_is_equal_up_to_rounding_and_can_be_left_out(model):
    samples = scene(2, 1)
    plain, folded = Predictor(model, fold=False), Predictor(model)
    assert not is_folded(plain.model) and is_folded(folded.model)
    for (semantics, _), (expected, _) in zip(predict(folded, samples), predict(plain, samples), strict=True):
        assert (semantics == expected).float().mean() > 0.999
    mine = copy.deepcopy(model)
    assert Predictor(mine, inplace=True).model is mine and is_folded(mine)
    half = copy.deepcopy(model)
    assert Predictor(half, mode="fast", inplace=True).model is half and half.inference_dtype == torch.float16
    assert_equal(predict(Predictor(fold_batch_norm(model)), samples), predict(folded, samples))


def test_wrong_options_are_refused(model):
    with pytest.raises(ValueError, match=r"scene_start: expected one of \['none', 'primed', 'carried'\], got 'zero'"):
        Predictor(model, scene_start="zero")
    with pytest.raises(ValueError, match=r"mode: expected one of \['exact', 'fast'\], got 'half'"):
        Predictor(model, mode="half")
    with pytest.raises(ValueError, match="mode='fast' folds batch norms; it cannot be had with fold=False"):
        Predictor(model, mode="fast", fold=False)


def test_tools_offer_what_there_is():
    import argparse

    parser = argparse.ArgumentParser()
    add_predictor_options(parser)
    choices = {action.dest: action.choices for action in parser._actions}
    assert choices["mode"] == MODES and choices["scene_start"] == SCENE_STARTS
    defaults = vars(parser.parse_args([]))
    assert defaults == {"mode": "exact", "fuse_conv_bn": True, "scene_start": SCENE_STARTS[0]}


def test_results_are_numbers_of_the_right_kind(model):
    semantics, flow, memory = Predictor(model)(*scene(1, 1)[0])
    assert semantics.dtype == torch.uint8 and flow.dtype == torch.float16
    assert semantics.shape == (1, 2 * tiny.X, 2 * tiny.Y, 2 * tiny.Z) and flow.shape == (*semantics.shape, 2)
    assert not flow[~np.isin(semantics, range(8))].any() and memory.batch_size == 1
