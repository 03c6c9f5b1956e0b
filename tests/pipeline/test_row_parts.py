"""Rows cut into parts, sums in pairs, work dealt out, and what travels between ranks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contexts import CPU, GROUP, block_context, run_on, token_ids
from tiny_models import tiny_model
from torch import Tensor

from awqkit import Recipe
from awqkit.numerics.statistics import Gram, added_gram_
from awqkit.pipeline import search_block, summed_statistics
from awqkit.pipeline.activations import HiddenStates, TokenRows
from awqkit.pipeline.ranks import Ranks, _packed, _unpacked, asked_size, dealt
from awqkit.pipeline.row_parts import by_part, compared_rows, copies_of_sums, in_pairs, learnt_rows, own_rows
from awqkit.pipeline.saved_states import rows_of_pieces


def _cuts(count: int, size: int) -> list[tuple[int, int]]:
    """Where all parts of all ranks begin and end."""
    found = []
    for rank in range(size):
        own, start = own_rows(count, Ranks(rank, size)), 0
        for end in own.ends:
            found.append((own.rows.start + start, own.rows.start + end))
            start = end
    return found


@pytest.mark.parametrize("count", [1, 3, 4, 17, 128])
def test_one_two_and_four_ranks_cut_rows_alike(count: int) -> None:
    assert _cuts(count, 1) == _cuts(count, 2) == _cuts(count, 4)
    for size in (1, 2, 3, 4, 8):
        cuts = _cuts(count, size)
        assert cuts[0][0] == 0
        assert cuts[-1][1] == count
        assert all(one[1] == other[0] for one, other in pairwise(cuts))
        assert max(end - start for start, end in cuts) - min(end - start for start, end in cuts) <= 1


@pytest.mark.parametrize("size", [1, 2, 4])
def test_on_a_gpu_rows_are_one_part_of_each_rank_where_last_bits_of_sums_do_not_matter(size: int) -> None:
    nearest, fed_back, learning = Recipe.preset("fast"), Recipe.preset("balanced"), Recipe(propagation="auto")
    for rank in range(size):
        on_cpu, on_gpu = Ranks(rank, size), Ranks(rank, size, torch.device("cuda"))
        own = own_rows(18, on_cpu)
        whole = replace(own, ends=own.ends[-1:])
        for recipe in (nearest, fed_back, learning):
            assert learnt_rows(18, on_cpu, recipe) == compared_rows(18, on_cpu, recipe) == own
        assert [learnt_rows(18, on_gpu, recipe) for recipe in (nearest, fed_back, learning)] == [whole, own, own]
        assert [compared_rows(18, on_gpu, recipe) for recipe in (nearest, fed_back, learning)] == [whole, whole, own]


def test_sums_that_wait_are_counted() -> None:
    """A part under way, those that wait for their partners, and what arrives."""
    on_gpu = torch.device("cuda")
    for recipe, copies in ((Recipe.preset("balanced"), [3, 3, 2]), (Recipe.preset("fast"), [1, 2, 2])):
        assert [copies_of_sums(Ranks(0, size, on_gpu), recipe) for size in (1, 2, 4)] == copies
    assert copies_of_sums(Ranks(), Recipe.preset("fast")) == 3


def test_no_batch_has_rows_of_two_parts() -> None:
    skeleton, ids = block_context(tiny_model("llama")).skeleton, token_ids(11, 8)
    own = own_rows(11, Ranks())
    states = HiddenStates(skeleton, TokenRows(ids), CPU, tokens_per_batch=16, own=own)
    parts = [[part for part, *_ in batches] for batches in by_part(states.batches(0), own.ends)]
    assert [(batches[0].start, batches[-1].stop) for batches in parts] == [(0, 2), (2, 5), (5, 8), (8, 11)]
    assert all(part.stop - part.start <= 2 for batches in parts for part in batches)
    whole = HiddenStates(skeleton, TokenRows(ids), CPU)
    assert torch.equal(states.held()[0], whole.held()[0])


def test_a_rank_without_rows_has_parts_without_batches() -> None:
    skeleton = block_context(tiny_model("llama")).skeleton
    own = own_rows(1, Ranks(0, 2))
    states = HiddenStates(skeleton, TokenRows(token_ids(1, 8)[own.rows]), CPU, own=own)
    assert [list(batches) for batches in by_part(states.batches(0), own.ends)] == [[], []]


def test_sums_go_in_pairs_and_hold_few_values() -> None:
    def added(first: str, second: str) -> str:
        return f"({first}{second})"

    assert in_pairs(iter("abcd"), added) == "((ab)(cd))"
    assert in_pairs(iter("ab"), added) == "(ab)"
    assert in_pairs(iter("abcdefg"), added) == "(((ab)(cd))((ef)g))"
    assert in_pairs(iter("abcd"), added, lambda value: value + "'", 4) == "((a'b)'(c'd))"
    assert in_pairs(iter("abc"), added, lambda value: value + "'", 3) == "((a'b)'c)"


def test_a_sum_that_waits_is_not_held_beside_the_next_value() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def parts() -> Iterator[Tensor]:
        for _ in range(4):
            assert not any(each() is not None for each in alive)
            part = torch.ones(2)
            alive.append(weakref.ref(part))
            yield part
            del part

    assert in_pairs(parts(), torch.add, torch.clone, 4).tolist() == [4.0, 4.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("has_room", [True, False])
def test_sums_wait_on_the_host_where_a_gpu_has_no_room(has_room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summed_statistics, "is_spare", lambda *given: has_room)
    parts = [{"": Gram(1.0, torch.full((4, 4), float(part), device="cuda"))} for part in range(4)]
    (waiting,) = summed_statistics._where_there_is_room([parts[0][""].gram], 0.0)
    assert waiting.is_cuda == has_room
    found = summed_statistics.summed_grams(Ranks.alone(torch.device("cuda")), parts, 4)[""]
    assert (found.weight_sum, found.gram.is_cuda, float(found.gram[0, 0])) == (4.0, True, 6.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_sums_on_the_host_are_added_where_the_others_are() -> None:
    waited, here = torch.randn(1500, 1500), torch.randn(1500, 1500, device="cuda")
    expected = waited.cuda() + here
    found = added_gram_(Gram(1.0, waited), Gram(2.0, here))
    assert (found.weight_sum, found.gram.data_ptr()) == (3.0, here.data_ptr())
    assert torch.equal(found.gram, expected)


def test_work_is_dealt_by_cost() -> None:
    owners = dealt([1, 8, 3, 4, 4], 2)
    loads = [sum(cost for cost, owner in zip([1, 8, 3, 4, 4], owners, strict=True) if owner == rank) for rank in (0, 1)]
    assert sorted(loads) == [9, 11]
    assert dealt([], 3) == []


@pytest.mark.parametrize(("preset", "inputs_at_once"), [("fast", [4]), ("balanced", [1, 1, 1, 1])])
def test_where_nothing_propagates_all_inputs_of_a_block_are_one_piece_of_work(
    preset: str, inputs_at_once: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, quantize_all = list[int](), search_block._quantize_all

    def counted(context: Any, applied: Any, entries: Any, *rest: Any) -> Any:
        seen.append(len(entries))
        return quantize_all(context, applied, entries, *rest)

    monkeypatch.setattr(search_block, "_quantize_all", counted)
    recipe = Recipe.preset(preset, group_size=GROUP, generated=0.0, tuning_epochs=0)
    result = run_on(tiny_model("llama"), tmp_path, recipe)
    assert not result.report.fallbacks
    assert seen == inputs_at_once * len(result.report.blocks)


def test_what_travels_arrives_as_it_was() -> None:
    value = {
        "codes": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(3, 5).to(torch.bfloat16).t(),
        "none": torch.empty(0, 4),
        "number": torch.tensor(3.5, dtype=torch.float64),
        "own": replace(Ranks(), rank=0).size,
        "twice": [torch.tensor([True, False])] * 2,
    }
    found = _unpacked(*_packed(value, CPU), CPU)
    assert found.keys() == value.keys()
    for key in ("codes", "half", "none", "number"):
        assert found[key].dtype == value[key].dtype
        assert torch.equal(found[key], value[key])
    assert found["own"] == 1
    assert torch.equal(found["twice"][1], value["twice"][1])


def test_what_goes_with_rows_can_be_cut_anew() -> None:
    rows = torch.arange(10)
    pieces = [(start, ({"a": rows[start:stop]}, None)) for start, stop in ((4, 10), (0, 4))]
    for cut in (slice(0, 4), slice(2, 7), slice(9, 10), slice(0, 10)):
        found, nothing = rows_of_pieces(pieces, cut)
        assert torch.equal(found["a"], rows[cut])
        assert nothing is None
    assert rows_of_pieces([(0, ()), (4, ())], slice(1, 3)) == ()


def test_ranks_are_counted_by_what_torchrun_says() -> None:
    assert asked_size({}) == asked_size({"WORLD_SIZE": "4"}) == 1
    assert asked_size({"WORLD_SIZE": "4", "RANK": "0"}) == 4
