"""Finding folds by asking the block, and proving them. No architecture, module or parameter name decides anything.

Discovery: multiply a producer's channels by distinct random factors and look at every linear's input. Where channel
j of an input grew by exactly the factor of producer channel c, `channel_of[j] = c`; undo it there and look again, until
nothing new appears. Repeating matters: an uncompensated reader changes everything behind it.

Proof: the same with random powers of two, written into the real parameters. An exact fold then leaves the block's
output unchanged to the last bits, because a power of two commutes with every rounding on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from awqkit.model.channel_factors import distinct_factors, read_factors
from awqkit.model.observe import TRANSPOSED, LinearWatch, both_ways, matrix_parameters
from awqkit.model.structure import BlockStructure, Fold, LinearInput, LinearView, Refusal

RunBlock = Callable[[], Tensor]

PROOF_TOLERANCE = 1e-5  # largest change of the output under powers of two, relative to the block's own contribution
_ROUGH_TOLERANCE = 1e-3  # the same under random factors, before the proof
_MAX_PASSES = 8
_MAX_ROWS_ASKED = 400  # of a fused linear; a hundred heads whose q, k and v lie side by side take about as many


@dataclass(slots=True)
class _Look:
    """One run of the block: every linear's inputs in order of the calls, and the block's output."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    repeated: set[str] = field(default_factory=set)
    output: Tensor | None = None


_Ask = Callable[..., "tuple[dict[str, Tensor], _Look] | None"]


@dataclass(frozen=True, slots=True)
class _Producer:
    kind: str
    parameters: tuple[str, ...]
    offset: str | None
    linear: LinearView | None
    num_channels: int


def discover(block: nn.Module, run: RunBlock, hidden: Tensor, *, look_for_folds: bool = True) -> BlockStructure:
    """The structure of a block with real weights. `run()` runs it on `hidden` `[rows, tokens, width]` (float32).

    look_for_folds: whether to ask where scales can be absorbed, or for linears and their inputs alone. Parameters
    are changed on the way and restored exactly.
    """
    weights = matrix_parameters(block)
    plain = _look(block, run, weights)
    views = _linear_views(block, weights, plain)
    inputs = _linear_inputs(plain, views)
    folds, refusals = [], []
    for producer in _producers(block, views) if look_for_folds else ():
        ask = partial(_consumers, block, run, weights, views, plain, producer)
        found = ask() or (_of_some_rows(ask, producer) if producer.linear is not None else None)
        if not found:
            continue
        channel_of, look = found
        fold = Fold(
            producer.kind,
            producer.parameters,
            producer.offset,
            producer.linear.name if producer.linear else None,
            producer.num_channels,
            tuple(channel_of),
            channel_of,
        )
        change = _relative_change(look.output, plain.output, hidden)
        if change > _ROUGH_TOLERANCE:
            reason = f"something besides the linears it was found in reads it (output changes by {change:.1e})"
            refusals.append(Refusal(fold.label, fold.consumers, reason))
        elif any(fold.label == other.label for other in folds):
            continue
        else:
            folds.append(fold)
    called = {view.weight for view in views}
    others = tuple(name for name, value in block.named_parameters() if value.dim() > 1 and name not in called)
    return BlockStructure(tuple(views), inputs, tuple(folds), tuple(refusals), others, _experts(block))


def _experts(block: nn.Module) -> tuple[int, ...]:
    """How many matrices each stack of the block holds, and how many modules each list; convolutions are no stacks."""
    stacks = {value.shape[0] for value in block.parameters() if value.dim() == 3 and min(value.shape[1:]) > 1}
    lists = {len(module) for module in block.modules() if isinstance(module, nn.ModuleList) and len(module) > 1}
    return tuple(sorted(stacks | lists))


def prove(
    block: nn.Module, run: RunBlock, hidden: Tensor, structure: BlockStructure, fold: Fold, seed: int = 0
) -> float:
    """The largest change of the block's output, relative to its contribution, under random powers of two.

    The fold is exact where this is at most PROOF_TOLERANCE. Parameters are restored exactly.
    """
    plain = run()
    generator = torch.Generator().manual_seed(seed)
    factor = torch.exp2(torch.randint(-2, 3, (fold.num_channels,), generator=generator).float()).to(hidden.device)
    factor = torch.where(fold.read, factor, torch.ones_like(factor))
    parameters = dict(block.named_parameters())
    touched = [*fold.producer, *(structure.linear(name).weight for name in fold.consumers)]
    rows = structure.linear(fold.producer_linear) if fold.producer_linear else None
    saved = {name: parameters[name].data for name in touched}
    try:
        for name in fold.producer:
            turned = rows.oriented(saved[name]) if rows is not None and name == rows.weight else saved[name]
            divided = _divided(turned, 1.0 / factor, name == fold.offset)
            parameters[name].data = rows.oriented(divided) if turned is not saved[name] else divided
        for consumer in fold.consumers:
            view, channel_of = structure.linear(consumer), fold.channel_of[consumer]
            undo = torch.where(
                channel_of >= 0, 1.0 / factor[channel_of.clamp(min=0)], torch.ones((), device=hidden.device)
            )
            parameters[view.weight].data = view.oriented(view.oriented(parameters[view.weight].data) * undo)
        changed = run()
    finally:
        for name, value in saved.items():
            parameters[name].data = value
    return _relative_change(changed, plain, hidden)


def _divided(value: Tensor, scale: Tensor, offset: bool) -> Tensor:
    """A producer's parameter with its first dimension divided by `scale`; `offset` for the w of a norm by 1 + w."""
    scale = scale.reshape(-1, *(1,) * (value.dim() - 1))
    return (1.0 + value) / scale - 1.0 if offset else value / scale


def _look(
    block: nn.Module,
    run: RunBlock,
    weights: Mapping[str, Tensor],
    gain: tuple[str, Tensor] | None = None,
    undo: Mapping[str, Tensor] | None = None,
) -> _Look:
    """Run the block once. `gain` multiplies a linear's outputs, `undo` the inputs of linears, by weight name."""
    look = _Look()

    def before(name: str, inputs: Tensor) -> Tensor | None:
        if name in look.inputs:
            look.repeated.add(name)
        else:
            look.order.append(name)
        look.inputs[name] = inputs  # kept alive, so that no later tensor can be mistaken for it by its address
        return inputs * undo[name] if undo and name in undo else None

    def after(name: str, outputs: Tensor) -> Tensor | None:
        return outputs * gain[1] if gain is not None and name == gain[0] else None

    with torch.no_grad(), LinearWatch(both_ways(weights), before, after):
        look.output = run()
    return look


def _call(view: LinearView) -> str:
    """The name by which a look at the block knows a linear's weight."""
    return view.weight + TRANSPOSED if view.transposed else view.weight


def _linear_views(block: nn.Module, weights: Mapping[str, Tensor], plain: _Look) -> list[LinearView]:
    views = []
    for key in plain.order:
        name, transposed = key.removesuffix(TRANSPOSED), key.endswith(TRANSPOSED)
        other = name if transposed else name + TRANSPOSED
        if key in plain.repeated or other in plain.inputs:
            continue  # called more than once: one input does not describe it
        path, _, _ = name.rpartition(".")
        owner = block.get_submodule(path)
        vectors = [leaf for leaf, value in owner.named_parameters(recurse=False) if value.dim() == 1]
        bias = f"{path}.{vectors[0]}" if len(vectors) == 1 else None
        shape = tuple(reversed(weights[name].shape)) if transposed else tuple(weights[name].shape)
        views.append(LinearView(path or name, name, bias, shape, transposed))
    return views


def _linear_inputs(plain: _Look, views: Sequence[LinearView]) -> tuple[LinearInput, ...]:
    readers: dict[tuple, list[str]] = {}
    for view in views:
        tensor = plain.inputs[_call(view)]
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        readers.setdefault(key, []).append(view.name)
    return tuple(LinearInput(names[0], tuple(names), key[1][-1]) for key, names in readers.items())


def _producers(block: nn.Module, views: Sequence[LinearView]) -> Iterator[_Producer]:
    """Everything whose channels might be scaled: vectors of modules without a matrix, and rows of linears."""
    linear_owners = {view.name for view in views}
    for path, module in block.named_modules():
        vectors = {leaf: value for leaf, value in module.named_parameters(recurse=False) if value.dim() == 1}
        if not vectors or path in linear_owners or len({value.shape[0] for value in vectors.values()}) != 1:
            continue
        names = tuple(f"{path}.{leaf}" if path else leaf for leaf in vectors)
        size = next(iter(vectors.values())).shape[0]
        yield _Producer("norm", names, None, None, size)
        for name in names:
            yield _Producer("offset norm", names, name, None, size)
    for view in views:
        parameters = (view.weight,) if view.bias is None else (view.weight, view.bias)
        yield _Producer("rows", parameters, None, view, view.shape[0])


def _consumers(
    block: nn.Module,
    run: RunBlock,
    weights: Mapping[str, Tensor],
    views: Sequence[LinearView],
    plain: _Look,
    producer: _Producer,
    rows: Sequence[int] | None = None,
) -> tuple[dict[str, Tensor], _Look] | None:
    """Linears whose input carries the producer's factors, with `channel_of`, and the run with all of them undone.

    rows: the only channels that are scaled, or None for all.
    """
    factor = distinct_factors(producer.num_channels, plain.output.device)
    if rows is not None:
        scaled = torch.zeros_like(factor, dtype=torch.bool)
        scaled[list(rows)] = True
        factor = torch.where(scaled, factor, torch.ones_like(factor))
    channel_of: dict[str, Tensor] = {}
    undo: dict[str, Tensor] = {}
    gain = (_call(producer.linear), factor) if producer.linear else None
    with _scaled_vectors(block, producer, factor):
        for _ in range(_MAX_PASSES):
            look = _look(block, run, weights, gain, undo)
            new = {}
            for view in views:
                if view.name in channel_of or view is producer.linear:
                    continue
                mapping = read_factors(plain.inputs[_call(view)], look.inputs[_call(view)], factor)
                if mapping is not None:
                    new[view.name] = mapping
                    measured = torch.where(mapping >= 0, factor[mapping.clamp(min=0)], torch.ones_like(factor[:1]))
                    undo[_call(view)] = 1.0 / measured
            if not new:
                break
            channel_of |= new
    return (channel_of, look) if channel_of else None


def _of_some_rows(ask: _Ask, producer: _Producer) -> tuple[dict[str, Tensor], _Look] | None:
    """As `_consumers`, of those rows of a fused linear that can be scaled: v's of q, k and v, up's of gate and up.

    Ranges of rows are halved until the first, the middle and the last row of each agree. What a query or a gate is
    scaled by goes through a softmax or an activation and is no factor any more.
    """
    asked: dict[int, bool] = {}

    def alone(row: int) -> bool:
        if row not in asked:
            asked[row] = len(asked) < _MAX_ROWS_ASKED and ask([row]) is not None
        return asked[row]

    def scalable(first: int, end: int) -> list[int]:
        said = [alone(row) for row in (first, (first + end - 1) // 2, end - 1)]
        if not any(said):
            return []
        if all(said) and ask(range(first, end)) is not None:
            return list(range(first, end))
        if end - first <= 1:
            return []
        middle = (first + end) // 2
        return scalable(first, middle) + scalable(middle, end)

    rows = scalable(0, producer.num_channels)
    return ask(rows) if rows else None


class _scaled_vectors:
    """Inside, a norm's vectors are multiplied by the factors; rows of a linear are scaled at the call instead."""

    def __init__(self, block: nn.Module, producer: _Producer, factor: Tensor) -> None:
        self._parameters = dict(block.named_parameters())
        self._producer, self._factor = producer, factor
        self._saved: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        if self._producer.linear is None:
            for name in self._producer.parameters:
                self._saved[name] = self._parameters[name].data
                scaled = _divided(self._saved[name], 1.0 / self._factor, name == self._producer.offset)
                self._parameters[name].data = scaled

    def __exit__(self, *_: object) -> None:
        for name, value in self._saved.items():
            self._parameters[name].data = value


def _relative_change(changed: Tensor | None, plain: Tensor | None, hidden: Tensor) -> float:
    """The largest change of any row, relative to what the block adds to that row; inf where it is not a number."""
    assert changed is not None and plain is not None
    contribution = (plain - hidden).abs().flatten(1).amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    change = float(((changed - plain).abs().flatten(1).amax(dim=1) / contribution).max())
    return change if change == change else float("inf")
