"""Telling a router what to choose, following picked rows, and the names of matrices in stacks and lists."""

from __future__ import annotations

import torch
from torch import nn

from awqkit.model.disk_places import Place
from awqkit.model.matrices import Expert, expert_of, matrix_of, matrix_parameters, siblings_of, with_stacks_whole
from awqkit.model.routing import ChosenExperts, PickedRows, run_with_all_experts, spread


def test_a_router_chooses_what_it_is_told_and_anything_else_as_ever() -> None:
    scores = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    with ChosenExperts((8,), spread):
        values, chosen = torch.topk(scores, 2, dim=-1)
        other = torch.topk(scores[:, :7], 2)
        along = scores.topk(2, dim=0)
    assert chosen.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1]]
    assert torch.equal(values, scores.gather(1, chosen))
    assert torch.equal(other.indices, torch.topk(scores[:, :7], 2).indices)
    assert torch.equal(along.indices, scores.topk(2, dim=0).indices)


def test_all_experts_are_met_by_all_tokens_in_as_few_runs_as_that_takes() -> None:
    scores, chosen = torch.randn(3, 5), []
    run_with_all_experts(lambda: chosen.append(torch.topk(scores, 2).indices), (5,))
    assert [each[0].tolist() for each in chosen] == [[0, 1], [2, 3], [4, 0]]
    assert all(torch.equal(each, each[:1].expand(3, 2)) for each in chosen)
    runs: list[int] = []
    run_with_all_experts(lambda: runs.append(1), (5,))  # chooses by something else
    assert len(runs) == 1


def test_picked_rows_are_known_until_others_are_picked() -> None:
    tokens, first, second = torch.randn(6, 4), torch.tensor([4, 1]), torch.tensor([0, 5, 2])
    picked = PickedRows()
    with picked:
        some = tokens[first]
        assert torch.equal(picked.rows_of(some), first)
        others = tokens.index_select(0, second)
    assert torch.equal(picked.rows_of(others), second)
    assert picked.rows_of(some) is None


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.arange(24.0).reshape(3, 4, 2))
        self.kernel = nn.Parameter(torch.zeros(3, 1, 4))  # a convolution's
        self.listed = nn.ModuleList(nn.Linear(2, 4) for _ in range(2))


def test_matrices_of_stacks_and_lists_have_names_and_siblings() -> None:
    module = _Experts()
    matrices = matrix_parameters(module)
    assert list(matrices) == ["up[0]", "up[1]", "up[2]", "listed.0.weight", "listed.1.weight"]
    assert matrices["up[1]"].data_ptr() == module.up[1].data_ptr()
    assert siblings_of("up[2]", matrices) == ["up[0]", "up[1]", "up[2]"]
    assert siblings_of("listed.1.weight", matrices) == ["listed.0.weight", "listed.1.weight"]
    assert expert_of("mlp.experts.up[7]") == Expert("mlp.experts", 7, "up")
    assert expert_of("mlp.experts.7.up.weight") == Expert("mlp.experts", 7, "up.weight")
    assert {expert_of(name).linear for name in ("mlp.experts.up[7]", "mlp.experts.7.up.weight")} == {"mlp.experts.7.up"}
    assert expert_of("self_attn.q_proj.weight") is None


def test_a_changed_matrix_is_in_its_stack_beside_the_others() -> None:
    parameters = {name: value.data for name, value in _Experts().named_parameters()}
    changed = with_stacks_whole(parameters, {"up[1]": torch.full((4, 2), 9.0), "norm": torch.ones(2)})
    assert set(changed) == {"up", "norm"}
    assert torch.equal(changed["up"][1], torch.full((4, 2), 9.0))
    assert torch.equal(changed["up"][::2], parameters["up"][::2])
    assert float(parameters["up"][1].max()) < 24  # a copy
    matrix_of(parameters, "up[2]").zero_()
    assert not parameters["up"][2].any()


def test_rows_on_disk_are_told_from_anything_else() -> None:
    matrix = Place((6, 4), (4, 1), 24)
    assert Place((3, 4), (4, 1), 24).rows_in(matrix) == slice(0, 3, 1)
    assert Place((3, 4), (8, 1), 28).rows_in(matrix) == slice(1, 6, 2)  # gate and up, row by row in turn
    assert Place((3, 4), (4, 1), 40).rows_in(matrix) is None  # runs over the end
    assert Place((3, 4), (4, 1), 26).rows_in(matrix) is None
    assert Place((3, 2), (4, 1), 24).rows_in(matrix) is None
    turned = Place((4, 6), (1, 4), 24)
    assert Place((2, 6), (1, 4), 26).rows_in(turned) == slice(2, 4, 1)
