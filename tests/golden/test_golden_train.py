"""The reference implementation's losses and gradient norms over two training steps."""

import numpy as np
import pytest
from golden_cases import build, load_module

LOSS_TOLERANCE = 2e-3
GRADIENT_TOLERANCE = 5e-2


def gradient_norms(model):
    """L2 norm of the gradients of all parameters that share the first three parts of their name."""
    squares = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        prefix = ".".join(name.split(".")[:3])
        squares[prefix] = squares.get(prefix, 0.0) + parameter.grad.double().square().sum().item()
    return {prefix: np.sqrt(value) for prefix, value in squares.items()}


@pytest.mark.slow
def test_training_equals_the_reference(shared, device, record_property):
    fill = load_module(shared / "golden/fill.py")
    golden = np.load(shared / "golden/openocc_train.npz")
    model = build("openocc")
    fill.fill_state_dict(model, 17)
    model.train().to(device)
    sequence = fill.make_sequence(seed=0, frames=2, with_gt=True)
    worst = {}
    with fill.deterministic_noise(model):
        for i, frame in enumerate(sequence):
            model.zero_grad(set_to_none=True)
            data = {key: value.to(device) for key, value in frame.items() if key not in ("img_inputs", "img_metas")}
            losses = model(img_inputs=[x.to(device) for x in frame["img_inputs"]], img_metas=frame["img_metas"], **data)
            names = {key.split("/")[-1] for key in golden.files if key.startswith(f"step{i}/loss/")}
            assert set(losses) == names
            total, log = model.parse_losses(losses)
            total.backward()
            for name in names:
                worst[f"step{i}/{name}"] = abs(log[name] / float(golden[f"step{i}/loss/{name}"]) - 1)
            assert log["loss"] == pytest.approx(float(golden[f"step{i}/total"]), rel=LOSS_TOLERANCE)
            norms = gradient_norms(model)
            wanted = {key.split("/", 2)[2]: float(golden[key]) for key in golden.files if f"step{i}/grad_norm/" in key}
            assert norms.keys() == wanted.keys()
            for prefix, norm in wanted.items():
                worst[f"step{i}/grad/{prefix}"] = abs(norms[prefix] / norm - 1)
    record_property("relative_errors", worst)
    wrong = {key: error for key, error in worst.items()
             if error > (GRADIENT_TOLERANCE if "/grad/" in key else LOSS_TOLERANCE)}
    assert wrong == {}
