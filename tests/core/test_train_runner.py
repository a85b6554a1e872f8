"""The training loop: order of hooks, learning rate, steps, precision, and stopping."""

import os
import signal

import pytest
import torch
from mmcv.runner import Hook
from small_training import Loader, batch, build_model, make_runner

from mmdet3d.core.interrupt import TrainingInterrupted
from mmdet3d.core.runner import TrainRunner
from mmdet3d.registry import ConfigError


def test_hooks_have_the_published_order(tmp_path):
    runner = make_runner(
        tmp_path, optimizer_config={"grad_clip": {"max_norm": 5, "norm_type": 2}}, checkpoint_config={"interval": 10},
        log_config={"interval": 50, "hooks": [{"type": "TextLoggerHook"}, {"type": "TensorboardLoggerHook"}]},
        custom_hooks_config=[{"type": "MEGVIIEMAHook", "init_updates": 10560, "priority": "NORMAL", "interval": 20}])
    order = [type(hook).__name__ for hook in runner.hooks]
    assert order == ["StepLrUpdaterHook", "FiniteLossHook", "OptimizerHook", "CheckpointHook", "MEGVIIEMAHook",
                     "IterTimerHook", "TextLoggerHook", "TensorboardLoggerHook"]


def test_learning_rate_warms_up_as_published(tmp_path):
    seen = []
    runner = make_runner(tmp_path, 202, record=lambda runner: seen.append(runner.current_lr()[0]))
    runner.run([Loader()])
    expected = {0: 1e-7, 1: 5.995e-7, 100: 5.005e-5, 199: 9.95005e-5, 200: 1e-4, 201: 1e-4}
    assert {i: seen[i] for i in expected} == pytest.approx(expected, rel=1e-12)
    assert seen == pytest.approx([1e-4 * (1 - (1 - i / 200) * (1 - 0.001)) for i in range(200)] + [1e-4] * 2, rel=1e-12)


def by_hand(steps, max_norm, lrs):
    """Weights after steps of AdamW (Loshchilov and Hutter, 2019), written out."""
    model = build_model()
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for step in range(steps):
        loss = model(**batch(step))["loss_line"]
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        scale = min(1.0, max_norm / (float(norm) + 1e-6))
        with torch.no_grad():
            for parameter, gradient, (m, v) in zip(model.parameters(), gradients, moments, strict=True):
                gradient = gradient * scale
                m.mul_(0.9).add_(gradient, alpha=0.1)
                v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                parameter.mul_(1 - lrs[step] * 0.01)
                m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                parameter.sub_(lrs[step] * m_hat / (v_hat.sqrt() + 1e-8))
    return model


@pytest.mark.parametrize("max_norm", [5, 0.1])
def test_iterations_are_forward_backward_clip_and_step(tmp_path, max_norm):
    norms = []
    runner = make_runner(tmp_path, 3, optimizer_config={"grad_clip": {"max_norm": max_norm, "norm_type": 2}},
                         record=lambda runner: norms.append(runner.log_buffer.val_history["grad_norm"][-1]))
    runner.run([Loader()])
    lrs = [1e-4 * (1 - (1 - i / 200) * (1 - 0.001)) for i in range(3)]
    expected = by_hand(3, max_norm, lrs)
    for got, wanted in zip(runner.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)
    assert all(norm > 0.1 for norm in norms)  # before clipping
    assert runner.iter == 3 and runner.data_batch is None


def test_logged_losses_are_those_of_the_model(tmp_path):
    logged = []
    runner = make_runner(tmp_path, 2, record=lambda runner: logged.append(dict(runner.outputs["log_vars"])))
    expected = {name: float(value.detach()) for name, value in build_model()(**batch(0)).items()}
    runner.run([Loader()])
    assert logged[0] == pytest.approx({**expected, "loss": expected["loss_line"]}, rel=1e-6)


def test_accumulated_gradients_equal_a_larger_batch(tmp_path):
    class Pairs(Loader):
        def __iter__(self):
            for number in range(3):
                both = torch.cat([batch(2 * number)["img_inputs"][0], batch(2 * number + 1)["img_inputs"][0]])
                yield {"img_inputs": [both, *[torch.eye(4)] * 5], "img_metas": [{}, {}]}

    constant = {"policy": "fixed"}
    clip = {"max_norm": 0.5, "norm_type": 2}
    small = make_runner(tmp_path / "a", 6, lr=constant, optimizer_config={"grad_clip": clip, "cumulative_iters": 2})
    large = make_runner(tmp_path / "b", 3, lr=constant, optimizer_config={"grad_clip": clip})
    small.run([Loader()])
    large.run([Pairs()])
    for got, wanted in zip(small.model.parameters(), large.model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


def test_accumulation_steps_at_the_end_of_each_group_only(tmp_path):
    weights = [build_model().linear.weight.detach().clone()]
    runner = make_runner(tmp_path, 5, lr={"policy": "fixed"}, optimizer_config={"cumulative_iters": 2},
                         record=lambda runner: weights.append(runner.model.linear.weight.detach().clone()))
    runner.run([Loader()])
    changed = [not torch.equal(a, b) for a, b in zip(weights[1:], weights[:-1], strict=True)]
    assert changed == [False, True, False, True, True]  # the last one ends the run


def test_a_skipped_iteration_drops_its_group(tmp_path):
    class Skip(Hook):
        def after_train_iter(self, runner):
            runner.skip_step = runner.iter in (1, 2)

    runner = make_runner(tmp_path, 6, lr={"policy": "fixed"}, optimizer_config={"cumulative_iters": 3})
    runner.register_hook(Skip(), "VERY_HIGH")
    steps = []
    runner.optimizer.register_step_post_hook(lambda *_: steps.append(runner.iter))
    runner.run([Loader()])
    assert steps == [5]


def test_mixed_precision_computes_in_bfloat16_and_keeps_losses_in_float32(tmp_path):
    types = []
    runner = make_runner(tmp_path, 1, precision="bf16")
    runner.model.linear.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    runner.run([Loader()])
    assert types == [torch.bfloat16] and runner.model.linear.weight.dtype == torch.float32
    assert runner.model.linear.weight.grad.dtype == torch.float32
    with pytest.raises(ConfigError, match="precision: expected one of .'bf16', 'fp32'., got 'fp16'"):
        make_runner(tmp_path, precision="fp16")


def test_checkpoints_have_the_published_names(tmp_path):
    runner = make_runner(tmp_path, 7, checkpoint_config={"interval": 3})
    runner.run([Loader()])
    assert sorted(path.name for path in tmp_path.glob("iter_*.pth")) == ["iter_3.pth", "iter_6.pth", "iter_7.pth"]
    assert torch.load(tmp_path / "iter_3.pth", weights_only=True)["meta"]["iter"] == 2
    assert (tmp_path / "latest.pth").resolve().name == "iter_7.pth"


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_iteration_saves_and_ends(tmp_path, number, status):
    def interrupt(runner):
        if runner.iter == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    runner = make_runner(tmp_path / "a", 6, record=interrupt)
    with pytest.raises(TrainingInterrupted) as stop:
        runner.run([Loader()])
    assert stop.value.exit_status == status and runner.iter == 3
    assert signal.getsignal(number) is before
    assert (tmp_path / "a/iter_3.pth").is_file()
    resumed = make_runner(tmp_path / "a", 6)
    resumed.resume(tmp_path / "a/iter_3.pth")
    assert resumed.iter == 3


def test_a_signal_waits_for_the_end_of_an_accumulation(tmp_path):
    runner = make_runner(tmp_path, 9, optimizer_config={"cumulative_iters": 4},
                         record=lambda runner: runner.iter == 4 and os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingInterrupted):
        runner.run([Loader()])
    assert runner.iter == 8


def test_a_signal_in_the_last_iteration_changes_nothing(tmp_path):
    runner = make_runner(tmp_path, 2, record=lambda runner: runner.iter == 1 and os.kill(os.getpid(), signal.SIGINT))
    runner.run([Loader()])
    assert runner.iter == 2


def test_a_second_signal_ends_at_once(tmp_path):
    def twice(runner):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    runner = make_runner(tmp_path, 4, record=twice)
    with pytest.raises(KeyboardInterrupt):
        runner.run([Loader()])
    assert not list(tmp_path.glob("iter_*"))


def test_resume_keeps_the_way_this_machine_computes_a_step(tmp_path):
    def adam(model, **options):
        return torch.optim.AdamW(model.parameters(), lr=1e-3, **options)

    first = build_model()
    make_runner(tmp_path, 2, model=first, optimizer=adam(first, fused=True),
                checkpoint_config={"interval": 2}).run([Loader()])
    second = build_model()
    runner = make_runner(tmp_path, 4, model=second, optimizer=adam(second))
    runner.resume(tmp_path / "iter_2.pth")
    assert runner.iter == 2 and not runner.optimizer.param_groups[0]["fused"]
    runner.run([Loader()])


@pytest.mark.parametrize("hooks, message", [
    ({"lr": {"warmup": "linear"}}, "lr_config: expected a dict with a 'policy'"),
    ({"lr": {"policy": "stair"}}, "lr_config.type: 'StairLrUpdaterHook' is not a hook"),
    ({"lr": {"policy": "step", "step": [3], "warmup_iter": 3}},
     "lr_config: StepLrUpdaterHook takes no .'warmup_iter'.*did you mean 'warmup_iters'"),
    ({"optimizer_config": {"grad_clips": {}}}, "optimizer_config: OptimizerHook takes no .'grad_clips'"),
    ({"optimizer_config": {"grad_clip": {"max_nrm": 5}}}, r"optimizer_config.grad_clip: unknown \['max_nrm'\]"),
    ({"optimizer_config": {"grad_clip": {"norm_type": 2}}}, "max_norm is missing"),
    ({"optimizer_config": {"cumulative_iters": 0}}, "optimizer_config: .*cumulative_iters: expected a positive"),
    ({"checkpoint_config": {"intervall": 5}}, "checkpoint_config: CheckpointHook takes no .'intervall'"),
    ({"log_config": {"interval": 5, "hook": []}}, r"log_config: unknown \['hook'\]"),
    ({"log_config": {"interval": 5, "hooks": [{"type": "TextLogger"}]}}, r"log_config.hooks\[0\].type: 'TextLogger'"),
    ({"custom_hooks_config": [{"type": "MEGVIIEMAHook", "updates": 1}]}, r"custom_hooks\[0\]: MEGVIIEMAHook takes no"),
    ({"custom_hooks_config": [5]}, r"custom_hooks\[0\]: expected a dict with a 'type'")])
def test_wrong_hooks_are_refused(tmp_path, hooks, message):
    with pytest.raises(ConfigError, match=message):
        make_runner(tmp_path, **hooks)


def test_configs_of_hooks_stay_as_they_are(tmp_path):
    config = {"policy": "step", "step": [3]}
    log = {"interval": 5, "hooks": [{"type": "TextLoggerHook"}]}
    make_runner(tmp_path, lr=config, log_config=log)
    assert config == {"policy": "step", "step": [3]} and log == {"interval": 5, "hooks": [{"type": "TextLoggerHook"}]}


def test_other_workflows_and_models_are_refused(tmp_path):
    runner = make_runner(tmp_path)
    with pytest.raises(ConfigError, match=r"workflow: only .*'train', 1.* use --validate"):
        runner.run([Loader()], [("train", 1), ("val", 1)])
    with pytest.raises(NotImplementedError, match="--validate"):
        runner.val(None)

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def train_step(self, data, optimizer):
            return {"loss": self.weight.sum()}

    odd = TrainRunner(Odd(), None, logger=runner.logger, work_dir=tmp_path, max_iters=1)
    with pytest.raises(TypeError, match=r"loss, log_vars and num_samples, got \['loss'\]"):
        odd.train_step({})
