"""upsample_mlp: definition, gradients, fused against reference, refusals."""

import sys

import pytest
import torch
from torch.nn import functional as F

from mmdet3d.ops import upsample_mlp, upsample_mlp_reference
from mmdet3d.ops.upsample_mlp.reference import upsample_rows

module = sys.modules["mmdet3d.ops.upsample_mlp.upsample_mlp"]
B, Z, Y, X, H, K = 2, 2, 3, 4, 5, 6


def make_case(device="cpu", dtype=torch.float64, *, sizes=(B, Z, Y, X, H, K), seed=0):
    """hidden, weight, bias, fine, residual."""
    generator = torch.Generator().manual_seed(seed)
    b, z, y, x, h, k = sizes
    shapes = ((b, z, y, x, h), (k, h), (k,), (b, 2 * x, 2 * y, 2 * z, h), (b, x, y, z, k))
    hidden, weight, bias, fine, residual = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes)
    half = dtype in (torch.float16, torch.bfloat16)
    parameters = [tensor.to(torch.float32 if half else dtype) for tensor in (weight, bias)]
    return hidden.to(dtype), *parameters, fine.to(dtype), residual.to(dtype)


def bench_cases(device, dtype):
    """(name, compiled, reference) callables at the size of the released heads: K = 18 of 192, and 2 of 48 hidden."""
    cases = []
    for name, sizes, guided in (("occupancy head", (1, 8, 100, 100, 192, 18), False),
                                ("flow head", (1, 8, 100, 100, 48, 2), True)):
        hidden, weight, bias, fine, residual = make_case(device, dtype, sizes=sizes)
        extra = {"fine": fine} if guided else {"residual": residual, "residual_weight": 0.5}
        B, Z, Y, X, H, K = sizes
        voxels = 8 * B * Z * Y * X
        inputs = hidden.nbytes + (fine if guided else residual).nbytes
        cases.append((f"upsample_mlp forward, {name}",
                      lambda h=hidden, w=weight, b=bias, e=extra: upsample_mlp(h, w, b, **e),
                      lambda h=hidden, w=weight, b=bias, e=extra: upsample_mlp_reference(h, w, b, **e),
                      {"bytes": inputs + 4 * K * voxels, "flops": 2 * H * K * voxels}))
        leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
        grad = torch.randn_like(upsample_mlp(hidden, weight, bias, **extra))
        out = [function(*leaves, **extra) for function in (upsample_mlp, upsample_mlp_reference)]
        cases.append((f"upsample_mlp backward, {name}",
                      *(lambda o=o, lv=leaves, g=grad: torch.autograd.grad(o, lv, g, retain_graph=True) for o in out)))
    return cases


def test_definition():
    hidden, weight, bias, fine, residual = make_case()
    out = upsample_mlp(hidden, weight, bias, fine=fine, residual=residual, residual_weight=0.5)
    assert out.shape == (B, 2 * X, 2 * Y, 2 * Z, K)
    up = F.interpolate(hidden.permute(0, 4, 1, 2, 3), scale_factor=2, mode="trilinear", align_corners=False)
    coarse = F.interpolate(residual.permute(0, 4, 1, 2, 3), scale_factor=2, mode="trilinear", align_corners=False)
    for x, y, z in ((0, 0, 0), (7, 5, 3), (3, 2, 1), (6, 1, 3)):
        expected = F.softplus(up[:, :, z, y, x] + fine[:, x, y, z]) @ weight.T + bias + 0.5 * coarse[:, :, x, y, z]
        torch.testing.assert_close(out[:, x, y, z], expected)


def test_rows_have_the_axes_of_labels():
    """A ramp along each axis stays one, in its axis: at index i it is (i + 0.5) / 2 - 0.5, held at the borders."""
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (Z, Y, X)), indexing="ij")
    fine = upsample_rows(torch.stack([100 * x + 10 * y + z, -y], -1)[None], 2, 6)
    at = [((torch.arange(2 * n) + 0.5) / 2 - 0.5).clamp(0, n - 1) for n in (X, Y, Z)]
    x, y, z = torch.meshgrid(*at, indexing="ij")
    torch.testing.assert_close(fine, torch.stack([100 * x + 10 * y + z, -y], -1)[None, 2:6])


@pytest.mark.parametrize("guided", [False, True])
def test_gradients(monkeypatch, guided):
    monkeypatch.setattr(module, "_BACKWARD_SLAB", 1)  # as many slabs as there can be
    hidden, weight, bias, fine, residual = make_case()
    inputs = [t.requires_grad_() for t in (hidden, weight, bias, *([fine] if guided else []))]

    def function(hidden, weight, bias, fine=None):
        return upsample_mlp(hidden, weight, bias, fine=fine, residual=residual)

    assert torch.autograd.gradcheck(function, inputs)


def test_no_gradient_into_the_residual():
    hidden, weight, bias, _, residual = make_case()
    upsample_mlp(hidden.requires_grad_(), weight, bias, residual=residual.requires_grad_()).sum().backward()
    assert residual.grad is None and hidden.grad.abs().sum() > 0


def test_slabs_change_nothing(monkeypatch):
    hidden, weight, bias, fine, residual = make_case(dtype=torch.float32)
    expected = upsample_mlp_reference(hidden, weight, bias, fine=fine, residual=residual)
    monkeypatch.setattr(module, "_FORWARD_SLAB", 1)
    out = upsample_mlp(hidden, weight, bias, fine=fine, residual=residual)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # a matrix product may block its sums differently


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_float32(device, dtype):
    hidden, weight, bias, fine, residual = make_case(device, dtype)
    hidden.requires_grad_()
    out = upsample_mlp(hidden, weight, bias, fine=fine, residual=residual)
    expected = upsample_mlp_reference(hidden.float(), weight, bias, fine=fine.float(), residual=residual.float())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(out.sum(), hidden)[0].dtype == dtype


@pytest.mark.cuda
@pytest.mark.parametrize("sizes", [(2, 2, 3, 4, 5, 6), (1, 1, 1, 1, 33, 1), (1, 3, 5, 7, 64, 2), (2, 4, 9, 6, 192, 17),
                                   (1, 2, 3, 4, 96, 18), (1, 2, 3, 4, 48, 40)])
@pytest.mark.parametrize("guided", [False, True])
def test_fused_equals_reference(sizes, guided, monkeypatch):
    monkeypatch.setattr(module, "_BACKWARD_SLAB", 4096)
    results = []
    for device in ("cpu", "cuda"):
        hidden, weight, bias, fine, residual = make_case(device, torch.float32, sizes=sizes)
        inputs = [t.requires_grad_() for t in (hidden, weight, bias, *([fine] if guided else []))]
        out = upsample_mlp(hidden, weight, bias, fine=fine if guided else None, residual=residual, residual_weight=0.5)
        grad = torch.linspace(0.5, 1.5, out.numel()).view(out.shape).to(device)  # sums do not cancel
        results.append([t.cpu() for t in (out, *torch.autograd.grad(out, inputs, grad))])
    for fused, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(fused, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


def rounded_reference(hidden, weight, bias, fine, residual, residual_weight):
    """In float64, with softplus and weights rounded to the dtype of ``hidden``: what tensor cores multiply."""
    count = 2 * hidden.shape[3]
    before = upsample_rows(hidden.double(), 0, count)
    activations = F.softplus(before if fine is None else before + fine).to(hidden.dtype).double()
    out = F.linear(activations, weight.to(hidden.dtype).double(), bias.double())
    return out + residual_weight * upsample_rows(residual.double().permute(0, 3, 2, 1, 4), 0, count), activations


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("sizes", [(2, 3, 2, 5, 48, 18), (1, 1, 1, 1, 16, 1), (1, 3, 5, 7, 64, 2),
                                   (2, 4, 9, 6, 192, 17), (1, 2, 3, 4, 96, 8), (1, 2, 3, 4, 48, 40),
                                   (1, 8, 50, 47, 16, 3)])  # the last has several groups of cells a warp
def test_tensor_cores_equal_rounded_reference(sizes, guided, dtype):
    """A softplus of the kernel is within some 1e-7 of the reference's. Rarely a rounding boundary lies between the two;
    then they are one unit in the last place apart after rounding, which changes all outputs of that voxel. So nearly
    all outputs must agree to the accuracy of sums in float32, and each to that unit of the largest activation, times
    the largest weight. Without the rounding in the reference, nine in ten outputs would not agree."""
    hidden, weight, bias, fine, residual = make_case(dtype=dtype, sizes=sizes)
    fine, residual = fine if guided else None, residual.float()
    expected, activations = rounded_reference(hidden, weight, bias, fine, residual, 0.5)
    out = upsample_mlp(hidden.cuda(), weight.cuda(), bias.cuda(), fine=fine.cuda() if guided else None,
                       residual=residual.cuda(), residual_weight=0.5)
    error = (out.cpu().double() - expected).abs()
    accurate = error <= 1e-5 * expected.abs().max()
    unit = torch.finfo(dtype).eps * activations.max() * weight.abs().max()
    assert out.dtype == torch.float32
    assert accurate.double().mean() >= 0.95
    assert error.max() <= 1e-5 * expected.abs().max() + unit


@pytest.mark.cuda
def test_half_precision_without_tensor_cores():
    """Memory that is not aligned to eight bytes takes the kernel that rounds nothing."""
    hidden, weight, bias, fine, residual = make_case("cuda", torch.float16, sizes=(1, 2, 3, 4, 48, 18))
    shifted = torch.empty(hidden.numel() + 1, dtype=hidden.dtype, device="cuda")[1:].view(hidden.shape).copy_(hidden)
    expected = upsample_mlp_reference(hidden, weight, bias, fine=fine, residual=residual)
    out = upsample_mlp(shifted, weight, bias, fine=fine, residual=residual)
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.cuda
def test_fused_backward_repeats_bit_for_bit():
    hidden, weight, bias, _, _ = make_case("cuda", torch.float32, sizes=(1, 4, 9, 6, 192, 17))
    hidden.requires_grad_()
    out = upsample_mlp(hidden, weight, bias)
    first, second = (torch.autograd.grad(out.square().sum(), hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("change", "message"), [
    ({"weight": torch.zeros(6, 4)}, r"weight must have shape \(K, H\)"),
    ({"bias": torch.zeros(5)}, r"bias must have shape"),
    ({"fine": torch.zeros(2, 8, 6, 3, 5)}, r"fine must have shape"),
    ({"residual": torch.zeros(2, 2, 3, 4, 6)}, r"residual must have shape"),
    ({"hidden": torch.zeros(2, 3, 4, 5)}, r"hidden must have shape \(B, Z, Y, X, H\)"),
])
def test_shapes_are_refused(change, message):
    arguments = dict(zip(("hidden", "weight", "bias"), make_case(dtype=torch.float32)[:3], strict=True)) | change
    with pytest.raises(ValueError, match=message):
        upsample_mlp(**arguments)


def test_integers_are_refused():
    hidden, weight, bias, _, _ = make_case(dtype=torch.float32)
    with pytest.raises(TypeError, match="hidden must be one of"):
        upsample_mlp(hidden.long(), weight, bias)
