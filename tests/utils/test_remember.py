"""Results that are remembered: which calls share one, and which are not remembered."""

import torch

from mmdet3d.utils.remember import remembered


def counted(capacity=16):
    calls = []

    def function(*args, **kwargs):
        calls.append(args)
        return object()

    return remembered(function, capacity), calls


def test_equal_values_share_a_result():
    function, calls = counted()
    first = function(torch.eye(3), 2, scale=0.5)
    assert function(torch.eye(3), 2, scale=0.5) is first and len(calls) == 1
    others = [function(torch.eye(3), 3, scale=0.5), function(torch.eye(3), 2, scale=0.25),
              function(torch.eye(3), 2, size=0.5), function(torch.eye(3).double(), 2, scale=0.5),
              function(torch.eye(9).view(1, 9, 9)[:, :3, :3], 2, scale=0.5), function(torch.eye(3) * 2, 2, scale=0.5)]
    assert len({id(result) for result in (first, *others)}) == 7 == len(calls)


def test_values_decide_and_not_storage():
    function, calls = counted()
    matrix = torch.eye(3)
    first = function(matrix)
    matrix[0, 1] = 1
    assert function(matrix) is not first
    assert function(torch.eye(6)[::2, ::2]) is first and len(calls) == 2
    zero = function(torch.zeros(1))
    assert function(-torch.zeros(1)) is not zero  # other bits


def test_the_oldest_is_forgotten():
    function, calls = counted(capacity=2)
    first = function(1)
    second = function(2)
    assert function(1) is first
    function(3)  # 2 was used longest ago
    assert function(1) is first and function(2) is not second and len(calls) == 4


def test_results_of_a_tracer_are_not_remembered():
    function = remembered(lambda value: torch.ones(value, device="meta"))
    assert function(2) is not function(2)


def test_what_is_not_remembered():
    function, calls = counted()
    for value in (torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.bfloat16), torch.ones(2, device="meta"),
                  torch.nn.Parameter(torch.ones(2), requires_grad=False)):
        assert function(value) is not function(value)
    assert len(calls) == 8
