"""Steps of forward and backward pass: equal to those of the model, recorded or not, whatever comes in between."""

import copy
import logging

import pytest
import tiny_model as tiny
import torch
from small_training import Line, Loader, make_runner

from mmdet3d.core.checkpointing import resume_training_state, save_training_state
from mmdet3d.core.cuda_graphs.engine import EAGER_CALLS
from mmdet3d.core.cuda_graphs.steps import StepGraph
from mmdet3d.core.runner import TrainRunner
from mmdet3d.models.detectors.base import BaseDetector
from mmdet3d.registry import ConfigError

LONG = EAGER_CALLS + 6


def batches(device, count=LONG, starts=(0,), batch=tiny.BATCH):
    """Consecutive batches; the first slot begins a new sequence at each of ``starts``."""
    result, sequence = [], 0
    for step in range(count):
        sequence += step in starts
        sample = tiny.training_batch(step, starts=[step in starts] + [step == 0] * (batch - 1),
                                     sequences=(sequence, 50), batch=batch)
        sample.update(tiny.targets(step, batch=batch))
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in sample.items()}
        moved["img_inputs"] = [sample["img_inputs"][0].to(device), *sample["img_inputs"][1:]]
        result.append(moved)
    return result


def model_on(device, **options):
    """In training mode; drop-out stays on, because its random numbers follow the seed."""
    model = tiny.build(**options).to(device).train()
    model.forward_projection.img_backbone.with_cp = True  # as published
    return model


def plain_step(model, batch, dtype=None):
    """What the loop does without :class:`StepGraph`."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(batch["gt_depth"].device.type, dtype=dtype, enabled=dtype is not None):
        outputs = model.train_step(batch)
    outputs["loss"].backward()
    return outputs


def run(step, model, samples, learning_rate=0.0):
    """Losses, gradients and histories of every step, each with the same random numbers."""
    records = []
    for sample in samples:
        torch.manual_seed(7)
        outputs = step(sample)
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()
                     if parameter.grad is not None}
        records.append((dict(outputs["log_vars"]), float(outputs["loss"].detach()), gradients, model.memory.clone()))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None and learning_rate:  # an arbitrary gradient (below) can be NaN
                    parameter -= learning_rate * parameter.grad.clamp(-1, 1)
    return records


def assert_close(mine, theirs, loss=1e-5, gradient=1e-4, skip_3d=False):
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        # Gradients of 3D convolutions in bfloat16 are arbitrary numbers in PyTorch 2.11 for CPUs.
        for gradients in (a[2], b[2]):
            for name in [name for name, value in gradients.items() if skip_3d and value.dim() == 5]:
                del gradients[name]
        assert list(a[0]) == list(b[0]), number
        assert a[0] == pytest.approx(b[0], rel=loss), number
        assert a[1] == pytest.approx(b[1], rel=loss), number
        assert a[2].keys() == b[2].keys(), number
        total = torch.stack([value.norm() for value in b[2].values()]).norm()
        for name, expected in b[2].items():
            difference = (a[2][name] - expected).norm()
            assert difference <= gradient * expected.norm() + 0.01 * gradient * total, (number, name)
        for history, expected in zip(a[3].histories, b[3].histories, strict=True):
            torch.testing.assert_close(history, expected, rtol=gradient, atol=gradient)
        for name in ("bda", "sequence_ids", "ego_translation"):
            assert torch.equal(getattr(a[3], name), getattr(b[3], name)), (number, name)


def compare(device, samples, *, precision="fp32", graphs=False, replayed=0, loss=1e-5, gradient=1e-4):
    """A model trained by steps and one trained plainly; returns the first and its :class:`StepGraph`."""
    model = model_on(device)
    other = copy.deepcopy(model)
    dtype = torch.bfloat16 if precision == "bf16" else None
    step = StepGraph(model, precision, graphs=graphs)
    mine = run(step.step, model, samples)
    theirs = run(lambda sample: plain_step(other, sample, dtype), other, samples)
    assert step.graphs == graphs and len(step.engine.captures) == replayed
    assert_close(mine, theirs, loss, gradient, skip_3d=precision == "bf16" and device == "cpu")
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=gradient, atol=gradient, msg=name)
    return model, step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_without_graphs_equal_those_of_the_model(precision):
    compare("cpu", batches("cpu", 4, starts=(0, 2)), precision=precision)


def test_the_memory_alternates_between_two_buffers():
    model = model_on("cpu")
    step, places = StepGraph(model, graphs=False), []
    for sample in batches("cpu", 5, starts=(0, 3)):
        assert step.step(sample)["backward_done"]
        places.append([history.data_ptr() for history in model.memory.histories])
    assert places[0] != places[1] and places[0] == places[2] == places[4] and places[1] == places[3]


def test_a_memory_from_elsewhere_is_taken_in():
    samples = batches("cpu", 4)
    model = model_on("cpu")
    step = StepGraph(model, graphs=False)
    run(step.step, model, samples[:2])
    kept, weights = model.memory.clone(), copy.deepcopy(model.state_dict())
    first = run(step.step, model, samples[2:])
    model.load_state_dict(weights)
    model.memory = kept
    assert_close(run(step.step, model, samples[2:]), first, 0, 0)
    model.load_state_dict(weights)
    model.memory = kept.clone()
    assert_close(run(StepGraph(model, graphs=False).step, model, samples[2:]), first, 0, 0)


def test_a_memory_of_the_caller_stays_as_it_is():
    samples = batches("cpu", 4)
    model = model_on("cpu")
    run(StepGraph(model, graphs=False).step, model, samples[:2])
    mine = model.memory = model.memory.clone()
    before = mine.clone()
    run(StepGraph(model, graphs=False).step, model, samples[2:])
    for history, expected in zip(mine.histories, before.histories, strict=True):
        assert torch.equal(history, expected)


def test_targets_are_checked_before_anything_changes():
    model = model_on("cpu")
    state, step = copy.deepcopy(model.state_dict()), StepGraph(model, graphs=False)
    good, = batches("cpu", 1)
    wrong = [({"voxel_semantics": good["voxel_semantics"][:1]}, r"voxel_semantics must have the shape \[2, "),
             ({"voxel_semantics_1_2": None}, r"training needs \['voxel_semantics_1_2'\]"),
             ({"gt_depth": good["gt_depth"][:1]}, "gt_depth must be that of 2 samples"),
             ({"gt_depth": None}, r"training needs \['gt_depth'\]"),
             ({"voxel_flows": good["voxel_flows"].to("meta")},
              "targets must be on the device of the images, cpu; got {'voxel_flows': 'meta'}")]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            step.step({**good, **change})
    assert model.memory is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_another_batch_size_begins_anew():
    model = model_on("cpu")
    step = StepGraph(model, graphs=False)
    run(step.step, model, batches("cpu", 2))
    model.reset_memory()
    run(step.step, model, batches("cpu", 2, batch=1))
    assert model.memory.batch_size == 1 and step._buffers.source.batch_size == 1


def test_logged_values_come_in_two_parts():
    losses = {"loss_a": torch.tensor([1.0, 3.0], requires_grad=True), "seen": torch.tensor(5),
              "loss_b": torch.tensor(4.0, dtype=torch.float64)}
    losses["seen"] = losses["seen"].float()
    total, names, values = BaseDetector.reduce_losses(losses)
    assert total.requires_grad and not values.requires_grad and values.dtype == torch.float32
    assert names == ("loss_a", "seen", "loss_b", "loss") and values.tolist() == [2, 5, 4, 6]
    again, logged = BaseDetector.parse_losses(losses)
    assert float(again.detach()) == 6 and list(logged.items()) == list(zip(names, values.tolist(), strict=True))


def test_what_cannot_be_recorded_is_refused(tmp_path, monkeypatch):
    model = model_on("cpu")
    with pytest.raises(ConfigError, match="cuda_graphs=True needs the model on a CUDA device, it is on cpu"):
        StepGraph(model)
    with pytest.raises(ConfigError, match="precision: expected one of .'bf16', 'fp32'., got 'fp16'"):
        StepGraph(model, "fp16", graphs=False)
    with pytest.raises(ConfigError, match="needs a model with plan, compute, .*; Line has not"):
        StepGraph(Line())
    with pytest.raises(ConfigError, match="records steps that go on from a memory; this model has none"):
        StepGraph(model_on("cpu", temporal_fusion=None), graphs=False)
    with pytest.raises(ValueError, match=r"call model.train\(\) first"):
        StepGraph(model.eval(), graphs=False).step(tiny.training_batch())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="cuda_graphs=True trains in a single process only"):
        StepGraph(model)


def tiny_runner(folder, model, iterations, samples, *, step=None, **hooks):
    """Runner and loader of ``samples``."""
    runner = TrainRunner(model, torch.optim.AdamW(model.parameters(), 1e-3), work_dir=folder, max_iters=iterations,
                         logger=logging.getLogger("mmdet3d.small_training"))
    runner.step_graph = step
    runner.register_training_hooks({"policy": "fixed"}, **{"optimizer_config": {"grad_clip": {"max_norm": 5}}, **hooks})
    return runner, samples


def test_the_runner_trains_alike_with_steps(tmp_path):
    samples, trained = batches("cpu", 3), []
    for graphs in (False, True):
        model = model_on("cpu")
        torch.manual_seed(1)
        runner, loader = tiny_runner(tmp_path / str(graphs), model, 3, samples,
                                     step=StepGraph(model, graphs=False) if graphs else None)
        runner.run([loader])
        trained.append(model.state_dict())
        assert runner.log_buffer.val_history["grad_norm"]
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name


def test_accumulation_of_gradients_is_refused(tmp_path):
    model = model_on("cpu")
    runner, loader = tiny_runner(tmp_path, model, 2, batches("cpu", 2), step=StepGraph(model, graphs=False),
                                 optimizer_config={"cumulative_iters": 2})
    with pytest.raises(ConfigError, match="cuda_graphs=True does not go with optimizer_config.cumulative_iters=2"):
        runner.run([loader])


def test_training_without_steps_stays_as_it_is(tmp_path):
    runner = make_runner(tmp_path, 2)
    runner.run([Loader()])
    assert runner.step_graph is None and runner.iter == 2


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_replayed_steps_equal_plain_ones():
    model, _ = compare("cuda", batches("cuda"), graphs=True, replayed=2)
    assert next(model.parameters()).grad is not None


@pytest.mark.cuda
def test_sequences_start_in_between():
    compare("cuda", batches("cuda", 12, starts=(0, 5, 6, 9)), graphs=True, replayed=2)


@pytest.mark.cuda
def test_replayed_steps_in_mixed_precision():
    compare("cuda", batches("cuda"), precision="bf16", graphs=True, replayed=2, loss=2e-3, gradient=3e-2)


@pytest.mark.cuda
def test_replayed_steps_see_new_weights_and_new_random_numbers():
    samples = batches("cuda", LONG)
    model = model_on("cuda")
    other, step = copy.deepcopy(model), StepGraph(model)
    mine = run(step.step, model, samples, learning_rate=1e-3)
    theirs = run(lambda sample: plain_step(other, sample), other, samples, learning_rate=1e-3)
    assert len(step.engine.captures) == 2 and mine[-1][1] != mine[-3][1]
    assert mine[-1][1] == pytest.approx(theirs[-1][1], rel=2e-2)  # small differences grow from step to step
    memory = model.memory.clone()
    values = []
    for _ in range(2):
        model.memory = memory.clone()
        values.append(step.step(samples[-1])["log_vars"]["loss_flow"])
    assert values[0] != values[1]


@pytest.mark.cuda
def test_a_checkpoint_holds_the_memory_of_replayed_steps(tmp_path):
    samples = batches("cuda", LONG)
    model = model_on("cuda")
    runner, loader = tiny_runner(tmp_path, model, LONG - 2, samples, step=StepGraph(model))
    runner.run([loader])
    assert len(runner.step_graph.engine.captures) == 2
    save_training_state(runner, tmp_path / "iter_1.pth", finished=1)
    other = model_on("cuda")
    resumed, _ = tiny_runner(tmp_path, other, LONG, samples, step=StepGraph(other))
    resume_training_state(resumed, tmp_path / "iter_1.pth")
    for mine, saved in zip(other.memory.histories, model.memory.histories, strict=True):
        assert torch.equal(mine, saved)
    assert_close(run(resumed.step_graph.step, other, samples[-2:]), run(runner.step_graph.step, model, samples[-2:]))


@pytest.mark.cuda
def test_a_step_that_cannot_be_recorded_goes_on_without_graphs(caplog, monkeypatch):
    samples = batches("cuda", EAGER_CALLS + 3)
    model = model_on("cuda")
    other, step = copy.deepcopy(model), StepGraph(model)
    forward = step._forward

    def waiting(*arguments):
        loss, *rest = forward(*arguments)
        if torch.cuda.is_current_stream_capturing():
            loss.item()
        return loss, *rest

    monkeypatch.setattr(step, "_forward", waiting)
    with caplog.at_level(logging.WARNING, logger="mmdet3d.core.cuda_graphs.engine"):
        mine = run(step.step, model, samples)
    assert not step.graphs and "could not be captured" in caplog.text
    assert_close(mine, run(lambda sample: plain_step(other, sample), other, samples))
