"""Noise by seed and position: its distribution, and that it depends on nothing else."""

import pytest
import torch

from mmdet3d.models.heads import OccFlowHead
from mmdet3d.models.heads.seeded_noise import sample_seed
from mmdet3d.ops.class_guidance import gumbel_noise, uniform_noise

SHAPE = (20, 15, 8, 17)
TOKENS = ("fd8420396768425eabec9bdddf7e64b6", "sample", "sample ", "")


def seeds_of(*tokens, device="cpu", seed=0):
    return torch.tensor([sample_seed(token, seed) for token in tokens], dtype=torch.int32, device=device)


def scalar_noise(seed, position):
    """The numbers between 0 and 1, written with Python's whole numbers."""
    def scramble(word):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            word = (word ^ (word >> shift)) * factor % 2**32
        return word

    return ((scramble(scramble(position + 1) ^ (seed % 2**32)) >> 9) + 0.5) / 2**23


def test_seeds_of_samples_are_known_numbers():
    assert [sample_seed(token) for token in TOKENS[:2]] == [1171320046, -1714220543]
    assert all(-2**31 <= sample_seed(f"token {n}") < 2**31 for n in range(100))
    assert len({sample_seed(token, seed) for token in TOKENS for seed in range(3)}) == 12


def test_numbers_equal_those_of_whole_number_arithmetic(device):
    seeds = seeds_of(*TOKENS, device=device)
    noise = uniform_noise(seeds, SHAPE).cpu().flatten(1)
    for row, seed in zip(noise, seeds.tolist(), strict=True):
        for position in (0, 1, 2, 16, 17, 12345, noise.shape[1] - 1):
            assert row[position].item() == scalar_noise(seed, position)


@pytest.mark.cuda
def test_cuda_and_cpu_agree():
    on_cpu = gumbel_noise(seeds_of(*TOKENS), SHAPE)
    on_cuda = gumbel_noise(seeds_of(*TOKENS, device="cuda"), SHAPE)
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=1e-5, atol=1e-6)


def test_distribution(device):
    """Mean Euler's constant, variance pi^2 / 6; distribution function exp(-exp(-x))."""
    noise = gumbel_noise(seeds_of("a", "b", device=device), (100, 50, 10, 17)).double().cpu()
    assert noise.dtype == torch.float64 and bool(noise.isfinite().all())
    count = noise.numel()
    assert noise.mean().item() == pytest.approx(0.5772157, abs=5 * (1.645 / count) ** 0.5)
    assert noise.var().item() == pytest.approx(1.644934, abs=0.01)
    cumulative = torch.exp(-torch.exp(-noise.flatten().sort().values))
    expected = (torch.arange(count) + 0.5) / count
    assert (cumulative - expected).abs().max().item() < 1.95 / count**0.5  # Kolmogorov-Smirnov, 0.1 %


def test_neighbours_and_samples_are_independent():
    noise = uniform_noise(seeds_of(*(f"token {n}" for n in range(20))), (4000, 17)).double() - 0.5
    pairs = [(noise[:, :-1], noise[:, 1:]), (noise[..., :-1], noise[..., 1:]), (noise[:-1], noise[1:]),
             (noise[:, :-13], noise[:, 13:])]
    for first, second in pairs:
        assert abs((first * second).mean().item() * 12) < 5 / first.numel() ** 0.5
    assert abs((noise[0].mean() - noise[1].mean()).item()) < 0.01


def test_a_sample_has_its_noise_wherever_it_stands():
    batch = gumbel_noise(seeds_of("a", "b", "c"), SHAPE)
    assert torch.equal(batch[1], gumbel_noise(seeds_of("b"), SHAPE)[0])
    assert torch.equal(batch, gumbel_noise(seeds_of("a", "b", "c"), SHAPE))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    other = gumbel_noise(seeds_of("a", "b", "c", seed=1), SHAPE)
    assert torch.equal(state, torch.get_rng_state()) and (other == batch).float().mean() < 1e-3


def test_wrong_seeds_are_refused():
    with pytest.raises(TypeError, match="seeds must be int32, got torch.int64"):
        uniform_noise(torch.tensor([1]), SHAPE)
    with pytest.raises(ValueError, match=r"expected seeds \[B\]"):
        uniform_noise(torch.tensor(1, dtype=torch.int32), SHAPE)


def test_the_flow_head_takes_seeds_in_evaluation_only():
    torch.manual_seed(2)
    head = OccFlowHead(6, (0, 2), 5, 8).eval()
    volume, logits = torch.randn(2, 5, 2, 3, 4), torch.randn(2, 8, 6, 4, 6)
    seeds = seeds_of("a", "b")
    with torch.no_grad():
        flow = head(volume, logits, seeds)
        guidance = (logits + gumbel_noise(seeds, logits.shape[1:])).softmax(-1)
        assert torch.equal(flow, head(volume, logits, seeds)) and not torch.equal(flow, head(volume, logits))
        torch.testing.assert_close(head(volume[1:], logits[1:], seeds[1:]), flow[1:])
        torch.testing.assert_close(head._class_guidance(logits, seeds), guidance)
        head.train()
        assert not torch.equal(head._class_guidance(logits, seeds), head._class_guidance(logits, seeds))
        head.eval().gumbel_in_eval = False
        assert torch.equal(head._class_guidance(logits, seeds), logits.softmax(-1))
