"""A decoder without its weights: where its blocks are, and what each block is called with.

Blocks are found by structure (the list of submodules that holds most of the parameters) and by asking the model:
its own forward runs with recorders in the blocks' places, which yields the first block's input and every block's
arguments. One block at a time has weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from awqkit.errors import ModelError
from awqkit.model.block_calls import BlockInputs, laid_out
from awqkit.model.block_list import shared_parameters
from awqkit.model.disk_places import Place, joined, places_on_disk
from awqkit.model.matrices import parameter_of, stack_and_index
from awqkit.model.named_blocks import NamedBlocks
from awqkit.model.plain_model import PlainModel, plain_runnable
from awqkit.model.recorded_calls import Manner, blocks_replaced, lists_called, record_calls
from awqkit.model.runnable import Runnable, transformers_runnable
from awqkit.model.transformers_bridge import empty_model

_TOKENS_TO_ASK = 8


class WeightSource(Protocol):
    """What the model layer needs of a checkpoint; the checkpoint reader fits it without being imported."""

    @property
    def names(self) -> Iterable[str]:
        """Tensor names on disk."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU in its stored dtype."""
        ...


class Skeleton:
    """A causal language model whose parameters are on the meta device until a part is asked for.

    model: a config of transformers, or a PlainModel.
    """

    def __init__(self, model: Any, source: WeightSource, *, trust_remote_code: bool = False) -> None:
        self._runnable = _runnable(model, trust_remote_code)
        self._model, self._decoder = self._runnable.module, self._runnable.decoder
        self._source = source
        self._places = places_on_disk(self._model, source.names)
        self._modules = dict(self._model.named_modules(remove_duplicate=False))
        # Taken now: weights come and go with new Parameter objects, and tied ones are told by their identity.
        self._shared = {name: id(value) for name, value in self._model.named_parameters(remove_duplicate=False)}
        self._manner: Manner | None = None
        self._take(self._runnable.lists[0])
        self._name_of_shared = {self._shared[name]: name for name in self.names() if name in self._shared}

    def _take(self, blocks: NamedBlocks, others: Sequence[NamedBlocks] = ()) -> None:
        """Take a list for that of the blocks. others: lists that no text visits, which need no weights either."""
        self._blocks = blocks
        self._without_weights = {id(part) for each in (blocks, *others) for block in each for part in block.modules()}
        self._call_only(range(len(self._blocks)))

    def _call_only(self, visited: Sequence[int]) -> None:
        """Of the list only these are blocks that the model calls with text alone."""
        self._visited = tuple(visited)
        self._kinds: dict[int, tuple[Any, ...]] = {}
        self._shared_by = shared_parameters([self._blocks[number] for number in visited])

    @property
    def num_blocks(self) -> int:
        """How many decoder blocks there are; what follows is settled once the model was first asked (`start`)."""
        return len(self._visited)

    @property
    def uncalled_blocks(self) -> list[str]:
        """The paths of blocks that the model does not call with text alone; they count as outside of the blocks."""
        return [path for number, path in enumerate(self._blocks.paths) if number not in self._visited]

    def block_path(self, index: int) -> str:
        """The module path of a block, for example `model.layers.3`."""
        return self._blocks.paths[self._visited[index]]

    def _block(self, index: int) -> nn.Module:
        return self._blocks[self._visited[index]]

    def block_kind(self, index: int) -> tuple[Any, ...]:
        """A key that two blocks have in common when class and parameters, by name and shape, are the same.

        Of both the same parameters are shared with other blocks.
        """
        if index not in self._kinds:  # asked of all blocks again in each of them
            block, shared = self._block(index), self._shared_by[index]
            parameters = ((name, tuple(value.shape), name in shared) for name, value in block.named_parameters())
            self._kinds[index] = (type(block), *parameters)
        return self._kinds[index]

    def block_elements(self, index: int) -> int:
        """How many elements the parameters of a block have."""
        return sum(value.numel() for value in self._block(index).parameters())

    def shared_by(self, index: int) -> Mapping[str, tuple[int, ...]]:
        """The parameters of a block, by their names in it, that others share: each with the numbers of all of them."""
        return self._shared_by[index]

    def names(self) -> list[str]:
        """Names of all parameters and buffers of the model that the checkpoint has."""
        return [*self._places.whole, *self._places.slices]

    def disk_name(self, module_name: str) -> str | None:
        """The name on disk of a parameter or buffer of the model, or None where no tensor there is all of it."""
        return self._places.whole.get(module_name)

    def disk_names(self, module_name: str) -> tuple[str, ...]:
        """The names on disk of all tensors that a parameter or buffer of the model is made of."""
        return self._places.disk_names(module_name)

    def parts(self, module_name: str, value: Tensor) -> dict[str, Tensor]:
        """The tensors on disk that hold `value`, what a parameter or buffer of the model is, by name."""
        disk = self.disk_name(module_name)
        if disk is not None:
            return {disk: value}
        whole = value.contiguous()
        return {disk: place.of(whole).contiguous() for disk, place in self._places.slices.get(module_name, {}).items()}

    def matrix_parts(self, name: str, *, transposed: bool = False) -> dict[str, slice] | None:
        """The tensors on disk that hold a matrix, each with the rows `[out]` of it that it is; None where they do not.

        name: of a parameter, or of a matrix of a stack (`model.matrices`). transposed: whether it is `[in, out]`.
        """
        parameter, stacked = parameter_of(name), stack_and_index(name)
        shape = tuple(self._parameter(parameter).shape)
        rows, columns = shape[-2:]
        if stacked is None and parameter in self._places.whole:
            return {self._places.whole[parameter]: slice(None)}
        first = 0 if stacked is None else stacked[1] * rows * columns
        whole = Place((rows, columns), (columns, 1), first)
        if transposed:
            whole = Place((columns, rows), (1, columns), first)
        found = {disk: place.rows_in(whole) for disk, place in self._places.slices.get(parameter, {}).items()}
        parts = {disk: part for disk, part in found.items() if part is not None}
        held = sum(len(range(*part.indices(whole.shape[0]))) for part in parts.values())
        return parts if parts and held == whole.shape[0] else None

    def missing(self) -> list[str]:
        """Parameters of the model that the checkpoint does not have, tied ones left out."""
        have = {self._shared[name] for name in self.names() if name in self._shared}
        return [name for name, shared in self._shared.items() if shared not in have]

    def parameters_on_disk(self) -> frozenset[str]:
        """Disk names of the model's parameters; anything else on disk is a buffer, or unknown to the model."""
        parameters = (name for name in self.names() if not self._is_buffer(name))
        return frozenset(disk for name in parameters for disk in self.disk_names(name))

    def buffers_on_disk(self) -> frozenset[str]:
        """Disk names of the model's buffers."""
        buffers = (name for name in self.names() if self._is_buffer(name))
        return frozenset(disk for name in buffers for disk in self.disk_names(name))

    def shapes_on_disk(self) -> dict[str, tuple[int, ...]]:
        """Disk name -> the shape that the model gives each of its parameters there."""
        parameters = self.parameters_on_disk()
        whole = {disk: name for name, disk in self._places.whole.items() if disk in parameters}
        slices = {disk: place.shape for parts in self._places.slices.values() for disk, place in parts.items()}
        return {disk: tuple(self._parameter(name).shape) for disk, name in whole.items()} | slices

    @property
    def vocabulary_size(self) -> int:
        """How many token ids the model has an embedding for; of a plain module known once it was first run."""
        return self._runnable.vocabulary_size()

    def tied_duplicates(self) -> dict[str, str]:
        """Disk name -> disk name it is tied to, for parameters that the model shares and the checkpoint has twice."""
        first: dict[int, str] = {}
        duplicates = {}
        for name, disk in self._places.whole.items():
            if name not in self._shared:
                continue
            kept = first.setdefault(self._shared[name], disk)
            if kept != disk:
                duplicates[disk] = kept
        return duplicates

    def linears_outside_blocks(self) -> list[str]:
        """Paths of the linear modules that no block holds: the output head, projections around the decoder."""
        inside = {id(part) for index in range(self.num_blocks) for part in self._block(index).modules()}
        named = self._model.named_modules()
        return [path for path, module in named if isinstance(module, nn.Linear) and id(module) not in inside]

    def disk_names_of_block(self, index: int) -> list[str]:
        """Disk names of everything that `load_block` reads, parts of what several blocks share left out."""
        inside = f"{self.block_path(index)}."
        return [disk for name in self.names() if name.startswith(inside) for disk in self.disk_names(name)]

    def load_block(self, index: int, device: torch.device, read: Callable[[str], Tensor] | None = None) -> nn.Module:
        """The block with its weights in float32 on `device`. Call `release_block` when done.

        read: gives a tensor by its name on disk, in the place of the source's own.
        """
        block = self._block(index)
        self._materialize(block, self.block_path(index), device, read=read)
        return block

    def release_block(self, index: int) -> None:
        """Give the block's weights back."""
        _to_meta(self._block(index))

    def start(self, batches: Iterable[tuple[Tensor, Tensor | None]], device: torch.device) -> Iterable[BlockInputs]:
        """For each batch of (token ids `[rows, tokens]`, mask or None) what the first block gets, in float32.

        Weights outside the blocks exist while this generator runs. Raises ModelError where the model cannot be run
        or does not visit its blocks once and in order.
        """
        self._choose_list(device)
        with self._weights_of(self._decoder, self._without_weights, device):
            for ids, mask in batches:
                yield self._record(ids.to(device), None if mask is None else mask.to(device))

    def _choose_list(self, device: torch.device) -> None:
        """Take the largest list of those that the model visits with token ids alone, where it can be asked; once."""
        lists = self._runnable.lists
        if self._manner is not None or len(lists) == 1:
            return
        without = {id(part) for blocks in lists for block in blocks for part in block.modules()}
        ids = torch.arange(_TOKENS_TO_ASK, device=device).expand(2, _TOKENS_TO_ASK)
        with self._weights_of(self._decoder, without, device):
            called = lists_called(self._runnable.reach, lists, ids)
        if called:
            self._take(
                next(blocks for blocks in lists if blocks.where in called),
                [blocks for blocks in lists if blocks.where not in called],
            )

    @contextmanager
    def _weights_of(self, part: nn.Module, without: Collection[int], device: torch.device) -> Iterator[None]:
        """Inside, everything below `part` has weights but for the modules `without`, by their id."""
        prefix = _prefix_of(self._model, part)
        filled = [(path, module) for path, module in part.named_modules() if id(module) not in without]
        try:
            for path, module in filled:
                self._materialize(module, f"{prefix}{path}".strip("."), device, recurse=False)
            yield
        finally:
            for _, module in filled:
                _to_meta(module, recurse=False)

    @contextmanager
    def head(self, device: torch.device) -> Iterator[Callable[[Tensor, Tensor, Tensor | None], Tensor]]:
        """A function (ids, hidden, mask) -> logits: what follows the last block, differentiable in `hidden`.

        ids: `[rows, tokens]`, only to satisfy the model's own forward; hidden: `[rows, tokens, width]`, the last
        block's output. The weights outside the blocks exist inside the context.
        """

        def logits(ids: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
            if self._manner is None:
                self._record(ids, mask)
            answer, given = self._manner.answer, laid_out(hidden, self._manner.ahead)
            with blocks_replaced(self._blocks, lambda index: lambda *args, **kwargs: answer(given, index)):
                return self._runnable.logits(ids, mask)

        self._choose_list(device)
        with self._weights_of(self._model, self._without_weights, device):
            yield logits

    def _record(self, ids: Tensor, mask: Tensor | None) -> BlockInputs:
        """The model's own forward with recorders for blocks."""
        runs = self._runnable
        reach = runs.reach if self._manner is None else runs.reach_blocks(self.block_path(self.num_blocks - 1))
        try:
            recorded, manner = record_calls(reach, self._blocks, ids, mask, self._manner)
        except ModelError as error:
            raise ModelError(f"{error}{runs.advice}") from error
        if self._manner is None:
            self._manner = manner
            self._call_only(manner.visited)
        return recorded

    def _is_buffer(self, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        return leaf in self._modules[path]._buffers

    def _parameter(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        return getattr(self._modules[path], leaf)

    def _materialize(
        self,
        module: nn.Module,
        path: str,
        device: torch.device,
        *,
        recurse: bool = True,
        read: Callable[[str], Tensor] | None = None,
    ) -> None:
        named = list(module.named_parameters(recurse=recurse)) + list(module.named_buffers(recurse=recurse))
        for name, value in named:
            full = f"{path}.{name}" if path else name
            if not self.disk_names(full):
                full = self._name_of_shared.get(self._shared.get(full), full)
            there = bool(self.disk_names(full))
            if not there and value.device.type == "meta":
                raise ModelError(f"the checkpoint has no tensor for {path}.{name}, which the model needs")
            owner_path, _, leaf = name.rpartition(".")
            owner = self._modules[f"{path}.{owner_path}".strip(".")]
            if not there:
                owner._buffers[leaf] = value.to(device)
                continue
            # the bytes as they are go to the device first: half as many, and a GPU converts them at once
            stored = self._stored(full, value, read or self._source.read, device).to(device, non_blocking=True)
            filled = stored.to(torch.float32) if stored.is_floating_point() else stored
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(filled, requires_grad=False)
            else:
                owner._buffers[leaf] = filled

    def _stored(self, name: str, like: Tensor, read: Callable[[str], Tensor], device: torch.device) -> Tensor:
        """A parameter or buffer in its stored dtype, put together on `device` where the checkpoint has it in parts."""
        disk = self.disk_name(name)
        if disk is not None:
            return read(disk)
        return joined(self._places.slices[name], like.shape, read, device)


def _runnable(model: Any, trust_remote_code: bool) -> Runnable:
    if isinstance(model, PlainModel):
        return plain_runnable(model)
    return transformers_runnable(empty_model(model, trust_remote_code=trust_remote_code, experts_apart=True))


def _prefix_of(model: nn.Module, part: nn.Module) -> str:
    for path, module in model.named_modules():
        if module is part:
            return f"{path}." if path else ""
    return ""


def _to_meta(module: nn.Module, *, recurse: bool = True) -> None:
    for owner in module.modules() if recurse else (module,):
        for leaf, value in owner._parameters.items():
            if value is not None:
                owner._parameters[leaf] = nn.Parameter(value.detach().to("meta"), requires_grad=False)
