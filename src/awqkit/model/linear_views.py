"""The linears of a block and who reads which input, from one look at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from awqkit.model.block_look import Look, call_name
from awqkit.model.matrices import Expert, expert_of, parameter_of, siblings_of
from awqkit.model.observe import TRANSPOSED
from awqkit.model.structure import LinearInput, LinearView


def linear_views(block: nn.Module, weights: Mapping[str, Tensor], plain: Look, num_tokens: int) -> list[LinearView]:
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


def _is_expert(name: str, siblings: Sequence[str], plain: Look, num_tokens: int) -> bool:
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


def linear_inputs(plain: Look, views: Sequence[LinearView]) -> tuple[LinearInput, ...]:
    """What reads what, by the tensors of the calls; an expert that was not called reads as its siblings do."""
    shared: dict[tuple[str, str], str] = {}  # an expert's part, by what holds them -> the part whose input it reads
    readers: dict[tuple, list[LinearView]] = {}
    for view in views:
        if call_name(view) not in plain.inputs:
            continue
        tensor = plain.inputs[call_name(view)]
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
