"""upsample_add: the definition, the fused kernel against the plain version, refusals."""

import pytest
import torch

from mmdet3d.ops import upsample_add, upsample_add_reference

SIZES = (2, 6, 2, 3, 4)  # B, C, Z, Y, X


def make_case(device="cpu", dtype=torch.float32, sizes=SIZES, channels_last=True):
    """A fine and a coarse volume of values between -2 and 2, on a grid that half precision holds."""
    generator = torch.Generator().manual_seed(0)
    B, C, Z, Y, X = sizes
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    return [torch.randint(-256, 257, size, generator=generator).div(128).to(device, dtype).to(memory_format=layout)
            for size in ((B, C, 2 * Z, 2 * Y, 2 * X), sizes)]


def bench_cases(device, dtype):
    """(name, compiled, reference) callables between the two finest stages of the released model."""
    fine, coarse = make_case(device, dtype, (1, 96, 4, 50, 50))
    work = {"bytes": 2 * fine.nbytes + coarse.nbytes + upsample_add(fine, coarse)[1].nbytes}
    return [("upsample_add, finest stage", lambda: upsample_add(fine, coarse),
             lambda: upsample_add_reference(fine, coarse), work)]


def test_a_ramp_stays_a_ramp():
    """The coarse voxel i is at 2 i + 0.5 of the fine ones; beyond the outermost centres the value is held."""
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (2, 3, 4)), indexing="ij")
    coarse = (100 * z + 10 * y + x)[None, None]
    fine = torch.ones(1, 1, 4, 6, 8, dtype=torch.float64)
    total, mean = upsample_add(fine, coarse)
    at = [((torch.arange(2 * n) + 0.5) / 2 - 0.5).clamp(0, n - 1) for n in (2, 3, 4)]
    z, y, x = torch.meshgrid(*at, indexing="ij")
    expected = 1 + 100 * z + 10 * y + x
    torch.testing.assert_close(total[0, 0], expected.double())
    torch.testing.assert_close(mean[0, 0], expected.double().mean(0))


def test_gradients():
    inputs = [t.requires_grad_() for t in make_case(dtype=torch.float64)]
    assert torch.autograd.gradcheck(upsample_add, inputs)


@pytest.mark.cuda
def test_gradients_on_a_gpu():
    inputs = [t.requires_grad_() for t in make_case("cuda", torch.float64)]
    assert torch.autograd.gradcheck(upsample_add, inputs)
    fine, coarse = (t.requires_grad_() for t in make_case("cuda"))
    assert all(t.requires_grad for t in upsample_add(fine, coarse))


def test_mean_of_half_precision_is_float32():
    fine, coarse = make_case(dtype=torch.bfloat16)
    total, mean = upsample_add(fine, coarse)
    assert (total.dtype, mean.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.cuda
@pytest.mark.parametrize("sizes", [SIZES, (1, 8, 1, 1, 1), (2, 96, 4, 5, 7), (1, 33, 3, 2, 9), (1, 64, 2, 50, 25)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_fused_equals_reference(sizes, dtype, channels_last):
    fine, coarse = make_case("cuda", dtype, sizes, channels_last)
    total, mean = upsample_add(fine, coarse)
    expected, expected_mean = upsample_add_reference(fine.double(), coarse.double())
    assert total.dtype == dtype and total.is_contiguous(memory_format=torch.channels_last_3d)
    # One rounding of the sum, whose values are below 4.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=2 * unit + 2e-6)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=0, atol=2e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("change", [
    lambda fine, coarse: (fine, coarse[:, 1:].contiguous()), lambda fine, coarse: (fine[:1], coarse),
    lambda fine, coarse: (fine, coarse.half()), lambda fine, coarse: (fine, coarse.cpu()),
    lambda fine, coarse: (fine.transpose(1, 2), coarse.transpose(1, 2)), lambda fine, coarse: (fine[0], coarse[0])])
def test_the_compiled_operator_checks_what_keeps_it_in_memory(change):
    rows = [volume.permute(0, 2, 3, 4, 1).contiguous() for volume in make_case("cuda")]
    with pytest.raises(RuntimeError, match="upsample_add: "):
        torch.ops.mmdet3d.upsample_add(*change(*rows))


def test_torch_compile_traces_through(device):
    inputs = make_case(device)
    traced = torch.compile(lambda *case: [2 * t for t in upsample_add(*case)], backend="aot_eager", fullgraph=True)
    for found, plain in zip(traced(*inputs), upsample_add(*inputs), strict=True):
        assert torch.equal(found, 2 * plain)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"coarse": torch.zeros(2, 6, 2, 3)}, ValueError, r"coarse must have shape \(B, C, Z, Y, X\)"),
    ({"fine": torch.zeros(2, 6, 4, 6, 7)}, ValueError, "fine must have shape"),
    ({"coarse": torch.zeros(SIZES, dtype=torch.float64)}, TypeError, "coarse"),
    ({"fine": torch.zeros(2, 6, 4, 6, 8, dtype=torch.int64)}, TypeError, "fine must be one of"),
])
def test_refusals(change, error, message):
    arguments = dict(zip(("fine", "coarse"), make_case(), strict=True)) | change
    with pytest.raises(error, match=message):
        upsample_add(**arguments)
