"""Blocks made here: names must not matter, and what only looks like a fold must be refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awqkit.model.folds import discover
from awqkit.model.proof import PROOF_TOLERANCE, prove
from awqkit.model.structure import BlockStructure

WIDTH, MLP, HEADS, KV_HEADS, HEAD = 16, 24, 4, 2, 4


class Spoon(nn.Module):
    """A linear without the name, class or parameter name of one."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.soup = nn.Parameter(torch.randn(rows, columns) / columns**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.soup)


class Fork(nn.Module):
    """RMSNorm by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.tine = nn.Parameter(1.0 + 0.3 * torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * self.tine


class Kitchen(nn.Module):
    """A Llama block whose names mislead: `q_proj` is what v is, and a norm is called `down_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj, self.o_proj = Fork(), Fork()
        self.a, self.b, self.q_proj = Spoon(WIDTH, WIDTH), Spoon(KV_HEADS * HEAD, WIDTH), Spoon(KV_HEADS * HEAD, WIDTH)
        self.c = Spoon(WIDTH, WIDTH)
        self.d, self.norm, self.e = Spoon(MLP, WIDTH), Spoon(MLP, WIDTH), Spoon(WIDTH, MLP)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down_proj(x)
        q, k, v = (part(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in (self.a, self.b, self.q_proj))
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (k, v))
        x = x + self.c(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.o_proj(x)
        return x + self.e(self.mix(F.silu(self.d(h)), self.norm(h)))

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * up


class ClampedUp(Kitchen):
    """The up branch is clamped, as GPT-OSS does it: a factor before the clamp is not one behind it."""

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * up.clamp(-1.0, 1.0)


class ShiftedUp(Kitchen):
    """The up branch gets a constant added."""

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * (up + 1.0)


class NormedResidual(Kitchen):
    """The second norm's output also goes into the residual sum."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.o_proj(x)
        return h + self.e(self.mix(F.silu(self.d(h)), self.norm(h)))


class CalledTwice(Kitchen):
    """One linear reads two inputs."""

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * up + 0.1 * self.d(self.e(up))


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(1, 12, WIDTH, generator=torch.Generator().manual_seed(5))


def _discovered(kind: type[Kitchen], hidden: Tensor) -> tuple[Kitchen, BlockStructure]:
    torch.manual_seed(0)
    block = kind().eval()
    with torch.no_grad():
        return block, discover(block, lambda: block(hidden), hidden)


def test_no_name_decides(hidden: Tensor) -> None:
    block, structure = _discovered(Kitchen, hidden)
    heads = [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    found = [
        (fold.kind, fold.producer, fold.consumers, fold.channel_of[fold.consumers[0]].tolist())
        for fold in structure.folds
    ]
    assert found == [
        ("norm", ("down_proj.tine",), ("a", "b", "q_proj"), list(range(WIDTH))),
        ("norm", ("o_proj.tine",), ("d", "norm"), list(range(WIDTH))),
        ("rows", ("q_proj.soup",), ("c",), heads),
        ("rows", ("norm.soup",), ("e",), list(range(MLP))),
    ]
    with torch.no_grad():
        for fold in structure.folds:
            assert prove(block, lambda: block(hidden), hidden, structure, (fold,)) <= PROOF_TOLERANCE


@pytest.mark.parametrize("kind", [ClampedUp, ShiftedUp])
def test_a_changed_up_branch_is_no_fold(kind: type[Kitchen], hidden: Tensor) -> None:
    block, structure = _discovered(kind, hidden)
    assert [fold.consumers for fold in structure.folds] == [("a", "b", "q_proj"), ("d", "norm"), ("c",)]
    _, plain = _discovered(Kitchen, hidden)
    wanted = plain.folds[-1]
    assert wanted.consumers == ("e",)
    with torch.no_grad():
        assert prove(block, lambda: block(hidden), hidden, structure, (wanted,)) > 100 * PROOF_TOLERANCE


def test_what_something_else_reads_too_is_refused_with_the_reason(hidden: Tensor) -> None:
    _, structure = _discovered(NormedResidual, hidden)
    assert ("d", "norm") not in [fold.consumers for fold in structure.folds]
    refused = [refusal for refusal in structure.refusals if refusal.label == "o_proj.tine"]
    assert refused
    assert refused[0].consumers == ("d", "norm")
    assert "something besides the linears" in refused[0].reason


def test_a_linear_that_is_called_twice_is_left_alone(hidden: Tensor) -> None:
    torch.manual_seed(0)
    block = CalledTwice().eval()
    with torch.no_grad():
        structure = discover(block, lambda: block(hidden), hidden)
    assert "d" not in [view.name for view in structure.linears]
    assert "d.soup" in structure.unwatched
    assert all("d" not in fold.consumers for fold in structure.folds)


def test_an_inexact_output_of_nan_is_not_taken_for_a_proof(hidden: Tensor) -> None:
    block, structure = _discovered(Kitchen, hidden)
    outputs = iter([block(hidden), torch.full_like(hidden, float("nan"))])
    with torch.no_grad():
        assert prove(block, lambda: next(outputs), hidden, structure, structure.folds[:1]) == float("inf")


def test_the_proof_restores_parameters_when_the_block_fails(hidden: Tensor) -> None:
    block, structure = _discovered(Kitchen, hidden)
    before = {name: value.data.clone() for name, value in block.named_parameters()}
    calls = iter([block(hidden)])  # the second run raises StopIteration
    with torch.no_grad(), pytest.raises(StopIteration):
        prove(block, lambda: next(calls), hidden, structure, structure.folds[:1])
    assert all(torch.equal(value.data, before[name]) for name, value in block.named_parameters())
