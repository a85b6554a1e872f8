"""The step of the optimizer, with clipping and accumulation of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmcv.runner import Hook

from mmdet3d.core.hooks.builder import HOOKS
from mmdet3d.registry import ConfigError, check_keys


@HOOKS.register_module(name=("OptimizerHook", "GradientCumulativeOptimizerHook"))
class OptimizerHook(Hook):
    """Before the forward pass zero_grad, which makes room; after it backward, clip, step.

    With ``cumulative_iters`` N the gradients of N iterations are averaged before a step; an iteration remains one
    forward pass, so N iterations are one step. A run that ends within such a group steps with what it has.

    Where the forward pass came with the backward pass (``outputs["backward_done"]``, see
    :class:`mmdet3d.core.cuda_graphs.steps.StepGraph`), clipping and step remain.

    Where a hook before this one has set ``runner.skip_step``, the loss of the iteration and the gradients accumulated
    for the step are dropped.

    Args:
        grad_clip: ``max_norm`` and ``norm_type`` of :func:`torch.nn.utils.clip_grad_norm_` over all gradients.
        cumulative_iters: Iterations whose gradients make one step.

    Raises:
        ConfigError: ``grad_clip`` has an unknown key.
        ValueError: ``cumulative_iters`` is not a positive whole number.
    """

    def __init__(self, grad_clip: Mapping[str, Any] | None = None, cumulative_iters: int = 1) -> None:
        if not isinstance(cumulative_iters, int) or cumulative_iters < 1:
            raise ValueError(f"cumulative_iters: expected a positive whole number, got {cumulative_iters!r}")
        if grad_clip is not None:
            check_keys(grad_clip, ("max_norm", "norm_type", "error_if_nonfinite", "foreach"), "grad_clip")
            if "max_norm" not in grad_clip:
                raise ConfigError("optimizer_config.grad_clip: max_norm is missing")
        self.grad_clip = None if grad_clip is None else dict(grad_clip)
        self.cumulative_iters = cumulative_iters
        self._pending = False

    def steps_after(self, runner: Any) -> bool:
        """Whether the current iteration ends with a step."""
        return (runner.iter + 1) % self.cumulative_iters == 0 or runner.iter + 1 == runner.max_iters

    def before_run(self, runner: Any) -> None:
        """Refuse what excludes each other.

        Raises:
            ConfigError: gradients are to be accumulated while steps replay CUDA graphs, which replace them.
        """
        if self.cumulative_iters > 1 and getattr(runner, "step_graph", None) is not None:
            raise ConfigError(f"cuda_graphs=True does not go with optimizer_config.cumulative_iters="
                              f"{self.cumulative_iters}; leave one of them out")

    def before_train_iter(self, runner: Any) -> None:
        """Drop the gradients of the last step. Processes exchange gradients only in iterations that end with one."""
        if not self._pending:
            runner.optimizer.zero_grad(set_to_none=True)
        if self.cumulative_iters > 1 and hasattr(runner.model, "require_backward_grad_sync"):
            runner.model.require_backward_grad_sync = self.steps_after(runner)

    def after_train_iter(self, runner: Any) -> None:
        """Backward pass of ``runner.outputs["loss"]`` and, at the end of a group, the step."""
        if getattr(runner, "skip_step", False):
            self._pending = False
            return
        if not runner.outputs.get("backward_done", False):
            loss = runner.outputs["loss"]
            (loss if self.cumulative_iters == 1 else loss / self.cumulative_iters).backward()
        self._pending = not self.steps_after(runner)
        if self._pending:
            return
        norm = self._clip(runner)
        runner.optimizer.step()
        if norm is not None:  # read after the step, so that a GPU need not wait for this process
            runner.log_buffer.update({"grad_norm": float(norm)}, runner.outputs["num_samples"])

    def _clip(self, runner: Any) -> torch.Tensor | None:
        if self.grad_clip is None:
            return None
        parameters = [p for group in runner.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return torch.nn.utils.clip_grad_norm_(parameters, **self.grad_clip) if parameters else None
