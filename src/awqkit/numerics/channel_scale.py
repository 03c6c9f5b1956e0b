"""Channel scales: s per input channel, chosen so that rounding W·s and computing with x/s hurts less.

    Y = X Wᵀ = (X S⁻¹)(S Wᵀ)          S = diag(s); s is `channel_scale`

S⁻¹ is absorbed by whoever produces x (a fold), so nothing is computed at run time (AWQ, Lin 2023, section 3.2).
Two families of s over α on 21 points of [0, 1]:

    importance    a_j^(α/2)                        a_j is the importance of channel j: E[x_j²], or (E|x_j|)² as in AWQ
    duo           a_j^(α/2) / rms(W_:j)^(1−α)      divides by the column's own size, as AutoAWQ's duo scaling does, with
                                                   raw, row-weighted column norms in place of its means

each normalised by √(max · min) over its search unit. The identity is always among the candidates.
A search unit is the smallest set of whole groups that is closed under sharing a producer channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from awqkit.kernels.group_search import scale_errors, takes
from awqkit.kernels.replay import constants
from awqkit.numerics.grid_tries import TileGrid, spanned, tile_error_, tile_of, tile_range, tile_row_errors_
from awqkit.numerics.tiles import group_tiles, row_tiles

ALPHAS = tuple(step / 20 for step in range(21))
IDENTITY = "identity"
_SMALLEST_SHARE = 1e-9  # of the largest importance: keeps a dead channel's s finite


@dataclass(frozen=True, slots=True)
class Candidate:
    """One s to try: `[in]` float32, its family ("identity", "importance", "duo") and α."""

    family: str
    alpha: float
    channel_scale: Tensor


def search_units(channel_of: Tensor, num_producer_channels: int, group_size: int) -> Tensor:
    """The unit of every group, `[groups]` int64 numbered from 0.

    channel_of: `[in]` int64, the producer channel of each input channel, −1 where s must stay 1. Groups that read
    one producer channel must agree on its s, so they form one unit (v → o under grouped-query attention).
    """
    device, channel_of = channel_of.device, channel_of.cpu()  # a few numbers, looked at in every round
    groups = torch.arange(channel_of.shape[0]) // group_size
    tied = channel_of >= 0
    label = torch.arange(channel_of.shape[0] // group_size)
    while True:
        by_channel = torch.full((num_producer_channels,), label.shape[0])
        by_channel.scatter_reduce_(0, channel_of[tied], label[groups[tied]], "amin")
        lower = label.scatter_reduce(0, groups[tied], by_channel[channel_of[tied]], "amin")
        if torch.equal(lower, label):
            return torch.unique(label, return_inverse=True)[1].to(device)
        label = lower


def tied_mean(values: Tensor, channel_of: Tensor, num_producer_channels: int) -> Tensor:
    """`values` `[in]` averaged over the input channels that share a producer channel, back on `[in]`; −1 gives 1."""
    tied, place = channel_of >= 0, channel_of.clamp(min=0)
    ones = torch.ones_like(values)
    counted = torch.where(tied, torch.stack([values, ones]), torch.zeros_like(values))
    total, count = _summed(counted, place, num_producer_channels)
    return torch.where(tied, (total / count.clamp(min=1))[place], ones)


def _summed(values: Tensor, place: Tensor, num_places: int) -> Tensor:
    """`values` `[n, in]` added up by place, `[n, num_places]`, in float64: a GPU adds in no fixed order."""
    total = torch.zeros(values.shape[0], num_places, dtype=torch.float64, device=values.device)
    return total.index_add_(1, place, values.double()).to(values.dtype)


def tries(families: Sequence[str]) -> list[tuple[str, float]]:
    """Family and α of every one of `candidates`, the identity first."""
    return [
        (IDENTITY, 0.0),
        *(
            (family, alpha)
            for family in families
            for alpha in ALPHAS
            if family == "duo" or alpha > 0.0  # importance^0 is the identity again
        ),
    ]


def candidates(
    importance: Tensor, column_rms: Tensor, channel_of: Tensor, unit_of_channel: Tensor, families: Sequence[str]
) -> list[Candidate]:
    """Every s to try, the identity first, each constant over channels that share a producer channel.

    importance, column_rms: `[in]` float32 ≥ 0, already tied; unit_of_channel: `[in]` int64.
    """
    identity, *tried = tries(families)
    halves = tuple(alpha / 2 for _, alpha in tried)
    rest = tuple(1 - alpha if family == "duo" else 0.0 for family, alpha in tried)
    alphas, shares = (constants(each, importance.device).unsqueeze(-1) for each in (halves, rest))
    energy, column = _positive(importance).log(), _positive(column_rms).log()
    scales = _normalised(energy * alphas - column * shares, channel_of, unit_of_channel)
    unscaled = Candidate(*identity, torch.ones_like(importance))
    return [unscaled, *(Candidate(*which, scale) for which, scale in zip(tried, scales, strict=True))]


def smooth_candidates(max_abs: Tensor, column_max: Tensor, channel_of: Tensor, alpha: float | None) -> list[Candidate]:
    """SmoothQuant's s_j = max|X_j|^α / max|W_j|^(1 − α) at the given α, or at 21 of [0, 1] with the identity first.

    max_abs, column_max: `[in]` float32 ≥ 0, already tied. (Xiao 2022, equation 4.)
    """
    activation, column = _positive(max_abs).log(), _positive(column_max).log()
    strengths = ALPHAS if alpha is None else (alpha,)
    logs = torch.stack([activation * strength - column * (1 - strength) for strength in strengths])
    found = [] if alpha is not None else [Candidate(IDENTITY, 0.0, torch.ones_like(max_abs))]
    for strength, scale in zip(strengths, _normalised(logs, channel_of, torch.zeros_like(channel_of)), strict=True):
        found.append(Candidate("smooth", strength, scale))
    return found


def _positive(values: Tensor) -> Tensor:
    """`values` ≥ 0 with a floor far below their largest, so that a dead channel's s stays finite."""
    floor = (values.max().double() * _SMALLEST_SHARE).to(values.dtype)
    return values.clamp(min=floor).clamp_(min=torch.finfo(torch.float32).tiny)


def _normalised(log_scales: Tensor, channel_of: Tensor, unit_of_channel: Tensor) -> Tensor:
    """s `[n, in]` from log s, each divided by √(max · min) in its unit; 1 where `channel_of` is −1."""
    units, free = len(unit_of_channel), channel_of >= 0  # there are no more
    place = unit_of_channel.expand_as(log_scales)
    extremes = []
    for reduce, fill in (("amax", -torch.inf), ("amin", torch.inf)):
        start = log_scales.new_full((len(log_scales), units), fill)
        held = torch.where(free, log_scales, torch.full_like(log_scales, fill))
        extremes.append(start.scatter_reduce_(1, place, held, reduce))
    middle = (extremes[0] + extremes[1]) / 2
    middle = torch.where(middle.isfinite(), middle, torch.zeros_like(middle))
    scales = (log_scales - middle.gather(1, place)).exp()
    return torch.where(free, scales, torch.ones_like(scales))


def rounding_errors(
    weight: Tensor,
    group_weights: Tensor,
    row_weight: Tensor,
    tried: Sequence[Candidate],
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    stored_dtype: torch.dtype,
    full_moment: Tensor | None = None,
) -> Tensor:
    """The error of nearest rounding under every candidate, `[candidates, groups]`, or `[candidates, 1]` on the full H.

    weight: float32 `[out, in]`, all consumers of the input stacked; row_weight: `[out]` ≥ 0. group_weights: as
    `grid_tries.tile_row_errors_` takes them, for the unscaled input. full_moment: H `[in, in]` to judge by instead.
    """
    if full_moment is None and takes(weight, group_size, stored_dtype):
        return scale_errors(
            weight, group_weights, row_weight, torch.stack([candidate.channel_scale for candidate in tried]),
            bits=bits, group_size=group_size, symmetric=symmetric, stored_dtype=stored_dtype,
        )  # fmt: skip
    scales = torch.stack([candidate.channel_scale for candidate in tried]).reshape(len(tried), -1, group_size, 1)
    span = partial(spanned, bits=bits, symmetric=symmetric, stored_dtype=stored_dtype)
    (num_rows, num_channels), groups = weight.shape, scales.shape[1]
    errors = torch.zeros(len(tried), groups if full_moment is None else 1, device=weight.device)
    if full_moment is None:
        for part, rows in group_tiles(groups, group_size, num_rows, weight.device):
            tile = tile_of(weight, group_size, part, rows)
            errors[:, part] += _tile_errors(tile, scales[:, part], span, group_weights[part]) @ row_weight[rows]
    else:
        for rows in row_tiles(num_channels, num_rows, weight.device):
            tile = tile_of(weight, group_size, slice(0, groups), rows)
            errors += _tile_errors(tile, scales, span, full_moment.unsqueeze(0)) @ row_weight[rows]
    return errors


def _tile_errors(
    tile: Tensor, scales: Tensor, span: Callable[[Tensor, Tensor], list[TileGrid]], group_weights: Tensor
) -> Tensor:
    """The error of every row of a tile `[groups, group_size, rows]` under every s, `[candidates, groups, rows]`.

    scales: `[candidates, groups, group_size, 1]`. group_weights: of the tile's groups, or the whole H as one of one.
    """
    scaled, error = torch.empty_like(tile), torch.empty_like(tile)
    each_scale = scales.unbind()
    # the grids of all candidates first: scaling twice is cheaper than a dozen operators on a few numbers for each
    ranges = [tile_range(torch.mul(tile, scale, out=scaled)) for scale in each_scale]
    grids = span(*(torch.stack(ends) for ends in zip(*ranges, strict=True)))
    found = tile.new_empty(len(scales), len(group_weights), tile.shape[2])
    judged = (len(group_weights), -1, tile.shape[2])
    seen, spare = error.view(judged), scaled.view(judged)
    for scale, inverse, grid, errors in zip(each_scale, scales.reciprocal(), grids, found, strict=True):
        tile_error_(torch.mul(tile, scale, out=scaled), grid, error).mul_(inverse)
        tile_row_errors_(seen, group_weights, spare, errors)
    return found


def best_per_unit(errors: Tensor, unit_of_group: Tensor, num_units: int) -> Tensor:
    """The index of the best candidate of every unit, `[units]`; the earlier one wins a tie, so the identity does.

    errors: `[candidates, groups]`, unit_of_group: `[groups]` int64 below `num_units`.
    """
    return _summed(errors, unit_of_group, num_units).argmin(dim=0)


def exact_under_storage(gain: Tensor, channel_scale: Tensor, stored_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The producer's stored value near gain/s, and the s that it really has: s := gain / stored.

    gain: float32 `[channels]`, γ of a norm (or a bias of a linear that is rounded later), exact in `stored_dtype`.
    Returns (stored, s), float32. γ/s rounded is not γ/s, and the consumers must get the s that the file can hold.
    s is 1 where the gain or the stored value is 0, changes sign or leaves the dtype's normal range.
    """
    stored = (gain / channel_scale).to(stored_dtype).to(torch.float32)
    limits = torch.finfo(stored_dtype)
    held = (stored.abs() >= limits.tiny) & (stored.abs() <= limits.max) & (gain != 0) & (stored.sign() == gain.sign())
    stored = torch.where(held, stored, gain)
    return stored, torch.where(held, gain / torch.where(held, stored, torch.ones_like(stored)), torch.ones_like(gain))


def exact_offset_under_storage(
    offset: Tensor, channel_scale: Tensor, stored_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `exact_under_storage` for a norm that multiplies by 1 + w: stored w' near (1 + w)/s − 1.

    s := (1 + w)/(1 + w').
    """
    gain = 1.0 + offset
    stored = (gain / channel_scale - 1.0).to(stored_dtype).to(torch.float32)
    new_gain = 1.0 + stored
    held = (gain != 0) & (new_gain != 0) & (new_gain.sign() == gain.sign()) & new_gain.isfinite()
    stored = torch.where(held, stored, offset)
    return stored, torch.where(held, gain / torch.where(held, new_gain, torch.ones_like(gain)), torch.ones_like(gain))


def nearest_power_of_two(channel_scale: Tensor) -> Tensor:
    """s rounded to a power of two in the exponent: exact under any float storage that has the range."""
    return torch.exp2(torch.log2(channel_scale).round())


def nearly_exact_pair_under_storage(
    gain: Tensor, companion: Tensor, channel_scale: Tensor, stored_dtype: torch.dtype, reach: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """As `exact_under_storage` for a gain with a bias beside it (LayerNorm): (stored gain, stored bias, s).

    One s cannot make both quotients exact. The gain's is; among the `reach` neighbours of its stored value on both
    sides the one is taken whose s leaves the bias nearest to a value of `stored_dtype`, which costs s at most 3 %
    and leaves about a fifth of the bias's rounding error.
    """
    base, _ = exact_under_storage(gain, channel_scale, stored_dtype)
    bits = base.to(stored_dtype).view(torch.int16).to(torch.int32)
    best: tuple[Tensor, ...] | None = None
    for step in sorted(range(-reach, reach + 1), key=abs):
        near = (bits + step).to(torch.int16).view(stored_dtype).to(torch.float32)
        stored, scale = exact_under_storage(gain, gain / torch.where(near == 0, base, near), stored_dtype)
        quotient = companion / scale
        held = quotient.to(stored_dtype).to(torch.float32)
        miss = torch.where(companion == 0, torch.zeros_like(held), (held - quotient).abs() / quotient.abs())
        if best is None:
            best = (miss, stored, held, scale)
        else:
            better = miss < best[0]
            best = tuple(
                torch.where(better, new, old) for new, old in zip((miss, stored, held, scale), best, strict=True)
            )
    assert best is not None
    return best[1], best[2], best[3]
