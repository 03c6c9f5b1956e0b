"""The matrices of a block by name: two-dimensional parameters, and those that lie in a stack, one for each expert.

A matrix of a stack goes by the parameter's name and its number, `mlp.experts.up_proj[3]`; no parameter is called so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor, nn

_IN_STACK = re.compile(r"(?P<stack>.+)\[(?P<index>\d+)\]")
_IN_LIST = re.compile(r"(?P<experts>.+)\.(?P<index>\d+)\.(?P<part>.+)")


@cache
def stack_and_index(name: str) -> tuple[str, int] | None:
    """The parameter and the number of a matrix in a stack, None for a matrix that is a parameter."""
    found = _IN_STACK.fullmatch(name)
    return None if found is None else (found["stack"], int(found["index"]))


def parameter_of(name: str) -> str:
    """The parameter that a matrix, by its name, is or lies in."""
    found = stack_and_index(name)
    return name if found is None else found[0]


def matrix_of(parameters: Mapping[str, Tensor], name: str) -> Tensor:
    """A parameter, or a matrix of a stack: a view, so that what is written into it is in the parameter."""
    found = stack_and_index(name)
    return parameters[name] if found is None else parameters[found[0]][found[1]]


def with_stacks_whole(parameters: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that are changed: those given, and stacks of which matrices are, with their other ones."""
    whole: dict[str, Tensor] = {}
    for name, value in changed.items():
        found = stack_and_index(name)
        if found is None:
            whole[name] = value
        else:
            stack, index = found
            whole.setdefault(stack, parameters[stack].clone())[index] = value
    return whole


def matrix_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Every matrix below `module`, by its name there: what may turn out to be a linear's weight."""
    found = {}
    for name, value in module.named_parameters():
        if value.dim() == 2:
            found[name] = value
        elif value.dim() == 3 and min(value.shape[1:]) > 1:
            found |= {f"{name}[{index}]": value.data[index] for index in range(len(value))}
    return found


@dataclass(frozen=True, slots=True)
class Expert:
    """A matrix as one of several alike. experts: path of what holds them. part: which of an expert's matrices."""

    experts: str
    index: int
    part: str

    @property
    def linear(self) -> str:
        """What the linear is called: `mlp.experts.3.up_proj`, whether in a stack or in a list of modules."""
        return f"{self.experts}.{self.index}.{self.part.removesuffix('.weight')}".removeprefix(".")


def expert_of(name: str) -> Expert | None:
    """How a matrix is numbered, if it is: in a stack, or below a numbered module."""
    stacked = stack_and_index(name)
    if stacked is not None:
        path, _, leaf = stacked[0].rpartition(".")
        return Expert(path, stacked[1], leaf)
    listed = _IN_LIST.fullmatch(name)
    return None if listed is None else Expert(listed["experts"], int(listed["index"]), listed["part"])


def siblings_of(name: str, matrices: Mapping[str, Tensor]) -> list[str]:
    """All matrices that differ from this one in their number alone, of the same shape, in order; itself is there."""
    one = expert_of(name)
    if one is None:
        return [name]
    numbered = ((each, expert_of(each)) for each in matrices if matrices[each].shape == matrices[name].shape)
    alike = [(of.index, each) for each, of in numbered if of and (of.experts, of.part) == (one.experts, one.part)]
    return [each for _, each in sorted(alike)]
