"""class_guidance: definition, noise, fused against reference, refusals, and the flow head that uses it."""

import math

import pytest
import torch
from torch.nn import functional as F

from mmdet3d.models.heads import OccFlowHead
from mmdet3d.ops import class_guidance, class_guidance_reference
from mmdet3d.ops.class_guidance import gumbel_noise, gumbel_noise_reference, kernel_serves

HALF = [torch.float16, torch.bfloat16]
VOXELS = (3, 5, 7)
REAL = {"voxels": (200, 200, 16), "batch": 1}
# Sums of two layers of rounded numbers: where a fast function crosses the middle of two half-precision numbers, a term
# moves by one unit in the last place.
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3.2e-2}


def make_case(device="cpu", *, classes=18, hidden=48, outputs=48, voxels=VOXELS, batch=2, dtype=torch.float32):
    """Scores, the four parameters of the layers in ``dtype``, and seeds."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, *voxels, classes), (hidden, classes), (hidden,), (outputs, hidden), (outputs,))
    scores, *parameters = (torch.randn(shape, generator=generator) for shape in shapes)
    parameters[2] /= hidden**0.5
    seeds = torch.randint(-(2**31), 2**31, (batch,), generator=generator).int()
    return (3 * scores).to(device), [p.to(device, dtype) for p in parameters], seeds.to(device)


def test_definition(device):
    scores, (w1, b1, w2, b2), seeds = make_case(device, classes=5, hidden=6, outputs=7)
    for softmax, noise_seeds in ((True, None), (True, seeds), (False, None)):
        classes = scores + gumbel_noise_reference(seeds, scores.shape[1:]) if noise_seeds is not None else scores
        classes = classes.softmax(-1) if softmax else classes
        expected = F.softplus(classes @ w1.T + b1) @ w2.T + b2
        out = class_guidance(scores, w1, b1, w2, b2, noise_seeds=noise_seeds, softmax=softmax)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_is_that_of_autocast(device, dtype):
    scores, (w1, b1, w2, b2), _ = make_case(device, dtype=dtype)
    b1.zero_(), b2.zero_()
    with torch.autocast(device, dtype=dtype):
        classes = scores.softmax(-1)
        expected = F.linear(F.softplus(F.linear(classes, w1).float()), w2)
    out = class_guidance(scores, w1, b1, w2, b2, dtype=dtype)
    assert out.dtype == expected.dtype == dtype
    # Autocast also rounds what goes into the softplus.
    torch.testing.assert_close(out, expected, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


def test_float64_and_seeds_of_one_sample():
    scores, parameters, seeds = make_case()
    out = class_guidance(scores, *parameters, noise_seeds=seeds, dtype=torch.float64)
    assert out.dtype == torch.float64
    one = class_guidance(scores[1:], *parameters, noise_seeds=seeds[1:], dtype=torch.float64)
    torch.testing.assert_close(one, out[1:])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("noise", ["seeds", "none", "ready"])
@pytest.mark.parametrize(("classes", "hidden", "outputs"), [(18, 48, 48), (5, 16, 16), (1, 3, 4), (17, 30, 20),
                                                            (24, 48, 48), (25, 64, 64), (32, 50, 60), (6, 64, 8)])
def test_fused_equals_reference(dtype, noise, classes, hidden, outputs):
    scores, parameters, seeds = make_case("cuda", classes=classes, hidden=hidden, outputs=outputs)
    assert kernel_serves(scores, parameters[0], parameters[2], dtype)
    scores = scores.softmax(-1) if noise == "ready" else scores
    options = {"noise_seeds": seeds if noise == "seeds" else None, "softmax": noise != "ready", "dtype": dtype}
    expected = class_guidance_reference(scores, *parameters, **options)
    out = class_guidance(scores, *parameters, **options)
    assert out.shape == expected.shape and out.dtype == dtype
    scale = float(expected.abs().max())
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)
    # Rounding has no preference: errors in one direction would be one of the arithmetic.
    assert abs(float((out.double() - expected.double()).mean())) < 0.1 * TOLERANCE[dtype] * scale


@pytest.mark.cuda
@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("voxels", [(), (1,), (15,), (16,), (17,), (64, 33), (100, 100, 9), (0, 4)])
def test_fused_at_any_number_of_voxels(batch, voxels):
    scores, parameters, seeds = make_case("cuda", voxels=voxels, batch=batch)
    options = {"noise_seeds": seeds, "dtype": torch.float16}
    expected = class_guidance_reference(scores, *parameters, **options)
    out = class_guidance(scores, *parameters, **options)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[torch.float16], atol=4 * TOLERANCE[torch.float16])


@pytest.mark.cuda
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.float64, *HALF])
def test_fused_takes_any_memory(parameter_dtype):
    scores, parameters, seeds = make_case("cuda", dtype=parameter_dtype)
    options = {"noise_seeds": seeds, "dtype": torch.float16}
    expected = class_guidance(scores, *(p.float() for p in parameters), **options)
    moved = torch.empty(scores.numel() + 1, device="cuda")[1:].view(scores.shape).copy_(scores)
    assert moved.data_ptr() % 8 == 4
    strided = scores.transpose(0, 1).contiguous().transpose(0, 1)
    for same in (moved, strided, scores):
        got = class_guidance(same, *(p.mT.contiguous().mT if p.dim() == 2 else p for p in parameters), **options)
        assert torch.equal(got, expected)


@pytest.mark.cuda
def test_fused_with_numbers_that_are_not_finite():
    scores, parameters, _ = make_case("cuda")
    clean = class_guidance(scores, *parameters, dtype=torch.float16)
    scores[0, 0, 0, 0, 3], scores[0, 0, 0, 1, 0], scores[1, 2, 4, 6] = math.nan, math.inf, -math.inf
    scores[0, 0, 0, 2, 5] = -math.inf  # a class that cannot be
    out = class_guidance(scores, *parameters, dtype=torch.float16)
    for place in ((0, 0, 0, 0), (0, 0, 0, 1), (1, 2, 4, 6)):
        assert out[place].isnan().all()
        out[place] = clean[place]
    expected = class_guidance_reference(scores[0, 0, 0, 2][None], *parameters, dtype=torch.float16)[0]
    torch.testing.assert_close(out[0, 0, 0, 2], expected, rtol=4e-3, atol=1.6e-2)
    out[0, 0, 0, 2] = clean[0, 0, 0, 2]
    assert torch.equal(out, clean)


@pytest.mark.cuda
def test_larger_sizes_run_in_plain_pytorch():
    for sizes in ({"classes": 33}, {"hidden": 65}, {"outputs": 68}, {"outputs": 6}):
        scores, parameters, _ = make_case("cuda", **sizes)
        assert not kernel_serves(scores, parameters[0], parameters[2], torch.float16)
        expected = class_guidance_reference(scores, *parameters, dtype=torch.float16)
        torch.testing.assert_close(class_guidance(scores, *parameters, dtype=torch.float16), expected)


@pytest.mark.cuda
def test_fused_noise_equals_reference():
    seeds = torch.tensor([0, -1, 2**31 - 1, -(2**31)], dtype=torch.int32, device="cuda")
    shape = (50, 40, 18)
    assert torch.equal(gumbel_noise(seeds, shape), gumbel_noise_reference(seeds, shape))
    assert gumbel_noise(seeds[::2], shape).shape == (2, *shape) and gumbel_noise(seeds[:0], shape).numel() == 0
    assert torch.equal(gumbel_noise(seeds[::2], shape), gumbel_noise_reference(seeds[::2], shape))


@pytest.mark.cuda
def test_a_recorded_call_computes_again():
    scores, parameters, seeds = make_case("cuda")
    options = {"noise_seeds": seeds, "dtype": torch.float16}
    class_guidance(scores, *parameters, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = class_guidance(scores, *parameters, **options)
    scores.add_(torch.randn_like(scores))
    seeds.add_(1)
    graph.replay()
    assert torch.equal(out, class_guidance(scores, *parameters, **options))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("noise", ["seeds", "drawn", "none"])
def test_the_flow_head_in_half_precision(device, dtype, noise, monkeypatch):
    monkeypatch.setattr(F, "gumbel_softmax", lambda x, tau, hard, dim: (x / tau).softmax(dim).roll(1, dim))
    torch.manual_seed(2)
    head = OccFlowHead(18, (0, 2, 3), 8, 96, gumbel_in_eval=noise != "none").eval().to(device)
    scores, _, seeds = make_case(device, voxels=(8, 6, 4))
    volume = torch.randn(2, 8, 2, 3, 4).to(device)
    flows = []
    with torch.no_grad(), torch.autocast(device, dtype=dtype):
        assert head._fused(scores) == (device == "cuda")
        for fused in (True, False):
            monkeypatch.setattr(head, "_fused", lambda logits, fused=fused: fused)
            flows.append(head(volume, scores, seeds if noise == "seeds" else None))
        assert head._fused_guidance(scores, seeds).dtype == dtype
    torch.testing.assert_close(*flows, rtol=4 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


@pytest.mark.cuda
def test_the_flow_head_keeps_plain_pytorch_for_gradients_and_in_full_precision():
    head, scores = OccFlowHead(18, (0, 2, 3), 8, 96).eval().cuda(), make_case("cuda")[0]
    with torch.autocast("cuda", dtype=torch.float16):
        assert not head._fused(scores)
        with torch.no_grad():
            assert head._fused(scores) and not head.train()._fused(scores)
    with torch.no_grad():
        assert not head.eval()._fused(scores)


def test_the_flow_head_keeps_plain_pytorch_elsewhere():
    head = OccFlowHead(18, (0, 2, 3), 8, 96).eval()
    with torch.no_grad():
        assert not head._fused(make_case()[0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not head._fused(make_case()[0])


def test_autocast_does_not_touch_it(device):
    scores, parameters, seeds = make_case(device)
    expected = class_guidance(scores, *parameters, noise_seeds=seeds)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(class_guidance(scores, *parameters, noise_seeds=seeds), expected)


@pytest.mark.parametrize("function", [class_guidance, class_guidance_reference])
def test_empty(device, function):
    for voxels, batch in (((0, 4), 2), ((3,), 0)):
        scores, parameters, seeds = make_case(device, voxels=voxels, batch=batch)
        assert function(scores, *parameters, noise_seeds=seeds, dtype=torch.float16).shape == (batch, *voxels, 48)


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"scores": torch.zeros(2, 3).int()}, TypeError, "scores must be one of torch.float32"),
    ({"scores": torch.zeros(5)}, ValueError, r"scores must have shape \(B, ..., K\), got \(5,\)"),
    ({"first_weight": torch.zeros(6, 4)}, ValueError, r"first_weight must have shape \(H, K\) = \(6, 5\), got \(6, 4"),
    ({"first_weight": torch.zeros(5)}, ValueError, r"first_weight must have shape \(H, K\)"),
    ({"first_bias": torch.zeros(7)}, ValueError, r"first_bias must have shape"),
    ({"second_weight": torch.zeros(8, 7)}, ValueError, r"second_weight must have shape \(D, H\) = \(8, 6\)"),
    ({"second_bias": torch.zeros(8).long()}, TypeError, "second_bias must be one of"),
    ({"second_bias": torch.zeros(8, device="meta")}, ValueError, "second_bias must be on the device of scores, cpu"),
    ({"noise_seeds": torch.zeros(2)}, TypeError, "seeds must be int32, got torch.float32"),
    ({"noise_seeds": torch.zeros(2, 1).int()}, ValueError, r"expected seeds \[B\]"),
    ({"noise_seeds": torch.zeros(3).int()}, ValueError, r"noise_seeds must have shape"),
    ({"noise_seeds": torch.zeros(2).int(), "softmax": False}, ValueError, "noise_seeds need softmax=True"),
    ({"dtype": torch.int32}, TypeError, "dtype must be one of torch.float32, .* got torch.int32"),
])
def test_refusals(changes, error, message):
    scores, parameters, _ = make_case(classes=5, hidden=6, outputs=8)
    names = ("scores", "first_weight", "first_bias", "second_weight", "second_bias")
    arguments = dict(zip(names, (scores, *parameters), strict=True)) | changes
    with pytest.raises(error, match=message):
        class_guidance(**arguments)


def test_a_gradient_is_refused_not_dropped(device):
    scores, parameters, _ = make_case(device)
    parameters[2].requires_grad_()
    with pytest.raises(RuntimeError, match="class_guidance has no gradient"):
        class_guidance(scores, *parameters)
    with torch.no_grad():
        assert not class_guidance(scores, *parameters).requires_grad


@pytest.mark.cuda
@pytest.mark.parametrize(("place", "change"), [
    (0, lambda t: t.half()), (0, lambda t: t.transpose(0, 1)), (0, lambda t: t[..., :17].contiguous()),
    (1, lambda t: t[:, :17].contiguous()), (1, lambda t: t.cpu()), (1, lambda t: t.double()), (2, lambda t: t[:47]),
    (3, lambda t: t[:47]), (3, lambda t: t.mT), (4, lambda t: t[:44]), (5, lambda t: t.long()), (5, lambda t: t[:1]),
    (6, lambda softmax: False), (7, lambda dtype: torch.float32)])
def test_the_compiled_operator_checks_what_keeps_it_in_memory(place, change):
    scores, parameters, seeds = make_case("cuda")
    arguments = [scores, *parameters, seeds, True, torch.float16]
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match="class_guidance: "):
        torch.ops.mmdet3d.class_guidance(*arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", HALF)
def test_registration(dtype):
    scores, parameters, seeds = make_case("cuda")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mmdet3d.class_guidance.default, (scores, *parameters, seeds, True, dtype),
                          test_utils=tests)
    torch.library.opcheck(torch.ops.mmdet3d.gumbel_noise.default, (seeds, 12), test_utils=tests)


def test_torch_compile_traces_through(device):
    scores, parameters, seeds = make_case(device)

    def both(scores):
        return class_guidance(scores, *parameters, noise_seeds=seeds, dtype=torch.float16).tanh()

    traced = torch.compile(both, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(traced(scores), both(scores))


def bench_cases(device, dtype):
    """(name, fast, reference) at the size of the model; the kernel is for half precision, so float32 times float16."""
    scores, parameters, seeds = make_case(device, **REAL)
    options = {"dtype": dtype if dtype in HALF else torch.float16}
    shape = scores.shape[1:]
    work = {"bytes": scores.nbytes + class_guidance(scores, *parameters, **options).nbytes}
    cases = [("gumbel_noise", lambda: gumbel_noise(seeds, shape), lambda: gumbel_noise_reference(seeds, shape),
              {"bytes": scores.nbytes})]
    for name, more in (("class_guidance", {}), ("class_guidance, seeded noise", {"noise_seeds": seeds})):
        cases.append((name, lambda o=options | more: class_guidance(scores, *parameters, **o),
                      lambda o=options | more: class_guidance_reference(scores, *parameters, **o), work))
    return cases
