"""A checkpoint folder as a transformers model: full precision as it is, quantized with packed linears."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from awqkit.checkpoint.reader import Checkpoint
from awqkit.errors import CheckpointError
from awqkit.evaluation.int8_linear import Int8Linear
from awqkit.evaluation.packed_linear import PackedLinear
from awqkit.evaluation.shared_inputs import join_products
from awqkit.formats.format import Format, stored_format
from awqkit.formats.scheme import StoredConfig
from awqkit.model.disk_places import Place, joined, places_on_disk
from awqkit.model.transformers_bridge import empty_model, finish_loading, full_model, load_config
from awqkit.numerics.grid import QuantizedWeight, dequantize


def load_checkpoint(
    checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device, *, trust_remote_code: bool = False
) -> nn.Module:
    """The model of a folder in eval mode on `device`; dtype: of everything that is not packed, None for the stored one.

    Raises CheckpointError for a format that is not ours to read, and where tensors are missing.
    """
    found = stored_format(checkpoint.config)
    dtype = dtype or stored_dtype(checkpoint.config)
    if checkpoint.derived:  # transformers would read the folder itself, with the weights as they lie there
        model = empty_model(
            load_config(checkpoint.directory, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code
        )
        fill_rest(model, checkpoint, (), dtype, device)
        return finish_loading(model, checkpoint.directory)
    if found is None:
        return full_model(checkpoint.directory, dtype, device, trust_remote_code=trust_remote_code)
    model = empty_model(
        load_config(checkpoint.directory, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code
    )
    packed = Packed(*found, checkpoint)
    paths, stacks = _module_paths(model, packed.linears)
    _fill_stacks(model, stacks, packed.weight, dtype, device)
    for disk_path, path in paths.items():
        put_module(model, path, packed_linear(packed, disk_path, dtype, device))
    fill_rest(model, checkpoint, list(paths.values()), dtype, device, stacks)
    model = finish_loading(model, checkpoint.directory)
    join_products(model, device)
    return model


@dataclass(frozen=True, slots=True)
class Packed:
    """The quantized linears of a checkpoint."""

    stored: Format
    settings: StoredConfig
    checkpoint: Checkpoint

    @property
    def linears(self) -> list[str]:
        """Their paths on disk."""
        return self.stored.quantized_linears(self.checkpoint.names, self.settings.scheme)

    def names(self, linear: str) -> tuple[str, ...]:
        """The tensors that stand for a linear's weight."""
        return self.stored.tensor_names(linear, self.settings.scheme)

    def shape(self, linear: str) -> tuple[int, int]:
        """(out, in) of a linear."""
        return self.stored.linear_shape(linear, self.checkpoint.read, self.settings.scheme)

    def weight(self, linear: str) -> QuantizedWeight:
        """A linear's codes and grid, on the CPU."""
        return self.stored.unpack(linear, self.checkpoint.read_many(self.names(linear)), self.settings.scheme)


def packed_linear(packed: Packed, linear: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The module that computes with a linear as it is stored."""
    linear_class = PackedLinear if packed.settings.scheme.activations == "none" else Int8Linear
    weight, bias_name = on_device(packed.weight(linear), device), f"{linear}.bias"
    bias = packed.checkpoint.read(bias_name).to(device) if bias_name in packed.checkpoint.tensors else None
    return linear_class(weight, bias, dtype)


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """`module` in the place of what stands at `path`."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _fill_stacks(
    model: nn.Module,
    stacks: Mapping[str, Mapping[str, Place]],
    unpacked: Callable[[str], QuantizedWeight],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Stacks of experts get what their codes mean: a model computes with a stack as it is, not with a module's."""
    for name, parts in stacks.items():
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)

        def read(disk: str) -> torch.Tensor:
            weight = on_device(unpacked(disk.removesuffix(".weight")), device)
            return dequantize(weight.codes, weight.grid).to(dtype)

        whole = joined(parts, owner._parameters[leaf].shape, read, device)
        owner._parameters[leaf] = nn.Parameter(whole, requires_grad=False)


def stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that config.json names, float32 where it names none."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, str(name).removeprefix("torch."), torch.float32)


def on_device(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    """The same on `device`."""
    grid = replace(
        weight.grid, group_scale=weight.grid.group_scale.to(device), group_zero=weight.grid.group_zero.to(device)
    )
    return replace(weight, codes=weight.codes.to(device), grid=grid)


def _module_paths(model: nn.Module, disk_paths: list[str]) -> tuple[dict[str, str], Mapping[str, Mapping[str, Place]]]:
    """Linear path on disk -> module path in the model, by the same rule as every other tensor, and stacks by parts."""
    places = places_on_disk(model, [f"{path}.weight" for path in disk_paths])
    paths = {disk.removesuffix(".weight"): name.removesuffix(".weight") for name, disk in places.whole.items()}
    stacked = {disk.removesuffix(".weight") for parts in places.slices.values() for disk in parts}
    lost = [path for path in disk_paths if path not in paths and path not in stacked]
    if lost:
        raise CheckpointError(f"quantized linear {lost[0]} has no counterpart in the model that config.json describes")
    return paths, places.slices


def fill_rest(
    model: nn.Module,
    checkpoint: Checkpoint,
    paths: Collection[str],
    dtype: torch.dtype,
    device: torch.device,
    parameters: Collection[str] = (),
) -> None:
    """Every other parameter and buffer; a shared parameter is filled once, wherever it is used.

    paths, parameters: modules and parameters that have their values already.
    """
    places = places_on_disk(model, checkpoint.names)
    on_disk, slices = places.whole, places.slices
    filled: dict[int, nn.Parameter] = {}
    for name, value in list(model.named_parameters(remove_duplicate=False)):
        if id(value) in filled:
            continue
        if name in on_disk:
            stored = checkpoint.read(on_disk[name])
        elif name in slices:
            stored = joined(slices[name], value.shape, checkpoint.read)
        elif name in parameters:
            stored = value
        else:
            continue
        filled[id(value)] = nn.Parameter(stored.to(device, dtype), requires_grad=False)
    for name, value in list(model.named_parameters(remove_duplicate=False)):
        if id(value) not in filled:
            raise CheckpointError(f"{checkpoint.directory}: no tensor for {name}, which the model needs")
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._parameters[leaf] = filled[id(value)]
    packed = tuple(f"{path}." for path in paths)
    for name, value in list(model.named_buffers(remove_duplicate=False)):
        if name.startswith(packed):
            continue
        parent, _, leaf = name.rpartition(".")
        held = checkpoint.read(on_disk[name]) if name in on_disk else value
        model.get_submodule(parent)._buffers[leaf] = held.to(device)
