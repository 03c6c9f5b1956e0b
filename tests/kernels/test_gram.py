"""Sums of outer products against float64; on a GPU, where there is one, tokens are rounded to bfloat16."""

from __future__ import annotations

import pytest
import torch

from awqkit.kernels.gram import add_gram_, add_product_

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [5, 256, 300, 2100])
def test_products_are_added(device: str, channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    left = torch.randn(64, channels, generator=generator)
    right = left * torch.rand(64, 1, generator=generator)
    if device == "cuda":
        left, right = left.bfloat16().float(), right.bfloat16().float()
    start = torch.randn(channels, channels, generator=generator)
    expected = start.double() + left.double().t() @ right.double()

    whole = start.to(device, copy=True)
    add_product_(whole, left.to(device), right.to(device))
    torch.testing.assert_close(whole.cpu().double(), expected, rtol=1e-4, atol=1e-4)

    upper = start.to(device, copy=True)
    add_gram_(upper, left.to(device), right.to(device))
    torch.testing.assert_close(upper.cpu().double().triu(), expected.triu(), rtol=1e-4, atol=1e-4)
