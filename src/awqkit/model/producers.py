"""What a fold's producer becomes on disk, and the s that its consumers must then get.

s is defined by the stored, rounded producer, not by the search (`numerics.channel_scale.exact_under_storage`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from awqkit.model.structure import Fold
from awqkit.numerics.channel_scale import (
    exact_offset_under_storage,
    exact_under_storage,
    nearest_power_of_two,
    nearly_exact_pair_under_storage,
)


@dataclass(frozen=True, slots=True)
class StoredProducer:
    """values: parameter name -> float32 value, exact in the stored dtype. channel_scale: s `[producer channels]`."""

    values: Mapping[str, Tensor]
    channel_scale: Tensor


def store_producer(
    fold: Fold,
    parameters: Mapping[str, Tensor],
    channel_scale: Tensor,
    stored_dtype: torch.dtype,
    *,
    keeps_full_precision: bool,
) -> StoredProducer:
    """The producer divided by a searched s, as near to it as the file can hold; s is 1 for a channel that nobody reads.

    keeps_full_precision: the producing linear or a consumer is stored unquantized, so s must commute with its
    rounding: a power of two. A producing linear that will be quantized takes any s (its rows go to the quantizer in
    float32); its bias, which is stored, then defines s.
    """
    channel_scale = torch.where(fold.read.to(channel_scale.device), channel_scale, torch.ones_like(channel_scale))
    if keeps_full_precision:
        return _power_of_two_producer(fold, parameters, channel_scale, stored_dtype)
    if fold.offset is not None:
        stored, scale = exact_offset_under_storage(parameters[fold.offset], channel_scale, stored_dtype)
        others = {name: parameters[name] / scale for name in fold.producer if name != fold.offset}
        return StoredProducer({fold.offset: stored, **others}, scale)
    vectors = [name for name in fold.producer if parameters[name].dim() == 1]
    if not vectors:
        return StoredProducer({}, channel_scale)
    if len(vectors) == 1:
        stored, scale = exact_under_storage(parameters[vectors[0]], channel_scale, stored_dtype)
        if fold.producer_linear is not None:  # where the bias is 0 any s is exact
            scale = torch.where(parameters[vectors[0]] == 0, channel_scale, scale)
        return StoredProducer({vectors[0]: stored}, scale)
    stored, companion, scale = nearly_exact_pair_under_storage(
        parameters[vectors[0]], parameters[vectors[1]], channel_scale, stored_dtype
    )
    return StoredProducer({vectors[0]: stored, vectors[1]: companion}, scale)


def _power_of_two_producer(
    fold: Fold, parameters: Mapping[str, Tensor], channel_scale: Tensor, stored_dtype: torch.dtype
) -> StoredProducer:
    """The producer divided by powers of two; s is 1 where rounding to the file's dtype does not commute with it.

    It always does for what multiplies, short of the dtype's range; for 1 + w only where 1 + w' happens to fit.
    """
    scale = nearest_power_of_two(channel_scale)
    commutes = torch.ones_like(scale, dtype=torch.bool)
    for name in fold.producer:
        gain = 1.0 if name == fold.offset else 0.0
        plain = parameters[name].to(stored_dtype).to(torch.float32)
        stored = _divided(plain, scale, name == fold.offset).to(stored_dtype).to(torch.float32)
        same = (stored + gain) * _along_rows(scale, stored) == plain + gain
        commutes &= same.reshape(len(scale), -1).all(dim=1)
    scale = torch.where(commutes, scale, torch.ones_like(scale))
    unscaled = scale == 1.0
    values = {}
    for name in fold.producer:
        divided = _divided(parameters[name], scale, name == fold.offset)
        values[name] = torch.where(_along_rows(unscaled, divided), parameters[name], divided)
    return StoredProducer(values, scale)


def _along_rows(per_row: Tensor, like: Tensor) -> Tensor:
    return per_row.reshape(-1, *(1,) * (like.dim() - 1))


def _divided(value: Tensor, scale: Tensor, offset: bool) -> Tensor:
    scale = _along_rows(scale, value)
    return (1.0 + value) / scale - 1.0 if offset else value / scale
