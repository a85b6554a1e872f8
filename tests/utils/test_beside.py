"""Work next to other work."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from mmdet3d.utils.beside import Beside, _side_stream


@pytest.fixture(autouse=True)
def no_streams_of_others():
    _side_stream.cache_clear()
    yield
    _side_stream.cache_clear()


def test_without_a_recording_the_work_is_done_once_when_it_is_asked_for():
    calls = []
    work = Beside(lambda: calls.append(1) or len(calls))
    assert not calls
    assert work.get() == work.get() == 1


class Recorded:
    """Stands for ``torch.cuda`` while a graph is recorded: streams, and what waits for what."""

    def __init__(self, monkeypatch):
        self.events, self._count = [], 0
        self.current = self.Stream()
        for name in ("Stream", "stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("is_available", "is_current_stream_capturing"):
            monkeypatch.setattr(torch.cuda, name, lambda: True)

    def Stream(self):  # noqa: N802, a class there
        stream, self._count = _Stream(self._count, self.events), self._count + 1
        return stream

    def current_stream(self):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def work(self, name):
        self.events.append((self.current.cuda_stream, name))
        return name


class _Stream:
    def __init__(self, number, events):
        self.cuda_stream, self._events = number, events

    def wait_stream(self, other):
        self._events.append((self.cuda_stream, "waits for", other.cuda_stream))


def begun_and_asked_for(cuda):
    """Two works next to each other and, after them, a third one, as in a frame."""
    first, second = (Beside(lambda name=name: cuda.work(name), lane) for lane, name in enumerate(("first", "second")))
    cuda.work("main")
    assert first.get() == "first" and second.get() == "second" and first.get() == "first"
    assert Beside(lambda: cuda.work("third")).get() == "third"
    events = cuda.events[:]
    cuda.events.clear()
    return events


def test_every_recording_gives_the_same_work_the_same_stream(monkeypatch):
    cuda = Recorded(monkeypatch)
    with torch.no_grad():
        events = begun_and_asked_for(cuda)
        assert events == [(1, "waits for", 0), (1, "first"), (2, "waits for", 0), (2, "second"), (0, "main"),
                          (0, "waits for", 1), (0, "waits for", 2),
                          (1, "waits for", 0), (1, "third"), (0, "waits for", 1)]
        assert begun_and_asked_for(cuda) == events
        cuda.current = cuda.Stream()  # another recording, which may be replayed at the same time
        assert not {event[0] for event in begun_and_asked_for(cuda)} & {0, 1, 2}


def test_with_gradients_nothing_begins_early(monkeypatch):
    cuda = Recorded(monkeypatch)
    assert not Beside.possible()
    work = Beside(lambda: cuda.work("work"))
    assert not cuda.events
    assert work.get() == "work" and cuda.events == [(0, "work")]
    with torch.no_grad():
        assert Beside.possible()


def record(stream: torch.cuda.Stream, x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, list[int]]:
    """A recording of two works next to each other and a third one after them, and the streams they ran on."""
    streams = []

    def square(factor: float) -> torch.Tensor:
        streams.append(torch.cuda.current_stream().cuda_stream)
        return factor * (x @ x)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), torch.no_grad():
        first, second = Beside(lambda: square(1.0)), Beside(lambda: square(2.0), lane=1)
        plain = square(4.0)
        total = plain + first.get() + second.get()
        third = Beside(lambda: square(8.0))
        total = total + third.get() + first.get()
    return graph, total, streams


@pytest.mark.cuda
def test_in_a_recording_the_work_runs_on_streams_of_its_own_which_are_used_again():
    x = torch.eye(64, device="cuda")
    torch.testing.assert_close(x @ x, x)  # libraries are set up outside of recordings
    stream = torch.cuda.Stream()
    recordings = [record(stream, x) for _ in range(2)]
    (first, second, plain, third), again = (recording[2] for recording in recordings)
    assert plain == stream.cuda_stream and len({first, second, plain}) == 3 and third == first
    assert again == [first, second, plain, third]
    for value in (1.0, 3.0):
        x.copy_(value * torch.eye(64))
        for graph, total, _ in recordings:
            graph.replay()
            torch.testing.assert_close(total, 16 * value**2 * torch.eye(64, device="cuda"))
