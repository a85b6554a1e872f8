"""ms_deform_attn in PyTorch's deterministic mode on CUDA: the same bits in every run, and the right ones."""

import pytest
import torch
from test_ms_deform_attn import make_case, run_with_gradients

from mmdet3d.ops import ms_deform_attn, ms_deform_attn_reference

pytestmark = pytest.mark.cuda
# Few pixels for many queries: each element of the gradient of value is a sum of thousands of terms.
SIZES, LEVELS = (2, 4000, 3, 12, 8), [(5, 7), (3, 4)]


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def gradients(function, dtype, *, scale=1.0, channels=12):
    sizes = (*SIZES[:3], channels, SIZES[4])
    case = make_case("cuda", dtype, sizes=sizes, levels=LEVELS)
    grad = torch.randn(sizes[0], sizes[1], sizes[2] * channels, generator=torch.Generator().manual_seed(1),
                       dtype=torch.float64)
    return run_with_gradients(function, *case, (grad * scale).to("cuda", dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [12, 5])
def test_every_run_gives_the_same_bits(deterministic, dtype, channels):
    first = gradients(ms_deform_attn, dtype, channels=channels)
    for _ in range(4):
        again = gradients(ms_deform_attn, dtype, channels=channels)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_agrees_with_the_reference_at_every_magnitude(deterministic, scale):
    found = gradients(ms_deform_attn, torch.float32, scale=scale)
    expected = gradients(ms_deform_attn_reference, torch.float64, scale=scale)
    for one, other in zip(found, expected, strict=True):
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error < 1e-5


def test_float64_keeps_the_promised_precision(deterministic):
    found = gradients(ms_deform_attn, torch.float64)[1]
    expected = gradients(ms_deform_attn_reference, torch.float64)[1]
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


def test_agrees_with_the_default_mode():
    default = gradients(ms_deform_attn, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        found = gradients(ms_deform_attn, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found[0], default[0])
    for one, other in zip(found[1:], default[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_zero_and_nonfinite_gradients(deterministic):
    assert not gradients(ms_deform_attn, torch.float32, scale=0.0)[1].any()
    assert gradients(ms_deform_attn, torch.float32, scale=float("inf"))[1].isnan().all()
    assert gradients(ms_deform_attn, torch.float32, scale=float("nan"))[1].isnan().all()
