"""The reference implementation's numbers in evaluation: its own weights and inputs, three frames of a sequence."""

import json

import numpy as np
import pytest
import torch
from golden_cases import NUM_CLASSES, build, eval_tensors, load_module, sampled_error

from mmdet3d.utils.fold_batch_norm import fold_batch_norm

TOLERANCE = 1e-3  # standard deviations, for 99.9 % of the samples
SAME_CLASS = 0.9998


@pytest.mark.parametrize("name", ["openocc", "occ3d"])
def test_state_dict_equals_the_reference(shared, name):
    golden = json.loads((shared / f"golden/state_dict_{name}.json").read_text())
    state = build(name).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == golden
    assert list(state) == list(golden)
    lines = (shared / f"spec/state_dict_{name}.txt").read_text().splitlines()
    described = [f"{key} {tuple(value.shape)} {value.dtype}" for key, value in state.items()]
    assert described == [line.strip() for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name, frames, folded", [("openocc", 3, False), ("openocc", 3, True), ("occ3d", 2, False)])
def test_eval_equals_the_reference(shared, device, name, frames, folded, record_property):
    fill = load_module(shared / "golden/fill.py")
    golden = np.load(shared / f"golden/{name}_eval.npz")
    model = build(name)
    fill.fill_state_dict(model, NUM_CLASSES[name])
    model.eval()
    if folded:
        model = fold_batch_norm(model, inplace=True)
    model.to(device)
    sequence = fill.make_sequence(seed=0, frames=frames, num_classes=NUM_CLASSES[name])
    memory, errors, equal = None, {}, {}
    with torch.no_grad(), fill.deterministic_noise(model):
        for i, frame in enumerate(sequence):
            inputs = [tensor.to(device) for tensor in frame["img_inputs"]]
            prediction, features = model.run(inputs, frame["img_metas"], memory)
            memory = prediction.memory
            for tensor, value in eval_tensors(prediction, features).items():
                errors[f"frame{i}/{tensor}"] = sampled_error(golden, f"frame{i}/{tensor}", value)
            semantics = model.decode(prediction)[0].cpu().numpy()
            equal[f"frame{i}"] = float((semantics == golden[f"frame{i}/semantics"]).mean())
    record_property("errors", errors)
    record_property("equal_semantics", equal)
    assert {tensor: error for tensor, error in errors.items() if error > TOLERANCE} == {}
    assert min(equal.values()) >= SAME_CLASS
