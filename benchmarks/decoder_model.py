"""Llama-shaped models without a checkpoint: random weights made on the device, dense or on a 4-bit grid."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from awqkit.evaluation.load import put_module
from awqkit.evaluation.packed_linear import PackedLinear
from awqkit.evaluation.shared_inputs import join_products
from awqkit.kernels.int4_matmul import CHUNKS
from awqkit.model.transformers_bridge import empty_model
from awqkit.numerics.grid import Grid, QuantizedWeight

DENSE = "bf16"
CHUNKS_APART = "chunks-apart"  # CHUNKS with every product a launch of its own
_STD = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama; head_dim stays when `hidden` changes."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int

    def resized(self, layers: int | None, hidden: int | None) -> Shape:
        """With other numbers of layers and channels, everything else in proportion."""
        layers = layers or self.layers
        if not hidden:
            return replace(self, layers=layers)
        head_dim, share = self.hidden // self.heads, hidden / self.hidden
        heads = hidden // head_dim
        fitting = [n for n in range(1, heads + 1) if heads % n == 0 and n <= self.key_value_heads * share + 1e-9]
        mlp = max(128, round(self.mlp * share / 128) * 128)
        vocabulary = min(self.vocabulary, 8 * hidden)
        return Shape(heads * head_dim, mlp, layers, heads, max(fitting, default=1), vocabulary)

    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of the linears of a block, each kind once."""
        key_value = self.key_value_heads * (self.hidden // self.heads)
        kinds = [(self.hidden, self.hidden), (key_value, self.hidden), (self.mlp, self.hidden), (self.hidden, self.mlp)]
        return list(dict.fromkeys(kinds))

    def joined_linears(self) -> list[tuple[int, int]]:
        """(out, in) of what q, k and v are together, and gate and up."""
        key_value = self.key_value_heads * (self.hidden // self.heads)
        return [(self.hidden + 2 * key_value, self.hidden), (2 * self.mlp, self.hidden)]


SHAPES = {
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152),
}


def fitting_group_size(shape: Shape, wanted: int) -> int:
    """`wanted`, halved until it divides every row."""
    while any(columns % wanted for _, columns in shape.linears()):
        wanted //= 2
    return wanted


def build(shape: Shape, kind: str, dtype: torch.dtype, group_size: int, positions: int, device: torch.device) -> Any:
    """A causal language model with random weights. kind: DENSE, or the int4 kernel that its blocks' linears use.

    Products of one input are joined as `awqkit.load` joins them, but for CHUNKS_APART.
    """
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
    )
    model = empty_model(config)
    torch.manual_seed(0)
    if kind != DENSE:
        linears = [(path, part) for path, part in model.named_modules() if isinstance(part, nn.Linear)]
        for path, part in linears:
            if part is not model.get_output_embeddings():
                weight = random_weight(part.out_features, part.in_features, group_size, device)
                kernel = CHUNKS if kind == CHUNKS_APART else kind
                put_module(model, path, PackedLinear(weight, None, dtype, kernel=kernel))
    for name, value in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        filled = torch.empty(value.shape, dtype=dtype, device=device)
        filled = filled.fill_(1.0) if value.dim() == 1 else filled.normal_(std=_STD)
        model.get_submodule(parent)._parameters[leaf] = nn.Parameter(filled, requires_grad=False)
    for name, value in list(model.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = value.to(device)
    if kind == CHUNKS:
        join_products(model.eval(), device)
    return model.eval()


def random_weight(rows: int, columns: int, group_size: int, device: torch.device) -> QuantizedWeight:
    """Random codes whose grid spans what groups of N(0, 0.02²) span, Δ exact in bfloat16."""
    groups = (rows, columns // group_size)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=device)
    scale = (5.3 * _STD / 15 * (1 + 0.15 * torch.randn(groups, device=device)).clamp(0.5, 1.5)).to(torch.bfloat16)
    zero = torch.randint(6, 10, groups, device=device)
    return QuantizedWeight(codes, Grid(4, group_size, False, scale.float(), zero.float()))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    held: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum(each.numel() * each.element_size() for each in held)


def bytes_a_token(model: Any) -> int:
    """Bytes of weights that a token reads: all but the table of embeddings."""
    table = model.get_input_embeddings().weight
    return weight_bytes(model) - table.numel() * table.element_size()


def free(device: torch.device) -> None:
    """What nothing refers to any more goes back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
