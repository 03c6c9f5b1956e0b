"""Tiny decoders that are plain `nn.Module`s, as people write them, with random weights and outlier channels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import VOCABULARY, WIDTH
from torch import Tensor, nn

HEADS, POSITIONS, INNER = 4, 48, 128


class Attention(nn.Module):
    """One fused projection for q, k and v, with a causal mask in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.c_attn(x).split(WIDTH, dim=2))
        scores = (q @ k.transpose(-2, -1)) * (WIDTH // HEADS) ** -0.5
        scores = scores.masked_fill(~self.bias[:tokens, :tokens], float("-inf"))
        return self.c_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """LayerNorms with biases, GELU, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Gpt(nn.Module):
    """Learned positions, a tied head; gives (logits, loss), the logits of the last token alone without targets."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "wpe": nn.Embedding(POSITIONS, WIDTH),
                "h": nn.ModuleList(Block() for _ in range(blocks)),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gpt_logits(module: nn.Module, ids: Tensor) -> Tensor:
    """The logits of every token of a Gpt."""
    return module(ids, targets=ids)[0]


class Gain(nn.Module):
    """An RMS norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.g


class InOut(nn.Module):
    """A projection that holds its weight `[in, out]`, and is no nn.Linear."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(in_features, out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Storey(nn.Module):
    """Rotary positions that come as an argument, separate projections, a gated feed-forward part; gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = Gain(), Gain()
        self.q, self.k, self.v, self.join = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)
        self.down = InOut(INNER, WIDTH)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, None]:
        h = self.before(x)
        q, k, v = (each(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        q, k = (each * cos + torch.cat([-each[..., 8:], each[..., :8]], dim=-1) * sin for each in (q, k))
        x = x + self.join(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.after(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h)), None


class Tower(nn.Module):
    """Two storeys that are no list, a head of its own; gives an object with `logits`."""

    def __init__(self, words: int = VOCABULARY) -> None:
        super().__init__()
        self.words = nn.Embedding(words, WIDTH)
        self.ground, self.first = Storey(), Storey()
        self.last, self.say = Gain(), nn.Linear(WIDTH, words, bias=False)
        angle = torch.arange(POSITIONS).unsqueeze(1) * 100.0 ** (-torch.arange(8) / 8)
        self.register_buffer("angle", torch.cat([angle, angle], dim=-1), persistent=False)

    def forward(self, ids: Tensor) -> Any:
        x, angle = self.words(ids), self.angle[: ids.shape[1]]
        for storey in (self.ground, self.first):
            x, _ = storey(x, angle.cos(), angle.sin())
        return SimpleNamespace(logits=self.say(self.last(x)))


def with_random_weights(module: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The module, each parameter exact in bfloat16, with outlier channels in its norms and biases that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("bias"):
                fresh = 0.2 * noise
            elif value.dim() == 1:
                fresh = 1 + 0.2 * noise
                fresh[torch.randperm(len(fresh), generator=generator)[:3]] *= 8.0
            else:
                fan_in = value.shape[0 if isinstance(_owner(module, name), InOut) else 1]
                fresh = noise * fan_in**-0.5
            value.copy_(fresh.bfloat16())
    return module.to(dtype)


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])
