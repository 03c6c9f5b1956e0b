"""Where a model's decoder blocks are, by structure."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from awqkit.errors import ModelError


def find_block_list(model: nn.Module) -> str:
    """The path of the outermost module list with the most parameters inside the text decoder.

    Raises ModelError where there is none, and where two of its blocks hold one parameter: what one block stores would
    change the other.
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
    found = max(outermost, key=lambda path: outermost[path])
    refuse_shared(lists[found], found)
    return found


def _text_decoder(model: nn.Module) -> nn.Module:
    """The part that transformers calls the decoder: of a model that sees or hears as well, the one for text."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not isinstance(decoder, nn.Module) or not any(isinstance(part, nn.ModuleList) for part in decoder.modules()):
        return model
    return decoder


def refuse_shared(blocks: Iterable[nn.Module], where: str) -> None:
    """Raises ModelError where two blocks hold one parameter."""
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for name, value in block.named_parameters():
            first = owner.setdefault(id(value), index)
            if first != index:
                raise ModelError(f"{where}: blocks {first} and {index} share {name}: cannot quantize them one by one")
