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
    """The producer divided by a searched s, as near to it as the file can hold.

    keeps_full_precision: the producing linear or a consumer is stored unquantized, so s must commute with its
    rounding: a power of two. A producing linear that will be quantized takes any s (its rows go to the quantizer in
    float32); its bias, which is stored, then defines s.
    """
    if keeps_full_precision:
        channel_scale = nearest_power_of_two(channel_scale)
        divided = {name: _divided(parameters[name], channel_scale, name == fold.offset) for name in fold.producer}
        if fold.offset is None:
            return StoredProducer(divided, channel_scale)
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


def _divided(value: Tensor, scale: Tensor, offset: bool) -> Tensor:
    scale = scale.reshape(-1, *(1,) * (value.dim() - 1))
    return (1.0 + value) / scale - 1.0 if offset else value / scale
