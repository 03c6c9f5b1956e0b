"""Which tensors the output holds, settled before the first is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from awqkit.checkpoint.header import TensorSpec
from awqkit.checkpoint.tensor_source import TensorSource
from awqkit.formats.format import Format
from awqkit.formats.scheme import Scheme
from awqkit.model.skeleton import Skeleton
from awqkit.pipeline.plan import BlockPlan, RunPlan


@dataclass(frozen=True, slots=True)
class OutputLayout:
    """Every tensor of the source is accounted for: packed, kept, or dropped with a reason.

    scheme: how every quantized linear is stored. specs: the output's tensors in order.
    packed: disk name of a weight -> path of its linear on disk.
    kept: disk name -> dtype it is written in. dropped: disk name -> why.
    """

    scheme: Scheme
    specs: tuple[TensorSpec, ...]
    packed: dict[str, str]
    kept: dict[str, torch.dtype]
    dropped: dict[str, str]


def packed_parts(skeleton: Skeleton, block: BlockPlan, linear: str) -> dict[str, slice]:
    """The weights on disk that a linear is written as, each with its rows of it."""
    view = block.structure.linear(linear)
    parts = skeleton.matrix_parts(f"{block.path}.{view.weight}", transposed=view.transposed)
    assert parts is not None
    return parts


def plan_output(
    source: TensorSource, skeleton: Skeleton, plan: RunPlan, written: Format, scheme: Scheme
) -> OutputLayout:
    """The output's tensors, in the order of the source's."""
    shapes = {}
    for block in plan.blocks:
        for name, linear in block.linears.items():
            if linear.keep is None:
                for disk, rows in packed_parts(skeleton, block, name).items():
                    shapes[disk] = (len(range(*rows.indices(linear.shape[0]))), linear.shape[1])
    parameters, duplicates = skeleton.parameters_on_disk(), skeleton.tied_duplicates()
    specs: list[TensorSpec] = []
    packed, kept, dropped = {}, {}, {}
    for name in source.names:
        if name in duplicates:
            dropped[name] = f"tied to {duplicates[name]}"
        elif name in shapes:
            packed[name] = name.removesuffix(".weight")
            parts = written.tensor_specs(packed[name], *shapes[name], scheme, plan.stored_dtype)
            specs += [TensorSpec(part, dtype, shape) for part, (dtype, shape) in parts.items()]
        else:
            dtype = source.dtype(name)
            kept[name] = plan.stored_dtype if name in parameters and dtype.is_floating_point else dtype
            specs.append(TensorSpec(name, kept[name], source.shape(name)))
    dropped |= {part: f"went into {name}, which was dequantized" for part, name in source.hidden.items()}
    return OutputLayout(scheme, tuple(specs), packed, kept, dropped)
