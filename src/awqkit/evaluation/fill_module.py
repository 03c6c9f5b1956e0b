"""What was written of a plain module, put into an instance of its class."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from awqkit.checkpoint.reader import Checkpoint
from awqkit.errors import CheckpointError
from awqkit.evaluation.load import Packed, fill_rest, on_device, packed_linear, put_module, stored_dtype
from awqkit.formats.format import stored_format
from awqkit.numerics.grid import dequantize

TURNED_KEY = "linears_held_as_in_out"  # of the config.json of a plain module: whose weights it holds transposed


def load_into(module: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """`module`, filled with what the folder of a PlainModel holds, in eval mode on `device`; see `load_checkpoint`.

    Every nn.Linear that was quantized gives way to a packed one. A module that computes with its weight in a way of its
    own gets what the codes mean, and its inputs are not rounded where the recipe rounds them. Raises CheckpointError,
    before anything is changed, where the module is another one.
    """
    found = stored_format(checkpoint.config)
    if found is None:
        raise CheckpointError(f"{checkpoint.directory}: is not quantized, load_state_dict reads it")
    dtype = dtype or stored_dtype(checkpoint.config)
    packed, turned = Packed(*found, checkpoint), frozenset(checkpoint.config.get(TURNED_KEY, ()))
    _refuse_other_module(module, packed, turned)
    dense: list[str] = []
    paths: list[str] = []
    for linear in packed.linears:
        owner = module.get_submodule(linear)
        if _is_only_linear(owner):
            new = packed_linear(packed, linear, dtype, device)
            same = [path for path, part in module.named_modules(remove_duplicate=False) if part is owner]
            for path in same:
                put_module(module, path, new)
            paths += same
        else:
            weight = on_device(packed.weight(linear), device)
            value = dequantize(weight.codes, weight.grid).to(dtype)
            value = value.t().contiguous() if linear in turned else value
            owner._parameters["weight"] = nn.Parameter(value, requires_grad=False)
            dense.append(f"{linear}.weight")
    fill_rest(module, checkpoint, paths, dtype, device, dense)
    return module.eval()


def _is_only_linear(module: nn.Module) -> bool:
    """Whether a call of the module is x · Wᵀ + bias and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and not hooks


def _refuse_other_module(module: nn.Module, packed: Packed, turned: Collection[str]) -> None:
    """Raises CheckpointError unless module and file have the same parameters, of the same shapes."""
    where, name_of_class = packed.checkpoint.directory, type(module).__name__
    fitting = f"give an instance of the class, and of the size, that was quantized, not this {name_of_class}"
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    shapes: dict[str, tuple[int, ...]] = {}
    for path in packed.linears:
        shape = packed.shape(path)
        shapes[f"{path}.weight"] = shape[::-1] if path in turned else shape
    parts = {name for path in packed.linears for name in packed.names(path)}
    shapes |= {name: packed.checkpoint.shape(name) for name in packed.checkpoint.names if name not in parts}
    first: dict[int, str] = {}
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"{where}: has {name}, which the module has not; {fitting}")
        if tuple(tensors[name].shape) != shape:
            found = list(tensors[name].shape)
            raise CheckpointError(f"{where}: {name} is {list(shape)}, in the module {found}; {fitting}")
        other = first.setdefault(id(tensors[name]), name)
        if other != name and isinstance(tensors[name], nn.Parameter):
            raise CheckpointError(f"{where}: {other} and {name} are two tensors, in the module one; {fitting}")
    for name, value in tensors.items():
        if id(value) not in first and (isinstance(value, nn.Parameter) or value.device.type == "meta"):
            raise CheckpointError(f"{where}: no tensor for {name}, which the module needs; {fitting}")
