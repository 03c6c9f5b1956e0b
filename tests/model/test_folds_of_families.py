"""Folds that discovery finds in real decoder blocks, and that a wrong one is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES, MLP_WIDTH, WIDTH, block_probes, tiny_model
from torch import nn

from awqkit.model.folds import discover
from awqkit.model.proof import PROOF_TOLERANCE, prove
from awqkit.model.structure import BlockStructure, Fold

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")
KV_CHANNELS = 32  # 2 kv heads of 16, each read by 2 query heads
GROUPED_QUERY = [*range(16), *range(16), *range(16, 32), *range(16, 32)]
EACH = {size: list(range(size)) for size in (WIDTH, MLP_WIDTH)}

Found = tuple[str, tuple[str, ...], tuple[str, ...], list[int]]
_PLAIN_ROWS = [
    ("rows", ("self_attn.v_proj.weight",), ("self_attn.o_proj",), GROUPED_QUERY),
    ("rows", ("mlp.up_proj.weight",), ("mlp.down_proj",), EACH[MLP_WIDTH]),
]
_BIASED_VALUE = ("self_attn.v_proj.weight", "self_attn.v_proj.bias")


def _norms(kind: str, *pairs: tuple[str, tuple[str, ...]], bias: bool = False) -> list[Found]:
    leaves = ("weight", "bias") if bias else ("weight",)
    return [(kind, tuple(f"{name}.{leaf}" for leaf in leaves), consumers, EACH[WIDTH]) for name, consumers in pairs]


_PRE_NORMS = (("input_layernorm", ATTENTION), ("post_attention_layernorm", GATED))
_SANDWICH = (("input_layernorm", ATTENTION), ("pre_feedforward_layernorm", GATED))
EXPECTED: dict[str, list[Found]] = {
    "llama": [*_norms("norm", *_PRE_NORMS), *_PLAIN_ROWS],
    "llama-tied": [*_norms("norm", *_PRE_NORMS), *_PLAIN_ROWS],
    "qwen2": [
        *_norms("norm", *_PRE_NORMS),
        ("rows", _BIASED_VALUE, ("self_attn.o_proj",), GROUPED_QUERY),
        _PLAIN_ROWS[1],
    ],
    "gemma2": [*_norms("offset norm", *_SANDWICH), *_PLAIN_ROWS],
    "gemma3": [*_norms("offset norm", *_SANDWICH), *_PLAIN_ROWS],
    "opt": [
        *_norms("norm", ("self_attn_layer_norm", ATTENTION), ("final_layer_norm", ("fc1",)), bias=True),
        ("rows", _BIASED_VALUE, ("self_attn.out_proj",), EACH[WIDTH]),
        ("rows", ("fc1.weight", "fc1.bias"), ("fc2",), EACH[MLP_WIDTH]),  # ReLU lets a positive s through
    ],
    "starcoder2": [
        *_norms("norm", ("input_layernorm", ATTENTION), ("post_attention_layernorm", ("mlp.c_fc",)), bias=True),
        ("rows", _BIASED_VALUE, ("self_attn.o_proj",), GROUPED_QUERY),
    ],
    "cohere": [*_norms("norm", ("input_layernorm", (*ATTENTION, *GATED))), *_PLAIN_ROWS],
    "phi3": [
        *_norms(
            "norm", ("input_layernorm", ("self_attn.qkv_proj",)), ("post_attention_layernorm", ("mlp.gate_up_proj",))
        ),
        # v's rows come after q's and k's, up's after gate's
        ("rows", ("self_attn.qkv_proj.weight",), ("self_attn.o_proj",), [96 + channel for channel in GROUPED_QUERY]),
        (
            "rows",
            ("mlp.gate_up_proj.weight",),
            ("mlp.down_proj",),
            [MLP_WIDTH + channel for channel in EACH[MLP_WIDTH]],
        ),
    ],
}


class Case:
    """Block 1 of a family (discovery looked at block 0), ready for proofs."""

    def __init__(self, family: str) -> None:
        self.skeleton, self.probe, structures = block_probes(tiny_model(family))
        self.structure: BlockStructure = structures[1]
        self.block: nn.Module = self.skeleton.load_block(1, torch.device("cpu"))
        self.run = self.probe.runner(self.block, 1)

    def proof(self, fold: Fold) -> float:
        with torch.no_grad():
            return prove(self.block, self.run, self.probe.hidden, self.structure, (fold,))

    def fold(self, consumer: str) -> Fold:
        return next(fold for fold in self.structure.folds if consumer in fold.consumers)


@functools.cache
def case_of(family: str) -> Case:
    return Case(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_folds_consumers_and_channels_are_those_of_the_architecture(family: str) -> None:
    structure = case_of(family).structure
    found = []
    for fold in structure.folds:
        maps = [channel_of.tolist() for channel_of in fold.channel_of.values()]
        assert tuple(fold.channel_of) == fold.consumers
        assert all(entry == maps[0] for entry in maps)
        assert fold.offset == (fold.producer[0] if fold.kind == "offset norm" else None)
        assert fold.num_channels == max(maps[0]) + 1
        found.append((fold.kind, fold.producer, fold.consumers, maps[0]))
    assert found == EXPECTED[family]
    assert structure.refusals == ()
    assert structure.unwatched == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_fold_is_proved_on_a_block_that_discovery_did_not_look_at(family: str) -> None:
    case = case_of(family)
    assert [case.proof(fold) <= PROOF_TOLERANCE for fold in case.structure.folds] == [True] * len(EXPECTED[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_proof_touches_what_it_says_and_puts_it_back(family: str) -> None:
    case = case_of(family)
    before = {name: (id(value), value.data.clone()) for name, value in case.block.named_parameters()}
    for fold in case.structure.folds:
        case.proof(fold)
    with torch.no_grad():
        discover(case.block, case.run, case.probe.hidden)
    after = dict(case.block.named_parameters())
    assert list(after) == list(before)
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity
        assert torch.equal(after[name].data, value), name


def test_readers_of_one_input_are_known() -> None:
    inputs = {entry.first: (entry.readers, entry.num_channels) for entry in case_of("llama").structure.inputs}
    assert inputs == {
        "self_attn.q_proj": (ATTENTION, WIDTH),
        "self_attn.o_proj": (("self_attn.o_proj",), WIDTH),
        "mlp.gate_proj": (GATED, WIDTH),
        "mlp.down_proj": (("mlp.down_proj",), MLP_WIDTH),
    }


def _without_a_consumer(fold: Fold) -> Fold:
    rest = fold.consumers[:-1]
    return replace(fold, consumers=rest, channel_of={name: fold.channel_of[name] for name in rest})


def _channels_moved_by_one(fold: Fold) -> Fold:
    return replace(fold, channel_of={name: value.roll(1) for name, value in fold.channel_of.items()})


def _channel_left_out(fold: Fold) -> Fold:
    def cut(value: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(len(value)) == 40, torch.full_like(value, -1), value)

    return replace(fold, channel_of={name: cut(value) for name, value in fold.channel_of.items()})


def _not_an_offset(fold: Fold) -> Fold:
    return replace(fold, kind="norm", offset=None)


def _bias_left_out(fold: Fold) -> Fold:
    return replace(fold, producer=fold.producer[:1])


def _heads_in_the_wrong_order(fold: Fold) -> Fold:
    """Query heads mapped onto kv heads as 0 1 0 1 instead of 0 0 1 1."""
    return replace(fold, channel_of={name: torch.arange(WIDTH) % KV_CHANNELS for name in fold.consumers})


WRONG = [
    ("llama", "mlp.gate_proj", _without_a_consumer),
    ("llama", "self_attn.q_proj", _without_a_consumer),
    ("cohere", "mlp.gate_proj", _without_a_consumer),
    ("llama", "self_attn.q_proj", _channels_moved_by_one),
    ("llama", "mlp.down_proj", _channels_moved_by_one),
    ("llama", "self_attn.o_proj", _channel_left_out),
    ("llama", "self_attn.o_proj", _heads_in_the_wrong_order),
    ("gemma2", "self_attn.q_proj", _not_an_offset),
    ("opt", "self_attn.q_proj", _bias_left_out),
    ("opt", "fc2", _bias_left_out),
    ("qwen2", "self_attn.o_proj", _bias_left_out),
]


@pytest.mark.parametrize(("family", "consumer", "spoil"), WRONG, ids=lambda value: getattr(value, "__name__", value))
def test_a_deliberately_wrong_fold_is_refused(family: str, consumer: str, spoil: Callable[[Fold], Fold]) -> None:
    case = case_of(family)
    right = case.fold(consumer)
    assert case.proof(right) <= PROOF_TOLERANCE
    assert case.proof(spoil(right)) > 100 * PROOF_TOLERANCE


@pytest.mark.parametrize(
    ("producer", "consumer"),
    [("self_attn.q_proj", "self_attn.o_proj"), ("mlp.gate_proj", "mlp.down_proj"), ("mlp.up_proj", "self_attn.q_proj")],
)
def test_rows_that_do_not_reach_the_consumer_as_factors_are_refused(producer: str, consumer: str) -> None:
    case = case_of("llama")
    rows = case.structure.linear(producer).shape[0]
    channel_of = torch.arange(case.structure.linear(consumer).shape[1]) % rows
    fold = Fold("rows", (f"{producer}.weight",), None, producer, rows, (consumer,), {consumer: channel_of})
    assert case.proof(fold) > 100 * PROOF_TOLERANCE
