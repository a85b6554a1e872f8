"""row_argmax: PyTorch's argmax on the CPU, ties and NaN included, and where it must refuse."""

import math

import pytest
import torch

from mmdet3d.ops import row_argmax, row_argmax_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
REAL = (1, 200, 200, 16, 18)


def make_case(device="cpu", dtype=torch.float32, shape=(2, 3, 50, 18), levels=None):
    """Normal numbers or, for ties, whole ones of a few levels."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    if levels is not None:
        values = torch.randint(levels, shape, generator=generator).float()
    return values.to(dtype).to(device)


def expected_by_loops(values):
    """First index of the greatest value of [N, K], NaN being the greatest."""
    indices = []
    for row in values.tolist():
        best = 0
        for i, value in enumerate(row):
            if not math.isnan(row[best]) and (math.isnan(value) or value > row[best]):
                best = i
        indices.append(best)
    return torch.tensor(indices, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 5, 18])
def test_equals_loops(device, dtype, columns):
    values = make_case(device, dtype, (600, columns), levels=3)
    values[::7, columns // 2] = math.nan
    values[::14, 0] = math.nan
    values[1::7, -1] = math.inf
    values[2::7] = -math.inf
    values[3::7, ::2] = -0.0
    assert torch.equal(row_argmax(values).cpu(), expected_by_loops(values.cpu()))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 17, 18, 31, 32, 33, 64, 100, 255, 256])
def test_cuda_equals_cpu(dtype, levels, columns):
    for rows in (1, 31, 32, 255, 257, 1000):
        values = make_case("cuda", dtype, (rows, columns), levels)
        assert torch.equal(row_argmax(values).cpu(), row_argmax(values.cpu()))


@pytest.mark.cuda
def test_cuda_equals_cpu_at_the_size_of_the_model():
    values = make_case("cuda", shape=REAL)
    assert torch.equal(row_argmax(values).cpu(), row_argmax_reference(values.cpu()))


def test_shapes_and_strides(device):
    values = make_case(device)
    expected = row_argmax_reference(values.cpu())
    assert row_argmax(values).shape == (2, 3, 50) and row_argmax(values).dtype == torch.uint8
    moved = torch.empty(values.numel() + 1, device=device)[1:].view(values.shape).copy_(values)
    for same in (values, moved, values.mT.contiguous().mT):
        assert torch.equal(row_argmax(same).cpu(), expected)
    assert int(row_argmax(values[0, 0, 0])) == int(expected[0, 0, 0])
    assert row_argmax(values[:0]).shape == (0, 3, 50)


def test_no_gradient_flows(device):
    assert not row_argmax(make_case(device).requires_grad_()).requires_grad


@pytest.mark.parametrize(("values", "error", "message"), [
    (torch.zeros(3, 4).int(), TypeError, "values must be one of torch.float32, .* got torch.int32"),
    ([1.0, 2.0], TypeError, "values must be a tensor, got list"),
    (torch.zeros(()), ValueError, r"values must have shape \(..., K\) with 1 <= K <= 256, got \(\)"),
    (torch.zeros(3, 0), ValueError, r"with 1 <= K <= 256, got \(3, 0\)"),
    (torch.zeros(3, 257), ValueError, r"with 1 <= K <= 256, got \(3, 257\)"),
])
def test_refusals(values, error, message):
    with pytest.raises(error, match=message):
        row_argmax(values)


@pytest.mark.cuda
@pytest.mark.parametrize("change", [lambda t: t.mT, lambda t: t[..., :0], lambda t: t.double(), lambda t: t.sum()])
def test_the_compiled_operator_checks_what_keeps_it_in_memory(change):
    with pytest.raises(RuntimeError, match="row_argmax: "):
        torch.ops.mmdet3d.row_argmax(change(make_case("cuda")))


@pytest.mark.cuda
def test_registration():
    torch.library.opcheck(torch.ops.mmdet3d.row_argmax.default, (make_case("cuda"),),
                          test_utils=("test_schema", "test_faketensor"))


def test_torch_compile_traces_through(device):
    values = make_case(device)
    traced = torch.compile(lambda values: row_argmax(values) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(values), row_argmax(values) + 1)


def bench_cases(device, dtype):
    """(name, fast, reference): the classes of the voxels of the released model."""
    values = make_case(device, dtype, REAL)
    work = {"bytes": values.nbytes + values.numel() // values.shape[-1]}
    return [("row_argmax", lambda: row_argmax(values), lambda: row_argmax_reference(values), work)]
