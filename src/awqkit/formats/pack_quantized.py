"""The `pack-quantized` layout of compressed-tensors: codes of 2 to 8 bits in a dense bit stream.

    M.weight_packed      int32        [N, ceil(K·b / 32)]    codes q, packed along K (`bit_stream`)
    M.weight_scale       model dtype  [N, G]                 Δ; G groups, 1 where a row is one group
    M.weight_zero_point  int32        [ceil(N·b / 32), G]    z, packed along N; only where the scheme is not symmetric
    M.weight_shape       int64        [2]                    N and K

Opens no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from awqkit.errors import CheckpointError
from awqkit.formats.bit_stream import pack_stream, padded_words, stream_words, unpack_padded, unpack_stream
from awqkit.formats.scheme import Scheme
from awqkit.numerics.grid import Grid, QuantizedWeight


class PackQuantized:
    """Writes and reads one linear; no state."""

    name = "pack-quantized"
    marker = ".weight_packed"

    def tensor_names(self, linear: str, scheme: Scheme) -> tuple[str, ...]:
        """The names on disk that stand for the weight of module path `linear`."""
        zero = () if scheme.symmetric else (f"{linear}.weight_zero_point",)
        return f"{linear}.weight_packed", f"{linear}.weight_scale", f"{linear}.weight_shape", *zero

    def tensor_specs(
        self, linear: str, out_features: int, in_features: int, scheme: Scheme, stored_dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape of what `pack` will return."""
        groups = in_features // scheme.columns(in_features)
        specs = (
            (torch.int32, (out_features, stream_words(in_features, scheme.bits))),
            (stored_dtype, (out_features, groups)),
            (torch.int64, (2,)),
            (torch.int32, (stream_words(out_features, scheme.bits), groups)),
        )
        return dict(zip(self.tensor_names(linear, scheme), specs, strict=False))

    def pack(
        self, linear: str, weight: QuantizedWeight, scheme: Scheme, stored_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The tensors on disk, contiguous, on the device of `weight`, which is on a grid of the scheme."""
        parts = [
            pack_stream(weight.codes, scheme.bits),
            weight.grid.group_scale.to(stored_dtype).contiguous(),
            torch.tensor(weight.codes.shape, dtype=torch.int64),
        ]
        if not scheme.symmetric:
            zeros = weight.grid.group_zero.to(torch.uint8)
            parts.append(pack_stream(zeros.t(), scheme.bits).t().contiguous())
        return dict(zip(self.tensor_names(linear, scheme), parts, strict=True))

    def linear_shape(self, linear: str, read: Callable[[str], Tensor], scheme: Scheme) -> tuple[int, int]:
        """(out_features, in_features) of a quantized linear; read: a tensor by its name on disk."""
        rows, columns = read(self.tensor_names(linear, scheme)[2]).tolist()
        return rows, columns

    def unpack(self, linear: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """The quantized weight `[N, K]`; `tensors` has all of `tensor_names`. Raises CheckpointError for a misfit."""
        words, group_scale, shape, *zeros = (tensors[name] for name in self.tensor_names(linear, scheme))
        if shape.is_floating_point() or shape.shape != (2,):
            raise CheckpointError(
                f"{linear}: weight_shape is {shape.dtype} {tuple(shape.shape)}, expected two integers"
            )
        rows, columns = shape.tolist()
        group_size = scheme.columns(columns)
        groups, rest = divmod(columns, group_size) if group_size > 0 else (0, 1)
        dense = words.dim() == 2 and words.shape[1] == stream_words(columns, scheme.bits)
        if rest or not self._fits(words, (rows,), columns, scheme.bits, dense) or group_scale.shape != (rows, groups):
            raise CheckpointError(
                f"{linear}: weight_packed {words.dtype} {tuple(words.shape)} and weight_scale "
                f"{tuple(group_scale.shape)} "
                f"do not fit a weight of {rows} x {columns} with {scheme.bits} bits and {scheme.groups_text}"
            )
        if not group_scale.is_floating_point():
            raise CheckpointError(f"{linear}: weight_scale is {group_scale.dtype}, expected a floating-point dtype")
        if zeros and not (zeros[0].dim() == 2 and self._fits(zeros[0].t(), (groups,), rows, scheme.bits, dense)):
            raise CheckpointError(
                f"{linear}: weight_zero_point {zeros[0].dtype} {tuple(zeros[0].shape)} does not fit "
                f"{rows} outputs and {groups} groups with {scheme.bits} bits"
            )
        unpacked = unpack_stream if dense else unpack_padded
        if zeros:
            group_zero = unpacked(zeros[0].t().contiguous(), scheme.bits, rows).t().float().contiguous()
        else:
            group_zero = torch.full(group_scale.shape, float(scheme.middle_code), device=group_scale.device)
        grid = Grid(scheme.bits, group_size, scheme.symmetric, group_scale.float().contiguous(), group_zero)
        return QuantizedWeight(unpacked(words, scheme.bits, columns), grid)

    @staticmethod
    def _fits(words: Tensor, rows: tuple[int], count: int, bits: int, dense: bool) -> bool:
        """Whether words are of the dense layout, or else of the padded one that compressed-tensors had before 0.18.

        The two differ in width wherever 32 divides the count; where they do not, the words are taken as dense.
        """
        width = stream_words(count, bits) if dense else padded_words(count, bits)
        return words.dtype == torch.int32 and words.shape == (*rows, width)
