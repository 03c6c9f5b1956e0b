"""Products of linears that read one input, joined, against the same linears apart."""

from __future__ import annotations

import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from awqkit.evaluation.packed_linear import PackedLinear
from awqkit.evaluation.shared_inputs import join_products
from awqkit.kernels.int4_matmul import CHUNKS
from awqkit.numerics.rounding import round_nearest, span_grid

CPU = torch.device("cpu")
WIDTH = 32


def _linear(out_features: int, bias: Tensor | None = None) -> PackedLinear:
    weight = torch.randn(out_features, WIDTH)
    grid = span_grid(weight, bits=4, group_size=32, symmetric=False, stored_dtype=torch.bfloat16)
    return PackedLinear(round_nearest(weight, grid), bias, torch.bfloat16, kernel=CHUNKS)


class Attention(nn.Module):
    """Readers of one input, in a list and not, of several sizes, and one of the same size that reads something else."""

    def __init__(self) -> None:
        super().__init__()
        self.q = _linear(32, torch.linspace(-2.0, 2.0, 32))
        self.kv = nn.ModuleList([_linear(16), _linear(16)])
        self.o = _linear(32)
        self.adds_in_place = self.adds = self.skips = False
        self.seen = weakref.ref(self)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        if not torch.compiler.is_compiling():
            self.seen = weakref.ref(x)
        q = self.q(x)
        if self.adds_in_place:
            x.add_(1)
        x = x + 1 if self.adds else x
        k, v = self.kv[0](x), x[..., :16] if self.skips else self.kv[1](x)
        rows = q.view(len(x) * q.shape[1] * WIDTH)  # as only something contiguous can be seen
        return self.o(rows.view_as(x) * torch.cat([k, v], dim=-1))


class Tiny(nn.Module):
    """Two blocks; all products of chunks as a CPU computes them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(8, WIDTH, dtype=torch.bfloat16)
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = x + block(x).tanh()
        return x


class Products(TorchDispatchMode):
    """How many products were computed, apart and joined."""

    def __init__(self) -> None:
        super().__init__()
        self.apart = self.joined = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.apart += function is torch.ops.awqkit.int4_chunks_matmul.default
        self.joined += function is torch.ops.awqkit.int4_chunks_joined.default
        return function(*args, **(kwargs or {}))


@pytest.fixture
def pair() -> tuple[Tiny, Tiny]:
    """A model with joined products, and the same with all of them apart."""
    apart = Tiny()
    joined = deepcopy(apart)
    join_products(joined, CPU)
    return joined, apart


def _ids(*shape: int) -> Tensor:
    return torch.randint(8, shape, generator=torch.Generator().manual_seed(1))


def _run(model: nn.Module, ids: Tensor) -> tuple[Tensor, int, int]:
    with torch.no_grad(), Products() as products:
        found = model(ids)
    return found, products.apart, products.joined


def test_readers_of_one_input_are_found_and_give_the_same_bits(pair: tuple[Tiny, Tiny]) -> None:
    joined, apart = pair
    for model in (joined, deepcopy(joined)):
        found, alone, together = _run(model, _ids(2, 5))
        assert torch.equal(found, _run(apart, _ids(2, 5))[0])
        assert (alone, together) == (2, 2)
    block = joined.blocks[0]
    assert block.o.joined is None
    assert block.q.words.untyped_storage().data_ptr() == block.kv[1].words.untyped_storage().data_ptr()
    assert all(torch.equal(value, apart.state_dict()[name]) for name, value in joined.state_dict().items())
    assert block.seen() is None


@pytest.mark.parametrize("ids", [_ids(1, 65), _ids(0, 3)])
def test_many_rows_and_none_are_multiplied_apart(ids: Tensor, pair: tuple[Tiny, Tiny]) -> None:
    joined, apart = pair
    found, *counts = _run(joined, ids)
    assert torch.equal(found, _run(apart, ids)[0])
    assert counts == [8, 0]
    assert _run(joined, _ids(1, 64))[1:] == (2, 2)


def test_gradients_pass_as_they_do_apart(pair: tuple[Tiny, Tiny]) -> None:
    for model in pair:
        model(_ids(1, 3)).float().sum().backward()
    assert torch.equal(pair[0].words.weight.grad, pair[1].words.weight.grad)


@pytest.mark.parametrize(
    ("change", "inference"),
    [("adds_in_place", False), ("adds", False), ("adds", True), ("skips", False), ("skips", True)],
)
def test_a_pass_unlike_the_one_seen_is_right_and_keeps_nothing(
    change: str, inference: bool, pair: tuple[Tiny, Tiny]
) -> None:
    found = []
    with torch.inference_mode(inference), torch.no_grad():
        for model in pair:
            setattr(model.blocks[0], change, True)
            first = model(_ids(1, 2))
            assert model.blocks[0].seen() is None
            found.append((first, model(_ids(1, 1))))
    assert all(torch.equal(*both) for both in zip(*found, strict=True))
    assert _run(pair[0], _ids(1, 1))[2] == 1  # the other block's


def test_a_linear_called_by_itself_computes_alone(pair: tuple[Tiny, Tiny]) -> None:
    x, block = torch.randn(1, WIDTH).to(torch.bfloat16), pair[0].blocks[0]
    _run(pair[0], _ids(1, 1))
    _, alone, together = _run(block.q, x)
    assert (alone, together) == (1, 0)
    block.q(x)
    x.data.zero_()
    assert not block.kv[0](x).any()


def test_readers_in_a_list_are_joined_and_a_block_that_is_called_twice_is_not() -> None:
    class Listed(nn.Module):
        def __init__(self, twice: bool) -> None:
            super().__init__()
            self.words, self.twice = nn.Embedding(8, WIDTH, dtype=torch.bfloat16), twice
            self.parts = nn.ModuleList([_linear(32), _linear(16)])

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            x = self.parts[0](x) + self.parts[1](x).repeat(1, 1, 2)
            return self.parts[0](x) + self.parts[1](x).repeat(1, 1, 2) if self.twice else x

    for twice, counts in ((False, (0, 1)), (True, (4, 0))):
        model = Listed(twice)
        join_products(model, CPU)
        assert _run(model, _ids(1, 1))[1:] == counts


def test_what_is_moved_or_given_another_weight_is_joined_no_more(pair: tuple[Tiny, Tiny]) -> None:
    joined, apart = pair
    for model in pair:
        model.blocks[0].kv[0].words = model.blocks[0].kv[0].words ^ 1
        model.blocks[1].to(torch.float16).to(torch.bfloat16)
    found, alone, together = _run(joined, _ids(1, 1))
    assert torch.equal(found, _run(apart, _ids(1, 1))[0])
    assert (alone, together) == (8, 0)


def test_joined_products_are_compiled_whole(pair: tuple[Tiny, Tiny]) -> None:
    joined, apart = pair
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(joined, backend=backend, fullgraph=True)
    for tokens in (1, 1, 2):
        with torch.no_grad():
            assert torch.equal(compiled(_ids(3, tokens)), apart(_ids(3, tokens)))
    assert [graph.count("int4_chunks_joined") for graph in graphs][:1] == [2]
    assert len(graphs) <= 2
    assert _run(joined, _ids(1, 1))[1:] == (2, 2)


def test_a_model_that_cannot_be_called_with_a_token_stays_as_it_is() -> None:
    model = Attention()
    join_products(model, CPU)
    assert model.q.joined is None
    assert not any(part._forward_pre_hooks for part in model.modules())
