"""The `int-quantized` layout of compressed-tensors for W8A8: whole signed bytes, inputs rounded per token at run time.

    M.weight        int8         [N, K]    q − 128
    M.weight_scale  model dtype  [N, 1]    Δ

Opens no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from awqkit.errors import CheckpointError
from awqkit.formats.scheme import Scheme
from awqkit.numerics.grid import Grid, QuantizedWeight

_SIGN_BIT = 0x80  # unsigned codes with the middle at 128 and signed ones differ in this bit alone


class IntQuantized:
    """Writes and reads one linear; no state."""

    name = "int-quantized"
    marker = ".weight_scale"

    def tensor_names(self, linear: str, scheme: Scheme) -> tuple[str, ...]:
        """The names on disk that stand for the weight of module path `linear`."""
        return f"{linear}.weight", f"{linear}.weight_scale"

    def tensor_specs(
        self, linear: str, out_features: int, in_features: int, scheme: Scheme, stored_dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape of what `pack` will return."""
        specs = ((torch.int8, (out_features, in_features)), (stored_dtype, (out_features, 1)))
        return dict(zip(self.tensor_names(linear, scheme), specs, strict=True))

    def pack(
        self, linear: str, weight: QuantizedWeight, scheme: Scheme, stored_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The tensors on disk, contiguous, on the device of `weight`, which is on a grid of the scheme."""
        signed = (weight.codes ^ _SIGN_BIT).view(torch.int8).contiguous()
        parts = (signed, weight.grid.group_scale.to(stored_dtype).contiguous())
        return dict(zip(self.tensor_names(linear, scheme), parts, strict=True))

    def linear_shape(self, linear: str, read: Callable[[str], Tensor], scheme: Scheme) -> tuple[int, int]:
        """(out_features, in_features) of a quantized linear; read: a tensor by its name on disk."""
        rows, columns = read(self.tensor_names(linear, scheme)[0]).shape
        return rows, columns

    def unpack(self, linear: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """The quantized weight `[N, K]`; `tensors` has all of `tensor_names`. Raises CheckpointError for a misfit."""
        signed, scale = (tensors[name] for name in self.tensor_names(linear, scheme))
        fits = signed.dim() == 2 and scale.shape == (signed.shape[0], 1)
        if not fits or signed.dtype != torch.int8 or not scale.is_floating_point():
            raise CheckpointError(
                f"{linear}: weight {signed.dtype} {tuple(signed.shape)} and weight_scale {scale.dtype} "
                f"{tuple(scale.shape)}; expected int8 [N, K] and a floating-point [N, 1]"
            )
        codes = signed.view(torch.uint8) ^ _SIGN_BIT
        group_zero = torch.full(scale.shape, float(scheme.middle_code), device=scale.device)
        return QuantizedWeight(codes, Grid(scheme.bits, signed.shape[1], True, scale.float(), group_zero))
