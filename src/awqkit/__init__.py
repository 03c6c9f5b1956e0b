"""awqkit: low-bit checkpoints by activation-aware weight quantization, every choice proved and measured.

    from awqkit import PlainModel, Recipe, quantize, load, evaluate

Names are imported when first used, so that `import awqkit` does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "PlainModel",
    "Recipe",
    "RunOptions",
    "__version__",
    "compare",
    "convert",
    "estimate",
    "evaluate",
    "folds",
    "inspect",
    "load",
    "quantize",
]

if TYPE_CHECKING:
    from awqkit.api.compare import compare
    from awqkit.api.convert import convert
    from awqkit.api.estimate import estimate
    from awqkit.api.evaluate import evaluate
    from awqkit.api.folds import folds
    from awqkit.api.inspect import inspect
    from awqkit.api.load import load
    from awqkit.api.quantize import quantize
    from awqkit.model.plain_model import PlainModel
    from awqkit.options import RunOptions
    from awqkit.recipe import Recipe

_HOMES = {
    "PlainModel": "awqkit.model.plain_model",
    "Recipe": "awqkit.recipe",
    "RunOptions": "awqkit.options",
    "compare": "awqkit.api.compare",
    "convert": "awqkit.api.convert",
    "estimate": "awqkit.api.estimate",
    "evaluate": "awqkit.api.evaluate",
    "folds": "awqkit.api.folds",
    "inspect": "awqkit.api.inspect",
    "load": "awqkit.api.load",
    "quantize": "awqkit.api.quantize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'awqkit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
