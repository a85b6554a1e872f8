"""Frame after frame: recorded frames equal those that run kernel by kernel, and memories come and go."""

import logging

import pytest
import tiny_model as tiny
import torch

from mmdet3d.core.cuda_graphs.engine import EAGER_CALLS
from mmdet3d.core.cuda_graphs.frames import FrameRunner
from mmdet3d.models.detectors.fast_mode import fast_copy
from mmdet3d.utils.normalise import NORMALISED

STEPS = 7


def frames(starts=(0,), batch=1, steps=STEPS, keys=True):
    """Consecutive samples; a new sequence begins at each of ``starts``."""
    samples, sequence = [], 0
    for step in range(steps):
        sequence += step in starts
        inputs, metas = tiny.frame(step, starts=[step in starts] * batch, sequences=(sequence, sequence + 50),
                                   batch=batch)
        inputs[5] = torch.eye(4).repeat(batch, 1, 1)
        if keys:  # pictures of every sample are new: nothing is shared, but features are kept
            for b, meta in enumerate(metas):
                meta["image_keys"] = tuple((b, step, frame) for frame in range(3))
        samples.append((inputs, metas))
    return samples


def run(predictor, samples, device, memory=None):
    """Classes, flows and the last memory."""
    results = []
    for inputs, metas in samples:
        inputs = [inputs[0].to(device), *inputs[1:]]
        torch.manual_seed(0)  # of the flow head's noise
        semantics, flow, memory = predictor(inputs, metas, memory)
        results.append((semantics.clone(), flow.clone()))
    return results, memory


def plainly(model):
    """The model's own forward pass and decoding, as a predictor."""
    def predict(inputs, metas, memory):
        prediction, _ = model.run(inputs, metas, memory)
        return *model.decode(prediction), prediction.memory

    return predict


def assert_equal(mine, theirs):
    for (semantics, flow), (expected, expected_flow) in zip(mine, theirs, strict=True):
        assert torch.equal(semantics, expected) and torch.equal(flow, expected_flow)


@pytest.fixture
def model(device):
    return tiny.build().to(device)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_runner_predicts_what_the_model_does(model, device, batch):
    samples = frames(starts=(0, 5), batch=batch)
    with torch.inference_mode():
        expected, memory = run(plainly(model), samples, device)
    results, mine = run(FrameRunner(model), samples, device)
    assert_equal(results, expected)
    for history, other in zip(mine.histories, memory.histories, strict=True):
        assert torch.equal(history, other)
    assert torch.equal(mine.bda, memory.bda) and mine.features.keys == memory.features.keys


def test_the_images_can_come_as_pixels(model, device):
    """Pixels give the same bits as the floats that the loader makes of them."""
    inputs, metas = frames(steps=1)[0]
    pixels = (inputs[0] * 40 + 100).clamp(0, 255).to(torch.uint8)
    table = torch.from_numpy(NORMALISED)
    floats = torch.stack([table[c][pixels[:, :, c].int()] for c in range(3)], 2)
    results = []
    for images in (floats, pixels):
        torch.manual_seed(0)
        results.append(FrameRunner(model)([images, *inputs[1:]], metas))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_model_in_training_is_refused(model):
    with pytest.raises(ValueError, match="call model.eval"):
        FrameRunner(model.train())(*frames(steps=1)[0])


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="graphs=True needs the model on a CUDA device, it is on cpu"):
        FrameRunner(tiny.build(), graphs=True)


@pytest.mark.cuda
@pytest.mark.parametrize("keys", [True, False])
def test_frames_are_recorded_and_replayed(keys):
    model, samples = tiny.build().cuda(), frames(starts=(0, 6), steps=9, keys=keys)
    runner = FrameRunner(model)
    results, _ = run(runner, samples, "cuda")
    assert runner.graphs and len(runner.engine.captures) == 2  # one in each direction
    assert_equal(results, run(FrameRunner(model, graphs=False), samples, "cuda")[0])


def shared_pictures(steps, jump=None):
    """Samples of which each shows the pictures of the two before again; from ``jump`` on others, still one sequence."""
    samples = []
    for step in range(steps):
        first = 0 if jump is None or step < jump else jump
        records = [max(step - back, first) for back in range(3)]
        inputs, metas = tiny.frame(step, starts=[step == 0], sequences=(1,), batch=1)
        inputs[0] = torch.stack([torch.randn(1, tiny.CAMS, 3, *tiny.IMAGE, generator=torch.Generator().manual_seed(r))
                                 for r in records], 2).flatten(1, 2)
        inputs[5] = torch.eye(4)[None]
        metas[0]["image_keys"] = tuple((0, first, record) for record in records)
        samples.append((inputs, metas))
    return samples


@pytest.mark.cuda
def test_recordings_in_two_parts():
    """The pictures begin before the plan is there; where they were begun in vain, nothing comes of it."""
    model, samples = tiny.build().cuda(), shared_pictures(15, jump=9)
    runner = FrameRunner(model)
    results, _ = run(runner, samples, "cuda")
    assert runner.graphs and [r.network is not None for r in runner.engine.captures.values()] == [True, True]
    assert_equal(results, run(FrameRunner(model, graphs=False), samples, "cuda")[0])


@pytest.mark.cuda
def test_a_frame_that_cannot_be_recorded_goes_on_without_graphs(monkeypatch, caplog):
    """The noise comes from torch's generator, which a recording that fails leaves as one that records."""
    model, samples = tiny.build().cuda(), frames(steps=EAGER_CALLS + 4)
    expected, _ = run(FrameRunner(model, graphs=False), samples, "cuda")
    runner, decode = FrameRunner(model), model.decode

    def waiting(prediction):
        if torch.cuda.is_current_stream_capturing():
            prediction.semantic_logits.sum().item()
        return decode(prediction)

    monkeypatch.setattr(model, "decode", waiting)
    with caplog.at_level(logging.WARNING, logger="mmdet3d.core.cuda_graphs.engine"):
        results, _ = run(runner, samples, "cuda")
    assert not runner.graphs and "could not be captured" in caplog.text
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert_equal(results, expected)


@pytest.mark.cuda
def test_recordings_of_another_batch_size():
    model = tiny.build().cuda()
    runner, plain = FrameRunner(model), FrameRunner(model, graphs=False)
    for batch in (1, 2, 1):
        samples = frames(steps=EAGER_CALLS + 4, batch=batch)
        assert_equal(run(runner, samples, "cuda")[0], run(plain, samples, "cuda")[0])
    assert runner.graphs and len(runner.engine.captures) == 2


@pytest.mark.cuda
def test_a_memory_from_elsewhere_is_taken_in():
    model, samples = tiny.build().cuda(), frames(steps=8)
    runner = FrameRunner(model)
    half = EAGER_CALLS + 2
    _, memory = run(runner, samples[:half], "cuda")
    kept = memory.clone()
    first, _ = run(runner, samples[half:], "cuda", memory)
    again, _ = run(runner, samples[half:], "cuda", kept)
    assert_equal(again, first)


@pytest.mark.cuda
def test_a_frame_never_waits_for_the_device():
    model, samples = tiny.build().cuda(), frames(steps=4)
    memory = None
    for inputs, metas in samples:
        given = model.camera_inputs([inputs[0].cuda(), *inputs[1:]])
        plan = model.plan(given, model.frame_meta(metas), memory, given.images.device).to("cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.inference_mode():
                prediction, _ = model.compute(given.images, plan, memory)
                model.decode(prediction)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        memory = prediction.memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_fast_mode_agrees_mostly(model, device, dtype):
    samples = frames(steps=4)
    exact, _ = run(FrameRunner(model), samples, device)
    fast, _ = run(FrameRunner(fast_copy(model, dtype)), samples, device)
    same = torch.stack([(a[0] == b[0]).float().mean() for a, b in zip(exact, fast, strict=True)])
    assert same.mean() > 0.9
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"dtype must be torch.float16 or torch.bfloat16, got torch.float64"):
        fast_copy(tiny.build(), torch.float64)
