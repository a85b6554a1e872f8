"""The stage never asks the device for a value, nor sends it one: its work can be queued ahead, or captured once."""

import pytest
import small_stage as stage
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that wait for a value, or whose result has a shape that depends on values; and the upload of Python numbers.
WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "unique", "equal", "lift_fresh")


class NoHostWait(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(str(function).startswith(f"aten.{name}") for name in WAITING):
            raise AssertionError(f"{function} holds up the host")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("wait", [
    lambda x: x.max().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: bool(x.any()), lambda x: float(x[0]),
    lambda x: torch.tensor([1.0, 2.0], device=x.device), lambda x: x.new_tensor([1.0, 2.0])])
def test_what_holds_up_the_host_is_recognised(wait):
    with pytest.raises(AssertionError, match="holds up the host"), NoHostWait():
        wait(torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("quirks", [True, False])
def test_a_stage_needs_nothing_from_the_device(training, first, quirks):
    layer = stage.config()["transformer"]["encoder"]["transformerlayers"]
    if not quirks:
        temporal, spatial = layer["attn_cfgs"]
        temporal |= {"scrambled_reduction": False, "interleaved_history_rows": False}
        spatial["shared_occlusion_buffer"] = False
    options = {} if quirks else {"always_flip_previous": False, "stale_previous_at_start": False}
    module = stage.make({"transformerlayers": layer}, **options).train(training)
    arguments = stage.inputs(coarse=not first, previous=not first)
    with NoHostWait(), torch.set_grad_enabled(training):
        bev, logits = stage.call(module, **arguments)
        if training:
            (bev.square().mean() + logits.square().mean()).backward()
    if training:
        assert all(parameter.grad is not None for parameter in module.parameters())
