"""Which recipes a comparison runs: methods by name, at several bit widths. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from awqkit.errors import UsageError
from awqkit.recipe import Recipe

ORIGINAL = "fp"
METHODS = (ORIGINAL, "rtn", "gptq", "smoothquant", "awq", "awq-clip", "fast", "balanced", "best")
DEFAULT_BITS = (4,)
_PRESETS = ("fast", "balanced", "best")
_FIXED_BITS = ("smoothquant",)  # its recipe has its own, whatever is asked for


@dataclass(frozen=True, slots=True)
class NamedRecipe:
    """A recipe and the method that it stands for."""

    method: str
    recipe: Recipe

    @property
    def label(self) -> str:
        """Unlike that of every other of a comparison."""
        return f"{self.method}, {self.recipe.bits} bits"


def contender_recipes(
    methods: Sequence[str], bits: Sequence[int], *, group_size: int | None = None, **calibration: Any
) -> list[NamedRecipe]:
    """A recipe for every method at every bit width, width by width; the original is none of them.

    calibration: fields of the Recipe for the calibration rows. Raises UsageError for an unknown method, for a width or
    group size that no recipe takes, and where nothing is left to compare.
    """
    for method in methods:
        if method not in METHODS:
            raise UsageError(f"method {method!r} is not known; it takes one or more of {', '.join(METHODS)}")
    chosen = [method for method in dict.fromkeys(methods) if method != ORIGINAL]
    if not chosen:
        raise UsageError("the original alone is nothing to compare: name a method beside it, or use awqkit evaluate")
    found = []
    for width in dict.fromkeys(bits):
        grid = {"bits": width, "group_size": group_size}
        found += [
            NamedRecipe(method, _recipe(method, {**grid, **calibration}))
            for method in chosen
            if method not in _FIXED_BITS
        ]
    found += [NamedRecipe(method, _recipe(method, calibration)) for method in chosen if method in _FIXED_BITS]
    if not found:
        raise UsageError("no bit width was given; give one or more of 2, 3, 4 and 8")
    return found


def _recipe(method: str, fields: dict[str, Any]) -> Recipe:
    if method in _PRESETS:
        return Recipe.preset(method, **fields)
    if method == "awq":
        return Recipe.method("awq", clip="none", **fields)
    return Recipe.method(method.removesuffix("-clip"), **{**fields, "name": method})
