"""A checkpoint folder as a transformers model: full precision as it is, quantized with packed linears."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from awqkit.checkpoint.reader import Checkpoint
from awqkit.errors import CheckpointError
from awqkit.evaluation.int8_linear import Int8Linear
from awqkit.evaluation.packed_linear import PackedLinear
from awqkit.formats.format import stored_format
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
        _fill_rest(model, checkpoint, {}, dtype, device)
        return finish_loading(model, checkpoint.directory)
    if found is None:
        return full_model(checkpoint.directory, dtype, device, trust_remote_code=trust_remote_code)
    stored, settings = found
    config = load_config(checkpoint.directory, trust_remote_code=trust_remote_code)
    model = empty_model(config, trust_remote_code=trust_remote_code)
    scheme = settings.scheme
    linear_class = PackedLinear if scheme.activations == "none" else Int8Linear
    packed = stored.quantized_linears(checkpoint.names, scheme)

    def unpacked(disk_path: str) -> QuantizedWeight:
        return stored.unpack(disk_path, checkpoint.read_many(stored.tensor_names(disk_path, scheme)), scheme)

    paths, stacks = _module_paths(model, packed)
    _fill_stacks(model, stacks, unpacked, dtype, device)
    for disk_path, path in paths.items():
        weight = _on_device(unpacked(disk_path), device)
        bias_name = f"{disk_path}.bias"
        bias = checkpoint.read(bias_name).to(device) if bias_name in checkpoint.tensors else None
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear_class(weight, bias, dtype))
    _fill_rest(model, checkpoint, paths, dtype, device, stacks)
    return finish_loading(model, checkpoint.directory)


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
            weight = _on_device(unpacked(disk.removesuffix(".weight")), device)
            return dequantize(weight.codes, weight.grid).to(dtype)

        whole = joined(parts, owner._parameters[leaf].shape, read, device)
        owner._parameters[leaf] = nn.Parameter(whole, requires_grad=False)


def stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that config.json names, float32 where it names none."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, str(name).removeprefix("torch."), torch.float32)


def _on_device(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
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


def _fill_rest(
    model: nn.Module,
    checkpoint: Checkpoint,
    paths: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
    stacks: Collection[str] = (),
) -> None:
    """Every other parameter and buffer; a shared parameter is filled once, wherever it is used.

    paths, stacks: modules and parameters that have their values already.
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
        elif name in stacks:
            stored = value
        else:
            continue
        filled[id(value)] = nn.Parameter(stored.to(device, dtype), requires_grad=False)
    for name, value in list(model.named_parameters(remove_duplicate=False)):
        if id(value) not in filled:
            raise CheckpointError(f"{checkpoint.directory}: no tensor for {name}, which the model needs")
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._parameters[leaf] = filled[id(value)]
    packed = tuple(f"{path}." for path in paths.values())
    for name, value in list(model.named_buffers()):
        if name.startswith(packed):
            continue
        parent, _, leaf = name.rpartition(".")
        held = checkpoint.read(on_disk[name]) if name in on_disk else value
        model.get_submodule(parent)._buffers[leaf] = held.to(device)
