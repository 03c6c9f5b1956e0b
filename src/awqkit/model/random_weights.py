"""Weights for a model of which only the config is there: random, the same ones each time, made when they are read."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from awqkit.model.transformers_bridge import empty_model

_STD = 0.05


class RandomWeights:
    """A `WeightSource` with every tensor of the model that `config` describes, under the model's own names."""

    def __init__(self, config: Any, *, trust_remote_code: bool = False) -> None:
        model = empty_model(config, trust_remote_code=trust_remote_code)
        self._shapes = {name: value.shape for name, value in model.named_parameters(remove_duplicate=False)}

    @property
    def names(self) -> Iterable[str]:
        """The names of all parameters."""
        return list(self._shapes)

    def read(self, name: str) -> Tensor:
        """N(0, 0.05²) float32; a vector lies around 1, so that a norm lets something through."""
        shape = self._shapes[name]
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))).mul_(_STD)
        return noise.add_(1.0) if len(shape) == 1 and not name.endswith("bias") else noise
