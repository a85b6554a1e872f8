"""Work next to other work."""

from __future__ import annotations

import pytest
import torch

from mmdet3d.utils.beside import Beside


def test_without_a_recording_the_work_is_done_once_when_it_is_asked_for():
    calls = []
    beside = Beside(lambda: calls.append(1) or len(calls))
    assert not calls
    assert beside.get() == beside.get() == 1


def record(stream: torch.cuda.Stream, x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, list[int]]:
    """A recording of two works next to each other and a third one after them, and the streams they ran on."""
    streams = []

    def square(factor: float) -> torch.Tensor:
        streams.append(torch.cuda.current_stream().cuda_stream)
        return factor * (x @ x)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), torch.no_grad():
        first, second = Beside(lambda: square(1.0)), Beside(lambda: square(2.0))
        plain = square(4.0)
        total = plain + first.get() + second.get()
        third = Beside(lambda: square(8.0))
        total = total + third.get() + first.get()
    return graph, total, streams


@pytest.mark.cuda
def test_in_a_recording_the_work_runs_on_streams_of_its_own_which_are_used_again():
    x = torch.eye(64, device="cuda")
    torch.testing.assert_close(x @ x, x)  # libraries are set up outside of recordings
    stream, other = torch.cuda.Stream(), torch.cuda.Stream()
    recordings = [record(s, x) for s in (stream, stream, other)]
    streams = [recording[2] for recording in recordings]
    for home, (first, second, plain, third) in zip((stream, stream, other), streams, strict=True):
        assert plain == home.cuda_stream and len({first, second, plain}) == 3
        assert third in (first, second)
    assert set(streams[0]) == set(streams[1]) and not set(streams[0]) & set(streams[2])
    for value in (1.0, 3.0):
        x.copy_(value * torch.eye(64))
        for graph, total, _ in recordings:
            graph.replay()
            torch.testing.assert_close(total, 16 * value**2 * torch.eye(64, device="cuda"))
