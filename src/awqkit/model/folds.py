"""Finding folds by asking the block, and proving them. No architecture, module or parameter name decides anything.

Discovery: multiply a producer's channels by distinct random factors and look at every linear's input. Where channel
j of an input grew by exactly the factor of producer channel c, `channel_of[j] = c`; undo it there and look again, until
nothing new appears. Repeating matters: an uncompensated reader changes everything behind it.

Proof: the same with random powers of two, written into the real parameters. An exact fold then leaves the block's
output unchanged to the last bits, because a power of two commutes with every rounding on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from awqkit.model.block_calls import Handed, leaves
from awqkit.model.channel_factors import distinct_factors, read_factors
from awqkit.model.matrices import Expert, expert_of, matrix_of, matrix_parameters, parameter_of, siblings_of
from awqkit.model.observe import TRANSPOSED, LinearWatch, both_ways
from awqkit.model.routing import ChosenExperts, spread
from awqkit.model.structure import BlockStructure, Fold, LinearInput, LinearView, Refusal

RunBlock = Callable[[], Tensor | Handed]

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
    output: Handed | None = None


_Ask = Callable[..., "tuple[dict[str, Tensor], _Look] | None"]


@dataclass(frozen=True, slots=True)
class _Producer:
    kind: str
    parameters: tuple[str, ...]
    offset: str | None
    linear: LinearView | None
    num_channels: int


def discover(block: nn.Module, run: RunBlock, hidden: Tensor, *, look_for_folds: bool = True) -> BlockStructure:
    """The structure of a block with real weights. `run()` runs it on `hidden` `[rows, tokens, width]` (float32) and
    gives its output, alone or with what it hands on.

    look_for_folds: whether to ask where scales can be absorbed, or for linears and their inputs alone. Parameters
    are changed on the way and restored exactly.
    """
    weights, experts = matrix_parameters(block), _experts(block)
    run = every_expert(run, experts)
    plain = _look(block, run, weights)
    views = _linear_views(block, weights, plain, hidden.shape[:2].numel())
    inputs = _linear_inputs(plain, views)
    folds: list[Fold] = []
    refusals = []
    for producer in _producers(block, views, plain) if look_for_folds else ():
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
            folds += _of_every_expert(fold, views)
    called = {parameter_of(view.weight) for view in views}
    others = tuple(name for name, value in block.named_parameters() if value.dim() > 1 and name not in called)
    return BlockStructure(tuple(views), inputs, tuple(folds), tuple(refusals), others, experts)


def every_expert(run: RunBlock, experts: Sequence[int]) -> RunBlock:
    """The same run with its tokens sent to all experts in turn, where there are any. experts: how many there may be."""

    def spread_run() -> Tensor | Handed:
        with ChosenExperts(experts, spread):
            return run()

    return spread_run if experts else run


def _of_every_expert(fold: Fold, views: Sequence[LinearView]) -> list[Fold]:
    """A fold between the matrices of one expert, found in the first, for each of them; any other fold as it is."""
    named = {view.name: view for view in views}
    producer = named.get(fold.producer_linear or "")
    if producer is None or producer.expert is None:
        return [fold]
    inside = [named[name].expert for name in fold.consumers]
    if any(of is None or (of.experts, of.index) != (producer.expert.experts, producer.expert.index) for of in inside):
        return [fold]
    of_expert = {(view.expert.index, view.expert.part): view for view in views if _in(view, producer.expert.experts)}
    parts = {producer.expert.part, *(of.part for of in inside if of)}
    numbers = sorted({number for number, _ in of_expert})
    found = []
    for number in (number for number in numbers if all((number, part) in of_expert for part in parts)):
        rows = of_expert[number, producer.expert.part]
        readers = {of_expert[number, named[name].expert.part].name: of for name, of in fold.channel_of.items()}
        parameters = (rows.weight,) if rows.bias is None else (rows.weight, rows.bias)
        found.append(replace(
            fold, producer=parameters, producer_linear=rows.name, consumers=tuple(readers), channel_of=readers
        ))  # fmt: skip
    return found


def _in(view: LinearView, experts: str) -> bool:
    return view.expert is not None and view.expert.experts == experts


def _experts(block: nn.Module) -> tuple[int, ...]:
    """How many matrices each stack of the block holds, and how many modules each list; convolutions are no stacks."""
    stacks = {value.shape[0] for value in block.parameters() if value.dim() == 3 and min(value.shape[1:]) > 1}
    lists = {len(module) for module in block.modules() if isinstance(module, nn.ModuleList) and len(module) > 1}
    return tuple(sorted(stacks | lists))


def prove(
    block: nn.Module, run: RunBlock, hidden: Tensor, structure: BlockStructure, folds: Sequence[Fold], seed: int = 0
) -> float:
    """The largest change of the block's output, relative to its contribution, under random powers of two.

    The folds are exact where this is at most PROOF_TOLERANCE: all at once, each with factors of its own. With
    experts a second run reaches them all. Parameters are restored exactly.
    """
    runs = [run, every_expert(run, structure.experts)] if structure.experts else [run]
    plain = [_handed(each()) for each in runs]
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: value.data for name, value in block.named_parameters()}
    touched = {name for fold in folds for name in fold.producer}
    touched |= {structure.linear(name).weight for fold in folds for name in fold.consumers}
    saved = {name: matrix_of(parameters, name).clone() for name in touched}
    try:
        for fold in folds:
            _scale_by_powers(parameters, structure, fold, generator)
        changed = [_handed(each()) for each in runs]
    finally:
        for name, value in saved.items():
            matrix_of(parameters, name).copy_(value)
    return max(_relative_change(after, before, hidden) for after, before in zip(changed, plain, strict=True))


def proved_together(structure: BlockStructure) -> list[tuple[Fold, ...]]:
    """The folds of a structure in the groups that one proof serves: those of all experts' like parts are one."""
    groups: dict[tuple[str, ...], list[Fold]] = {}
    for fold in structure.folds:
        expert = structure.linear(fold.producer_linear).expert if fold.producer_linear else None
        key = (fold.label,) if expert is None else (expert.experts, expert.part)
        groups.setdefault(key, []).append(fold)
    return [tuple(group) for group in groups.values()]


def proof_errors(
    block: nn.Module, run: RunBlock, hidden: Tensor, structure: BlockStructure, folds: Sequence[Fold]
) -> list[float]:
    """`prove` for each fold: of all together where that is exact, else of one after the other."""
    error = prove(block, run, hidden, structure, folds)
    if error <= PROOF_TOLERANCE or len(folds) == 1:
        return [error] * len(folds)
    return [prove(block, run, hidden, structure, (fold,)) for fold in folds]


def _scale_by_powers(
    parameters: Mapping[str, Tensor], structure: BlockStructure, fold: Fold, generator: torch.Generator
) -> None:
    """Multiply a producer by random powers of two, and divide its consumers by them, in place."""
    factor = torch.exp2(torch.randint(-2, 3, (fold.num_channels,), generator=generator).float()).to(fold.read.device)
    factor = torch.where(fold.read, factor, torch.ones_like(factor))
    rows = structure.linear(fold.producer_linear) if fold.producer_linear else None
    for name in fold.producer:
        value = matrix_of(parameters, name)
        value = rows.oriented(value) if rows is not None and name == rows.weight else value
        value.copy_(_divided(value, 1.0 / factor, name == fold.offset))
    for consumer in fold.consumers:
        view, channel_of = structure.linear(consumer), fold.channel_of[consumer]
        undo = torch.where(channel_of >= 0, 1.0 / factor[channel_of.clamp(min=0)], torch.ones_like(factor[:1]))
        view.oriented(matrix_of(parameters, view.weight)).mul_(undo)


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
        look.output = _handed(run())
    return look


def _call(view: LinearView) -> str:
    """The name by which a look at the block knows a linear's weight."""
    return view.weight + TRANSPOSED if view.transposed else view.weight


def _linear_views(block: nn.Module, weights: Mapping[str, Tensor], plain: _Look, num_tokens: int) -> list[LinearView]:
    """Every matrix that is called as a linear, in order of the calls; of an expert's, with those of all its siblings.

    num_tokens: of the whole input; what meets fewer, or a stack, is an expert.
    """
    order: list[tuple[str, bool]] = []
    for key in plain.order:
        name, transposed = key.removesuffix(TRANSPOSED), key.endswith(TRANSPOSED)
        other = name if transposed else name + TRANSPOSED
        if key not in plain.repeated and other not in plain.inputs:
            order.append((name, transposed))  # called more than once one input does not describe it
    called = dict(order)
    siblings = {name: siblings_of(name, weights) for name in called}
    orientations = {name: {called[each] for each in alike if each in called} for name, alike in siblings.items()}
    views: dict[str, LinearView] = {}
    for name, transposed in order:
        of = expert_of(name)
        if of is None or not _is_expert(name, siblings[name], plain, num_tokens):
            views.setdefault(name, _view(block, weights, name, transposed, None))
            continue
        parts = dict.fromkeys(
            each for each, _ in order if _holds(each, of) and len(orientations[each]) == 1
        )  # of this expert, in the order in which it calls them
        for number, _ in enumerate(siblings[name]):
            for part in parts:
                if len(siblings[part]) == len(siblings[name]):
                    each = siblings[part][number]
                    views.setdefault(each, _view(block, weights, each, called[part], expert_of(each)))
    return list(views.values())


def _holds(name: str, expert: Expert) -> bool:
    """Whether the matrix belongs to this very expert."""
    of = expert_of(name)
    return of is not None and (of.experts, of.index) == (expert.experts, expert.index)


def _is_expert(name: str, siblings: Sequence[str], plain: _Look, num_tokens: int) -> bool:
    if parameter_of(name) != name:
        return True
    met = [_tokens(plain.inputs[key]) for each in siblings for key in (each, each + TRANSPOSED) if key in plain.inputs]
    return len(siblings) > 1 and (len(met) < len(siblings) or min(met) < num_tokens)


def _tokens(inputs: Tensor) -> int:
    return inputs.shape[:-1].numel()


def _view(
    block: nn.Module, weights: Mapping[str, Tensor], name: str, transposed: bool, expert: Expert | None
) -> LinearView:
    shape = tuple(reversed(weights[name].shape)) if transposed else tuple(weights[name].shape)
    if parameter_of(name) != name:
        assert expert is not None
        return LinearView(expert.linear, name, None, shape, transposed, expert)
    path, _, _ = name.rpartition(".")
    owner = block.get_submodule(path)
    vectors = [leaf for leaf, value in owner.named_parameters(recurse=False) if value.dim() == 1]
    bias = f"{path}.{vectors[0]}" if len(vectors) == 1 else None
    return LinearView(path or name, name, bias, shape, transposed, expert)


def _linear_inputs(plain: _Look, views: Sequence[LinearView]) -> tuple[LinearInput, ...]:
    """What reads what, by the tensors of the calls; an expert that was not called reads as its siblings do."""
    shared: dict[tuple[str, str], str] = {}  # an expert's part, by what holds them -> the part whose input it reads
    readers: dict[tuple, list[LinearView]] = {}
    for view in views:
        if _call(view) not in plain.inputs:
            continue
        tensor = plain.inputs[_call(view)]
        alike = readers.setdefault((tensor.data_ptr(), tuple(tensor.shape), tensor.stride()), [])
        alike.append(view)
        if view.expert is not None:
            shared.setdefault((view.expert.experts, view.expert.part), (alike[0].expert or view.expert).part)
    together: dict[tuple, list[LinearView]] = {}
    names = {view.name: key for key, alike in readers.items() for view in alike if view.expert is None}
    for view in views:
        of, key = view.expert, names.get(view.name)
        if of is not None:
            key = (of.experts, of.index, shared[of.experts, of.part])
        together.setdefault(key, []).append(view)
    return tuple(
        LinearInput(alike[0].name, tuple(view.name for view in alike), alike[0].shape[1], alike[0].expert)
        for alike in together.values()
    )


def _producers(block: nn.Module, views: Sequence[LinearView], plain: _Look) -> Iterator[_Producer]:
    """Everything whose channels might be scaled: vectors of modules without a matrix, and rows of linears.

    Of the experts the first that was called stands for all.
    """
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
    asked: set[tuple[str, str]] = set()
    for view in views:
        if view.expert is not None:
            alike = (view.expert.experts, view.expert.part)
            if alike in asked or _call(view) not in plain.inputs:
                continue
            asked.add(alike)
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
    factor = distinct_factors(producer.num_channels, plain.output.hidden.device)
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
                before, after = plain.inputs.get(_call(view)), look.inputs.get(_call(view))
                if view.name in channel_of or view is producer.linear or before is None or after is None:
                    continue
                mapping = read_factors(before, after, factor) if before.shape == after.shape else None
                if mapping is not None:
                    new[view.name] = mapping
                    measured = torch.where(mapping >= 0, factor[mapping.clamp(min=0)], torch.ones_like(factor[:1]))
                    undo[_call(view)] = 1.0 / measured
            if not new:
                break
            channel_of |= new
    if not channel_of:
        return None
    if producer.linear is None or producer.linear.expert is None:
        channel_of = _with_siblings(channel_of, views, plain)
    return ({view.name: channel_of[view.name] for view in views if view.name in channel_of}, look)


def _with_siblings(channel_of: dict[str, Tensor], views: Sequence[LinearView], plain: _Look) -> dict[str, Tensor]:
    """What was found in an expert holds for those of its siblings that no token met."""
    named = {view.name: view for view in views}
    known = {(of.experts, of.part): mapping for name, mapping in channel_of.items() if (of := named[name].expert)}
    unmet = {
        view.name: known[of.experts, of.part]
        for view in views
        if (of := view.expert) and _call(view) not in plain.inputs and (of.experts, of.part) in known
    }
    return channel_of | unmet


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


def _handed(given: Tensor | Handed) -> Handed:
    return given if isinstance(given, Handed) else Handed(given)


def _relative_change(changed: Handed | None, plain: Handed | None, hidden: Tensor) -> float:
    """The largest change of any row, relative to what the block adds to that row; inf where it is not a number.

    Of what is handed on beside, relative to its own size; inf where whole numbers are others.
    """
    assert changed is not None and plain is not None
    changes = [_largest(changed.hidden - plain.hidden, plain.hidden - hidden)]
    for after, before in zip(leaves(changed.beside), leaves(plain.beside), strict=True):
        if before.is_floating_point() and after.shape == before.shape:
            changes.append(_largest(after - before, before))
        elif not torch.equal(after, before):
            return float("inf")
    return max(change if change == change else float("inf") for change in changes)


def _largest(change: Tensor, like: Tensor) -> float:
    """The largest change of any row, relative to the largest number of `like` there."""
    size = like.abs().flatten(1).amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return float((change.abs().flatten(1).amax(dim=1) / size).max())
