"""Where a model's decoder blocks are, by structure, and what they share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from awqkit.errors import ModelError


def find_block_lists(model: nn.Module) -> list[str]:
    """The paths of the outermost module lists inside the text decoder, those with the most parameters first.

    Raises ModelError where there is none.
    """
    inside = {id(module) for module in _text_decoder(model).modules()}
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and id(module) in inside
    }
    outermost = {
        path: sum(value.numel() for value in module.parameters())
        for path, module in lists.items()
        if not any(path.startswith(f"{other}.") for other in lists)
    }
    if not outermost or max(outermost.values()) == 0:
        raise ModelError(
            f"no list of decoder blocks found in {type(model).__name__}: cannot quantize it block by block"
        )
    return sorted((path for path in outermost if outermost[path]), key=lambda path: -outermost[path])


def _text_decoder(model: nn.Module) -> nn.Module:
    """The part that transformers calls the decoder: of a model that sees or hears as well, the one for text."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not isinstance(decoder, nn.Module) or not any(isinstance(part, nn.ModuleList) for part in decoder.modules()):
        return model
    return decoder


def shared_parameters(blocks: Sequence[nn.Module]) -> list[dict[str, tuple[int, ...]]]:
    """For every block its parameters that others compute with as well, each with the numbers of all these blocks."""
    owners: dict[int, dict[int, None]] = {}
    for index, block in enumerate(blocks):
        for value in block.parameters():
            owners.setdefault(id(value), {})[index] = None
    return [
        {name: tuple(owners[id(value)]) for name, value in block.named_parameters() if len(owners[id(value)]) > 1}
        for block in blocks
    ]
