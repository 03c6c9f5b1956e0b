"""What each kind of producer becomes on disk, and the s that its consumers get."""

from __future__ import annotations

import torch
from torch import Tensor

from awqkit.model.producers import store_producer
from awqkit.model.structure import Fold

N = 64
BF16 = torch.bfloat16


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16).float()


SCALE = torch.exp(_random(N, seed=0))


def _fold(kind: str, producer: tuple[str, ...], *, offset: str | None = None, linear: str | None = None) -> Fold:
    return Fold(kind, producer, offset, linear, N, ("o",), {"o": torch.arange(N)})


def _is_stored(value: Tensor) -> bool:
    return torch.equal(value.to(BF16).float(), value)


def test_a_norm_is_stored_rounded_and_s_follows_it() -> None:
    gain = _random(N, seed=1)
    found = store_producer(_fold("norm", ("n.weight",)), {"n.weight": gain}, SCALE, BF16, keeps_full_precision=False)
    stored = found.values["n.weight"]
    assert _is_stored(stored)
    torch.testing.assert_close(stored * found.channel_scale, gain, rtol=2e-7, atol=0)
    assert not torch.equal(found.channel_scale, SCALE)


def test_a_norm_by_one_plus_w() -> None:
    offset = 0.2 * _random(N, seed=1)
    fold = _fold("offset norm", ("n.weight",), offset="n.weight")
    offset = offset.to(BF16).float()
    found = store_producer(fold, {"n.weight": offset}, SCALE, BF16, keeps_full_precision=False)
    assert _is_stored(found.values["n.weight"])
    torch.testing.assert_close((1 + found.values["n.weight"]) * found.channel_scale, 1 + offset, rtol=2e-7, atol=0)


def test_a_norm_with_bias_is_exact_in_the_gain_and_close_in_the_bias() -> None:
    gain, bias = _random(N, seed=1), _random(N, seed=2)
    fold = _fold("norm", ("n.weight", "n.bias"))
    found = store_producer(fold, {"n.weight": gain, "n.bias": bias}, SCALE, BF16, keeps_full_precision=False)
    assert all(_is_stored(value) for value in found.values.values())
    torch.testing.assert_close(found.values["n.weight"] * found.channel_scale, gain, rtol=2e-7, atol=0)
    miss = (found.values["n.bias"] * found.channel_scale / bias - 1).abs()
    assert float(miss.max()) <= 2**-8  # a plain rounding at worst
    assert float(miss.mean()) < 2**-11  # a plain rounding's mean is 2^-9.5


def test_rows_that_will_be_quantized_take_any_s() -> None:
    fold = _fold("rows", ("v.weight",), linear="v")
    found = store_producer(fold, {"v.weight": _random(N, 8, seed=1)}, SCALE, BF16, keeps_full_precision=False)
    assert found.values == {}
    assert torch.equal(found.channel_scale, SCALE)


def test_the_bias_of_quantized_rows_defines_s_except_where_it_is_zero() -> None:
    bias = _random(N, seed=2)
    bias[::4] = 0.0
    fold = _fold("rows", ("v.weight", "v.bias"), linear="v")
    parameters = {"v.weight": _random(N, 8, seed=1), "v.bias": bias}
    found = store_producer(fold, parameters, SCALE, BF16, keeps_full_precision=False)
    assert list(found.values) == ["v.bias"]
    assert _is_stored(found.values["v.bias"])
    torch.testing.assert_close(found.values["v.bias"] * found.channel_scale, bias, rtol=2e-7, atol=0)
    assert torch.equal(found.channel_scale[::4], SCALE[::4])
    assert bool((found.channel_scale[1::4] != SCALE[1::4]).any())


def test_beside_something_kept_s_is_a_power_of_two_and_everything_exact() -> None:
    weight, bias, gain = _random(N, 8, seed=1), _random(N, seed=2), _random(N, seed=3)
    cases = [
        (_fold("rows", ("v.weight", "v.bias"), linear="v"), {"v.weight": weight, "v.bias": bias}),
        (_fold("norm", ("n.weight", "n.bias")), {"n.weight": gain, "n.bias": bias}),
    ]
    for fold, parameters in cases:
        found = store_producer(fold, parameters, SCALE, BF16, keeps_full_precision=True)
        exponents = torch.log2(found.channel_scale)
        assert torch.equal(exponents, exponents.round())
        assert len(exponents.unique()) > 2
        for name, value in parameters.items():
            scale = found.channel_scale.reshape(-1, *(1,) * (value.dim() - 1))
            assert _is_stored(found.values[name])
            assert torch.equal(found.values[name] * scale, value)


def test_a_norm_by_one_plus_w_beside_a_kept_consumer_is_exact_or_left_alone() -> None:
    """s is a power of two, and 1 wherever (1 + w)/s - 1 is not a value of the file."""
    offset = torch.cat([_random(N - 4, seed=2) * 0.2, torch.tensor([0.0, 1.0, -0.5, 3.0])]).to(BF16).float()
    scale = torch.cat([SCALE[:-4], torch.tensor([2.0, 4.0, 0.5, 2.0])])
    fold = _fold("offset norm", ("n.weight",), offset="n.weight")
    found = store_producer(fold, {"n.weight": offset}, scale, BF16, keeps_full_precision=True)
    exponents = torch.log2(found.channel_scale)
    assert torch.equal(exponents, exponents.round())
    assert _is_stored(found.values["n.weight"])
    assert torch.equal((1 + found.values["n.weight"]) * found.channel_scale, 1 + offset)
    assert found.channel_scale[-4:].tolist() == [2.0, 4.0, 0.5, 2.0]
    assert bool((found.channel_scale == 1).any())
