"""Linear calls are seen by the storage of their weight."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awqkit.model.matrices import matrix_parameters
from awqkit.model.observe import TRANSPOSED, LinearWatch, both_ways


def test_only_the_watched_linears_are_reported_with_what_goes_in_and_out() -> None:
    first, second = nn.Linear(4, 6), nn.Linear(6, 3)
    x = torch.randn(2, 5, 4)
    seen: list[tuple[str, str, tuple[int, ...]]] = []
    with LinearWatch(
        {"first": first.weight},
        before=lambda name, inputs: seen.append(("in", name, tuple(inputs.shape))),
        after=lambda name, outputs: seen.append(("out", name, tuple(outputs.shape))),
    ):
        watched = second(first(x))
    assert seen == [("in", "first", (2, 5, 4)), ("out", "first", (2, 5, 6))]
    assert torch.equal(watched, second(first(x)))


def test_what_a_callback_returns_takes_the_place() -> None:
    linear, x = nn.Linear(4, 6), torch.randn(3, 4)
    with LinearWatch(
        {"it": linear.weight}, before=lambda name, inputs: 2 * inputs, after=lambda name, outputs: outputs + 1
    ):
        changed = linear(x)
    torch.testing.assert_close(changed, linear(2 * x) + 1)


def test_a_slice_of_a_stack_is_recognised_and_its_neighbour_is_not() -> None:
    stack = nn.Parameter(torch.randn(3, 5, 4))
    seen: list[str] = []

    def note(name: str, inputs: Tensor) -> None:
        seen.append(name)

    with LinearWatch({"expert 1": stack[1]}, before=note):
        for expert in range(3):
            F.linear(torch.randn(2, 4), stack[expert])
        F.linear(input=torch.randn(2, 4), weight=stack[1], bias=None)
    assert seen == ["expert 1", "expert 1"]


def test_matrices_are_all_two_dimensional_parameters() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    assert list(matrix_parameters(module)) == ["0.weight"]


@pytest.mark.parametrize("product", [torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, operator.matmul])
def test_a_product_with_a_turned_weight_is_a_linear(product: Any) -> None:
    weight, x, seen = nn.Parameter(torch.randn(5, 4)), torch.randn(3, 4), []
    with LinearWatch({"it": weight}, before=lambda name, inputs: seen.append(inputs.shape)):
        found = product(x, weight.t())
    assert seen == [(3, 4)]
    torch.testing.assert_close(found, x @ weight.t())


def test_a_weight_that_is_in_by_out_is_told_from_one_that_is_out_by_in() -> None:
    square, bias, x, seen = nn.Parameter(torch.randn(4, 4)), torch.randn(4), torch.randn(3, 4), []
    with LinearWatch(both_ways({"it": square}), before=lambda name, inputs: seen.append(name)):
        found = torch.addmm(bias, x, square)
        F.linear(x, square)
        x @ square
        x @ square.t()
    assert seen == ["it" + TRANSPOSED, "it", "it" + TRANSPOSED, "it"]
    torch.testing.assert_close(found, x @ square + bias)


def test_an_addition_with_factors_is_left_alone() -> None:
    weight, bias, x = nn.Parameter(torch.randn(4, 4)), torch.randn(4), torch.randn(3, 4)
    with LinearWatch(both_ways({"it": weight}), before=lambda name, inputs: 0 * inputs):
        found = torch.addmm(bias, x, weight, beta=2.0)
    torch.testing.assert_close(found, x @ weight + 2.0 * bias)
