"""Occlusion-aware temporal attention against its formulas."""

import pytest
import torch
from literal_attention import temporal_attention

from mmdet3d.models.attention import OA_TemporalAttention
from mmdet3d.models.attention.temporal_attention import queue_mean, scrambled_mean

SIZE, CHANNELS, HEADS, POINTS = (3, 5), 6, 2, 4  # (Y, X)
QUERIES = SIZE[0] * SIZE[1]


def test_scrambled_mean_of_one_sample():
    mean = scrambled_mean(torch.arange(48.0).view(2, 6, 4), 2)
    assert mean.shape == (1, 6, 4)
    assert mean[0, 0].tolist() == [0.5, 2.5, 4.5, 6.5] and mean[0, 1].tolist() == [8.5, 10.5, 12.5, 14.5]
    rows = torch.arange(48.0).view(12, 4)  # history rows 0..5, current rows 6..11
    for q in range(6):
        for c in range(4):
            row, pair = rows[2 * q + (c >= 2)], 2 * c % 4
            assert mean[0, q, c] == (row[pair] + row[pair + 1]) / 2


def test_scrambled_mean_mixes_the_samples_of_a_batch():
    source = torch.arange(24.0).div(6, rounding_mode="floor").view(4, 6, 1).expand(4, 6, 4)
    mean = scrambled_mean(source, 2)
    assert mean.shape == (2, 6, 4)
    assert mean[:, :, 0].tolist() == [[0, 0, 1, 2, 2, 3]] * 2


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_scrambled_mean_equals_its_closed_form(batch):
    output = torch.randn(2 * batch, 5, 6, generator=torch.Generator().manual_seed(batch))
    mean, flat = scrambled_mean(output, 2), output.flatten()
    for b in range(batch):
        for q in range(5):
            for c in range(6):
                m = (q * 6 + c) * batch + b
                assert mean[b, q, c] == (flat[2 * m] + flat[2 * m + 1]) / 2


def test_queue_mean_keeps_samples_apart():
    output = torch.randn(6, 4, 5)
    mean = queue_mean(output, 2)
    for b in range(3):
        torch.testing.assert_close(mean[b], (output[2 * b] + output[2 * b + 1]) / 2)


def make(**options):
    torch.manual_seed(1)
    module = OA_TemporalAttention(CHANNELS, num_heads=HEADS, num_points=POINTS, **options).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.eval()


def case(batch, seed=2):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    references = torch.rand(2 * batch, QUERIES, 2, generator=generator, dtype=torch.float64) * 1.2 - 0.1
    visibility = torch.rand(batch, QUERIES, POINTS, generator=generator, dtype=torch.float64)
    return (normal(batch, QUERIES, CHANNELS), normal(batch, QUERIES, CHANNELS), normal(2 * batch, QUERIES, CHANNELS),
            references, visibility, SIZE)


def attend(module, query, query_pos, values, references, visibility, size):
    cells = torch.tensor([size[1], size[0]], dtype=query.dtype)
    return module(query, query_pos, values, references, visibility, size, cells)


@pytest.mark.parametrize("batch, scrambled, interleaved", [(1, True, True), (2, True, True), (2, False, False)])
def test_equals_the_literal_formulas(batch, scrambled, interleaved):
    module = make(scrambled_reduction=scrambled, interleaved_history_rows=interleaved)
    arguments = case(batch)
    with torch.no_grad():
        expected = temporal_attention(module, *arguments, scrambled, interleaved)
        torch.testing.assert_close(attend(module, *arguments), expected)


def test_the_corrected_reduction_makes_samples_independent():
    query, query_pos, values, references, visibility, size = case(2)
    first = (query[:1], query_pos[:1], values[:2], references[:2], visibility[:1], size)
    with torch.no_grad():
        corrected = make(scrambled_reduction=False, interleaved_history_rows=False)
        together = attend(corrected, query, query_pos, values, references, visibility, size)
        torch.testing.assert_close(together[:1], attend(corrected, *first))
        quirky = make()
        mixed = attend(quirky, query, query_pos, values, references, visibility, size)
        assert not torch.allclose(mixed[:1], attend(quirky, *first))


def test_with_one_sample_the_interleaved_rows_are_the_history():
    arguments = case(1)
    with torch.no_grad():
        torch.testing.assert_close(attend(make(interleaved_history_rows=False), *arguments), attend(make(), *arguments))


def test_invisible_voxels_leave_the_query_and_the_bias():
    query, query_pos, values, references, visibility, size = case(2)
    module = make()
    with torch.no_grad():
        output = attend(module, query, query_pos, values, references, torch.zeros_like(visibility), size)
        torch.testing.assert_close(output, query + module.output_proj.bias)


def test_initial_values():
    module = OA_TemporalAttention(16, num_heads=8, num_points=3)
    bias = module.sampling_offsets.bias.view(8, 2, 3, 2)
    for queue in range(2):
        torch.testing.assert_close(bias[0, queue], torch.tensor([[1.0, 0], [2, 0], [3, 0]]))
        torch.testing.assert_close(bias[1, queue], torch.tensor([[1.0, 1], [2, 2], [3, 3]]))
        torch.testing.assert_close(bias[2, queue], torch.tensor([[0.0, 1], [0, 2], [0, 3]]), atol=1e-6, rtol=0)
        torch.testing.assert_close(bias[5, queue], -bias[1, queue], atol=1e-5, rtol=0)
    assert not module.sampling_offsets.weight.any() and not module.attention_weights.weight.any()
    for layer in (module.attention_weights, module.value_proj, module.output_proj):
        assert not layer.bias.any()
    bound = (6 / 32) ** 0.5
    for weight in (module.value_proj.weight, module.output_proj.weight):
        assert 0.8 * bound < weight.abs().max() <= bound


def test_published_shapes():
    state = OA_TemporalAttention(96, num_points=8).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "sampling_offsets.weight": (256, 193), "sampling_offsets.bias": (256,), "attention_weights.weight": (128, 192),
        "attention_weights.bias": (128,), "value_proj.weight": (96, 96), "value_proj.bias": (96,),
        "output_proj.weight": (96, 96), "output_proj.bias": (96,)}


@pytest.mark.parametrize("options", [{"num_heads": 5}, {"num_levels": 2}])
def test_unsupported_options_are_refused(options):
    with pytest.raises(ValueError, match="num_heads.*num_levels"):
        OA_TemporalAttention(96, **options)


def test_gradients_reach_queries_values_and_weights_but_not_visibility():
    query, query_pos, values, references, visibility, size = case(2)
    query, values = query.requires_grad_(), values.requires_grad_()
    module = make()
    attend(module, query, query_pos, values, references, visibility, size).square().sum().backward()
    for tensor in (query, values, *module.parameters()):
        assert tensor.grad.abs().sum() > 0
