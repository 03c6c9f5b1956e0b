"""Factors are read off many tensors side by side as off each alone."""

import torch

from awqkit.model.channel_factors import distinct_factors, read_factors

FACTOR = distinct_factors(6, torch.device("cpu"))


def test_inputs_side_by_side_are_read_as_each_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 6), (8, 6), (8, 4), (3, 6))
    plain, shuffled, narrow, few = (torch.randn(*shape, generator=draw) for shape in shapes)
    order = torch.tensor([5, 0, 3, 1, 2, 4])
    some = torch.where(torch.arange(6) < 3, FACTOR, 1.0)
    pairs = [
        (plain, plain * FACTOR),
        (shuffled, shuffled * FACTOR[order]),
        (plain, plain * 1.0),
        (narrow, narrow * FACTOR[[2, 2, 0, 1]]),
        (plain, plain * FACTOR + 0.1 * plain.roll(1, 0)),
        (few, few * some),
    ]

    together = read_factors(pairs, FACTOR)

    wanted = [list(range(6)), order.tolist(), None, [2, 2, 0, 1], None, [0, 1, 2, -1, -1, -1]]
    assert [None if found is None else found.tolist() for found in together] == wanted
    assert [None if found is None else found.tolist() for pair in pairs for found in read_factors([pair], FACTOR)] == (
        wanted
    )


def test_linears_that_read_one_tensor_share_its_channels() -> None:
    plain = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    scaled = plain * FACTOR

    first, second = read_factors([(plain, scaled), (plain, scaled)], FACTOR)

    assert first is second
